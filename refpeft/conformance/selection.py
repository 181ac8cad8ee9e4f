"""Which cases to run, and what to run them on."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import RefpeftError, nearest
from .vectors import Case


def chosen(
    cases: Iterable[Case],
    *,
    names: Iterable[str] = (),
    kinds: Iterable[str] = (),
    flags: Iterable[str] = (),
    ids: Iterable[str] = (),
) -> list[Case]:
    """The cases that are asked for by name (of a method, quantizer, operation ...), kind, one of their flags, and id.

    All of these are globs, and none means all. RefpeftError for one that fits no case.
    """
    cases = list(cases)
    wanted = {"name": names, "kind": kinds, "flag": flags, "id": ids}
    said = {
        "name": lambda case: [case.name],
        "kind": lambda case: [case.kind],
        "flag": lambda case: case.flags,
        "id": lambda case: [case.id],
    }
    for what, globs in wanted.items():
        there = {word for case in cases for word in said[what](case)}
        for glob in globs:
            if not any(fnmatchcase(word, glob) for word in there):
                raise RefpeftError(f"no case has the {what} {glob!r}{nearest(glob, there)}")
    return [
        case
        for case in cases
        if all(
            not globs or any(fnmatchcase(word, glob) for word in said[what](case) for glob in globs)
            for what, globs in wanted.items()
        )
    ]


_PYTHON = re.compile(r"(?P<home>[^:]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def in_python(text: str) -> Any | None:
    """The implementation that FILE.py:NAME or package.module:NAME names: an object, or one of the class that is there.

    None where the text has another form, such as that of a command line whose last word is FILE.py:NAME. Raises
    RefpeftError where there is no such thing, or it cannot be made.
    """
    match = _PYTHON.fullmatch(text)
    if match is None or (" " in text and not Path(match["home"]).is_file()):
        return None
    home, name = match["home"], match["name"]
    try:
        module = _file(Path(home)) if home.endswith(".py") else importlib.import_module(home)
        found = getattr(module, name)
        return found() if isinstance(found, type) else found
    except AttributeError as error:
        if str(error).endswith(f"has no attribute {name!r}"):
            raise RefpeftError(f"{home} has no {name}{nearest(name, vars(module))}") from None
        raise RefpeftError(f"{text}: AttributeError: {error}") from error
    except (Exception, SystemExit) as error:
        raise RefpeftError(f"{text}: {type(error).__name__}: {error}") from error


def _file(path: Path) -> Any:
    """The module in a file; modules beside it can be imported, as beside a script."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"implementation_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
