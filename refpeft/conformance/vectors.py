"""The golden vectors as objects: where they lie, what a case says, its inputs and expected outputs.

The format is golden/README.md's; this module reads it with NumPy alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RefpeftError
from . import tensors

Arrays = dict[str, np.ndarray]

DTYPES = ("float64", "float32", "bfloat16", "float16")

_JSON = {dict: "object", list: "array"}
_WORD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case. Its attributes are the members of its JSON file, see golden/README.md."""

    id: str
    kind: str
    name: str
    level: str
    comment: str
    flags: list[str]
    spec: str
    config: dict[str, Any]
    inputs: list[str]
    checks: dict[str, Any]
    tensors: str
    source: dict[str, Any]
    at: str | None = None
    path: Path

    def __str__(self) -> str:
        return self.id

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What the case can be computed in: those for which all of its checks have a limit.

        Exact ones have none; quantizers are defined in float32.
        """
        if self.kind == "quantizer":
            return ("float32",)
        limits = [limit for limit in self.checks.values() if limit != "exact"] or [("float64", "float32")]
        return tuple(dtype for dtype in DTYPES if all(dtype in limit for limit in limits))

    @property
    def _arrays(self) -> Arrays:
        return tensors.read(self.path.with_name(self.tensors))

    def given(self, dtype: str) -> Arrays:
        """The inputs by name, in the order of the case, floats in `dtype`; bfloat16 is float32 that was rounded to it.

        Raises RefpeftError where they cannot be read.
        """
        arrays = self._arrays
        missing = [name for name in self.inputs if f"in.{name}" not in arrays]
        if missing:
            raise RefpeftError(f"{self.path}: {self.tensors} has no in.{missing[0]}")
        given = {name: arrays[f"in.{name}"] for name in self.inputs}
        return {name: in_dtype(a, dtype) if a.dtype.kind == "f" else a for name, a in given.items()}

    def expected(self) -> Arrays:
        """The expected outputs by name: float64, or integers where the check is exact.

        Raises RefpeftError where they cannot be read.
        """
        arrays = self._arrays
        missing = [name for name in self.checks if f"out.{name}" not in arrays]
        if missing:
            raise RefpeftError(f"{self.path}: {self.tensors} has no out.{missing[0]}")
        for name in self.checks:
            if not np.isfinite(arrays[f"out.{name}"]).all():  # no answer could be held against it
                raise RefpeftError(f"{self.path}: out.{name} in {self.tensors} has values that are not finite")
        return {name.removeprefix("out."): a for name, a in arrays.items() if name.startswith("out.")}


def in_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floats in `dtype`; "bfloat16" gives float32 rounded to its eight leading bits, ties to even (finite values)."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype("f4").view("u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view("f4")


def root() -> Path:
    """The folder of the vectors: inside an installed package, or golden/ of a checkout.

    Raises RefpeftError where neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_golden", package.parent / "golden"):
        if (folder / "MANIFEST.json").is_file():
            return folder
    raise RefpeftError(f"no golden vectors beside {package}: expected _golden/ in it or golden/ next to it")


def read(path: Path) -> Case:
    """The case in one JSON file. Raises RefpeftError where it is not a case."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefpeftError(f"{path}: expected a case in JSON: {error}") from None
    problem = _problem_of(document)
    if problem:
        raise RefpeftError(f"{path}: {problem}")
    return Case(**document, path=path.resolve())


def _problem_of(document: Any) -> str | None:
    """What keeps a JSON document from being a case."""
    known = {f.name for f in fields(Case)} - {"path"}
    if not isinstance(document, dict) or not known - {"at"} <= document.keys() <= known:
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        return f"expected an object with the members {sorted(known)}, found {found}"
    for name, kind in {"config": dict, "checks": dict, "source": dict, "flags": list, "inputs": list}.items():
        if not isinstance(document[name], kind):
            return f"{name} is {document[name]!r}, expected a JSON {_JSON[kind]}"
    for name in ("id", "kind", "name", "level", "comment", "spec", "tensors", *({"at"} & document.keys())):
        if not isinstance(document[name], str):
            return f"{name} is {document[name]!r}, expected a string"
    for name in ("flags", "inputs"):
        if not all(isinstance(word, str) for word in document[name]):
            return f"{name} is {document[name]!r}, expected strings"
    for name in ("id", "tensors"):  # the one becomes part of file names, the other is one beside this file
        if not _WORD.fullmatch(document[name]):
            return f"{name} is {document[name]!r}, expected letters, digits, '.', '-' and '_'"
    if not document["checks"]:
        return "checks is empty, expected an output"
    for name, limit in document["checks"].items():
        limits = limit.items() if isinstance(limit, dict) else ()
        if limit != "exact" and not (limits and all(d in DTYPES and _is_limit(n) for d, n in limits)):
            return f'the check of {name} is {limit!r}, expected "exact" or limits by dtype'
    return None


def _is_limit(number: Any) -> bool:
    return type(number) in (int, float) and 0 < number < 2**53


def collect(folder: Path | None = None) -> tuple[tuple[Case, ...], list[str]]:
    """All cases of `folder` (default: the project's own), sorted by id, and one line for each file that is none.

    Of several with the same id the first counts. Raises RefpeftError where there is no case at all.
    """
    folder = folder or root() / "v1"
    found: dict[str, Case] = {}
    problems = []
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("MANIFEST.json", "notes.json", "case.schema.json"):
            continue  # of a whole copy
        try:
            case = read(path)
        except RefpeftError as error:
            problems.append(str(error))
            continue
        if case.id in found:
            problems.append(f"{path}: the id {case.id} is that of {found[case.id].path}, too: ids are unique")
        else:
            found[case.id] = case
    if not found:
        raise RefpeftError(f"there are no cases in {folder}" + (f": {problems[0]}" if problems else ""))
    return tuple(found[id] for id in sorted(found)), problems


@cache
def cases() -> tuple[Case, ...]:
    """All of the project's own cases, sorted by id. RefpeftError where a file is none."""
    found, problems = collect()
    if problems:
        raise RefpeftError(problems[0])
    return found


def notes() -> dict[str, dict[str, str]]:
    """What each flag means: {flag: {"mistake", "seen", "mend"}}."""
    return json.loads((root() / "notes.json").read_text("utf-8"))


def altered(folder: Path | None = None) -> list[str]:
    """One line for each file of `folder` that is not as MANIFEST.json says: changed, missing, or not listed."""
    folder = folder or root()
    listed = json.loads((folder / "MANIFEST.json").read_text("utf-8"))["files"]
    there = {p.relative_to(folder).as_posix() for p in (folder / "v1").rglob("*") if p.is_file()}
    problems = [f"{name}: {'missing' if name in listed else 'not in MANIFEST.json'}" for name in listed.keys() ^ there]
    for name in listed.keys() & there:
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != listed[name]:
            problems.append(f"{name}: its sha256 is not the one in MANIFEST.json")
    return sorted(problems)
