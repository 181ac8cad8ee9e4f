"""The vectors as tests of pytest: one test for each case and dtype, with one line above it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import expected_failures, report, runner, vectors
from .selection import chosen


def parametrize_with_vectors(
    implementation: runner.Implementation | type,
    *,
    methods: Iterable[str] = (),
    kinds: Iterable[str] = (),
    flags: Iterable[str] = (),
    dtypes: Iterable[str] | None = None,
    expected_failures: Mapping[str, str] | str | Path | None = None,
    folder: str | Path | None = None,
) -> Callable:
    """A decorator for a test with the argument `check`, which calls it:

        @parametrize_with_vectors(Mine(), expected_failures="xfails.toml")
        def test_vectors(check):
            check()

    A wrong answer fails the test, with the flags' explanations. What is not implemented is skipped with its
    reason; what is expected to fail is an xfail, or fails where it passes. One more test looks for patterns that name
    no case.

    methods, kinds, flags   the cases to run, by globs; all where none is given
    expected_failures       {glob over ids, or id@dtype: reason}, or the TOML file of them
    folder                  other vectors than refpeft's own
    """
    import pytest

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(check, id=id)
            for id, check in checks(implementation, methods, kinds, flags, dtypes, expected_failures, folder)
        ],
    )


def checks(
    implementation: Any, methods: Any, kinds: Any, flags: Any, dtypes: Any, expected: Any, folder: Any
) -> Iterable[tuple[str, Callable[[], None]]]:
    """(name, check) of each run, and of the list of expected failures."""
    mine = implementation() if isinstance(implementation, type) else implementation
    whole, problems = vectors.collect(Path(folder) if folder else None)
    cases = chosen(whole, names=methods, kinds=kinds, flags=flags)
    patterns = expected_failures.read(expected) if isinstance(expected, str | Path) else dict(expected or {})
    for case, dtype in runner.runs(mine, cases, dtypes):
        why = expected_failures.reason(patterns, case.id, dtype)
        yield f"{case.id}@{dtype}", _check(mine, case, dtype, why)
    yield "the lists", _complain([*problems, *expected_failures.idle(patterns, [case.id for case in whole])])


def _check(implementation: Any, case: vectors.Case, dtype: str, why: str | None) -> Callable[[], None]:
    def check() -> None:
        import pytest

        verdict = runner.verdict(implementation, case, dtype, why)
        if verdict.status == runner.NOT_IMPLEMENTED:
            pytest.skip(f"not implemented: {verdict.reason}")
        if verdict.unexpected:
            only = runner.Report(implementation.name, implementation.version, [verdict])
            pytest.fail(report.text(only), pytrace=False)
        if verdict.wrong:
            pytest.xfail(why or "")

    return check


def _complain(lines: list[str]) -> Callable[[], None]:
    def check() -> None:
        assert not lines, "\n".join(lines)

    return check
