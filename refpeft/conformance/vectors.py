"""The golden vectors as objects: where they lie, what a case says, its inputs and expected outputs.

The format is golden/README.md's; this module reads it with NumPy and safetensors alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..errors import RefpeftError

Arrays = dict[str, np.ndarray]


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
    def _arrays(self) -> Arrays:
        path = self.path.with_name(self.tensors)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RefpeftError(f"{path}: the tensors of case {self.id} cannot be read: {error}") from error

    def given(self, dtype: str) -> Arrays:
        """The inputs by name, in the order of the case, floats in `dtype`."""
        arrays = self._arrays
        missing = [name for name in self.inputs if f"in.{name}" not in arrays]
        if missing:
            raise RefpeftError(f"{self.path}: {self.tensors} has no in.{missing[0]}")
        given = {name: arrays[f"in.{name}"] for name in self.inputs}
        return {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in given.items()}

    def expected(self) -> Arrays:
        """The expected outputs by name: float64, or integers where the check is exact."""
        return {name.removeprefix("out."): a for name, a in self._arrays.items() if name.startswith("out.")}


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
    except (OSError, ValueError) as error:
        raise RefpeftError(f"{path}: expected a case in JSON: {error}") from error
    known = {f.name for f in fields(Case)} - {"path"}
    if not isinstance(document, dict) or not known - {"at"} <= document.keys() <= known:
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise RefpeftError(f"{path}: expected an object with the members {sorted(known)}, found {found}")
    return Case(**document, path=path)


@cache
def cases(folder: Path | None = None) -> tuple[Case, ...]:
    """All cases, sorted by id, of `folder` (default: the project's own)."""
    paths = (folder or root() / "v1").rglob("*.json")
    return tuple(sorted((read(path) for path in paths), key=lambda case: case.id))


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
