"""Block-wise quantization to a code book: what NF4, FP4 and the 8-bit maps have in common. For authors of quantizers.

The rules (refpeft.compat has those of bitsandbytes where they differ):
- Blocks run over the flattened array; the last one may be short, and is treated as any other.
- All arithmetic is float32. absmax is a block's largest magnitude; a value is multiplied by the rounded 1 / absmax.
- The code is that of the nearest level: a scaled value on the midpoint of two takes the lower, equal levels the first.
- A block of zeros, or of magnitudes below float32's smallest normal number, has absmax 0 and decodes to zeros.
- Codes of 16 levels lie two in a byte, the first in the high half; an unused half is the code of 0.
- A decoded value is level * absmax, rounded to float32, and so after a factor and an offset where there are these; then
  it is rounded to the dtype that is asked for.
- NaN, infinity and what is near it (above 2^120) are refused before (refpeft.quant).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import blockwise_numpy
from .backend import Array, xp_of

TINY = np.finfo("f4").tiny

ONE = np.float32(1)

FASTER: dict[Any, ModuleType] = {np: blockwise_numpy}
"""By array module: a module with `encode` and `decode`, the same bits as here, or NotImplemented."""


class Book(NamedTuple):
    """A code book: code c stands for levels[c], and a scaled value with n of the sorted `bounds` below it has codes[n].

    16 levels make 4-bit codes, 256 levels 8-bit codes. All arrays belong to one array module; uint8 and float32.
    """

    levels: Array
    bounds: Array
    codes: Array


class Blocks(NamedTuple):
    """An encoded array: number i is levels[code i] * absmax[i // block] * factor, plus an offset if any."""

    codes: Array  # uint8 of any shape, in C order; two in a byte where there are 16 levels
    absmax: Array | Blocks  # float32, one a block, or these encoded themselves: double quantization
    block: int
    levels: Array  # float32
    offset: Array | None = None  # float32, 0-d
    factor: np.float32 = ONE


def nearest(levels: np.ndarray, xp: ModuleType = np) -> Book:
    """The book of these float32 levels under the rules above, in arrays of `xp`."""
    rising, codes = np.unique(levels, return_index=True)
    return Book(xp.asarray(levels), xp.asarray((rising[1:] + rising[:-1]) / 2), xp.asarray(codes.astype("u1")))


def reciprocal(absmax: Array) -> Array:
    """1 / absmax, and 0 for a block of zeros."""
    return (absmax >= TINY) / xp_of(absmax).maximum(absmax, TINY)  # smaller numbers are 0 on a GPU


def encode(
    array: Array, block: int, book: Book, reciprocal: Callable[[Array], Array] = reciprocal
) -> tuple[Array, Array]:
    """(codes, absmax (blocks,)) of a finite float32 array; codes are a uint8 vector, two in a byte for 16 levels.

    `reciprocal` says by what a block is multiplied, given its absmax; where by 0, it is a block of zeros.
    """
    xp = xp_of(array)
    if xp in FASTER and (found := FASTER[xp].encode(array, block, book, reciprocal)) is not NotImplemented:
        return found
    blocks = xp.pad(array.reshape(-1), (0, -array.size % block)).reshape(-1, block)
    absmax = xp.abs(blocks).max(axis=1)
    factor = reciprocal(absmax)
    absmax *= factor > 0
    scaled = blocks * factor[:, None]
    codes = book.codes[xp.searchsorted(book.bounds, scaled.reshape(-1))]
    if len(book.levels) == 16:
        return pack_nibbles(codes, unused=0)[: (array.size + 1) // 2], absmax
    return codes[: array.size], absmax


def decode(blocks: Blocks, shape: tuple[int, ...], dtype: np.dtype, rows: slice | None = None) -> Array:
    """The array of this shape and dtype that was encoded to `blocks`, or these `rows` of a matrix alone."""
    if rows is not None:
        return _decode_rows(blocks, shape, dtype, rows)
    xp = xp_of(blocks.codes)
    if xp in FASTER and (found := FASTER[xp].decode(blocks, shape, dtype)) is not NotImplemented:
        return found
    if isinstance(blocks.absmax, Blocks):
        return decode(blocks._replace(absmax=_array(blocks.absmax)), shape, dtype)
    codes = blocks.codes.reshape(-1)
    if len(blocks.levels) == 16:
        codes = unpack_nibbles(codes, prod(shape))
    values = blocks.levels[codes] * blocks.absmax.repeat(blocks.block)[: codes.size]
    if blocks.factor != ONE:
        values *= blocks.factor
    if blocks.offset is not None:
        values += blocks.offset
    return values.reshape(shape).astype(dtype, copy=False)


def _decode_rows(blocks: Blocks, shape: tuple[int, ...], dtype: np.dtype, rows: slice) -> Array:
    """Whole blocks, from the one in which the first of these rows begins, and of them the rows."""
    first, last = rows.start * shape[1], rows.stop * shape[1]
    at, per_byte = first // blocks.block, 2 if len(blocks.levels) == 16 else 1
    start = at * blocks.block
    codes = blocks.codes.reshape(-1)[start // per_byte : -(-last // per_byte)]
    absmax = _array(blocks.absmax).reshape(-1)[at:]
    values = decode(blocks._replace(codes=codes, absmax=absmax), (last - start,), dtype)
    return values[first - start :].reshape(-1, shape[1])


def _array(absmax: Array | Blocks) -> Array:
    """Float32 constants, decoded where they are encoded."""
    return decode(absmax, (absmax.codes.size,), np.dtype("f4")) if isinstance(absmax, Blocks) else absmax


def pack_nibbles(codes: Array, unused: int) -> Array:
    """4-bit codes two in a byte, the first in the high half; the last half of an odd number is `unused`."""
    xp = xp_of(codes)
    codes = xp.pad(codes, (0, codes.size % 2), constant_values=unused)
    return codes[0::2] << 4 | codes[1::2]


def unpack_nibbles(packed: Array, count: int) -> Array:
    """The 4-bit codes of pack_nibbles."""
    return xp_of(packed).stack((packed >> 4, packed & 15), axis=-1).reshape(-1)[:count]


def dynamic_map(signed: bool = True) -> np.ndarray:
    """The dynamic map of arXiv:2110.02861, section 1.3: 256 sorted float32 levels in [-1, 1] ([0, 1] if not signed),
    dense near 0, which is one of them."""
    low, parts = np.float32(0.1), [np.array([0, 1], "f4")]
    for i in range(7):  # the middles of n intervals of [0.1, 1], times 10^(i - 6), with either sign
        n = 2**i if signed else 2 ** (i + 1)
        at = np.arange(n + 1)
        step = np.float64((1 - low) / np.float32(n))  # torch.linspace: a float32 step, counted from the nearer end
        ends = np.where(at < (n + 1) // 2, low + step * at, 1 - step * (n - at)).astype("f4")
        middles = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / 2)
        parts += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(parts))
