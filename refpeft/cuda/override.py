"""How pairs for CuPy's arrays are registered beside the plain ones."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import cupy

from refpeft.cuda.kernels import KernelError
from refpeft.errors import RefpeftWarning
from refpeft.tensor import Op

_said: set[str] = set()


def override(op: Op, *dtypes: str, takes_over: bool = False) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: a forward half on CuPy's arrays of these dtypes that stands in for that of `op`; see Op.override.

    Where a kernel of it does not compile on this machine, the plain pair does its work, which is said once.
    """

    def register(forward: Callable[..., Any]) -> Op:
        @functools.wraps(forward)
        def guarded(*args: Any, **options: Any) -> Any:
            try:
                return forward(*args, **options)
            except KernelError as error:
                say_once(f"{error}; {op.name} is computed by the plain pair instead, which is slower")
                return NotImplemented

        return op.override(cupy.ndarray, *dtypes, takes_over=takes_over)(guarded)

    return register


def say_once(what: str) -> None:
    """Warns of something that makes a run slower, once in a process."""
    if what not in _said:
        _said.add(what)
        warnings.warn(what, RefpeftWarning, stacklevel=2)
