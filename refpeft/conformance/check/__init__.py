"""What `refpeft check` asks of a plugin, one small function for each property; `check` asks them all."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from refpeft import manager
from refpeft.config import plugin_options
from refpeft.conformance.check import computing, formula, quantizers, source, surroundings
from refpeft.conformance.check.findings import FAILED, Finding, Report, found, named, said
from refpeft.conformance.check.subjects import Method
from refpeft.errors import RefpeftError, RefpeftWarning

__all__ = ["Finding", "Report", "check"]

OF_METHODS = (
    source.hooks,
    source.docstring,
    source.family,
    source.config,
    source.operations,
    *computing.PROPERTIES,
    formula.number_of_parameters,
    *surroundings.PROPERTIES,
)
OF_QUANTIZERS = (source.hooks, source.docstring, source.config, *quantizers.PROPERTIES)


def check(plugin: str | Path, options: Mapping[str, Any] | None = None, only: Collection[str] = ()) -> Report:
    """Everything that is asked of a plugin, a method or a quantizer, given by its file or its name.

    `options` are those of its Config that are not the defaults; `only` names some of the properties. Raises
    RefpeftError where there is no such plugin or option.
    """
    path = Path(plugin) if str(plugin).endswith(".py") else manager.path_of(str(plugin))
    if not path.is_file():
        raise RefpeftError(f"plugin {path} does not exist")
    path = path.resolve()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RefpeftWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy: what comes of it is a finding
        try:
            listing, module = manager.read(path), manager.load(path)
        except RefpeftError as error:
            return Report(path.stem, "", str(path), (Finding("hooks", FAILED, said(error, str(path))),))
        if options:
            plugin_options(module, options)
        if listing.kind == "quantizer":
            properties, subject = OF_QUANTIZERS, quantizers.Subject(module, listing, dict(options or {}))
        else:
            properties, subject = OF_METHODS, Method(module, listing, dict(options or {}))
            subject.fit()
        findings = found([one for one in properties if not only or named(one) in only], subject, str(path))
    return Report(listing.name, listing.summary, str(path), tuple(findings))
