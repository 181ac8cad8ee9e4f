"""Rows of arrays by arrays of their numbers: looked up in one launch, and their gradients added up in a fixed order.

CuPy's own `array[ids]` with a device array of integers is one kernel, reads nothing back to the host, and may be
captured (`_take` in its _routines_indexing.pyx); several arrays of integers are several launches. What it lacks is
adding bfloat16 rows in place (`scatter_add` refuses them), and adding float32 rows in the same order every time.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array, bfloat16
from refpeft.cuda.kernels import Source, contiguous
from refpeft.cuda.maps import mapped, merged, strides_of, summed
from refpeft.cuda.override import or_else, override
from refpeft.tape import ADDED, Slice

source = Source("gather.cu")

_BLOCK = 256  # threads
_MOST_SORTED = 2**16  # ids, by comparing each with all
_DTYPES = {np.dtype("f4"), bfloat16}


def rows(table: Array, ids: Array, dtype: np.dtype | None = None) -> Array:
    """table[ids] for a device array of integers of any shape, in `dtype` (None: that of the table).

    Raises ValueError for a table whose rows are not at most two axes of even steps.
    """
    places = _Places(table, (ids,))
    out = cupy.empty(ids.shape + table.shape[1:], dtype or table.dtype)
    _copy(places, table, out)
    return out


def _put(array: Array, key: Any, g: Array, add: bool) -> None:
    wide, g = (each.astype(np.float32) for each in (array, g))
    wide[key] = wide[key] + g if add else g
    array[...] = wide.astype(array.dtype)


@or_else("puts gradients of parts in their place", _put)
def put(array: Array, key: Any, g: Array, add: bool) -> None:
    """array[key] = g, or += with `add`, in place: for the keys that a Slice has, which say no place twice.

    They are those of basic indexing, or one or two device arrays of integers; both arrays have one dtype.
    """
    indices = key if isinstance(key, tuple) else (key,)
    if any(isinstance(index, cupy.ndarray) for index in indices):
        places = _Places(array, indices)
        if g.size:
            g = contiguous(g)
            in_eights = places.in_eights(array, g)
            source("put_rows", array.dtype)(*places.launch, array, g, add, in_eights, *places.arguments)
    else:
        part = array[key]
        mapped("add" if add else "copy", *((part, g) if add else (g,)), out=part)


class _Places:
    """What the kernels know of rows of an array: their numbers, along one or two leading axes, and what a row is."""

    def __init__(self, array: Array, ids: tuple[Array, ...]):
        count = len(ids)
        if count > 2 or not all(_are_ids(each) and each.shape == ids[0].shape for each in ids):
            raise ValueError("expected one or two device arrays of integers")
        strides = strides_of(array, array.shape)
        sizes, (steps,) = merged(array.shape[count:], [strides[count:]])
        if len(sizes) > 2:
            raise ValueError("the rows have more than two axes")
        inner, self.width = [1] * (2 - len(sizes)) + sizes
        inner_step, self.width_step = [0] * (2 - len(steps)) + steps
        self.steps = (*strides[:count], inner_step)
        groups = ids[0].size * inner * -(-self.width // 8)
        self.launch = (-(-groups // _BLOCK), _BLOCK)
        first, second = (*map(_int32, ids), None)[:2]
        n0, n1 = (*array.shape[:count], 1)[:2]
        step0, step1 = (*strides[:count], 0)[:2]
        self.arguments = (
            *(np.uint32(groups), first, second, n0, n1, np.int64(step0), np.int64(step1)),
            *(inner, np.int64(inner_step), self.width, np.int64(self.width_step)),
        )

    def in_eights(self, array: Array, side_by_side: Array) -> bool:
        """Whether eight numbers in a row may be read and written at once."""
        return (
            self.width_step == 1
            and self.width % 8 == 0
            and all(step % 8 == 0 for step in self.steps)
            and array.data.ptr % 16 == side_by_side.data.ptr % 16 == 0
        )


def _copy(places: _Places, table: Array, out: Array) -> None:
    if out.size:
        low, in_eights = table.dtype == bfloat16, places.in_eights(table, out)
        source("copy_rows", out.dtype)(*places.launch, table, low, out, in_eights, *places.arguments)


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, cupy.ndarray) and ids.dtype.kind in "iu"


def _int32(ids: Array) -> Array:
    return contiguous(ids).astype(np.int32, copy=False)


def _looked_up(x: Any, ids: Any) -> Array | None:
    """x[ids], or None where the kernels do not do it."""
    usable = isinstance(x, cupy.ndarray) and x.ndim and x.size and x.dtype in _DTYPES
    if not usable or not _are_ids(ids):
        return None
    try:
        return rows(x, ids)
    except ValueError:
        return None


def _summed(g: Array, ids: Array, shape: tuple[int, ...], into: Array | None) -> Any:
    """The gradient of an array of `shape` whose rows `ids` were looked up: ADDED where it was added to `into`."""
    adds = into is not None and into.dtype == g.dtype and into.flags.c_contiguous
    y = into if adds else cupy.zeros(shape, g.dtype)
    if g.size:
        add = _add_runs if ids.size <= _MOST_SORTED else _add_whole_numbers
        add(contiguous(g), _int32(ids), y, adds)
    return ADDED if adds else y


def _add_runs(g: Array, ids: Array, y: Array, adds: bool) -> None:
    """Ids are sorted, and the rows of each one added up from the first to the last."""
    n, width = ids.size, g.size // ids.size
    ascending, order = (cupy.empty(n, np.int32) for _ in range(2))
    source("sort_ids")(-(-n // (_BLOCK // 32)), _BLOCK, ids, ascending, order, n, len(y))
    in_eights = width % 8 == 0 and g.data.ptr % 16 == 0
    source("sum_runs", g.dtype)(n * -(-width // _BLOCK), _BLOCK, g, ascending, order, y, adds, n, width, in_eights)


def _add_whole_numbers(g: Array, ids: Array, y: Array, adds: bool) -> None:
    """Sums in 64 bits, as multiples of about 2**-61 of the sum of all |g|: eight bytes a number of y meanwhile."""
    width = g.size // ids.size
    size = summed("abs", g, shape=g.shape, axes=tuple(range(g.ndim)))
    sums = cupy.zeros(y.size, np.int64)
    source("add_rows", g.dtype)(-(-g.size // _BLOCK), _BLOCK, g, ids, size, sums, np.int64(g.size), len(y), width)
    source("put_sums", g.dtype)(-(-y.size // _BLOCK), _BLOCK, sums, size, y, adds, np.int64(y.size))


@override(fused.embedding, "bfloat16", "float32")
def embedding(needs, table, *, ids):
    y = _looked_up(table, ids)
    return NotImplemented if y is None else (y, (ids, table.shape))


@embedding.backward(into=True)
def _(g, ids, shape, into):
    return (_summed(g, ids, shape, into[0]),)


@override(ops.take, "bfloat16", "float32")
def take(needs, x, *, indices):
    y = _looked_up(x, indices)
    return NotImplemented if y is None else (y, (indices, x.shape))


@take.backward(into=True)
def _(g, indices, shape, into):
    return (_summed(g, indices, shape, into[0]),)


@override(fused.pick, "bfloat16", "float32")
def pick(needs, x, *, rows):
    if not x.size or x.dtype not in _DTYPES:
        return NotImplemented
    try:
        places = _Places(x, rows)
    except ValueError:
        return NotImplemented
    y = cupy.empty(rows[0].shape + x.shape[len(rows) :], x.dtype)
    _copy(places, x, y)
    return y, (x.shape, rows)


@pick.backward
def _(g, shape, rows):
    return (Slice(shape, rows, g),)
