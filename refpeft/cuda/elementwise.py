"""Arithmetic of bfloat16 arrays, alone or with float32 ones: one launch each way, and one or two more for a gradient of
what was broadcast. Nothing is kept but inputs: what backward needs is computed again, and so rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from refpeft import ops
from refpeft.backend import Array, bfloat16
from refpeft.cuda import blas, gains
from refpeft.cuda.kernels import Source, contiguous
from refpeft.cuda.maps import lanes_of, mapped, summed, takes
from refpeft.cuda.override import or_else, override
from refpeft.tape import ADDED
from refpeft.tensor import Op, Pending, Tensor, needs_of

softmax_source = Source("softmax.cu")


def _total(a: Array, b: Array, out: Array | None = None) -> Array:
    found = (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)
    if out is None:
        return found
    out[...] = found
    return out


@or_else("adds up gradients", _total)
def total(a: Array, b: Array, out: Array | None = None) -> Array:
    """a + b rounded once, in `out` (which may be one of them) where it is given, else in the dtype of `a`."""
    return mapped("add", a, b, dtype=a.dtype, out=out)


class Like:
    """What a gradient has of its input: shape and dtype."""

    __slots__ = ("dtype", "shape")

    def __init__(self, array: Any):
        self.shape, self.dtype = array.shape, array.dtype


def gradient(like: Like | None, into: Array | None, function: str, g: Array, *operands: Any) -> Any:
    """function(g, *operands), of the shape of `g`, summed over the axes along which an array `like` was broadcast.

    None where `like` is None, and ADDED where the sums were added to `into`.
    """
    if like is None:
        return None
    if like.shape == g.shape:
        return g if function == "copy" and g.dtype == like.dtype else mapped(function, g, *operands, dtype=like.dtype)
    new = g.ndim - len(like.shape)
    axes = tuple(i for i, n in enumerate(g.shape) if i < new or n != like.shape[i - new])
    if into is not None and into.flags.c_contiguous:
        summed(function, g, *operands, shape=g.shape, axes=axes, into=into)
        return ADDED
    return summed(function, g, *operands, shape=g.shape, axes=axes, dtype=like.dtype).reshape(like.shape)


def _likes(needs: tuple[bool, ...], *arrays: Any) -> tuple[Like | None, ...]:
    return tuple(Like(array) if need else None for need, array in zip(needs, arrays, strict=True))


def _broadcast(*arrays: Any) -> bool:
    """Whether they do so with each other."""
    try:
        np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        return False
    return True


# ---- of two arrays ---------------------------------------------------------------------------------------------------


def _of_two(
    op: Op,
    function: str,
    by_a: tuple[str, str],
    by_b: tuple[str, str],
    at_once: Callable[..., tuple | None] = lambda g, a, b, into: None,
) -> None:
    """function(a, b). The gradient of each is a function of g and what the second string names.

    Where both are wanted and read a and b, `at_once` is asked for them first.
    """

    @override(op, "bfloat16")
    def forward(needs, a, b):
        if not takes(a, b) or not _broadcast(a, b):
            return NotImplemented
        read = "".join(names for need, (_, names) in zip(needs, (by_a, by_b), strict=True) if need)
        kept = (a if "a" in read else None, b if "b" in read else None)
        return mapped(function, a, b), (*_likes(needs, a, b), *kept)

    @forward.backward(into=True)
    def _(g, a_like, b_like, a, b, into):
        found = None if a is None or b is None else at_once(g, a, b, into)
        if found is not None:
            return found
        named = {"a": a, "b": b}
        return tuple(
            gradient(like, onto, slope, g, *(named[name] for name in names))
            for like, onto, (slope, names) in zip((a_like, b_like), into, (by_a, by_b), strict=True)
        )


def _by_gains(g: Array, a: Array, b: Array, into: tuple) -> tuple | None:
    """Both gradients of a * b, in one pass, where one is rows and the other has a number for each column; else None."""
    first = gains.are(a, b)
    gain, x, onto = (a, b, into[0]) if first else (b, a, into[1])
    if not gains.are(gain, x) or not gain.flags.c_contiguous or g.shape != x.shape:
        return None
    adds = onto is not None and onto.flags.c_contiguous
    dx = cupy.empty(g.shape, bfloat16)
    sums = gains.backward(g, x, gain.reshape(-1), dx, onto if adds else None)
    dgain = ADDED if adds else sums.reshape(gain.shape)
    return (dgain, dx) if first else (dx, dgain)


_of_two(ops.add, "add", ("copy", ""), ("copy", ""))


@ops.add.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    """In training a sum waits: a norm of it may add up what it reads."""
    wanted = blas.is_training() and all(isinstance(x, Tensor) and x.dtype == bfloat16 for x in inputs)
    if not wanted or inputs[0].shape != inputs[1].shape or type(inputs[0].data) is not cupy.ndarray:
        return None
    return Pending(ops.add, partial(ops.add.alone, *inputs), inputs[0].shape, bfloat16, inputs)


def added(a: Tensor, b: Tensor, total: Array) -> Tensor:
    """ops.add of two tensors of one shape, whose sum is in `total`."""
    needs = needs_of((a, b))
    pair = ops.add.overrides[cupy.ndarray, bfloat16]
    return (
        pair.made(total, needs, (a, b), (*_likes(needs, a.data, b.data), None, None)) if any(needs) else Tensor(total)
    )


_of_two(ops.sub, "sub", ("copy", ""), ("neg", ""))
_of_two(ops.mul, "mul", ("mul", "b"), ("mul", "a"), _by_gains)
_of_two(ops.div, "div", ("div", "b"), ("div_slope", "ba"))
_of_two(ops.maximum, "maximum", ("maximum_slope", "ab"), ("maximum_slope", "ba"))


@override(ops.where, "bfloat16")
def where(needs, a, b, *, condition):
    if not takes(a, b, condition) or condition.dtype != bool or not _broadcast(a, b, condition):
        return NotImplemented
    return mapped("where", a, b, condition), (*_likes(needs, a, b), condition)


@where.backward(into=True)
def _(g, a_like, b_like, condition, into):
    return (
        gradient(a_like, into[0], "where", g, 0.0, condition),
        gradient(b_like, into[1], "where_not", g, 0.0, condition),
    )


# ---- of one array ----------------------------------------------------------------------------------------------------


def of_one(op: Op, function: str, slope: str, *dtypes: str) -> None:
    """function(x), whose gradient is slope(g, x)."""

    @override(op, *dtypes)
    def forward(needs, x):
        if not takes(x):
            return NotImplemented
        return mapped(function, x, dtype=x.dtype), (x if needs[0] else None,)

    @forward.backward
    def _(g, x):
        return (mapped(slope, g, x, dtype=x.dtype),)


of_one(ops.exp, "exp", "exp_slope", "bfloat16")
of_one(ops.log, "log", "div", "bfloat16")
of_one(ops.sqrt, "sqrt", "sqrt_slope", "bfloat16")
of_one(ops.abs, "abs", "abs_slope", "bfloat16")


@override(ops.neg, "bfloat16")
def neg(needs, x):
    return (mapped("neg", x), ()) if takes(x) else NotImplemented


@neg.backward
def _(g):
    return (mapped("neg", g),)


@override(ops.power, "bfloat16")
def power(needs, x, *, exponent):
    if not takes(x):
        return NotImplemented
    return mapped("power", x, float(exponent)), (x if needs[0] else None, float(exponent))


@power.backward
def _(g, x, exponent):
    return (mapped("power_slope", g, x, exponent),)


# ---- along axes ------------------------------------------------------------------------------------------------------


@override(ops.sum, "bfloat16")
def sum(needs, x, *, axis=None, keepdims=False):
    if not takes(x):
        return NotImplemented
    axes = tuple(range(x.ndim)) if axis is None else tuple(sorted(normalize_axis_tuple(axis, x.ndim)))
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    y = summed("copy", x, shape=x.shape, axes=axes, dtype=bfloat16)
    return y.reshape(kept) if keepdims else y, (kept, x.shape)


@sum.backward
def _(g, kept, shape):
    return (cupy.broadcast_to(g.reshape(kept), shape),)


def _of_rows(op: Op, log: bool) -> None:
    """softmax over the last axis, or its logarithm."""

    @override(op, "bfloat16", "float32")
    def forward(needs, x, *, axis=-1):
        if not takes(x) or not x.size or axis not in (-1, x.ndim - 1):
            return NotImplemented
        y = cupy.empty(x.shape, x.dtype)
        _launch("softmax_forward", contiguous(x), y, log)
        return y, (x if needs[0] else None,)

    @forward.backward
    def _(g, x):
        dx = cupy.empty(x.shape, x.dtype)
        _launch("softmax_backward", contiguous(x), contiguous(g), dx, log)
        return (dx,)


def _launch(kernel: str, *arrays: Any) -> None:
    x, *others, log = arrays
    width = x.shape[-1]
    rows, lanes = x.size // width, lanes_of(width) if width <= 1024 else 256
    softmax_source(kernel, x.dtype)(-(-rows * lanes // 256), 256, x, *others, rows, width, lanes, log)


_of_rows(ops.softmax, log=False)
_of_rows(ops.log_softmax, log=True)
