"""Attention in bfloat16 by tiles on the tensor cores, forward and backward, in kernels of our own.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691): nothing of size queries x keys is kept, or made outside of registers.
The gradients of queries, and those of keys and values, come from kernels of their own, each of which computes the
scores again: so no two blocks add to the same number, and every run gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda import aside, margins
from refpeft.cuda.kernels import Source
from refpeft.fused import Mask

LONGEST = 256
"""The most dimensions of a head."""

_PADDING = 128  # statistics and documents' numbers are padded to a multiple of so many queries or keys: of any block
_GRANULE = 32  # queries or keys whose documents' numbers have a common range
_NO_WINDOW = 2**30


def supports(q: Array, k: Array, v: Array, mask: Mask, bias: Array | None) -> str | None:
    """Why these arrays and this mask are not for `forward` and `backward`; None: they are."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if bias is not None:
        return "a bias is added to the scores"
    if not all(array.dtype == bfloat16 for array in (q, k, v)):
        return "not all arrays are bfloat16"
    if int(cupy.cuda.Device().compute_capability) < 80:
        return "this GPU's tensor cores do not multiply bfloat16: that takes compute capability 8.0"
    if k.shape != v.shape or k.shape != (batch, kv_heads, keys, dim) or heads % kv_heads or not q.size or not k.size:
        return f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together, or there are none"
    if dim % 8 or dim > LONGEST:
        return f"heads have {dim} dimensions, which is no multiple of 8 up to {LONGEST}"
    tokens = mask.causal or (mask.segments is not None and mask.asking is None)  # whether queries are some of the keys
    if mask.keys > keys or (tokens and queries > keys):
        return f"{queries} queries and a mask of {mask.keys} keys need as many keys, found {keys}"
    if not all(map(_readable, (q, k, v))):
        return "rows of the arrays are not at multiples of 16 bytes"
    if any(kernel.shared > _most_shared() for kernel in _kernels(dim)):
        return f"a block of this GPU has too little shared memory for heads of {dim} dimensions"
    return None


def forward(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> tuple[Array, Array]:
    """softmax(scale q k^T + mask) v, and the logarithm of each row's sum of exponentials, as fused.attention.

    q (batch, heads, queries, dim), k and v (batch, kv_heads, keys, dim) as `supports` wants them; scale is above 0.
    What comes back: y like q, a view of memory (batch, queries, heads, dim), and float32 (batch, heads, queries). A row
    that sees nothing is 0, and its second number +inf. Raises KernelError where the kernels do not compile.
    """
    batch, heads, queries, dim = q.shape
    y, lse = margins.heads(q.shape), cupy.empty(q.shape[:3], np.float32)
    masked = _mask(mask, batch, queries, k.shape[2], dim)
    arrays = (*_view(q), *_view(k), *_view(v), *_view(y), lse)
    _forward(dim)((queries, heads, batch), *arrays, heads // k.shape[1], float(scale), *masked)
    return y, lse


def backward(
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    lse: Array,
    mask: Mask,
    scale: float,
    made: Sequence[Array | None],
) -> None:
    """The gradients of q, k and v, into the arrays of `made`; None where one is not wanted. g is that of y, any view.

    y and lse are what `forward` gave.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    g, y = (array if _readable(array) else cupy.ascontiguousarray(array) for array in (g, y))
    rows = _padded(queries)
    statistics = cupy.empty((batch, heads, 2, rows), np.float32)
    share = max(4, 1 << (dim // 8 - 1).bit_length())  # threads that treat a query: a power of two
    sum_up = _backward_queries(dim).source("flash_statistics")
    sum_up((rows * share // 128, heads, batch), 128, *_view(g), *_view(y), lse, statistics, queries, rows, share)
    arrays = (*_view(g), *_view(q), *_view(k), *_view(v), statistics)
    rest = (rows, heads // kv_heads, float(scale), *_mask(mask, batch, queries, keys, dim))
    dq, dk, dv = made

    def of_queries() -> None:
        _backward_queries(dim)((queries, heads, batch), *arrays, *_view(dq), *rest)

    def of_keys() -> None:
        for kernel in _backward_keys(dim, dk is not None, dv is not None):
            kernel((keys, kv_heads, batch), *arrays, *_view(dk), *_view(dv), *rest)

    if dq is None:
        of_keys()
    elif dk is None and dv is None:
        of_queries()
    else:
        aside.side_by_side(of_keys, of_queries)  # each has few blocks where texts are few


# ---- kernels ---------------------------------------------------------------------------------------------------------


class _Kernel:
    """The kernel that a .cu file is named after, for heads of `dim` dimensions.

    A block holds `held` tiles of `rows` rows a warp, and a double buffer for two tiles of `columns` rows.
    """

    def __init__(self, name: str, dim: int, rows: int, columns: int, held: int, **constants: int):
        stride = 2 * (-(-dim // 16) * 16 + 8)  # bytes of a row, as in flash.cuh
        for warps in (4, 2):  # fewer where a block of this GPU has less shared memory
            self.shared = stride * (held * rows * warps + 4 * columns) + 16 * columns
            if self.shared <= _most_shared():
                break
        self.name, self.block, self.threads = name, rows * warps, 32 * warps
        self.source = Source(f"{name}.cu", DIM=dim, ROWS=rows, COLUMNS=columns, WARPS=warps, **constants)

    def __call__(self, size: tuple[int, int, int], *args: Any) -> None:
        """Starts it for so many rows, heads, and rows of the batch."""
        rows, *others = size
        self.source(self.name)((-(-rows // self.block), *others), self.threads, *args, shared=self.shared)


# Rows a warp and columns of a tile, as large as 255 registers a thread allow: more columns for each number that is read
# from shared memory are more products for it. Found by `ptxas -v`: none of these spills more than a few bytes.


@functools.cache
def _forward(dim: int) -> _Kernel:
    rows, columns = (32, 64) if dim <= 128 else (16, 32)
    return _Kernel("flash_forward", dim, rows, columns, held=1)


@functools.cache
def _backward_queries(dim: int) -> _Kernel:
    rows, columns = (32, 32) if dim <= 128 else (16, 32)
    return _Kernel("flash_backward_queries", dim, rows, columns, held=2)


@functools.cache
def _backward_keys(dim: int, wants_k: bool, wants_v: bool) -> tuple[_Kernel, ...]:
    """The kernels that make the gradients of keys and of values: one for both, where a thread's registers hold both."""
    if dim > 128 and wants_k and wants_v:
        return _backward_keys(dim, True, False) + _backward_keys(dim, False, True)
    if not (wants_k or wants_v):
        return ()
    rows, columns = (32, 32) if dim <= 64 else (16, 64) if dim <= 128 else (16, 32)
    held = 1 + wants_k
    return (_Kernel("flash_backward_keys", dim, rows, columns, held=held, DK=wants_k, DV=wants_v),)


def _kernels(dim: int) -> tuple[_Kernel, ...]:
    return (_forward(dim), _backward_queries(dim), *_backward_keys(dim, True, True))


@functools.cache
def _most_shared() -> int:
    return cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]


# ---- their arguments -------------------------------------------------------------------------------------------------


def _readable(array: Array) -> bool:
    """Whether each row of the last axis lies together and begins at a multiple of 16 bytes."""
    *strides, last = (stride for stride, size in zip(array.strides, array.shape, strict=True) if size > 1)
    return last == array.itemsize and all(number % 16 == 0 for number in (*strides, array.data.ptr))


def _view(array: Array | None) -> tuple[Any, ...]:
    """An array, and its strides over batch, heads and time in numbers."""
    if array is None:
        return None, *[np.int64(0)] * 3
    return array, *(np.int64(stride // array.itemsize) for stride in array.strides[:3])


def _padded(count: int) -> int:
    return -(-count // _PADDING) * _PADDING


def _mask(mask: Mask, batch: int, queries: int, keys: int, dim: int) -> tuple[Any, ...]:
    """The last arguments of all kernels; where there are documents, their numbers are laid out by a kernel first."""
    extra = keys - mask.keys
    of_queries = of_keys = None
    if mask.segments is not None:
        segments, asking = (
            None if array is None else cupy.ascontiguousarray(array, np.int32) for array in (mask.segments, mask.asking)
        )
        granules = [_padded(count) // _GRANULE for count in (queries, keys)]
        of_queries, of_keys = (cupy.empty((batch, count, _GRANULE + 2), np.int32) for count in granules)
        lay_out = _forward(dim).source("flash_numbers")
        lay_out((max(granules), batch, 2), 32, segments, asking, of_queries, of_keys, queries, keys, extra)
    window = _NO_WINDOW if mask.window is None else min(int(mask.window), _NO_WINDOW)
    return queries, keys, extra, mask.causal, window, of_queries, of_keys
