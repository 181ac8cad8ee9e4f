"""How pairs for CuPy's arrays are registered beside the plain ones."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import cupy

from refpeft.backend import Array
from refpeft.cuda.kernels import KernelError, unstarted
from refpeft.errors import RefpeftWarning
from refpeft.tensor import Op

_said: set[str] = set()


def override(op: Op, *dtypes: str, takes_over: bool = False) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: a forward half on CuPy's arrays of these dtypes that stands in for that of `op`; see Op.override.

    Where a kernel of it does not compile on this machine, the plain pair does its work, which is said once. Backward's
    kernels are compiled with forward's: then it is too late for another pair. (Not where it may take over an input's
    memory: for the plain pair that input would be lost. Those have their kernels in one file, or compile none.)
    """

    def register(forward: Callable[..., Any]) -> Op:
        works: dict[tuple, bool] = {}  # by kinds of inputs, once asked

        @functools.wraps(forward)
        def guarded(needs: tuple[bool, ...], *arrays: Any, **options: Any) -> Any:
            kind = (needs, *map(_kind, arrays))
            known = works.get(kind)
            if known is False:
                return NotImplemented
            try:
                made = forward(needs, *arrays, **options)
                if known is None and made is not NotImplemented:
                    if True in needs and not takes_over:
                        _compile_backward(pair, *made, len(arrays))
                    works[kind] = True
                return made
            except KernelError as error:
                works[kind] = False
                say_once(f"{error}; {op.name} is computed by the plain pair instead, which is slower")
                return NotImplemented

        pair = op.override(cupy.ndarray, *dtypes, takes_over=takes_over)(guarded)
        return pair

    return register


def _kind(array: Any) -> Any:
    """What kernels are chosen by: the dtype, and the size of the last axis."""
    return (array.dtype, *array.shape[-1:]) if isinstance(array, cupy.ndarray) else type(array)


def _compile_backward(pair: Op, out: Array, saved: tuple, inputs: int) -> None:
    """Goes through the backward half, whose kernels are compiled and not started. What it makes is of no use."""
    into = {"into": (None,) * inputs} if pair.into else {}
    with unstarted(), contextlib.suppress(MemoryError):  # gradients that would be added in place take room here
        pair.vjp(cupy.empty(out.shape, out.dtype), *saved, **into)


def say_once(what: str) -> None:
    """Warns of something that makes a run slower, once in a process."""
    if what not in _said:
        _said.add(what)
        warnings.warn(what, RefpeftWarning, stacklevel=2)
