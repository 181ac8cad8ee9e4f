"""Linear layers and low-rank factors in bfloat16: every product is one call of cuBLAS, which adds where that is asked.

Gradients of trained factors are made in float32 and added straight to the flat gradient buffer; those of activations
are added to what other branches left there already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import cupy
import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array, bfloat16
from refpeft.capturing import keep
from refpeft.cuda import aside, margins
from refpeft.cuda.blas import low, product
from refpeft.cuda.kernels import Source, contiguous
from refpeft.cuda.override import or_else, override
from refpeft.ops import expect, fit
from refpeft.quant import Frozen
from refpeft.tape import ADDED
from refpeft.tensor import Tensor, needs_of

_source = Source("linear.cu")
_float32 = np.dtype("f4")


def rows_of(x: Array) -> Array:
    """(..., width) as (rows, width)."""
    return x.reshape(-1, x.shape[-1])


@override(fused.frozen_linear, "bfloat16")
def frozen_linear(needs, x, bias=None, *, weight):
    dense = low_weight(weight)
    y = _product_and_bias(low(x), dense, bias)
    return y, (weight if needs[0] else None, needs, getattr(bias, "dtype", None))


@frozen_linear.backward(into=True)
def _(g, weight, needs, bias, into):
    dx = None if weight is None else factor_gradient(g, low_weight(weight), into[0])
    return (dx, _column_sums(g, bias) if needs[1:] == (True,) else None)[: len(needs)]


@override(ops.linear, "bfloat16")
def linear(needs, x, w, b=None):
    y = _product_and_bias(low(x), low(w), b)
    dtypes = [getattr(array, "dtype", None) for array in (x, w, b)]
    return y, (w, x if needs[1] else None, needs, dtypes)


def linear_at(place: Array, x: Tensor, w: Tensor) -> Tensor:
    """ops.linear of x (..., in) and w (out, in), whose result is at a place (..., out) that is there."""
    product(rows_of(x.data), low(w.data).T, out=rows_of(place))
    needs = needs_of((x, w))
    saved = w.data, x.data if needs[1] else None, needs, [x.dtype, w.dtype, None]
    return linear.made(place, needs, (x, w), saved) if True in needs else Tensor(place)


@linear.backward(into=True, beside=True)
def _(g, w, x, needs, dtypes, into):
    dx = factor_gradient(g, low(w), into[0], dtypes[0]) if needs[0] else None
    dw = None if x is None else weight_gradient(g, x, into[1], dtypes[1])
    return (dx, dw, _column_sums(g, dtypes[2]) if needs[2:] == (True,) else None)[: len(needs)]


@override(fused.addmm, "bfloat16", takes_over=True)
def addmm(needs, y, u, B, *, alpha, spare):
    if y.dtype != bfloat16:
        return NotImplemented
    expect("y", y, *u.shape[:-1], len(B))
    total = y if spare and y.flags.c_contiguous else y.copy(order="C")
    product(rows_of(low(u)), low(B).T, out=rows_of(total), alpha=float(alpha), add=True)
    saved_B, saved_u = (B if needs[1] else None), (u if needs[2] else None)
    return total, (float(alpha), saved_B, saved_u, needs[0], B.dtype, u.dtype)


@addmm.backward(into=True, beside=True)
def _(g, alpha, B, u, y_needed, B_dtype, u_dtype, into):
    du = None if B is None else factor_gradient(g, low(B), into[1], u_dtype, alpha)
    dB = None if u is None else weight_gradient(g, u, into[2], B_dtype, alpha)
    return g if y_needed else None, du, dB


@override(ops.matmul, "bfloat16")
def matmul(needs, a, b):
    if a.ndim < 2 or b.ndim < 2:
        return NotImplemented
    if b.ndim == 2 and a.ndim > 2:
        y = cupy.empty((*a.shape[:-1], b.shape[1]), bfloat16)
        product(rows_of(low(a)), low(b), out=rows_of(y))
    else:
        y = product(low(a), low(b))
    return y, (a.shape, a.dtype, b.shape, b.dtype, a if needs[1] else None, b if needs[0] else None)


@matmul.backward(into=True, beside=True)
def _(g, a_shape, a_dtype, b_shape, b_dtype, a, b, into):
    da = db = None
    if len(b_shape) == 2 and len(a_shape) > 2:  # one matrix for the whole stack: one product
        da = None if b is None else factor_gradient(g, low(b).T, into[0], a_dtype)
        db = None if a is None else weight_gradient(a, g, into[1], b_dtype)
        return da, db
    if b is not None:
        da = _summed(product(low(g), low(b).swapaxes(-1, -2), dtype=_float32), a_shape, a_dtype)
    if a is not None:
        db = _summed(product(low(a).swapaxes(-1, -2), low(g), dtype=_float32), b_shape, b_dtype)
    return da, db


def low_weight(weight: Callable[[], Array]) -> Array:
    """A frozen weight in bfloat16: a Dense or a Quantized one has that without a detour."""
    return weight.low() if isinstance(weight, Frozen) else low(weight())


def factor_gradient(
    g: Array, w: Array, into: Array | None, dtype: np.dtype = bfloat16, alpha: float = 1.0
) -> Array | object:
    """alpha g @ w, of g (..., out) and w (out, in): (..., in), added to `into` where it can be."""
    rows = rows_of(low(g))
    if into is not None and margins.step(into) is not None:
        aside.join_all_that_adds_to(into)
        product(rows, w, out=rows_of(into), alpha=alpha, add=True)
        return ADDED
    found = cupy.empty((*g.shape[:-1], w.shape[1]), dtype)  # no view: more may be added to it
    product(rows, w, out=rows_of(found), alpha=alpha)
    return found


def weight_gradient(g: Array, x: Array, into: Array | None, dtype: np.dtype, alpha: float = 1.0) -> Array | object:
    """alpha g.T @ x, of g (..., out) and x (..., in): (out, in), added to `into` where it can be."""
    g, x = rows_of(low(g)), rows_of(low(x))
    if into is not None and into.flags.c_contiguous:
        aside.run(lambda: product(g.T, x, out=into, alpha=alpha, add=True), [into], [g, x])
        return ADDED
    return product(g.T, x, dtype=dtype, alpha=alpha)


def _summed(gradient: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """A float32 gradient as that of an input of this shape, which may have been broadcast, and dtype."""
    return fit(gradient, shape).astype(dtype, copy=False)


def _product_and_bias(x: Array, w: Array, bias: Array | None) -> Array:
    """x @ w.T + bias: the product is added to rows that the bias was written to, so that sums are rounded once."""
    y = cupy.empty((*x.shape[:-1], w.shape[0]), bfloat16)
    if bias is not None:
        write_bias(y, bias)
    product(rows_of(x), w.T, out=rows_of(y), add=bias is not None)
    return y


def _write_bias(y: Array, bias: Array) -> None:
    expect("bias", bias, y.shape[-1])
    y[...] = bias.astype(bfloat16)


@or_else("copies biases", _write_bias)
def write_bias(y: Array, bias: Array) -> None:
    """Makes every row of y (..., out) the bias (out,)."""
    expect("bias", bias, y.shape[-1])
    bias = contiguous(bias.astype(_float32, copy=False))
    _source("write_rows")(-(-y.size // 2048), 256, y, bias, np.int64(y.size), y.shape[-1])


def _column_sums(g: Array, dtype: np.dtype) -> Array:
    """The sums of g (..., out) over all rows, added up in float32: a product with ones."""
    rows = rows_of(low(g))
    return product(keep(_ones(len(rows))), rows, dtype=dtype)[0]


@functools.lru_cache(maxsize=64)
def _ones(count: int) -> Array:
    with cupy.cuda.using_allocator(None):  # not of a graph's own memory: it is used after that graph, too
        return cupy.ones((1, count), bfloat16)
