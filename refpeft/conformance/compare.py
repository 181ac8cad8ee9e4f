"""Holding an answer against a case: the share of each limit that it used, and in words what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import RefpeftError
from .vectors import Case

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""NumPy's finfo does not know bfloat16."""


@dataclass(frozen=True)
class Result:
    """One output of one case. `problem` is None where it passed, else one clear line."""

    output: str
    error: float
    """In units of eps(dtype) * max|expected|; infinite where it cannot be said."""
    limit: float
    problem: str | None = None

    @property
    def share(self) -> float:
        """Of the limit, how much was used."""
        return self.error / self.limit if self.limit else (float("inf") if self.error else 0.0)


def compare(case: Case, answer: Mapping[str, np.ndarray], dtype: str) -> list[Result]:
    """Every output that the case checks, in the case's order; `dtype` is what the answer was computed in.

    Raises RefpeftError where the case has no limit for that dtype.
    """
    for name, limit in case.checks.items():
        if limit != "exact" and dtype not in limit:
            raise RefpeftError(f"case {case.id} has no limit for {name} in {dtype}, only in {', '.join(limit)}")
    expected = case.expected()
    return [compare_output(name, answer.get(name), expected[name], limit, dtype) for name, limit in case.checks.items()]


def compare_output(name: str, got: np.ndarray | None, expected: np.ndarray, limit: dict | str, dtype: str) -> Result:
    """One output. `limit` is "exact" or {dtype: limit}."""
    allowed = 0.0 if limit == "exact" else float(limit[dtype])
    unit = 1.0 if limit == "exact" else EPS[dtype] * float(np.abs(expected).max(initial=0.0))

    def failed(problem: str) -> Result:
        return Result(name, float("inf"), allowed, f"{name}: {problem}")

    if got is None:
        return failed("not in the answer")
    got = np.asarray(got)
    if got.dtype.name == "bfloat16":  # of ml_dtypes; to NumPy it is no number
        got = got.astype(np.float32)
    if got.shape != expected.shape:
        return failed(f"shape {got.shape}, expected {expected.shape}")
    if got.dtype.kind not in "fiub":
        return failed(f"dtype {got.dtype}, expected numbers")
    if not np.isfinite(got).all():
        at = _first(~np.isfinite(got))
        return failed(
            f"{np.count_nonzero(~np.isfinite(got))} of {got.size} values are not finite, first at {list(at)}: {got[at]}"
        )
    distance = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    wrong = distance > allowed * unit
    worst = float(distance.max(initial=0.0))
    error = worst / unit if unit else (float("inf") if worst else 0.0)
    if not wrong.any():
        return Result(name, error, allowed)
    at = _first(wrong)
    size = "differs" if limit == "exact" else f"{error:.2g} of {allowed:g} eps"
    place = f"first of {np.count_nonzero(wrong)} at {list(at)}: got {got[at]:.9g}, expected {expected[at]:.9g}"
    return Result(name, error, allowed, f"{name}: {size}, {place}")


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))
