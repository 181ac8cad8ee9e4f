"""What a check of a plugin finds: one line for each property, passed, failed with what to do, or not applicable."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from refpeft.errors import RefpeftError

PASSED, FAILED, NOT_APPLICABLE = "passed", "FAILED", "not applicable"


class Failed(Exception):
    """A property that a plugin lacks: what was found, and what to do."""


class NotApplicable(Exception):
    """A property that cannot be asked of a plugin, and why."""


@dataclass(frozen=True)
class Finding:
    property: str
    outcome: str
    text: str


@dataclass(frozen=True)
class Report:
    """Everything that was found of one plugin."""

    name: str
    summary: str
    path: str
    findings: tuple[Finding, ...]

    def having(self, outcome: str) -> list[Finding]:
        """The findings of one outcome."""
        return [finding for finding in self.findings if finding.outcome == outcome]

    def text(self) -> str:
        width = max(len(finding.property) for finding in self.findings)
        lines = [f"{f.outcome:<{len(NOT_APPLICABLE)}}  {f.property:<{width}}  {f.text}" for f in self.findings]
        counts = ", ".join(f"{len(self.having(one))} {one.lower()}" for one in (PASSED, FAILED, NOT_APPLICABLE))
        return "\n".join([f"{self.name}: {self.summary or '(no docstring)'}", self.path, "", *lines, "", counts]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def found(properties: Iterable[Callable[[Any], str]], subject: Any, path: str) -> list[Finding]:
    """What each property says of `subject`. An exception of the plugin's own is a failure, with its place."""
    return [_found(one, subject, path) for one in properties]


def named(check: Callable[[Any], str]) -> str:
    """What a property is called."""
    return check.__name__.replace("_", " ")


def _found(check: Callable[[Any], str], subject: Any, path: str) -> Finding:
    name = named(check)
    try:
        return Finding(name, PASSED, check(subject))
    except NotApplicable as reason:
        return Finding(name, NOT_APPLICABLE, str(reason))
    except Failed as problem:
        return Finding(name, FAILED, str(problem))
    except (Exception, SystemExit) as error:
        return Finding(name, FAILED, said(error, path))


def said(error: BaseException, path: str) -> str:
    """An exception in one line, with its innermost place in the plugin's file."""
    text = " ".join(str(error).split())
    if isinstance(error, RefpeftError):
        return f"{text}{place(error, path)}"
    return (
        f"{type(error).__name__}: {text}{place(error, path)}; refpeft/hookspecs.py says what hooks are given and give"
    )


def place(error: BaseException, path: str) -> str:
    """ " (line 12)", the innermost one of the plugin's file where an exception was raised; "" outside of it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" (line {lines[-1]})" if lines else ""
