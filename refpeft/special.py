"""The error function in array code, for the exact GELU: neither NumPy has one, nor CuPy without SciPy."""

from __future__ import annotations

import numpy as np

from .backend import Array, xp_of

# Rational approximations of W. J. Cody (Math. Comp. 23, 1969, 631-637), as in SPECFUN's CALERF; highest power first.
_SMALL = (
    (
        1.85777706184603153e-1,
        3.16112374387056560e0,
        1.13864154151050156e2,
        3.77485237685302021e2,
        3.20937758913846947e3,
    ),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
_MIDDLE = (
    (
        2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
        2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
        1.23033935479799725e3,
    ),
    (
        1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
        3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
    ),
)  # fmt: skip
_LARGE = (
    (
        1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
        1.60837851487422766e-2, 6.58749161529837803e-4,
    ),
    (
        1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
        2.33520497626869185e-3,
    ),
)  # fmt: skip
_SQRT_1_PI = 0.56418958354775628695

# erf(x) / x in x^2 for float32 (that of XLA); highest power first. Above 3.8 it overshoots 1, and is cut off there.
_SINGLE = (
    (2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 1.8520832239976145e-1, 1.128379143519084),
    (
        -1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3, 1.4070470171167667e-2,
        1.1098505178285362e-1, 4.9746925110067538e-1, 1.0,
    ),
)  # fmt: skip
_FAR = 4.0  # here the quotient is 6 eps above 1


def _ratio(x: Array, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    above, below = (_polynomial(x, c) for c in coefficients)
    above /= below
    return above


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    """The polynomial with these coefficients, highest power first, at `x`."""
    total = xp_of(x).full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total *= x
        total += c
    return total


def erf(x: Array) -> Array:
    """The error function of `x` in its dtype: within 2.5 eps of the value in float64, 3.5 eps in float32.

    Float32 has a formula of its own: the other one takes 20 times as long, which was most of an encoder's time.
    """
    if x.dtype == np.float32:
        return _single(x)
    xp, wide = xp_of(x), x.astype(np.float64)
    a = xp.abs(wide)
    small = a <= 0.46875
    near = xp.where(small, wide, 0)
    inner = near * _ratio(near * near, _SMALL)
    far = xp.where(small, 1.0, xp.minimum(a, 6.0))  # erf(6) is 1 - 2e-17
    tail_square = 1 / (far * far)
    large = _SQRT_1_PI - tail_square * _ratio(tail_square, _LARGE)
    complement = xp.exp(-far * far) * xp.where(far <= 4, _ratio(xp.minimum(far, 4.0), _MIDDLE), large / far)
    return xp.where(small, inner, xp.sign(wide) * (1 - complement)).astype(x.dtype)


def _single(x: Array) -> Array:
    xp = xp_of(x)
    inside = xp.clip(x, -_FAR, _FAR)
    y = _ratio(inside * inside, _SINGLE)
    y *= inside
    return xp.clip(y, -1, 1, out=y)
