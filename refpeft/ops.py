"""Small differentiable operations: what authors of methods and models write forward maths with.

Names and meanings are NumPy's. Array arguments are positional, everything else is a keyword. All broadcast where NumPy
does; all are right in float32 and float64, on NumPy and CuPy. `Tensor` has the usual operators and methods.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from .backend import Array, concatenate, xp_of
from .backend import matmul as product
from .backend import stack as stacked
from .tape import Slice
from .tensor import Tensor, op


def fit(g: Array, shape: tuple[int, ...]) -> Array:
    """`g` summed over the axes along which an array of `shape` was broadcast."""
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)
    stretched = tuple(new + i for i, n in enumerate(shape) if n == 1 != g.shape[new + i])
    return g.sum(axis=tuple(range(new)) + stretched, keepdims=True).reshape(shape)


def expect(what: str, array: Array, *shape: int) -> None:
    """Raises the ValueError of an op whose input `what` must have this shape, and would broadcast in silence."""
    if array.shape != shape:
        raise ValueError(f"{what} has shape {list(array.shape)}: expected {list(shape)}")


def detach(x: Tensor) -> Tensor:
    """`x` as a constant: no gradient passes."""
    return Tensor(x.data)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


@op
def add(needs, a, b):
    """a + b"""
    return a + b, (a.shape if needs[0] else None, b.shape if needs[1] else None)


@add.backward
def _(g, a_shape, b_shape):
    return None if a_shape is None else fit(g, a_shape), None if b_shape is None else fit(g, b_shape)


@op
def sub(needs, a, b):
    """a - b"""
    return a - b, (a.shape if needs[0] else None, b.shape if needs[1] else None)


@sub.backward
def _(g, a_shape, b_shape):
    return None if a_shape is None else fit(g, a_shape), None if b_shape is None else fit(-g, b_shape)


@op
def mul(needs, a, b):
    """a * b"""
    return a * b, (a.shape, b.shape, a if needs[1] else None, b if needs[0] else None)


@mul.backward
def _(g, a_shape, b_shape, a, b):
    return None if b is None else fit(g * b, a_shape), None if a is None else fit(g * a, b_shape)


@op
def div(needs, a, b):
    """a / b"""
    y = a / b
    return y, (a.shape if needs[0] else None, b, y if needs[1] else None)


@div.backward
def _(g, a_shape, b, y):
    return None if a_shape is None else fit(g / b, a_shape), None if y is None else fit(-g * y / b, b.shape)


@op
def neg(needs, x):
    """-x"""
    return -x, ()


@neg.backward
def _(g):
    return (-g,)


@op
def power(needs, x, *, exponent):
    """x ** exponent, for a constant number."""
    exponent = x.dtype.type(exponent)
    return x**exponent, (x if needs[0] else None, exponent)


@power.backward
def _(g, x, exponent):
    return (g * exponent * x ** (exponent - 1),)


@op
def exp(needs, x):
    """e ** x"""
    y = xp_of(x).exp(x)
    return y, (y if needs[0] else None,)


@exp.backward
def _(g, y):
    return (g * y,)


@op
def log(needs, x):
    """Natural logarithm."""
    return xp_of(x).log(x), (x if needs[0] else None,)


@log.backward
def _(g, x):
    return (g / x,)


@op
def sqrt(needs, x):
    """Square root; its gradient at 0 is infinite."""
    y = xp_of(x).sqrt(x)
    return y, (y if needs[0] else None,)


@sqrt.backward
def _(g, y):
    return (g / (2 * y),)


@op
def abs(needs, x):
    """|x|, with gradient 0 at 0."""
    return xp_of(x).abs(x), (x if needs[0] else None,)


@abs.backward
def _(g, x):
    return (g * xp_of(x).sign(x),)


@op
def maximum(needs, a, b):
    """The larger of a and b; where they are equal each gets half the gradient, as in torch."""
    xp = xp_of(a, b)
    share = None
    if any(needs):
        share = ((a > b).astype("f4") + (a == b) * xp.float32(0.5)).astype(xp.result_type(a, b))
    return xp.maximum(a, b), (a.shape if needs[0] else None, b.shape if needs[1] else None, share)


@maximum.backward
def _(g, a_shape, b_shape, share):
    return (
        None if a_shape is None else fit(g * share, a_shape),
        None if b_shape is None else fit(g * (1 - share), b_shape),
    )


def minimum(a: Tensor, b: Tensor) -> Tensor:
    """The smaller of a and b."""
    return neg(maximum(neg(a) if isinstance(a, Tensor) else -a, neg(b) if isinstance(b, Tensor) else -b))


@op
def where(needs, a, b, *, condition):
    """a where `condition` (a boolean array) holds, b elsewhere."""
    if condition.dtype != bool:
        raise TypeError(f"condition is {condition.dtype}: expected booleans")
    return xp_of(a, b).where(condition, a, b), (a.shape if needs[0] else None, b.shape if needs[1] else None, condition)


@where.backward
def _(g, a_shape, b_shape, condition):
    zero = g.dtype.type(0)
    where_ = xp_of(g).where
    return (
        None if a_shape is None else fit(where_(condition, g, zero), a_shape),
        None if b_shape is None else fit(where_(condition, zero, g), b_shape),
    )


# ---- activations ---------------------------------------------------------------------------------------------------


@op
def relu(needs, x):
    """max(x, 0)"""
    return xp_of(x).maximum(x, x.dtype.type(0)), (x > 0 if needs[0] else None,)


@relu.backward
def _(g, positive):
    return (g * positive,)


@op
def tanh(needs, x):
    """Hyperbolic tangent."""
    y = xp_of(x).tanh(x)
    return y, (y if needs[0] else None,)


@tanh.backward
def _(g, y):
    return (g * (1 - y * y),)


def logistic(x: Array) -> Array:
    """1 / (1 + e**-x) of an array, without overflow."""
    half = x.dtype.type(0.5)
    y = xp_of(x).tanh(x * half)
    y += 1
    y *= half
    return y


@op
def sigmoid(needs, x):
    """1 / (1 + e**-x)"""
    y = logistic(x)
    return y, (y if needs[0] else None,)


@sigmoid.backward
def _(g, y):
    return (g * y * (1 - y),)


@op
def silu(needs, x):
    """x sigmoid(x), also called swish."""
    return x * logistic(x), (x if needs[0] else None,)


@silu.backward
def _(g, x):
    s = logistic(x)
    return (g * s * (1 + x * (1 - s)),)


@op
def softmax(needs, x, *, axis=-1):
    """e**x, divided by its sum along `axis`."""
    y = xp_of(x).exp(x - x.max(axis=axis, keepdims=True))
    y = y / y.sum(axis=axis, keepdims=True)
    return y, (y if needs[0] else None, axis)


@softmax.backward
def _(g, y, axis):
    return (y * (g - (g * y).sum(axis=axis, keepdims=True)),)


@op
def log_softmax(needs, x, *, axis=-1):
    """log(softmax(x)), without underflow."""
    xp = xp_of(x)
    y = x - x.max(axis=axis, keepdims=True)
    y = y - xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return y, (y if needs[0] else None, axis)


@log_softmax.backward
def _(g, y, axis):
    return (g - xp_of(y).exp(y) * g.sum(axis=axis, keepdims=True),)


# ---- reductions ----------------------------------------------------------------------------------------------------


def _axes(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim)) if axis is None else normalize_axis_tuple(axis, ndim)


@op
def sum(needs, x, *, axis=None, keepdims=False):
    """The sum over `axis` (a number, several, or None for all)."""
    return x.sum(axis=axis, keepdims=keepdims), (x.shape, _axes(axis, x.ndim))


@sum.backward
def _(g, shape, axes):
    xp = xp_of(g)
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    return (xp.broadcast_to(g.reshape(kept), shape),)


def mean(x: Tensor, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`."""
    total = sum(x, axis=axis, keepdims=keepdims)
    return mul(total, total.data.size / x.data.size)


@op
def max(needs, x, *, axis=None, keepdims=False):
    """The maximum over `axis`; equal maxima share the gradient, as in torch.amax."""
    axes = _axes(axis, x.ndim)
    top = x.max(axis=axes, keepdims=True)
    share = None
    if needs[0]:
        hit = (x == top).astype(x.dtype)
        share = hit / hit.sum(axis=axes, keepdims=True)
    return top if keepdims else top.reshape([n for i, n in enumerate(x.shape) if i not in axes]), (share, top.shape)


@max.backward
def _(g, share, kept):
    return (g.reshape(kept) * share,)


# ---- shape ---------------------------------------------------------------------------------------------------------


@op(moves=True)
def reshape(needs, x, *, shape):
    """The same values in row-major order under another shape."""
    return x.reshape(shape), (x.shape,)


@reshape.backward
def _(g, shape):
    return (g.reshape(shape),)


@op(moves=True)
def transpose(needs, x, *, axes=None):
    """The axes in another order; reversed where `axes` is None."""
    axes = normalize_axis_tuple(axes, x.ndim) if axes else tuple(range(x.ndim))[::-1]
    return x.transpose(axes), (tuple(axes.index(i) for i in range(x.ndim)),)


@transpose.backward
def _(g, inverse):
    return (g.transpose(inverse),)


@op
def broadcast_to(needs, x, *, shape):
    """A read-only view of `x` under a larger shape."""
    return xp_of(x).broadcast_to(x, shape), (x.shape,)


@broadcast_to.backward
def _(g, shape):
    return (fit(g, shape),)


@op(moves=True)
def concat(needs, *xs, axis=0):
    """The tensors one after another along an axis that exists."""
    sizes = [x.shape[axis] for x in xs]
    return concatenate(xs, axis), (np.cumsum(sizes)[:-1].tolist(), axis, needs)


@concat.backward
def _(g, cuts, axis, needs):
    return tuple(part if need else None for part, need in zip(xp_of(g).split(g, cuts, axis=axis), needs, strict=True))


@op(moves=True)
def stack(needs, *xs, axis=0):
    """The tensors one after another along a new axis."""
    return stacked(xs, axis), (axis, needs)


@stack.backward
def _(g, axis, needs):
    first = xp_of(g).moveaxis(g, axis, 0)
    return tuple(first[i] if need else None for i, need in enumerate(needs))


@op(moves=True)
def getitem(needs, x, *, key):
    """x[key] for integers, slices, None and `...`; `take` picks by an array."""
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, bool) or not isinstance(part, (int, np.integer, slice, type(None), type(...))):
            raise TypeError("a key is made of integers, slices, None and ...; ops.take picks by an array")
    return x[key], (x.shape, key)


@getitem.backward
def _(g, shape, key):
    return (Slice(shape, key, g),)


@op
def take(needs, x, *, indices):
    """x[indices]: rows of the first axis, by an integer array of any shape; rows may repeat."""
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices are {indices.dtype}: expected integers")
    return x[indices], (x.shape, indices)


@take.backward
def _(g, shape, indices):
    dx = xp_of(g).zeros(shape, g.dtype)
    xp_of(g).add.at(dx, indices, g)
    return (dx,)


# ---- linear algebra ------------------------------------------------------------------------------------------------


@op
def matmul(needs, a, b):
    """a @ b for matrices and stacks of matrices."""
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError("expected at least two axes on each side")
    return product(a, b), (a.shape, b.shape, a if needs[1] else None, b if needs[0] else None)


@matmul.backward
def _(g, a_shape, b_shape, a, b):
    da = None if b is None else fit(product(g, b.swapaxes(-1, -2)), a_shape)
    if a is None:
        return da, None
    if len(b_shape) == 2 and a.ndim > 2:  # one matrix for the whole stack: one product, not a sum of products
        return da, product(a.reshape(-1, a_shape[-1]).T, g.reshape(-1, b_shape[-1]))
    return da, fit(product(a.swapaxes(-1, -2), g), b_shape)


@op
def linear(needs, x, w, b=None):
    """x @ w.T + b: x (..., in), w (out, in), b (out,) or None. Gives (..., out).

    With `w` constant nothing of `x` is kept: its gradient needs only `w`.
    """
    y = product(x.reshape(-1, x.shape[-1]), w.T).reshape(*x.shape[:-1], w.shape[0])  # one for the whole batch
    if b is not None:
        expect("b", b, w.shape[0])
        y += b
    return y, (w if needs[0] else None, x if needs[1] else None, len(needs) > 2 and needs[2], len(needs))


@linear.backward
def _(g, w, x, bias, inputs):
    rows = g.reshape(-1, g.shape[-1])
    dx = None if w is None else product(rows, w).reshape(*g.shape[:-1], w.shape[1])
    dw = None if x is None else product(rows.T, x.reshape(-1, x.shape[-1]))
    return (dx, dw, rows.sum(axis=0) if bias else None)[:inputs]


@op
def solve(needs, a, b):
    """The x with a @ x = b: a (..., n, n), b (..., n, k)."""
    if b.ndim < 2:
        raise ValueError("b is a vector: give it as a matrix of one column")
    x = _solve(a, b)
    return x, (a, b.shape, x if needs[0] else None, needs[1])


def _solve(a: Array, b: Array) -> Array:
    xp, stack = xp_of(a), np.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # CuPy does not broadcast here
    return xp.linalg.solve(xp.broadcast_to(a, stack + a.shape[-2:]), xp.broadcast_to(b, stack + b.shape[-2:]))


@solve.backward
def _(g, a, b_shape, x, b_needed):
    db = _solve(a.swapaxes(-1, -2), g)
    da = None if x is None else fit(-product(db, x.swapaxes(-1, -2)), a.shape)
    return da, fit(db, b_shape) if b_needed else None


# ---- operators and methods of Tensor -------------------------------------------------------------------------------

Tensor.__add__ = lambda a, b: add(a, b)
Tensor.__radd__ = lambda a, b: add(b, a)
Tensor.__sub__ = lambda a, b: sub(a, b)
Tensor.__rsub__ = lambda a, b: sub(b, a)
Tensor.__mul__ = lambda a, b: mul(a, b)
Tensor.__rmul__ = lambda a, b: mul(b, a)
Tensor.__truediv__ = lambda a, b: div(a, b)
Tensor.__rtruediv__ = lambda a, b: div(b, a)
Tensor.__matmul__ = lambda a, b: matmul(a, b)
Tensor.__rmatmul__ = lambda a, b: matmul(b, a)
Tensor.__neg__ = lambda x: neg(x)
Tensor.__pow__ = lambda x, exponent: power(x, exponent=exponent)
Tensor.__getitem__ = lambda x, key: getitem(x, key=key)
Tensor.__iter__ = lambda x: (x[i] for i in range(x.shape[0]))
Tensor.reshape = lambda x, *shape: reshape(x, shape=shape)
Tensor.transpose = lambda x, *axes: transpose(x, axes=axes)
Tensor.T = property(lambda x: transpose(x))
Tensor.sum = lambda x, axis=None, keepdims=False: sum(x, axis=axis, keepdims=keepdims)
Tensor.mean = lambda x, axis=None, keepdims=False: mean(x, axis=axis, keepdims=keepdims)
