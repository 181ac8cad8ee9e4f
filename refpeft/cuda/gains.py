"""Going back through rows times a gain for each column: from one pass over memory, by gains.cu."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda import margins
from refpeft.cuda.kernels import Source
from refpeft.cuda.maps import float32, mapped, summed
from refpeft.cuda.override import or_else

_source = Source("gains.cu")
_COLUMNS, _LEAST_ROWS = 256, 64  # of a block
_BLOCKS = 1024  # about: several for each processor of a device


def are(gain: Any, x: Any) -> bool:
    """Whether `gain` is a float32 number for each column of rows x (..., width) of bfloat16."""
    if not all(isinstance(array, cupy.ndarray) for array in (gain, x)) or (gain.dtype, x.dtype) != (float32, bfloat16):
        return False
    return x.ndim > 1 and x.size > 0 and gain.shape[-1:] == x.shape[-1:] and gain.size == x.shape[-1]


def backward(g: Array, x: Array, gain: Array, dx: Array, into: Array | None = None) -> Array:
    """Fills dx with gain g; the sums of g x over all rows, (width,) in float32, or added to `into`, which comes back.

    g, x and dx are rows (..., width) in bfloat16, gain (width,). The order of sums goes by the shape alone.
    """
    if all(map(_in_eights, (g, x, dx))):
        partial = _one_pass(g, x, gain, dx)
        if partial is not NotImplemented:
            return summed("copy", partial, shape=partial.shape, axes=(0,), into=into)
    mapped("mul", g, gain, out=dx)
    return summed("mul", g, x, shape=g.shape, axes=tuple(range(g.ndim - 1)), into=into)


@or_else("goes back through gains")
def _one_pass(g: Array, x: Array, gain: Array, dx: Array) -> Array:
    width = x.shape[-1]
    rows, across = x.size // width, -(-width // _COLUMNS)
    per = -(-rows // min(-(-rows // _LEAST_ROWS), max(1, _BLOCKS // across)))
    partial = cupy.empty((-(-rows // per), width), float32)
    arrays = (g, _step(g), x, _step(x), gain, dx, _step(dx))
    _source("gain_backward")((across, len(partial)), _COLUMNS, *arrays, partial, rows, width, per)
    return partial


def _in_eights(x: Array) -> bool:
    """Whether rows of an array can be read and written in eights."""
    step = margins.step(x)
    return step is not None and step % 8 == 0 and x.shape[-1] % 8 == 0 and x.data.ptr % 16 == 0


def _step(x: Array) -> np.int64:
    return np.int64(margins.step(x))
