"""Dropout in one launch: random words are made in registers, and made again in the backward pass: no mask is kept."""

from __future__ import annotations

from typing import NamedTuple

import cupy
import numpy as np

from refpeft import fused
from refpeft.backend import Array
from refpeft.cuda import margins
from refpeft.cuda.kernels import Source, contiguous
from refpeft.cuda.override import override
from refpeft.rng import Stream, least_kept
from refpeft.tape import ADDED

_source = Source("dropout.cu")


class _Mask(NamedTuple):
    """Which elements are kept, and times what: the kernel's arguments from `first` to `scale`, by its names."""

    first: np.int64
    begins: Array | None
    row: int
    width: int
    slot: Array | None
    crc: np.uint32
    adler: np.uint32
    seed: np.uint32
    upper_seed: np.uint32
    least: np.uint32
    scale: np.float32


@override(fused.dropout, "bfloat16", "float32")
def dropout(needs, x, *, rate, stream: Stream):
    order = stream.order
    if not 0 <= rate < 1 or not x.size or (order is not None and x.size >= 2**32):
        return NotImplemented
    first, lies = stream.take(x.size), (None, 1, 1)
    if order is not None:
        first, lies = 0, (order.begins, order.row, order.width)
    seed = stream.seed & 0xFFFFFFFF, stream.seed >> 32 & 0xFFFFFFFF
    numbers = (np.uint32(number) for number in (*stream.words, *seed, least_kept(rate)))
    mask = _Mask(np.int64(first), *lies, stream.slot, *numbers, np.float32(1 / (1 - rate)))
    return _masked(x, mask), (mask,)


@dropout.backward(into=True)
def _(g, mask, into):
    if into[0] is None or into[0].dtype != g.dtype or not _is_aligned(into[0]):
        return (_masked(g, mask),)
    _masked(g, mask, into[0])
    return (ADDED,)


def _masked(x: Array, mask: _Mask, onto: Array | None = None) -> Array:
    """`x` with that mask; with `onto` added to that, in C order, in place."""
    step = None if x.flags.c_contiguous or x.size >= 2**32 else margins.step(x)
    if step is None:
        x, row, step = contiguous(x), 0, 0
    else:
        row = x.shape[-1]
    y = cupy.empty(x.shape, x.dtype) if onto is None else onto
    in_fours = mask.first % 4 == 0 if mask.begins is None else mask.row % 8 == 0 and mask.width % 4 == 0
    eights = in_fours and row % 8 == 0 and step % 8 == 0 and x.data.ptr % 16 == 0
    blocks = -(-x.size // 2048)
    _source("dropout", x.dtype)(blocks, 256, x, y, np.int64(x.size), *mask, bool(eights), row, np.int64(step), onto)
    return y


def _is_aligned(array: Array) -> bool:
    """Whether it is in C order, and can be read 16 bytes at a time."""
    return array.flags.c_contiguous and array.data.ptr % 16 == 0
