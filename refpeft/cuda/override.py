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

_works: dict[tuple, bool] = {}  # by pairs and kinds of inputs, once asked
_said: set[str] = set()


def override(op: Op, *dtypes: str, takes_over: bool = False) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: a forward half on CuPy's arrays of these dtypes that stands in for that of `op`; see Op.override.

    Where a kernel of it does not compile on this machine, the plain pair does its work, which is said once. Backward's
    kernels are compiled with forward's: then it is too late for another pair. (Not where it may take over an input's
    memory: for the plain pair that input would be lost. Those have their kernels in one file, or compile none.)
    """

    def register(forward: Callable[..., Any]) -> Op:
        @functools.wraps(forward)
        def guarded(needs: tuple[bool, ...], *arrays: Any, **options: Any) -> Any:
            kind = _kind(pair, needs, arrays, options)
            known = _works.get(kind)
            if known is False:
                return NotImplemented
            try:
                made = forward(needs, *arrays, **options)
                if known is None and made is not NotImplemented:
                    if True in needs and not takes_over:
                        _compile_backward(pair, *made, len(arrays))
                    _works[kind] = True
                return made
            except KernelError as error:
                _works[kind] = False
                say_once(f"{error}; {op.name} is computed by the plain pair instead, which is slower")
                return NotImplemented

        pair = op.override(cupy.ndarray, *dtypes, takes_over=takes_over)(guarded)
        return pair

    return register


def works(pair: Op, needs: tuple[bool, ...], *arrays: Any, **options: Any) -> bool:
    """Whether an override takes these inputs, and the kernels of both its halves compile: asked once of each kind."""
    kind = _kind(pair, needs, arrays, options)
    if kind not in _works:
        with unstarted():
            pair.forward(needs, *arrays, **options)
    return _works.get(kind, False)


def _kind(pair: Op, needs: tuple[bool, ...], arrays: tuple, options: dict[str, Any]) -> tuple:
    """What kernels are chosen by: dtypes, numbers of axes, the size of the last one, and options that are on or off."""
    each = [(a.dtype, a.ndim, *a.shape[-1:]) if isinstance(a, cupy.ndarray) else type(a) for a in arrays]
    return pair, needs, *each, *(value for value in options.values() if isinstance(value, bool))


def _compile_backward(pair: Op, out: Array, saved: tuple, inputs: int) -> None:
    """Goes through the backward half, whose kernels are compiled and not started. What it makes is of no use."""
    into = {"into": (None,) * inputs} if pair.into else {}
    with unstarted(), contextlib.suppress(MemoryError):  # gradients that would be added in place take room here
        pair.vjp(cupy.empty(out.shape, out.dtype), *saved, **into)


def or_else(does: str, instead: Callable[..., Any] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function that starts kernels; where one does not compile, it is said once what array code `does`.

    That is `instead`; without it NotImplemented comes back, and who has asked does it.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except KernelError as error:
                say_once(f"{error}; array code {does} instead, which is slower")
                return NotImplemented if instead is None else instead(*args, **options)

        return guarded

    return register


def say_once(what: str) -> None:
    """Warns of something that makes a run slower, once in a process."""
    if what not in _said:
        _said.add(what)
        warnings.warn(what, RefpeftWarning, stacklevel=2)
