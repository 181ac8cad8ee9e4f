"""Runs an implementation through the vectors: one verdict for each case and dtype, and what all of them come to."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..errors import RefpeftError
from . import expected_failures
from .compare import Result, compare
from .vectors import DTYPES, Arrays, Case

PASSED, FAILED, ERROR, NOT_IMPLEMENTED = "passed", "failed", "error", "not implemented"


class Implementation(Protocol):
    """What is under test."""

    name: str
    version: str
    dtypes: tuple[str, ...]
    """What it computes in, of float64, float32, bfloat16, float16."""

    def run(self, case: Case, given: Arrays, dtype: str) -> Mapping[str, np.ndarray]:
        """The outputs by name, of inputs that are in `dtype` already.

        Raises NotImplementedError(reason) for what it does not have; any other exception is an error of this case.
        """


@dataclass(frozen=True)
class Verdict:
    """What came of one case in one dtype."""

    case: Case
    dtype: str
    status: str
    """PASSED, FAILED (an output is wrong), ERROR (there is no answer) or NOT_IMPLEMENTED."""
    results: tuple[Result, ...] = ()
    reason: str = ""
    """Why there is no answer."""
    expected: str | None = None
    """Why a failure is expected, if it is."""

    @property
    def key(self) -> str:
        return f"{self.case.id}@{self.dtype}"

    @property
    def wrong(self) -> bool:
        return self.status in (FAILED, ERROR)

    @property
    def unexpected(self) -> bool:
        """Whether it fails and nobody expects it, or passes although it is expected to fail."""
        return self.status != NOT_IMPLEMENTED and self.wrong == (self.expected is None)

    @property
    def problems(self) -> list[str]:
        """One line for each output that is wrong, or for the answer that is missing."""
        return [self.reason] if self.reason else [result.problem for result in self.results if result.problem]

    @property
    def share(self) -> float:
        """The largest share of a limit that an output used."""
        return max((result.share for result in self.results), default=0.0)


@dataclass(frozen=True)
class Report:
    """What a run came to."""

    name: str
    version: str
    verdicts: list[Verdict]
    problems: list[str] = field(default_factory=list)
    """What is wrong with the vectors or the list of expected failures themselves, a line each."""

    @property
    def unexpected(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.unexpected]

    @property
    def ok(self) -> bool:
        """Whether all is as expected."""
        return not self.unexpected and not self.problems

    def count(self, status: str) -> int:
        return sum(verdict.status == status for verdict in self.verdicts)

    def flags(self, verdicts: Iterable[Verdict]) -> dict[str, tuple[int, int]]:
        """The flags of these cases: (failures, runs) of the runs with the flag, the likeliest mistake first.

        Runs of the same methods, quantizers, operations count. A mistake fails the cases of its flag, so the flags
        whose cases fail most often say best what is wrong: the better, the more cases there are, and the nearer to the
        front of a case's flags they stand.
        """
        verdicts = list(verdicts)
        asked = {flag for verdict in verdicts for flag in verdict.case.flags}
        names = {verdict.case.name for verdict in verdicts}
        failed, run, weight_of_failed, weight = Counter(), Counter(), Counter(), Counter()
        for verdict in self.verdicts:
            if verdict.case.name in names and verdict.status != NOT_IMPLEMENTED:
                for place, flag in enumerate(verdict.case.flags):
                    run[flag] += 1
                    failed[flag] += verdict.wrong
                    weight[flag] += 1 / (1 + place)
                    weight_of_failed[flag] += verdict.wrong / (1 + place)
        likely = sorted(asked, key=lambda flag: (-weight_of_failed[flag] / (weight[flag] + 2), flag))
        return {flag: (failed[flag], run[flag]) for flag in likely}


def conform(
    implementation: Implementation,
    cases: Iterable[Case],
    dtypes: Iterable[str] | None = None,
    expected: Mapping[str, str] | None = None,
    *,
    all_ids: Iterable[str] | None = None,
    problems: Iterable[str] = (),
    told: Callable[[Verdict], None] = lambda verdict: None,
) -> Report:
    """Runs every case in every dtype that both the case and the implementation (or `dtypes`) have.

    expected   {pattern: reason} of failures that are expected, see expected_failures
    all_ids    the ids of the whole suite, where `cases` is a part of it: patterns for others are then no mistake
    problems   what is wrong with the vectors, for the report
    told       is called with each verdict
    Raises RefpeftError for an implementation without the members of Implementation, and for unknown dtypes.
    """
    cases, expected, verdicts = list(cases), dict(expected or {}), []
    for case, dtype in runs(implementation, cases, dtypes):
        verdicts.append(verdict(implementation, case, dtype, expected_failures.reason(expected, case.id, dtype)))
        told(verdicts[-1])
    idle = expected_failures.idle(expected, [case.id for case in cases] if all_ids is None else all_ids)
    return Report(
        _line(implementation.name), _line(implementation.version), verdicts, [_printable(p) for p in (*problems, *idle)]
    )


def runs(
    implementation: Implementation, cases: Iterable[Case], dtypes: Iterable[str] | None = None
) -> list[tuple[Case, str]]:
    """Every case with every dtype that it, the implementation and `dtypes` (None: all) have.

    Raises RefpeftError as conform.
    """
    _check(implementation)
    declared, wanted = tuple(implementation.dtypes), DTYPES if dtypes is None else tuple(dtypes)
    for dtype in {*declared, *wanted} - set(DTYPES):
        raise RefpeftError(f"there is no dtype {dtype!r}: expected {', '.join(DTYPES)}")
    chosen = [dtype for dtype in declared if dtype in wanted]
    if not chosen:
        raise RefpeftError(f"{implementation.name} computes in {', '.join(declared)}, not in {', '.join(wanted)}")
    return [(case, dtype) for case in cases for dtype in chosen if dtype in case.dtypes]


def verdict(implementation: Implementation, case: Case, dtype: str, expected: str | None = None) -> Verdict:
    """What comes of one case: whatever the implementation does, the run goes on."""
    try:
        given = case.given(dtype)
        case.expected()
    except RefpeftError as error:
        return Verdict(case, dtype, ERROR, reason=_printable(str(error)), expected=expected)
    try:
        answer = implementation.run(copy.deepcopy(case), given, dtype)  # what it changes is its own
        if not isinstance(answer, Mapping):
            raise TypeError(f"the answer is of type {type(answer).__name__}, expected arrays by name of output")
        results = tuple(compare(case, answer, dtype))
    except NotImplementedError as error:
        return Verdict(case, dtype, NOT_IMPLEMENTED, reason=_line(error) or "no reason given", expected=expected)
    except (Exception, SystemExit) as error:
        return Verdict(case, dtype, ERROR, reason=f"{type(error).__name__}: {_line(error)}", expected=expected)
    failed = any(result.problem for result in results)
    return Verdict(case, dtype, FAILED if failed else PASSED, results, expected=expected)


def _line(said: object) -> str:
    """The first line of what an implementation says."""
    try:
        lines = str(said).strip().splitlines() or [""]
    except Exception:
        lines = ["it cannot be printed"]
    return _printable(lines[0])


def _printable(text: str) -> str:
    """Without what would steer a terminal, break XML or be no UTF-8, as names of files can; a few lines at most."""
    return "".join(c if c.isprintable() else "?" for c in text[:500])


def _check(implementation: Implementation) -> None:
    what = type(implementation).__name__
    for member in ("name", "version", "dtypes", "run"):
        if not hasattr(implementation, member):
            raise RefpeftError(f"an implementation has name, version, dtypes and run(): {what} has no {member}")
    if not isinstance(implementation.dtypes, tuple | list) or not implementation.dtypes:
        raise RefpeftError(f"the dtypes of {what} are {implementation.dtypes!r}, expected some of {', '.join(DTYPES)}")
