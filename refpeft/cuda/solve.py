"""Systems of equations of small matrices, in one launch that a CUDA graph can hold, as calls of cuSOLVER cannot."""

from __future__ import annotations

import math

import cupy
import numpy as np

from refpeft import ops
from refpeft.backend import Array
from refpeft.cuda.blas import product
from refpeft.cuda.kernels import Source, contiguous
from refpeft.cuda.override import override
from refpeft.ops import fit

_COLUMNS = 32  # of right sides that a block takes
_MOST = 64  # rows of a matrix
_source = Source("solve.cu", COLUMNS=_COLUMNS)


@override(ops.solve, "float32")
def solve(needs, a, b):
    square = a.ndim >= 2 and a.shape[-1] == a.shape[-2]
    if not square or b.ndim < 2 or b.shape[-2] != a.shape[-1] or not 0 < a.shape[-1] <= _MOST or not b.size:
        return NotImplemented
    x = _solved(a, b)
    return x, (a, b.shape, x if needs[0] else None, needs[1])


@solve.backward
def _(g, a, b_shape, x, b_needed):
    db = _solved(a.swapaxes(-1, -2), g)
    da = None if x is None else fit(product(db, x.swapaxes(-1, -2), alpha=-1.0), a.shape)
    return da, fit(db, b_shape) if b_needed else None


def _solved(a: Array, b: Array) -> Array:
    """The x with a @ x = b: a (..., n, n), b (..., n, k), whose leading axes broadcast."""
    leading, (n, k) = np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), b.shape[-2:]
    a, b = (contiguous(cupy.broadcast_to(array, leading + array.shape[-2:])) for array in (a, b))
    x = cupy.empty(b.shape, b.dtype)
    grid = math.prod(leading), -(-k // _COLUMNS)
    _source("solve", b.dtype)(grid, 256, a, b, x, n, k, shared=4 * n * (n + _COLUMNS))
    return x
