"""Activations, sums and products, for float32 arrays of NumPy.

Of a function of one array its derivative is kept in place of the array, as the backward pass then is one product. NumPy
computes exp several times as fast as a power, a choice (`where`) or copysign, so the formulas here have none of these.
"""

from __future__ import annotations

import math

import numpy as np

from .. import arena, fused, ops
from .blocks import blocks, sum_of_rows

# ---- activations ---------------------------------------------------------------------------------------------------


@fused.gelu.override(np.ndarray, "f4")
def gelu(needs, x, *, approximate):
    if not x.ndim or not x.size:
        return NotImplemented
    y, slope = arena.like(x), arena.like(x) if needs[0] else None
    one_block = _gelu_tanh if approximate else _gelu_exact
    with np.errstate(over="ignore"):  # e**-2u of a large -u
        for part in blocks(x, y, slope, scratch=3):
            one_block(*part)
    return y, (slope,)


@gelu.backward
def _(g, slope):
    return (np.multiply(g, slope, out=slope),)


_C, _K = math.sqrt(2 / math.pi), 0.044715  # u = C (x + K x^3)


def _gelu_tanh(x, y, slope, phi, square, rest):
    """x phi with phi = sigmoid(2u), which is (1 + tanh(u)) / 2; the derivative is phi + y (1 - phi) 2u'."""
    np.multiply(x, x, out=square)
    np.multiply(square, -2 * _C * _K, out=phi)
    phi -= 2 * _C
    phi *= x
    _sigmoid_of_minus(phi)
    np.multiply(x, phi, out=y)
    if slope is not None:
        square *= 6 * _C * _K
        square += 2 * _C
        square *= y
        np.subtract(1, phi, out=rest)
        rest *= square
        np.add(phi, rest, out=slope)


def _sigmoid_of_minus(z):
    """sigmoid(-z), in place of z."""
    np.exp(z, out=z)
    z += 1
    np.reciprocal(z, out=z)


# Phi(-a) / phi(a) for a >= 0, phi and Phi the standard normal's density and distribution, as a polynomial in
# a / (a + SHIFT), highest power first: what Lawson's algorithm finds with the weight phi(a)^0.9, for the SHIFT that
# makes phi(a) times the error smallest, 1.5e-8. The form is Abramowitz and Stegun's, 7.1.26, but for the variable:
# it is 0 where a is, so that rounding adds least where Phi(-a) is largest.
_SHIFT = 3.175
_MILLS = (0.33986875, -0.33669824, -1.2053692, 3.1418062, -3.1749925, 1.2533141)
_ONE = np.float32(1).view(np.int32)  # its bits


def _gelu_exact(x, y, slope, density, phi, t):
    """x Phi(x); the derivative is Phi(x) + x phi(x)."""
    half = np.multiply(x, -0.5, out=phi)
    np.multiply(half, x, out=density)
    np.exp(density, out=density)
    density *= 1 / math.sqrt(2 * math.pi)
    step = np.right_shift(half.view(np.int32), 31, out=y.view(np.int32))  # all bits where x > 0: the sign of -x / 2
    step &= _ONE
    np.abs(x, out=t)
    np.add(t, _SHIFT, out=phi)
    t /= phi
    np.multiply(t, _MILLS[0], out=phi)
    for c in _MILLS[1:-1]:
        phi += c
        phi *= t
    phi += _MILLS[-1]
    phi *= density
    np.subtract(y, phi, out=phi)  # y is 1 where x > 0, 0 elsewhere, and phi Phi(-|x|): this is Phi(x) or -Phi(x)
    np.abs(phi, out=phi)
    np.multiply(x, phi, out=y)
    if slope is not None:
        density *= x
        np.add(density, phi, out=slope)


@ops.silu.override(np.ndarray, "f4")
def silu(needs, x):
    if not x.ndim or not x.size:
        return NotImplemented
    y, slope = arena.like(x), arena.like(x) if needs[0] else None
    with np.errstate(over="ignore"):
        for part in blocks(x, y, slope, scratch=1):
            _silu(*part)
    return y, (slope,)


@silu.backward
def _(g, slope):
    return (np.multiply(g, slope, out=slope),)


def _silu(x, y, slope, s):
    """x s with s = sigmoid(x); the derivative is s + y (1 - s)."""
    np.negative(x, out=s)
    _sigmoid_of_minus(s)
    np.multiply(x, s, out=y)
    if slope is not None:
        np.subtract(1, s, out=slope)
        slope *= y
        slope += s


@fused.silu_mul.override(np.ndarray, "f4")
def silu_mul(needs, gate, up):
    if up.shape != gate.shape or not gate.ndim or not gate.size:
        return NotImplemented
    y = arena.like(gate)
    slopes = tuple(arena.like(gate) if need else None for need in needs)  # up silu'(gate) and silu(gate)
    with np.errstate(over="ignore"):
        for gate_, up_, y_, by_gate, by_up, s, spare in blocks(gate, up, y, *slopes, scratch=2):
            activated = spare if by_up is None else by_up
            _silu(gate_, activated, by_gate, s)
            np.multiply(activated, up_, out=y_)
            if by_gate is not None:
                by_gate *= up_
    return y, slopes


@silu_mul.backward
def _(g, *slopes):
    for g_, *parts in blocks(g, *slopes):
        for slope in parts:
            if slope is not None:
                slope *= g_
    return slopes


@ops.relu.override(np.ndarray, "f4")
def relu(needs, x):
    positive = np.greater(x, 0, out=arena.empty(x.shape, bool)) if needs[0] else None
    return np.maximum(x, 0, out=arena.like(x)), (positive,)


@relu.backward
def _(g, positive):
    return (np.multiply(g, positive, out=arena.like(g)),)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@fused.dropout.override(np.ndarray, "f4")
def dropout(needs, x, *, rate, stream):
    if not 0 <= rate < 1 or not x.ndim or not x.size:
        return NotImplemented
    keep, scale = stream.keeps(x.size, rate).reshape(x.shape), x.dtype.type(1 / (1 - rate))
    return _kept(x, keep, scale), (keep if needs[0] else None, scale)


@dropout.backward
def _(g, keep, scale):
    return (_kept(g, keep, scale),)


def _kept(x, keep, scale):
    y = arena.like(x)
    for x_, keep_, y_ in blocks(x, keep, y):
        np.multiply(x_, keep_, out=y_)
        y_ *= scale
    return y


# ---- sums and products ---------------------------------------------------------------------------------------------


@ops.add.override(np.ndarray, "f4")
def add(needs, a, b):
    y = _combine(np.add, a, b)
    return NotImplemented if y is None else (y, (a.shape if needs[0] else None, b.shape if needs[1] else None))


@add.backward
def _(g, a_shape, b_shape):
    return None if a_shape is None else _fit(g, a_shape), None if b_shape is None else _fit(g, b_shape)


@ops.mul.override(np.ndarray, "f4")
def mul(needs, a, b):
    y = _combine(np.multiply, a, b)
    return NotImplemented if y is None else (y, (a.shape, b.shape, a if needs[1] else None, b if needs[0] else None))


@mul.backward
def _(g, a_shape, b_shape, a, b):
    da, db = (None if other is None else np.multiply(g, other, out=arena.like(g)) for other in (b, a))
    return None if da is None else _fit(da, a_shape), None if db is None else _fit(db, b_shape)


def _combine(ufunc: np.ufunc, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """ufunc(a, b), or None where they do not broadcast."""
    if a is None or b is None:
        return None
    try:
        shape = np.broadcast(a, b).shape
    except ValueError:
        return None
    return ufunc(a, b, out=arena.empty(shape, a.dtype))


def _fit(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """ops.fit, faster for what was broadcast along leading axes: biases, gains, positions."""
    if g.shape == shape or not g.size or g.shape[g.ndim - len(shape) :] != shape:
        return ops.fit(g, shape)
    return sum_of_rows(g.reshape(-1, math.prod(shape))).reshape(shape)
