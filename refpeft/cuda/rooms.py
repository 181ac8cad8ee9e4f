"""Frozen weights in one array with the factors of low-rank methods on them, as products of all of them want them.

Layers that read the same x, such as q, k and v, have their weights one below the other, then alpha B of each beside its
weight, and A of each below all (see refpeft.cuda.margins):

    W1  a1 B1   .
    W2   .    a2 B2
    A1   .     .
    A2   .     .

Each factor's place has a rank that is a multiple of 8, of zeros where the factor's is not. Where A reads something else
than the layer, as with dropout, no A has a place. A weight moves there when it is first used so. What is trained is
copied there at the start of every pass.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda import blas
from refpeft.cuda.kernels import KernelError, Source
from refpeft.cuda.override import say_once
from refpeft.quant import Dense

_source = Source("rooms.cu")
_CHUNK = 2**10  # numbers that a block copies: few, since blocks are many and short


@dataclass(frozen=True)
class Factors:
    """What is added to a frozen layer: alpha u B^T with u = x A^T, of A (r, in) and B (out, r) in float32.

    Where A is None, u comes from elsewhere.
    """

    A: Array | None
    B: Array
    alpha: float

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def values(self) -> list[Array]:
        """What is trained."""
        return [self.B] if self.A is None else [self.A, self.B]


@dataclass
class Part:
    """One of the layers of a room: x weight^T + bias, and what is added to that."""

    weight: Any
    bias: Array | None
    factors: Factors | None = None

    @property
    def rank(self) -> int:
        """That of the place of the factors."""
        return 0 if self.factors is None else -(-self.factors.rank // 8) * 8


class Room:
    """The array [W . alphaB; A .] of these parts, and what it is made of, as views.

    forward    (out, in + offset + r): what [x u] is multiplied by, u being x `down`^T
    backward   (out + r, in): what [g du] is multiplied by, du being g `up`
    down, up   (r, in) and (out, r); `down` is (0, in) where u comes from elsewhere
    bias       (out,), or None

    Here `out` and `r` are the sums of those of all parts, and `offset` numbers lie between the rows of x and of u.
    """

    def __init__(self, parts: Sequence[Part], offset: int):
        self.widths, self.ranks = [part.weight.shape[0] for part in parts], [part.rank for part in parts]
        out, width, rank = sum(self.widths), parts[0].weight.shape[1], sum(self.ranks)
        self.is_given_u = any(part.factors is not None and part.factors.A is None for part in parts)
        below = 0 if self.is_given_u else rank
        with cupy.cuda.using_allocator(_pool.malloc):
            whole = cupy.zeros((out + below, width + offset + rank), bfloat16)
        self.whole, self.forward, self.backward = whole, whole[:out], whole[:, :width]
        self.down, self.up = whole[out:, :width], whole[:out, width + offset :]
        self.bias = _joined([part.bias for part in parts], self.widths)
        self._places: list[tuple[slice, slice, Factors]] = []  # rows of W, and ranks, of the factors that there are
        for part, rows, ranks in zip(parts, _slices(self.widths), _slices(self.ranks), strict=True):
            self.forward[rows, :width] = part.weight.low()
            part.weight.array = self.forward[rows, :width]
            if part.factors is not None:
                self._places.append((rows, slice(ranks.start, ranks.start + part.factors.rank), part.factors))
        cupy.get_default_memory_pool().free_all_blocks()  # where the weights were, which fits nothing else
        self.key = _key(parts, offset)
        self._tables: dict[tuple[int, ...], tuple[Array, int]] = {}

    @property
    def copies(self) -> list[tuple[Array, Array, float]]:
        """Values, their place here, and what they are multiplied by."""
        found = []
        for rows, ranks, factors in self._places:
            found.append((factors.B, self.up[rows, ranks], factors.alpha))
            if factors.A is not None:
                found.append((factors.A, self.down[ranks], 1.0))
        return found

    def fill(self) -> None:
        """Copies the values."""
        for values, place, scale in self.copies:
            place[...] = values * np.float32(scale)

    @property
    def alpha(self) -> float | None:
        """That of the only factors, which fill their place; None where there are others, or none."""
        alone = len(self._places) == len(self.widths) == 1 and self._places[0][2].rank == sum(self.ranks)
        return self._places[0][2].alpha if alone else None

    def blank_gradients(self) -> tuple[Array, Array, Array]:
        """(one empty array, and as its parts: for dA (r, in) = du^T x and for dB (out, r) = g^T u), all in float32."""
        both = cupy.empty(self.down.size + self.up.size, np.float32)
        return both, both[: self.down.size].reshape(self.down.shape), both[self.down.size :].reshape(self.up.shape)

    def gradients(self, dA: Array, dB: Array) -> list[Array]:
        """The gradients of what is trained, of each part in turn."""
        found = []
        for rows, ranks, factors in self._places:
            found += [dA[ranks]] if factors.A is not None else []
            found.append(dB[rows, ranks] * np.float32(factors.alpha))
        return found

    def parts_of(self, u: Array) -> list[Array]:
        """The columns of u (..., r) of each part that has factors, in turn."""
        return [u[..., ranks] for _, ranks, _ in self._places]

    def adds_gradients(self, into: Sequence[Array | None]) -> bool:
        """Whether `add_gradients` can add to these arrays."""
        key = _addresses(into)
        if key is None or key in self._tables:
            return key is not None
        if cupy.cuda.get_current_stream().is_capturing() or not all(array.flags.c_contiguous for array in into):
            return False
        width, rank, each = self.down.shape[1], self.up.shape[1], iter(into)
        copies, first = [], self.down.size  # where dB begins
        for rows, ranks, factors in self._places:
            if factors.A is not None:
                A = next(each)
                copies.append((ranks.start * width, A.data.ptr, *A.shape, width, 1.0))
            B = next(each)
            copies.append((first + rows.start * rank + ranks.start, B.data.ptr, *B.shape, rank, factors.alpha))
        self._tables[key] = _table(copies)
        return True

    def add_gradients(self, both: Array, into: Sequence[Array]) -> None:
        """Adds what is in `blank_gradients` to the gradients of what is trained, of all parts, in one launch."""
        table, blocks = self._tables[_addresses(into)]
        _source("add_gradients")(blocks, 256, table, both)


def _joined(biases: list[Array | None], widths: list[int]) -> Array | None:
    """All biases as one; None where there are none."""
    if all(bias is None for bias in biases):
        return None
    whole = cupy.zeros(sum(widths), np.float32)
    for bias, part in zip(biases, _slices(widths), strict=True):
        if bias is not None:
            whole[part] = bias
    return whole


def _slices(sizes: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _addresses(arrays: Sequence[Array | None]) -> tuple[int, ...] | None:
    return None if any(array is None for array in arrays) else tuple([array.data.ptr for array in arrays])


# ---- all rooms -------------------------------------------------------------------------------------------------------

_pool = cupy.cuda.MemoryPool()  # in which rooms lie: in pools of arrays that come and go they would leave gaps


def nbytes() -> int:
    """Bytes that rooms take."""
    return _pool.total_bytes()


_rooms: weakref.WeakKeyDictionary[Dense, Room] = weakref.WeakKeyDictionary()  # by the first of their weights
_passes: list[_Pass] = []


def room(parts: Sequence[Part], offset: int) -> Room | None:
    """The room of these parts, which they get now if they have none yet; None where that cannot be."""
    if not _passes or not all(_fits(part) for part in parts) or not _compiles():
        return None
    first = parts[0].weight
    found = _rooms.get(first)
    if found is not None and found.key != _key(parts, offset):
        found = None
    if found in _passes[-1].filled:
        return found
    if cupy.cuda.get_current_stream().is_capturing():
        return None  # copies of weights would be a part of the graph
    if found is None:
        _rooms[first] = found = Room(parts, offset)
    found.fill()
    _passes[-1].filled.add(found)
    return found


def is_trained(values: Array) -> bool:
    """Whether this pass trains these values."""
    return bool(_passes) and _passes[-1].has(values)


def _fits(part: Part) -> bool:
    if not isinstance(part.weight, Dense) or part.weight.shape[0] % 8:
        return False
    return part.factors is None or all(map(is_trained, part.factors.values))


def _compiles() -> bool:
    """Whether the kernels do, without which there are no rooms."""
    try:
        _source("copy_values"), _source("add_gradients")
    except KernelError as error:
        say_once(f"{error}; layers and low-rank factors are computed one by one instead, which is slower")
        return False
    return True


def _key(parts: Sequence[Part], offset: int) -> tuple:
    """What tells a room from others: where its weights lie, and what lies beside them."""
    values = (part.factors for part in parts)
    factors = [each and (*(array.data.ptr for array in each.values), each.rank, each.alpha) for each in values]
    return tuple([part.weight.array.data.ptr for part in parts]), tuple(factors), offset


# ---- passes of training ----------------------------------------------------------------------------------------------


class _Pass:
    """One forward and backward pass: the flat values that it trains, and the rooms that have them."""

    def __init__(self, values: Array):
        self.values = values
        self.filled: set[Room] = set()

    def has(self, array: Array) -> bool:
        return 0 <= array.data.ptr - self.values.data.ptr < self.values.nbytes and array.flags.c_contiguous


_filling: dict[int, tuple[list[weakref.ref], Array, int]] = {}  # by the address of values: rooms, and what fills them


@contextlib.contextmanager
def lowered(values: Array) -> Iterator[None]:
    """blas.lowered, and with it values in the rooms of weights.

    Rooms that are new in one pass are filled by one launch in the next, as long as all of them are there.
    """
    with blas.lowered(values):
        now = _Pass(values)
        known, table, blocks = _filling.get(values.data.ptr, ([], None, 0))
        rooms = {each() for each in known} - {None}
        if len(rooms) == len(known):
            if blocks:  # rooms of layers without factors need nothing
                _source("copy_values")(blocks, 256, table)
            now.filled |= rooms
        _passes.append(now)
        try:
            yield
        finally:
            _passes.pop()
            now.filled &= set(_rooms.values())  # not those that others took the place of in this pass
            if now.filled != rooms and not cupy.cuda.get_current_stream().is_capturing():
                copies = [
                    (values.data.ptr, place.data.ptr, *values.shape, place.strides[0] // place.itemsize, scale)
                    for each in now.filled
                    for values, place, scale in each.copies
                ]
                _filling[values.data.ptr] = list(map(weakref.ref, now.filled)), *_table(copies)


def _table(copies: Sequence[tuple[int, int, int, int, int, float]]) -> tuple[Array | None, int]:
    """The entries that a kernel of rooms.cu reads, and their number, which is that of its blocks.

    Of each copy: where the first number is read and written, rows and columns, the step from row to row where these do
    not lie side by side, and what numbers are multiplied by.
    """
    entries = []
    for source, target, rows, width, step, scale in copies:
        bits, at_once = int(np.float32(scale).view(np.int32)), max(1, _CHUNK // width)
        for row in range(0, rows, at_once):
            entries.append((source, target, row, min(at_once, rows - row), width, step, bits))
    return cupy.asarray(np.array(entries, np.int64)) if entries else None, len(entries)
