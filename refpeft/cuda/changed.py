"""Linear layers whose weights a method makes anew in every pass, in bfloat16, and lengths of rows of what is made so.

Such a weight is made as the plain pair makes it, in float32 from float32 values, and rounded once to be a factor. Its
gradient comes out of the product in float32, and goes from there to the values. Nothing dense is kept between passes.
"""

from __future__ import annotations

from collections.abc import Callable

import cupy
import numpy as np

from refpeft import fourier, fused, lowrank
from refpeft.backend import Array, bfloat16
from refpeft.cuda import margins
from refpeft.cuda.blas import low, product
from refpeft.cuda.gather import put, rows
from refpeft.cuda.kernels import Launch, Source, contiguous, row_block
from refpeft.cuda.linear import factor_gradient, low_weight, rows_of, weight_gradient
from refpeft.cuda.maps import mapped, summed
from refpeft.cuda.override import override
from refpeft.ops import expect
from refpeft.quant import Dense
from refpeft.tape import ADDED

_float32 = np.dtype("f4")
_source = Source("changed.cu")
_ROWS, _LARGEST = 8, 1024  # rows of a block, as in changed.cu, and the highest rank that it has room for


def _wide(values: Array) -> Array:
    return values.astype(_float32, copy=False)


def _like(gradient: Array | None, values: Array) -> Array | None:
    """A float32 gradient in the dtype of its values, which may be bfloat16 where another op made them."""
    return None if gradient is None else gradient.astype(values.dtype, copy=False)


def _times(x: Array, w: Array) -> Array:
    """x (..., in) @ w.T of w (out, in), in bfloat16."""
    y = cupy.empty((*x.shape[:-1], len(w)), bfloat16)
    product(rows_of(low(x)), w.T, out=rows_of(y))
    return y


def _back(needs: tuple[bool, bool], g: Array, x: Array, make: Callable[[], Array], into: Array | None) -> tuple:
    """(the gradient of x, that of the weight in float32), None where one is not needed; `make` makes the weight."""
    dx = factor_gradient(g, make(), into, x.dtype) if needs[0] else None
    return dx, weight_gradient(g, x, None, _float32) if needs[1] else None


# ---- a frozen weight times a product of low rank ---------------------------------------------------------------------


@override(fused.hadamard_linear, "bfloat16")
def hadamard_linear(needs, x, B, A, *, weight):
    return _times(x, _hadamard(B, A, weight)), (weight, x, B, A, needs)


@hadamard_linear.backward(into=True)
def _(g, weight, x, B, A, needs, into):
    trained = needs[1] or needs[2]
    dx, dense = _back((needs[0], trained), g, x, lambda: _hadamard(B, A, weight), into[0])
    if not trained:
        return dx, None, None
    mapped("mul", dense, low_weight(weight), out=dense)  # the gradient of B @ A
    dB, dA = product(dense, _wide(A).T) if needs[1] else None, product(_wide(B).T, dense) if needs[2] else None
    return dx, _like(dB, B), _like(dA, A)


def _hadamard(B: Array, A: Array, weight: Callable[[], Array]) -> Array:
    return mapped("mul", product(_wide(B), _wide(A)), low_weight(weight))


@override(lowrank.row_gains, "float32")
def row_gains(needs, m, B, A, *, weight, alpha):
    (out, r), width = B.shape, A.shape[-1]
    if needs[1] or needs[2] or r > _LARGEST or m.shape != (out,) or len(A) != r:
        return NotImplemented
    dense = _with_step(weight.array if isinstance(weight, Dense) else weight())  # in a room, others are behind rows
    if dense.shape != (out, width):
        return NotImplemented
    gains, norms = cupy.empty(out, _float32), cupy.empty(out, _float32)
    _source("row_gains", dense.dtype)(
        *(-(-out // _ROWS), row_block(4 * width, 256)),
        *(gains, norms, contiguous(m), dense, np.int64(margins.step(dense)), contiguous(B), contiguous(A)),
        *(float(alpha), out, width, r),
        shared=_ROWS * r * 4,
    )
    return gains, (norms, needs)


@row_gains.backward(into=True)
def _(g, norms, needs, into):
    if not needs[0]:
        return None, None, None
    adds = into[0] is not None and into[0].flags.c_contiguous
    dm = into[0] if adds else cupy.empty(g.shape, _float32)
    _source("row_gains_backward", _float32)(-(-g.size // 256), 256, dm, contiguous(g), norms, g.size, adds)
    return ADDED if adds else dm, None, None


# ---- few numbers of a weight, and few columns of an output -----------------------------------------------------------


@override(fused.sparse_linear, "bfloat16")
def sparse_linear(needs, x, values, *, rows, columns, out):
    expect("values", values, *rows.shape)
    y = _times(x, _sparse(values, rows, columns, (out, x.shape[-1])))
    return y, (x, values, rows, columns, out, needs)


@sparse_linear.backward(into=True)
def _(g, x, values, down, across, out, needs, into):
    width = x.shape[-1]
    dx, dense = _back(needs, g, x, lambda: _sparse(values, down, across, (out, width)), into[0])
    dvalues = None if dense is None else rows(dense.reshape(-1), down * np.int32(width) + across)
    return dx, _like(dvalues, values)


def _sparse(values: Array, down: Array, across: Array, shape: tuple[int, int]) -> Array:
    dense = cupy.zeros(shape, bfloat16)
    put(dense, (down, across), low(values), add=False)
    return dense


@override(fused.add_columns, "bfloat16", takes_over=True)
def add_columns(needs, y, z, *, columns, spare):
    expect("z", z, *y.shape[:-1], len(columns))
    kernel = _source("add_to_columns")  # before anything is written
    total = y if spare and y.dtype == bfloat16 and y.flags.c_contiguous else low(y).copy(order="C")
    _of_columns(kernel, total, low(z), columns)
    return total, (columns, needs, y.dtype, z.dtype)


@add_columns.backward
def _(g, columns, needs, of_y, of_z):
    dz = cupy.empty((*g.shape[:-1], len(columns)), bfloat16) if needs[1] else None
    if dz is not None:
        _of_columns(_source("take_columns"), _with_step(low(g)), dz, columns)
        dz = dz.astype(of_z, copy=False)
    return g.astype(of_y, copy=False) if needs[0] else None, dz


def _of_columns(kernel: Launch, y: Array, z: Array, columns: Array) -> None:
    """Starts a kernel on rows y (..., width) and columns z (..., k) of them."""
    if z.size:
        arrays = (y, np.int64(margins.step(y)), contiguous(z), columns.astype(np.int32, copy=False))
        kernel(-(-z.size // 256), 256, *arrays, len(columns), np.int64(z.size))


def _with_step(x: Array) -> Array:
    """Rows at equal distances: themselves, or a copy."""
    return x if margins.step(x) is not None else contiguous(x)


# ---- weights of frequencies, and circulant ones ----------------------------------------------------------------------


@override(fourier.spectral_linear, "bfloat16")
def spectral_linear(needs, x, c, *, places, shape):
    return _times(x, _spectral(c, places, shape)), (x, c, places, shape, needs)


@spectral_linear.backward(into=True)
def _(g, x, c, places, shape, needs, into):
    dx, dense = _back(needs, g, x, lambda: _spectral(c, places, shape), into[0])
    return dx, None if dense is None else _like(fourier.spectral_gradient(dense, places), c)


def _spectral(c: Array, places: Array, shape: tuple[int, int]) -> Array:
    return low(fourier.spectral_weight(_wide(c), places, shape))


@override(fourier.circulant_linear, "bfloat16")
def circulant_linear(needs, x, w):
    expect("x", x, *x.shape[:-1], w.shape[1] * w.shape[2])
    return _times(x, _circulant(w)), (x, w, needs)


@circulant_linear.backward(into=True)
def _(g, x, w, needs, into):
    dx, dense = _back(needs, g, x, lambda: _circulant(w), into[0])
    return dx, None if dense is None else _like(_along_diagonals(dense, w.shape), w)


def _circulant(w: Array) -> Array:
    """The matrix (outs size, ins size) of w (outs, ins, size): row j of a block is w turned by j."""
    outs, ins, size = w.shape
    twice = cupy.concatenate((w, w), axis=2)
    o, i, one = twice.strides
    turned = cupy.ndarray((outs, size, ins, size), w.dtype, twice.data + size * one, strides=(o, -one, i, one))
    return mapped("copy", turned).reshape(outs * size, ins * size)


def _along_diagonals(dense: Array, shape: tuple[int, int, int]) -> Array:
    """The reverse, for gradients: of each block the sums along its diagonals, which go on at the other side."""
    outs, ins, size = shape
    blocks = dense.reshape(outs, size, ins, size)
    twice = cupy.concatenate((blocks, blocks), axis=3)
    o, j, i, one = twice.strides
    turned = cupy.ndarray((size, outs, ins, size), dense.dtype, twice.data, strides=(j + one, o, i, one))
    return summed("copy", turned, shape=turned.shape, axes=(0,))
