"""Failures that are expected, with a reason, in a TOML file: "glob over ids, or over id@dtype" = "reason".

They are strict: a case that a pattern names and that passes is as wrong as a failure that nobody expects, and so is a
pattern that names nothing. So a list cannot outlive its reasons.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from .. import toml
from ..errors import RefpeftError
from .vectors import DTYPES


def read(path: str | Path) -> dict[str, str]:
    """{pattern: reason} of a file. RefpeftError where it is not one."""
    try:
        entries = tomllib.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise RefpeftError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RefpeftError(f"{path}: not valid TOML: {error}") from None
    for pattern, reason in entries.items():
        if not isinstance(reason, str) or not reason.strip():
            raise RefpeftError(f'{path}: expected lines of "glob over ids" = "reason", found {pattern} = {reason!r}')
    return entries


def reason(patterns: Mapping[str, str], id: str, dtype: str) -> str | None:
    """Why this case is expected to fail in that dtype; None where it is not. The first pattern that names it counts."""
    return next((why for pattern, why in patterns.items() if names(pattern, id, dtype)), None)


def names(pattern: str, id: str, dtype: str) -> bool:
    """Whether a pattern names a case in a dtype."""
    return fnmatchcase(id, pattern) or fnmatchcase(f"{id}@{dtype}", pattern)


def idle(patterns: Iterable[str], ids: Iterable[str]) -> list[str]:
    """A line for each pattern that names none of these cases in any dtype."""
    ids = list(ids)
    return [
        f"{pattern!r} is among the expected failures, but names no case: take it off the list"
        for pattern in patterns
        if not any(names(pattern, id, dtype) for id in ids for dtype in DTYPES)
    ]


def text(entries: Mapping[str, str]) -> str:
    """The file that says these."""
    return "".join(f"{toml.text(pattern)} = {toml.text(why)}\n" for pattern, why in entries.items())
