"""Rotary positions: one launch, which reads the heads where a linear layer left them and writes them likewise."""

from __future__ import annotations

from functools import partial
from typing import Any

import cupy
import numpy as np

from refpeft import fused
from refpeft.backend import Array, bfloat16
from refpeft.cuda import blas, margins
from refpeft.cuda.kernels import Source
from refpeft.cuda.override import override
from refpeft.tensor import Pending, Tensor

_source = Source("rope.cu")
_BLOCK = 256  # threads
_HEADS_EACH = 4  # heads that a thread turns, as in rope.cu


@override(fused.rope, "bfloat16", "float32")
def rope(needs, x, *, cos, sin):
    """For heads of a multiple of 16 numbers, and float32 tables."""
    if not takes(x, cos, sin):
        return NotImplemented
    cos, sin = cupy.ascontiguousarray(cos), cupy.ascontiguousarray(sin)
    return rotate(x, cos, sin, 1.0, _by_tokens(x)), (cos, sin)


@rope.backward
def _(g, cos, sin):
    return (rotate(g, cos, sin, -1.0, margins.heads(g.shape, g.dtype)),)  # which a linear layer reads


@fused.rope.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    """It waits for the attention that reads it: see refpeft.cuda.attention."""
    (x,) = inputs
    if not blas.is_training() or not isinstance(x, Tensor) or (type(x.data), x.dtype) != (cupy.ndarray, bfloat16):
        return None
    return Pending(fused.rope, partial(fused.rope.alone, x, **options), x.shape, bfloat16, (x, options))


def takes(x: Array, cos: Array, sin: Array) -> bool:
    """Whether heads x (batch, heads, time, dim) can be turned by these tables."""
    batch, _, time, dim = x.shape
    fit = cos.shape == sin.shape == (len(cos), 1, time, dim // 2) and len(cos) in (1, batch)
    return bool(fit and cos.dtype == sin.dtype == np.float32 and dim % 16 == 0 and x.size)


def _by_tokens(x: Array) -> Array:
    """Empty heads as x, a view of (batch, time, heads, dim)."""
    batch, heads, time, dim = x.shape
    return cupy.empty((batch, time, heads, dim), x.dtype).transpose(0, 2, 1, 3)


def rotate(x: Array, cos: Array, sin: Array, sign: float, y: Array, turned: int | None = None) -> Array:
    """x (batch, heads, time, dim), turned, in y, whose heads lie side by side, and which may be x.

    The tables (batch or 1, 1, time, dim / 2) are in C order. Only so many heads are `turned`, others are copied; all
    where None is given.
    """
    batch, heads, time, dim = x.shape
    if x.strides[3] != x.itemsize or any(stride % 16 for stride in x.strides[:3]) or x.data.ptr % 16:
        x = cupy.ascontiguousarray(x)
    threads = batch * time * -(-heads // _HEADS_EACH) * (dim // 16)
    strides = [np.int64(stride // x.itemsize) for stride in x.strides[:3]]
    table_row = np.int64(0 if len(cos) == 1 else time * dim // 2)
    _source("rotate", x.dtype)(
        -(-threads // _BLOCK),
        _BLOCK,
        x,
        *strides,
        cos,
        sin,
        table_row,
        y,
        np.int64(y.strides[2] // y.itemsize),
        batch,
        heads,
        heads if turned is None else turned,
        time,
        dim // 2,
        sign,
    )
    return y
