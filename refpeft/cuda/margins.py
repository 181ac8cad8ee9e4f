"""Room behind rows, where a low-rank method's narrow factors lie beside the wide ones: one product takes both.

With u = x A^T behind the rows of x, and alpha B behind those of W, x W^T + alpha u B^T is [x u] [W alphaB]^T: a product
whose sums are a little longer, in the place of three passes over memory. Going back, with du = alpha g B behind the
rows of g, and A below W, g W + du A is [g du] [W; A].

Arrays get such room where they are made (`rows`), frozen weights when they are first used so (`room`). What is
trained is copied there at the start of every pass.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda import aside, blas
from refpeft.cuda.kernels import Source
from refpeft.quant import Dense

MARGIN = 64
"""Numbers behind each row: three factors of rank 16, say, and one more."""

_source = Source("margins.cu")
_CHUNK = 2**13  # numbers that a block copies
_made: dict[int, tuple[weakref.ref, list[int]]] = {}  # by their address, arrays with a margin and how much is taken


# ---- rows with room behind them --------------------------------------------------------------------------------------


def rows(shape: tuple[int, ...], dtype: np.dtype = bfloat16) -> Array:
    """An empty array, with room behind its rows in a pass of training in bfloat16. It is a view then."""
    if dtype != bfloat16 or len(shape) < 2 or shape[-1] % 8 or not now():
        return cupy.empty(shape, dtype)
    whole = cupy.empty((*shape[:-1], shape[-1] + MARGIN), dtype)
    address = whole.data.ptr
    _made[address] = weakref.ref(whole, lambda _: _made.pop(address)), [0]
    return whole[..., : shape[-1]]


def now() -> int:
    """How many numbers `rows` leaves room for, here and now."""
    return MARGIN if _passes else 0


def heads(shape: tuple[int, ...], dtype: np.dtype = bfloat16) -> Array:
    """An empty (batch, heads, time, dim), a view of (batch, time, heads * dim) with room behind its rows as above."""
    batch, count, time, dim = shape
    return rows((batch, time, count * dim), dtype).reshape(batch, time, count, dim).transpose(0, 2, 1, 3)


def step(array: Array) -> int | None:
    """How many numbers lie between the rows (..., width) of an array; None where they are not at equal distances."""
    if array.ndim < 2 or (array.shape[-1] > 1 and array.strides[-1] != array.itemsize):
        return None
    axes = [(n, stride) for n, stride in zip(array.shape[-2::-1], array.strides[-2::-1], strict=True) if n > 1]
    if any(outer != n * inner for (n, inner), (_, outer) in itertools.pairwise(axes)):
        return None
    return axes[0][1] // array.itemsize if axes else array.shape[-1]


def _whole(array: Array) -> tuple[Array, list[int]] | None:
    """The array that rows are a view of, as `rows` made it, and how much of its margin is taken; None of others."""
    whole = array.base
    if whole is None or array.data.ptr != whole.data.ptr:
        return None
    made, taken = _made.get(whole.data.ptr, (lambda: None, []))
    if made() is not whole or array.shape[-1] + MARGIN != whole.shape[-1] or step(array) != whole.shape[-1]:
        return None
    return whole, taken


def _columns(whole: Array, shape: tuple[int, ...], start: int, width: int) -> Array:
    """Some columns of an array, under the leading axes of `shape`."""
    return whole[..., start : start + width].reshape(*shape[:-1], width)


def behind(x: Array, width: int) -> Array | None:
    """Room behind the rows of x (..., n) for `width` numbers each that nobody else has; None where there is none."""
    found = _whole(x)
    if found is None or width % 8 or found[1][0] + width > MARGIN:
        return None
    whole, taken = found
    start = x.shape[-1] + taken[0]
    taken[0] += width
    return _columns(whole, x.shape, start, width)


def scratch(g: Array, width: int) -> Array | None:
    """Room right behind the rows of g (..., n): until the next one asks for it."""
    found = _whole(g)
    if found is None or width % 8 or width > MARGIN:
        return None
    whole, taken = found
    if taken[0]:
        aside.join()  # what was there before may still be read beside the main stream
    taken[0] = width
    return _columns(whole, g.shape, g.shape[-1], width)


def together(x: Array, u: Array) -> Array:
    """Rows of x and all that lies behind them to the end of u, which `behind` or `scratch` gave: (..., n + ...)."""
    return _columns(x.base, x.shape, 0, x.shape[-1] + distance(x, u) + u.shape[-1])


def distance(x: Array, u: Array) -> int:
    """How many numbers lie between the rows of x and u, which is behind them."""
    return (u.data.ptr - x.data.ptr) // x.itemsize - x.shape[-1]


def lies_behind(u: Array, x: Array) -> bool:
    """Whether u (..., r) is room behind the rows of x."""
    return u.base is not None and u.base is x.base and _whole(x) is not None and step(u) == step(x)


# ---- weights with room for factors -----------------------------------------------------------------------------------


class Room:
    """A frozen weight (out, in) with the two factors of a low-rank method beside it, in one array.

    [W 0 alphaB; A .]: alpha B (out, r) from column in + `offset` on, A (r, in) from row `out` on.
    """

    def __init__(self, weight: Dense, A: Array, B: Array, alpha: float, offset: int):
        out, width = self.shape = weight.shape
        self.key = _key(A, B, alpha, offset)
        with cupy.cuda.using_allocator(_pool.malloc):
            whole = cupy.zeros((out + len(A), width + offset + B.shape[1]), bfloat16)
        whole[:out, :width] = weight.low()
        weight.array = whole[:out, :width]
        cupy.get_default_memory_pool().free_all_blocks()  # where the weight was, which fits nothing else
        self.copies = (B, whole[:out, width + offset :], alpha), (A, whole[out:, :width], 1.0)
        for factor, place, scale in self.copies:
            place[...] = factor * np.float32(scale)
        self.whole = whole
        self.forward = whole[:out]  # [W 0 alphaB]
        self.backward = whole[:, :width]  # [W; A]


_pool = cupy.cuda.MemoryPool()  # in which rooms lie: in pools of arrays that come and go they would leave gaps


def nbytes() -> int:
    """Bytes that rooms take."""
    return _pool.total_bytes()


_rooms: weakref.WeakKeyDictionary[Dense, Room] = weakref.WeakKeyDictionary()
_passes: list[_Pass] = []


def room(weight: Any, A: Array, B: Array, alpha: float, offset: int) -> Room | None:
    """A weight's room for these values, which it gets now if it has none yet; None where that cannot be."""
    if not _passes or not isinstance(weight, Dense) or len(A) % 8 or not (_passes[-1].has(A) and _passes[-1].has(B)):
        return None
    found = _rooms.get(weight)
    if found is not None and found.key == _key(A, B, alpha, offset) and weight.array.base is found.whole:
        return found if found in _passes[-1].filled else None
    if cupy.cuda.get_current_stream().is_capturing():
        return None  # the copy of the weight would be a part of the graph
    _rooms[weight] = found = Room(weight, A, B, alpha, offset)
    _passes[-1].filled.add(found)
    return found


def _key(A: Array, B: Array, alpha: float, offset: int) -> tuple:
    return A.data.ptr, B.data.ptr, B.shape, alpha, offset


# ---- passes of training ----------------------------------------------------------------------------------------------


class _Pass:
    """One forward and backward pass: the flat values that it trains, and the rooms that have them."""

    def __init__(self, values: Array):
        self.values = values
        self.filled: set[Room] = set()

    def has(self, array: Array) -> bool:
        return 0 <= array.data.ptr - self.values.data.ptr < self.values.nbytes and array.flags.c_contiguous


_tables: dict[int, tuple[set[Room], Array, int]] = {}  # by the address of the values: rooms, and what fills them


@contextlib.contextmanager
def lowered(values: Array) -> Iterator[None]:
    """blas.lowered, and with it room behind rows, and values in the rooms of weights.

    Rooms that are new in one pass are filled by one launch in the next.
    """
    with blas.lowered(values):
        now = _Pass(values)
        rooms, table, blocks = _tables.get(values.data.ptr, (set(), None, 0))
        if blocks:
            _source("copy_values")(blocks, 256, table)
            now.filled |= rooms
        _passes.append(now)
        try:
            yield
        finally:
            _passes.pop()
            if now.filled != rooms and not cupy.cuda.get_current_stream().is_capturing():
                _tables[values.data.ptr] = now.filled, *_table(now.filled)


def _table(rooms: set[Room]) -> tuple[Array, int]:
    """What `copy_values` reads to fill rooms, and its number of blocks: see margins.cu."""
    entries = []
    for values, place, scale in (copy for each in rooms for copy in each.copies):
        width, step = values.shape[1], place.strides[0] // place.itemsize
        bits = int(np.float32(scale).view(np.int32))
        at_once = max(1, _CHUNK // width)
        for row in range(0, len(values), at_once):
            count = min(at_once, len(values) - row) * width
            source, target = values.data.ptr + row * values.strides[0], place.data.ptr + row * place.strides[0]
            entries.append((source, target, count, width, step, bits))
    return cupy.asarray(np.array(entries, np.int64)), len(entries)
