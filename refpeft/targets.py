"""Which sites a method acts on: targets by role, name, glob or regular expression, and patterns of options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from . import toml
from .errors import RefpeftError, nearest, warn

if TYPE_CHECKING:
    from .sites import Site

_PLAIN = re.compile(r"@?[\w.-]+")


def matches(target: str, site: Site) -> bool:
    """Whether one target names the site: "@role", "all-linear", a glob, a full name or the end of one.

    What a decoder asks of an encoder has roles of its own: "@q" is all queries, "@cross_q" those of cross-attention.
    """
    if target.startswith("@"):
        return target[1:] in site.roles or f"cross_{target[1:]}" in site.roles
    if target == "all-linear":
        return site.kind == "linear" and "head" not in site.roles
    if any(c in target for c in "*?["):
        return fnmatchcase(site.name, target)
    return site.name == target or site.name.endswith("." + target)


def matcher(targets: str | Sequence[str]) -> dict[str, Callable[[Site], bool]]:
    """For each target, what tells its sites. One string that is no plain target is a regular expression, as in PEFT."""
    if not isinstance(targets, str):
        return {target: partial(matches, target) for target in targets}
    if _PLAIN.fullmatch(targets):
        return {targets: partial(matches, targets)}
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise RefpeftError(f"{targets!r} is not a regular expression: {error}; a glob goes into a list") from None
    return {targets: lambda site: pattern.fullmatch(site.name) is not None}


def select(sites: Iterable[Site], cfg: Any, usable: Callable[[Site], bool]) -> list[Site]:
    """The sites that cfg.targets names, less cfg.exclude, in cfg.layers (both optional fields).

    `targets` and `exclude` are lists of names, or one string: a regular expression over full names, as in PEFT. Each
    must match at least one usable site; raises RefpeftError with the nearest names otherwise. Of a method's own targets
    one that this model has no site for (a head, cross-attention) is left out.
    """
    sites = list(sites)
    if not cfg.targets:
        raise RefpeftError("targets is empty: name at least one that there is something to do for")
    targets = matcher(cfg.targets)
    if cfg.targets == getattr(type(cfg), "targets", None):
        targets = {target: hits for target, hits in targets.items() if any(map(hits, sites))} or targets
    found = {target: _hit(target, hits, sites, usable) for target, hits in targets.items()}
    targeted = set().union(*found.values())
    chosen = set(targeted)
    for target, hits in matcher(getattr(cfg, "exclude", ())).items():
        excluded = _hit(target, hits, sites, lambda site: True)
        if not excluded & targeted:
            warn(f"exclude {target!r} has no effect: it is none of the targets")
        chosen -= excluded
    layers = getattr(cfg, "layers", None)
    if layers is not None:
        last = max(site.index or 0 for site in sites)
        for number in layers:
            if not 0 <= number <= last:
                raise RefpeftError(f"layers names {number}: the model has layers 0 to {last}")
        within = {site.name for site in sites if site.name in chosen and site.index in layers}
        for target, names in found.items():
            if within and names & chosen and not names & within:
                warn(f"target {target!r} has no effect: it is in none of the layers that are named")
        chosen = within
    if not chosen:
        raise RefpeftError("after 'exclude' and 'layers' no site is left")
    return [site for site in sites if site.name in chosen]


def homes(sites: Iterable[Site]) -> list[str]:
    """The names of the layers that sites are in, in order: an encoder's come before its decoder's."""
    return list(dict.fromkeys(site.home for site in sites if site.home))


def stacks(sites: Iterable[Site]) -> list[list[Site]]:
    """The sites by the stack of layers that they are in: of an encoder and of its decoder, or of one stack."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.home.rpartition(".")[0], []).append(site)
    return list(found.values())


def check_layers(name: str, cfg: Any, sites: list[Site], two: bool = False) -> None:
    """Raises RefpeftError unless `sites`, of a method that goes through all layers, are those of one stack of them.

    With `two`, an encoder and its decoder will do.
    """
    if tuple(cfg.targets) != type(cfg).targets:
        raise RefpeftError(f"{name} goes through all layers: leave its targets as they are")
    check_runs(name, sites)
    numbers = [site.index for site in sites if site.kind == "block"]
    if not two and numbers != list(range(len(numbers))):
        raise RefpeftError(f"{name} goes through one stack of layers, and this model has an encoder and a decoder")


def check_runs(name: str, sites: list[Site]) -> None:
    """Raises RefpeftError where the model runs a layer several times, for a method that treats layers differently."""
    runs = max(site.runs for site in sites)
    if runs > 1:
        raise RefpeftError(f"{name} treats a model's layers differently, and this model runs one {runs} times")


def _hit(target: str, hits: Callable[[Site], bool], sites: list[Site], usable: Callable[[Site], bool]) -> set[str]:
    """Names of the usable sites that one target matches; an error if there are none."""
    found = [site for site in sites if hits(site)]
    fit = {site.name for site in found if usable(site)}
    if not fit:
        raise RefpeftError(_no_match(target, found, sites))
    return fit


def patterned(patterns: Mapping[str, Any], site: Site, default: Any) -> Any:
    """The value of the first key, a regular expression, that ends the site's name from a dot on; else `default`.

    This is PEFT's rank_pattern. Fields of a Config that are named so are checked: each key must match a site.
    """
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", site.name)), default)


def check_patterns(name: str, cfg: Any, sites: list[Site]) -> None:
    """Raises RefpeftError for a key of a `_pattern` field of plugin `name` that matches none of the sites."""
    for field, patterns in vars(cfg).items():
        for key in patterns if field.endswith("_pattern") else ():
            try:
                hit = any(patterned({key: True}, site, False) for site in sites)
            except re.error as error:
                raise RefpeftError(f"{name}.{field}: {key!r} is not a regular expression: {error}") from None
            if not hit:
                raise RefpeftError(f"{name}.{field} has the key {key!r}, which matches none of the targets")


def check_effects(cfg: Any) -> None:
    """Raises RefpeftError for an option that does nothing as another one is: see `only_with` in refpeft.hookspecs."""
    for key, other, value in getattr(cfg, "only_with", ()):
        if getattr(cfg, other) != value and getattr(cfg, key) != getattr(type(cfg), key):  # there, it is the default
            needs = f"{key} has an effect only with {other} = {toml.text(value)}"
            raise RefpeftError(f"{needs}: set that, or leave {key} out")


def _no_match(target: str, hit: list[Site], sites: list[Site]) -> str:
    if hit:
        kinds = ", ".join(sorted({s.kind for s in hit}))
        count = "1 site" if len(hit) == 1 else f"{len(hit)} sites"
        return f"target {target!r} matches {count} of kind {kinds}, where this method has nothing to do"
    if target.startswith("@"):
        names = sorted({"@" + role for s in sites for role in s.roles})
    else:
        names = sorted({s.name.rpartition(".")[2] for s in sites})
    return f"target {target!r} matches no site of this model{nearest(target, names)}; there are {', '.join(names)}"
