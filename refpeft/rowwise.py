"""Rows in pieces, blocks along rows, and small numbers: what the row-wise formats share. For authors of quantizers.

A row runs along the last axis. Blocks end where a row does: the last one of a row is filled up with zeros.

A format is written down for a few rows (`pack`, `unpack`); pack_rows and unpack_rows apply that to a whole weight. So
temporary arrays are as small as a piece, whatever the size of the weight: they stay in a cache, and NumPy's pieces
are worked on in several threads. What holds for a whole tensor is found before, and handed to the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from math import prod
from types import ModuleType
from typing import Literal

import ml_dtypes
import numpy as np

from . import arena, blockwise_numpy
from .backend import Array, xp_of

PIECE_ON_A_DEVICE = 1 << 24
"""Elements worked on at a time on a GPU, where a piece should be worth starting kernels for it."""

E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
"""The small floats of the OCP: magnitudes up to 6 and up to 448."""


def pack_rows(pack: Callable[..., tuple[Array, ...]], weight: Array, *constants: Array) -> list[Array]:
    """The arrays of pack(rows, *constants of these rows), joined along their first axis.

    weight     (..., length); `pack` gets some of its rows (n, length), an even number except at the end
    constants  (rows, ...) each, or (1, ...) for all rows
    """
    rows = weight.reshape(-1, weight.shape[-1])
    count, xp = len(rows), xp_of(weight)

    def packed(start: int, stop: int) -> tuple[Array, ...]:
        return pack(rows[start:stop], *(_of_rows(array, start, stop, count) for array in constants))

    two = min(2, count)  # rows, which show what the arrays are like
    joined = [xp.empty((-(-len(like) * count // two), *like.shape[1:]), like.dtype) for like in packed(0, two)]

    def piece(start: int, stop: int) -> None:
        for whole, part in zip(joined, packed(start, stop), strict=True):
            _of_rows(whole, start, stop, count)[:] = part

    _in_pieces(piece, *rows.shape, xp)
    return joined


def unpack_rows(
    unpack: Callable[..., None],
    shape: tuple[int, ...],
    dtype: np.dtype,
    parts: Sequence[Array],
    block: int = 1,
    rows: slice | None = None,
) -> Array:
    """The array of this shape and dtype that unpack(values, *parts of these rows) fills with some rows at a time.

    parts   arrays that hold row after row along their first axis, or one element for all rows
    block   `values` (n, length; float32, C order) has rows of whole blocks; what is beyond the end of a row is left out
    rows    those of a matrix that alone are asked for: an even one is the first
    """
    xp, count = xp_of(*parts), prod(shape[:-1])
    if rows is not None:
        parts = [_of_rows(part, rows.start, rows.stop, count) for part in parts]
        return unpack_rows(unpack, (rows.stop - rows.start, shape[1]), dtype, parts, block)
    result = (arena if xp is np else xp).empty((count, shape[-1]), dtype)
    length = shape[-1] + -shape[-1] % block
    direct = dtype == np.float32 and length == shape[-1]

    def piece(start: int, stop: int) -> None:
        values = result[start:stop] if direct else xp.empty((stop - start, length), "f4")
        unpack(values, *(_of_rows(part, start, stop, count) for part in parts))
        if not direct:
            result[start:stop] = values[:, : shape[-1]]

    _in_pieces(piece, *result.shape, xp)
    return result.reshape(shape)


def _of_rows(array: Array, start: int, stop: int, rows: int) -> Array:
    """The part of `array` for some of its rows. All rows have the same number of elements along its first axis; that is
    a half more than a whole number where two codes lie in a byte, and for an even `start` no byte is shared."""
    return array if len(array) == 1 else array[start * len(array) // rows : stop * len(array) // rows]


def _in_pieces(piece: Callable[[int, int], None], rows: int, columns: int, xp: ModuleType) -> None:
    """piece(start, stop) for pieces that make up all rows, each of an even number of rows except for the last one."""
    elements = blockwise_numpy.CHUNK if xp is np else PIECE_ON_A_DEVICE
    step = max(2, elements // columns // 2 * 2)

    def span(start: int, stop: int) -> None:
        for at in range(start, stop, step):
            piece(at, min(at + step, stop))

    if xp is np:
        blockwise_numpy.in_parallel(span, rows, step)
    else:
        span(0, rows)


def blocks_of(array: Array, size: int) -> Array:
    """`array` (..., length) as (rows, blocks, size)."""
    rows = array.reshape(prod(array.shape[:-1]), array.shape[-1])
    missing = -rows.shape[1] % size
    if missing:
        rows = xp_of(array).pad(rows, ((0, 0), (0, missing)))
    return rows.reshape(len(rows), -1, size)


def rows_of(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The array of this shape that blocks_of took apart."""
    return blocks.reshape(prod(shape[:-1]), -1)[:, : shape[-1]].reshape(shape)


def aligned(values: Array, size: int, *constants: Array) -> list[Array]:
    """`values` (rows, length) and constants of its blocks, (rows, blocks) each, in shapes that go together: views of
    both where blocks fill a row, else the values as they are and the constants repeated."""
    rows, length = values.shape
    if length % size == 0:
        return [values.reshape(rows, -1, size), *(constant[..., None] for constant in constants)]
    return [values, *(constant.repeat(size, axis=1)[:, :length] for constant in constants)]


@cache
def numbers(kind: type, xp: ModuleType = np) -> Array:
    """What all 16 codes of E2M1, or all 256 of E4M3, stand for: float32, NaN too. A GPU has these types no more than
    NumPy does, and no ml_dtypes: there they are tables."""
    return xp.asarray(np.arange(16 if kind is E2M1 else 256, dtype="u1").view(kind).astype("f4"))


@cache
def magnitudes(kind: type) -> np.ndarray:
    """The finite ones of them that are not negative, by code: rising."""
    half = numbers(kind)[: len(numbers(kind)) // 2]
    return half[np.isfinite(half)]


@cache
def _bounds(kind: type) -> list[np.float32]:
    """Where a magnitude gets the next code: above the middles, and at those middles whose upper code is even."""
    levels = magnitudes(kind)
    middles = (levels[1:] + levels[:-1]) / 2
    middles[1::2] = np.nextafter(middles[1::2], np.float32(0))
    return list(middles)


def ranks(array: Array, bounds: Iterable[np.float32]) -> Array:
    """uint8: how many of the bounds, 255 at most, are below each number."""
    codes = xp_of(array).zeros(array.shape, "u1")
    for bound in bounds:  # a third of the time of searchsorted, an eighth of its memory
        codes += array > bound
    return codes


def round_to(kind: type, array: Array) -> Array:
    """uint8 codes of the nearest magnitudes of E2M1 or E4M3 (a tie takes the even code); above the largest, that one.

    `array` is float32 and not negative.
    """
    if kind is E4M3 and xp_of(array) is np:
        return np.minimum(array, magnitudes(E4M3)[-1]).astype(E4M3).view("u1")
    return ranks(array, _bounds(kind))


def encode_e2m1(array: Array) -> Array:
    """E2M1 codes of a float32 array (..., even), two in a byte, the first in the low half; bit 3 is the sign."""
    xp = xp_of(array)
    codes = round_to(E2M1, xp.abs(array)) | xp.signbit(array).astype("u1") << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def decode_e2m1(packed: Array, values: Array) -> None:
    """Fills `values`, float32 in C order, with the numbers of encode_e2m1's bytes."""
    look_up(tuple(numbers(E2M1).tolist()), packed, values, first="low")


def look_up(levels: tuple[float, ...], packed: Array, values: Array, first: Literal["high", "low"] = "high") -> None:
    """Fills `values`, float32 in C order, with the levels of codes that lie two in a byte, the first in that half."""
    xp, packed, values = xp_of(packed), packed.reshape(-1), values.reshape(-1)
    table = _pairs(levels, first, xp)
    if xp is np and values.size % 2 == 0:
        # mode="clip" because np.take with another mode writes to a copy first
        np.take(table, packed, out=values.view(table.dtype), mode="clip")
    else:
        values[:] = table[packed].view("f4")[: values.size]


@cache
def _pairs(levels: tuple[float, ...], first: Literal["high", "low"], xp: ModuleType) -> Array:
    """The two float32 values of every byte, as 256 single elements of 8 bytes."""
    halves = [np.arange(256) >> 4, np.arange(256) & 15]
    codes = np.stack(halves if first == "high" else halves[::-1], axis=1)
    return xp.asarray(np.array(levels, "f4")[codes].view("f8").reshape(-1))
