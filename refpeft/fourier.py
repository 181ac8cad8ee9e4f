"""Waves: sines, and linear layers whose weights are given by frequencies. For authors of methods."""

from __future__ import annotations

from .backend import Array, xp_of
from .tensor import op


@op
def sin(needs, x):
    """Sine."""
    return xp_of(x).sin(x), (x if needs[0] else None,)


@sin.backward
def _(g, x):
    return (g * xp_of(x).cos(x),)


@op
def cos(needs, x):
    """Cosine."""
    return xp_of(x).cos(x), (x if needs[0] else None,)


@cos.backward
def _(g, x):
    return (-g * xp_of(x).sin(x),)


# ---- circulant blocks ------------------------------------------------------------------------------------------------


@op
def circulant_linear(needs, x, w):
    """x (..., in) @ C.T for C of blocks (size, size), C[o, i][j, k] = w[o, i, (k - j) mod size]: w (outs, ins, size).

    Neither C nor a block of it is made: blocks meet as products of frequencies.
    """
    _, ins, size = w.shape
    rows = _to_waves(x, ins, size)
    y = _from_waves(rows @ _waves(w).conj().transpose(2, 1, 0), size)
    return y.reshape(*x.shape[:-1], -1), (x if needs[1] else None, w, needs[0])


@circulant_linear.backward
def _(g, x, w, x_needed):
    outs, ins, size = w.shape
    rows, dx, dw = _to_waves(g, outs, size), None, None
    if x_needed:
        dx = _from_waves(rows @ _waves(w).transpose(2, 0, 1), size).reshape(*g.shape[:-1], -1)
    if x is not None:
        products = rows.conj().transpose(0, 2, 1) @ _to_waves(x, ins, size)  # (frequencies, outs, ins)
        dw = xp_of(x).fft.irfft(products.transpose(1, 2, 0), size)
    return dx, dw


def _waves(parts: Array) -> Array:
    return xp_of(parts).fft.rfft(parts)


def _to_waves(x: Array, parts: int, size: int) -> Array:
    """x (..., parts size) -> its frequencies (frequencies, rows, parts)"""
    return _waves(x.reshape(-1, parts, size)).transpose(2, 0, 1)


def _from_waves(waves: Array, size: int) -> Array:
    """The reverse: (rows, parts, size)"""
    return xp_of(waves).fft.irfft(waves.transpose(1, 2, 0), size)


# ---- few frequencies -------------------------------------------------------------------------------------------------


@op
def spectral_linear(needs, x, c, *, places, shape):
    """x (..., in) @ W.T, W = `spectral_weight(c, ...)`; W is made for the product, and again for the gradients."""
    y = x @ spectral_weight(c, places, shape).T
    return y, (x if needs[1] else None, c, places, shape, needs[0])


@spectral_linear.backward
def _(g, x, c, places, shape, x_needed):
    dx = g @ spectral_weight(c, places, shape) if x_needed else None
    if x is None:
        return dx, None
    dw = g.reshape(-1, shape[0]).T @ x.reshape(-1, shape[1])
    down, across = places // shape[1], places % shape[1]
    mirrored = across > shape[1] // 2  # the other half is the same, turned around
    where_ = xp_of(g).where
    down, across = where_(mirrored, -down % shape[0], down), where_(mirrored, shape[1] - across, across)
    return dx, _cosines(dw)[down, across]


def spectral_weight(c: Array, places: Array, shape: tuple[int, int]) -> Array:
    """The real part of the inverse Fourier transform, divided by its size, of a matrix of this shape that holds c (k,)
    at `places` (k,), counted row by row, and zeros elsewhere."""
    xp = xp_of(c)
    spectrum = xp.zeros(shape[0] * shape[1], c.dtype)
    spectrum[places] = c
    half = _cosines(spectrum.reshape(shape))
    rest = xp.roll(half[::-1, (shape[1] - 1) // 2 : 0 : -1], 1, axis=0)
    return xp.concatenate((half, rest), axis=1)


def _cosines(matrix: Array) -> Array:
    """The left half of the real part of a real matrix's Fourier transform, divided by its size."""
    return (xp_of(matrix).fft.rfft2(matrix).real / matrix.size).astype(matrix.dtype, copy=False)
