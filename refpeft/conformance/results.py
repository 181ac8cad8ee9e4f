"""Conformance by files alone: the vectors are copied out, and a folder of answers is compared, however it was made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import RefpeftError
from . import tensors
from .vectors import DTYPES, Arrays, Case, root

PARTS = ("README.md", "MANIFEST.json", "case.schema.json", "notes.json", "v1")


def copy(folder: str | Path) -> Path:
    """Writes the vectors with their README to a new folder.

    RefpeftError where there is something already, or it cannot be written.
    """
    folder = Path(folder)
    target = folder.resolve()
    if target == Path.cwd() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise RefpeftError(f"{folder} exists already: name a new folder")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for part in PARTS:
            source = root() / part
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, temporary / part)
        os.rename(temporary, target)
    except OSError as error:
        raise RefpeftError(f"{folder}: cannot be written: {error.strerror or 'a file was not copied'}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


class Results:
    """A folder of answers, <id>.<dtype>.safetensors, as an implementation; cases without a file are not implemented.

    Raises RefpeftError where it is no folder, or holds no such file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise RefpeftError(f"{folder} is not a folder: expected one of <id>.<dtype>.safetensors")
        self.files = {path.name: path for path in sorted(self.folder.glob("*.safetensors"))}
        self.dtypes = tuple(dtype for dtype in DTYPES if any(n.endswith(f".{dtype}.safetensors") for n in self.files))
        if not self.dtypes:
            raise RefpeftError(f"{folder} has no <id>.<dtype>.safetensors, with a dtype of {', '.join(DTYPES)}")
        self.name, self.version = str(folder), "results"

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        path = self.files.get(f"{case.id}.{dtype}.safetensors")
        if path is None:
            raise NotImplementedError("there is no file of it")
        return tensors.read(path)

    def strangers(self, ids: set[str]) -> list[str]:
        """A line for each file that is for no case."""
        known = {f"{id}.{dtype}.safetensors" for id in ids for dtype in DTYPES}
        return [f"{path}: there is no such case, or dtype" for name, path in self.files.items() if name not in known]
