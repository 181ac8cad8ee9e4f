"""Arrays of weights that are not there: any shape in the room of one number, and products that are only counted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

_LARGE = 2**16  # numbers from which on a matrix that follows from weights is not there either
_ROWS = 64  # so many rows of it at least; what follows from tokens has fewer

_counts: list[Counted] = []


class Counted:
    """How many floating-point operations products of matrices took: 2 for each pair of numbers that is multiplied.

    Those with Absent arrays are counted, but for the products of four dimensions, which attention makes of its heads.
    """

    flops = 0


@contextlib.contextmanager
def counted() -> Iterator[Counted]:
    """Within it, products with Absent arrays are counted."""
    _counts.append(Counted())
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


class Absent(np.ndarray):
    """Zeros that are not there, or what is computed of such.

    Products with them are zeros without being computed, and what is computed of an Absent array is one again, so that
    all products that follow are counted. What is as large as a weight is not there either: its shape is right, and
    nothing is to be read from it or written to it.
    """

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **keywords: Any) -> Any:
        if ufunc is np.matmul:
            return _product(*inputs, out=out and out[0])
        if out and _missing(out[0]):
            return out[0]
        if method == "reduce" and _missing(inputs[0]):
            return _reduced(inputs[0], keywords.get("axis", 0), keywords.get("keepdims", False))
        if method == "__call__" and any(map(_missing, inputs)):
            one = ufunc(*(np.zeros((), np.asarray(x).dtype) for x in inputs), **keywords)
            return absent(np.broadcast_shapes(*map(np.shape, inputs)), one.dtype)
        if out:
            keywords["out"] = tuple(map(_plain, out))
        result = getattr(ufunc, method)(*map(_plain, inputs), **keywords)
        return result.view(Absent) if isinstance(result, np.ndarray) else result

    def copy(self, order: str = "C") -> np.ndarray:
        """A copy; itself where it is not there."""
        return self if _missing(self) else super().copy(order)


def absent(shape: int | tuple[int, ...], dtype: np.dtype | None = None) -> Absent:
    """Zeros, float32 or another dtype, that are not there. Raises MemoryError where NumPy could not count them."""
    if np.prod(shape, dtype=float) >= 2**60:
        raise MemoryError(f"{shape} numbers are wanted at once")
    return np.broadcast_to(np.zeros((), dtype or np.float32), shape).view(Absent)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros of float32, that are not there where they are as many as a weight's."""
    large = math.prod(shape) >= _LARGE and len(shape) > 1 and shape[-2] >= _ROWS
    return absent(shape) if large else np.zeros(shape, np.float32).view(Absent)


def owner(array: np.ndarray) -> tuple[int, int]:
    """(id of the array that owns the memory, its bytes), those of arrays that are not there as if they were."""
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return id(base), array.nbytes if base.size == 1 else base.nbytes


def _product(a: Any, b: Any, out: np.ndarray | None) -> np.ndarray:
    left, right = np.shape(a), np.shape(b)
    shape = (*np.broadcast_shapes(left[:-2], right[:-2]), *left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
    if min(len(left), len(right)) < 4:
        for count in _counts:
            count.flops += 2 * math.prod(shape) * left[-1]
    if out is None:
        return zeros(shape)
    if not _missing(out):
        out.fill(0)
    return out


def _reduced(array: np.ndarray, axis: int | tuple[int, ...] | None, keepdims: bool) -> np.ndarray:
    """What is left of an array that is not there: zeros."""
    axes = range(array.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    gone = {one % array.ndim for one in axes}
    shape = [1 if i in gone else n for i, n in enumerate(array.shape) if keepdims or i not in gone]
    return zeros(tuple(shape))


def _missing(array: Any) -> bool:
    """Whether this is an array as large as a weight that is not there."""
    return isinstance(array, Absent) and array.size >= _LARGE and not any(array.strides)


def _plain(array: Any) -> Any:
    return array.view(np.ndarray) if isinstance(array, Absent) else array
