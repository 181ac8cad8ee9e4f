"""Seeded mistakes: the proof that the golden vectors notice them, each under the flag that names it.

The TOML files beside this one list the mistakes, [["file"]] tables of the file that each is made in:

text     what stands there, exactly once
becomes  what the mistake makes of it
flag     of golden/notes.json, that points to the mistake
what     the mistake in a few words

A mistake is made in memory, in a process of its own: the file stays as it is. That process is forked from one that has
imported refpeft; it forgets the module with the mistake and all that import it, and runs the cases that have the flag.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Mistake:
    """One entry of the lists."""

    file: str
    text: str
    becomes: str
    flag: str
    what: str

    @property
    def source(self) -> str:
        """The file's text with the mistake in it. Raises ValueError where `text` does not stand there exactly once."""
        source = (ROOT / self.file).read_text("utf-8")
        if (count := source.count(self.text)) != 1:
            raise ValueError(f"{self.file}, {self.what!r}: the text stands there {count} times, expected once")
        return source.replace(self.text, self.becomes)


@dataclass(frozen=True)
class Outcome:
    """What the cases with a flag said to a mistake, or to none."""

    cases: int
    wrong: list[str]
    """The ids of those with a wrong answer."""
    broken: list[str]
    """The ids of those without an answer, and why: a mistake that cannot be computed proves nothing."""

    @property
    def caught_by(self) -> str:
        return f"`{self.wrong[0]}`, {len(self.wrong)} of {self.cases}" if self.wrong else "nothing"


def mistakes() -> list[Mistake]:
    """All of them, in the order of the lists' names and of the entries."""
    lists = (tomllib.loads(path.read_text("utf-8")) for path in sorted(HERE.glob("*.toml")))
    return [Mistake(file, **entry) for of_files in lists for file, entries in of_files.items() for entry in entries]


def outcome(mistake: Mistake) -> Outcome:
    """What comes of a mistake."""
    return _in_a_fork(lambda: _run_with(mistake))


def outcome_without(mistakes: Iterable[Mistake]) -> Outcome:
    """What the cases that are to catch these mistakes say to refpeft as it is."""
    return _in_a_fork(lambda: _run({mistake.flag for mistake in mistakes}))


def _in_a_fork(find: Callable[[], Outcome]) -> Outcome:
    """What a forked process finds; its last words are `broken` where it finds nothing."""
    _import_refpeft()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            found = find()
        except BaseException:
            found = Outcome(0, [], [traceback.format_exc()])
        with os.fdopen(writing, "w") as pipe:
            json.dump(asdict(found), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return Outcome(**json.loads(text)) if text else Outcome(0, [], ["the process died"])


@functools.cache
def _import_refpeft() -> None:
    _refpeft()
    importlib.import_module("refpeft.conformance").cases()
    _imports()


def _refpeft() -> Any:
    return importlib.import_module("refpeft.conformance.drivers").Refpeft()


def _run_with(mistake: Mistake) -> Outcome:
    path, source = ROOT / mistake.file, mistake.source
    read = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> Any:
        return compile(source, str(path), "exec") if Path(loader.path) == path else read(loader, name)

    SourceFileLoader.get_code = get_code
    _forget(mistake.file.removesuffix(".py").replace("/", "."))
    return _run({mistake.flag})


def _run(flags: set[str]) -> Outcome:
    """In float64, or where that is not among a case's dtypes or notices nothing, in float32."""
    from refpeft.conformance.runner import ERROR, FAILED, verdict
    from refpeft.conformance.vectors import cases
    from refpeft.tensor import plain

    warnings.simplefilter("ignore")
    refpeft = _refpeft()
    chosen = [case for case in cases() if flags & set(case.flags)]
    for wide in ("float64", "float32"):
        with plain():  # where the mistakes are
            verdicts = [verdict(refpeft, case, wide if wide in case.dtypes else "float32") for case in chosen]
        wrong = [one.case.id for one in verdicts if one.status == FAILED]
        if wrong:
            break
    broken = [f"{one.case.id}: {one.reason}" for one in verdicts if one.status == ERROR]
    return Outcome(len(chosen), wrong, broken)


# ---- importing again -------------------------------------------------------------------------------------------------


def _forget(name: str) -> None:
    """Makes Python import a module again, and all that have imported it, directly or not."""
    gone, more = set(), {name} & sys.modules.keys()
    while more:
        gone |= more
        more = {other for other, imported in _imports().items() if imported & gone} - gone
    for module in gone:
        del sys.modules[module]
        package, _, last = module.rpartition(".")
        vars(sys.modules.get(package, sys)).pop(last, None)


@functools.cache
def _imports() -> dict[str, set[str]]:
    """The modules of refpeft that each of them imports."""
    ours = {name for name in sys.modules if name.startswith("refpeft.")}
    return {name: set(_imported(name)) & ours for name in ours}


def _imported(name: str) -> Iterator[str]:
    """What a module imports, and names that may be modules."""
    module = sys.modules[name]
    for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.__package__.split(".")
            start = ".".join(above[: len(above) + 1 - node.level]) if node.level else ""
            whole = ".".join(filter(None, (start, node.module)))
            yield whole
            yield from (f"{whole}.{alias.name}" for alias in node.names)
