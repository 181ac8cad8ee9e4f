"""AdamW and the clipping of gradients on flat float32 buffers: a launch or two each, whatever the number of values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array
from refpeft.cuda import aside
from refpeft.cuda.kernels import Source
from refpeft.cuda.override import or_else
from refpeft.optim import KERNELS, AdamW, Flat

_source = Source("adam.cu")
_float32 = np.dtype("f4")
_MOST_BLOCKS = 1024  # whose threads go on with what is left: about as many as run at the same time


@or_else("clips gradients")
def clip(flat: Flat, limit: float) -> Array:
    """Flat.clip: the device makes a factor of the norm, and touches gradients only where that is below 1."""
    grads = flat.grads
    aside.join()
    if grads.dtype != _float32:
        return NotImplemented
    blocks = min(_MOST_BLOCKS, -(-grads.size // 1024))
    of_block, norm = cupy.empty(blocks, _float32), cupy.empty((), _float32)
    _kernel("sums_of_squares")(blocks, 256, grads, of_block, np.int64(grads.size))
    _kernel("root_of_sum")(1, 256, of_block, norm, blocks)
    if limit:
        _kernel("clip")(blocks, 256, grads, norm, float(limit), np.int64(grads.size))
    return norm


@or_else("takes AdamW's steps")
def adamw(optimizer: AdamW, p: Array, g: Array, now: SimpleNamespace, m: Array, v: Array) -> Any:
    """AdamW.change of a part, of any size."""
    if p.dtype != _float32:
        return NotImplemented
    (b1, b2), size = optimizer.betas, p.size
    _kernel("adamw")(
        -(-size // 256), 256, p, g, m, v, optimizer.flat.norm, now.decay, now.unbias, now.rate,
        b1, 1 - b1, b2, 1 - b2, optimizer.eps, np.int64(size),
    )  # fmt: skip
    return None


def _kernel(name: str) -> Any:
    return _source(name, _float32)


KERNELS |= {(Flat, cupy.ndarray): clip, (AdamW, cupy.ndarray): adamw}
