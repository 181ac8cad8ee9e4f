"""refpeft.blockwise for CuPy's arrays: the same bits, in one launch a weight.

Decoding takes constants that are encoded themselves (double quantization) as they are. What a kernel was not written
for is NotImplemented, and computed by the plain code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod

import cupy
import numpy as np

from refpeft import blockwise
from refpeft.backend import Array, bfloat16
from refpeft.blockwise import Blocks, Book
from refpeft.cuda.kernels import Source
from refpeft.cuda.override import or_else

_source = Source("blockwise.cu")
_float32 = np.dtype("f4")
_THREADS, _UNITS = 256, 4  # a thread decodes so many times eight numbers
_MOST = 1 << 35  # numbers of a weight


@or_else("decodes quantized weights")
def decode(blocks: Blocks, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """refpeft.blockwise.decode of a whole array."""
    nibbles, count = len(blocks.levels) == 16, prod(shape)
    arguments = _of_4_bits(blocks) if nibbles else _of_8_bits(blocks)
    if arguments is None or blocks.block % 8 or blocks.codes.data.ptr % 8 or not 0 < count < _MOST:
        return NotImplemented
    values = cupy.empty(shape, dtype if dtype == bfloat16 else _float32)
    kernel = _source("decode_4_bits" if nibbles else "decode_8_bits", values.dtype)
    kernel(-(-count // (8 * _UNITS * _THREADS)), _THREADS, *arguments, values, np.int64(count))
    return values.astype(dtype, copy=False)


def _of_4_bits(blocks: Blocks) -> tuple | None:
    """What decode_4_bits takes of these blocks; None where it does not take them."""
    absmax, inner = blocks.absmax, (None, None, None, 0)
    if blocks.offset is not None or blocks.factor != blockwise.ONE or not _power_of_two(blocks.block):
        return None
    if isinstance(absmax, Blocks):
        plain = absmax.factor == blockwise.ONE and not isinstance(absmax.absmax, Blocks)
        if not plain or len(absmax.levels) == 16 or not _power_of_two(absmax.block):
            return None
        inner = (absmax.codes, absmax.levels, absmax.offset, _log2(absmax.block))
        absmax = absmax.absmax
    return blocks.codes, blocks.levels, _log2(blocks.block), absmax, *inner


def _of_8_bits(blocks: Blocks) -> tuple | None:
    """The same of decode_8_bits."""
    if isinstance(blocks.absmax, Blocks):
        return None
    levels, factor = blocks.levels, float(blocks.factor)
    return blocks.codes, levels, len(levels), blocks.block, blocks.absmax, factor, blocks.offset


@or_else("quantizes weights")
def encode(array: Array, block: int, book: Book, reciprocal: Callable[[Array], Array]) -> tuple[Array, Array]:
    """refpeft.blockwise.encode."""
    if reciprocal is not blockwise.reciprocal or block % 2 or not array.size or array.dtype != _float32:
        return NotImplemented
    nibbles = len(book.levels) == 16
    codes = cupy.empty(-(-array.size // 2) if nibbles else array.size, "u1")
    absmax = cupy.empty(-(-array.size // block), _float32)
    kernel = _source("encode_4_bits" if nibbles else "encode_8_bits", _float32)
    flat, ranks = array.reshape(-1), (book.bounds, book.codes, len(book.bounds))
    warps = _THREADS // 32
    kernel(-(-absmax.size // warps), _THREADS, flat, np.int64(flat.size), block, *ranks, codes, absmax)
    return codes, absmax


def _power_of_two(block: int) -> bool:
    return block & block - 1 == 0


def _log2(block: int) -> int:
    return block.bit_length() - 1


blockwise.FASTER[cupy] = sys.modules[__name__]
