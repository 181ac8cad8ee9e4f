"""An implementation in Python as a program that answers JSON lines, for one that needs an environment of its own:

python -m refpeft.conformance.serve FILE.py:NAME
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..errors import RefpeftError
from . import selection, tensors, vectors
from .programs import PROTOCOL


def main() -> None:
    """Answers on what was stdout; whatever an implementation prints, also from C, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        found = selection.in_python(sys.argv[1]) if len(sys.argv) == 2 else None
    except RefpeftError as error:
        sys.exit(str(error))
    if found is None:
        sys.exit("usage: python -m refpeft.conformance.serve FILE.py:NAME")
    serve(found, sys.stdin, answers)


def serve(implementation: Any, requests: Iterable[str], answers: TextIO) -> None:
    """Until "stop" or the end of the requests. A case that fails is answered, and the next one is read."""
    for line in requests:
        try:
            request = json.loads(line)
            command = request["cmd"]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"expected a request in JSON, found {line.strip()[:80]!r}")
        if command == "stop":
            return
        answer = _start(implementation) if command == "start" else _run(implementation, request)
        print(json.dumps(answer), file=answers, flush=True)


def _start(implementation: Any) -> dict[str, Any]:
    about = {"name": implementation.name, "version": implementation.version, "dtypes": list(implementation.dtypes)}
    return {"protocol": PROTOCOL, **about}


def _run(implementation: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        case, dtype = vectors.read(Path(request["case"])), request["dtype"]
        found = implementation.run(case, case.given(dtype), dtype)
        tensors.write(request["out"], {name: np.asarray(array) for name, array in found.items()})
    except NotImplementedError as error:
        return {"seq": request["seq"], "status": "not implemented", "reason": str(error)}
    except Exception as error:
        return {"seq": request["seq"], "status": "error", "message": f"{type(error).__name__}: {error}"}
    return {"seq": request["seq"], "status": "ok"}


if __name__ == "__main__":
    main()
