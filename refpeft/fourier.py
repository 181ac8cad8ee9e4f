"""Waves: sines, weights that are given by frequencies, and Walsh and Hadamard's square ones. For authors of methods."""

from __future__ import annotations

from math import prod

from .backend import Array, matmul, xp_of
from .ops import reshape
from .rng import Stream
from .tensor import Tensor, op


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
    y = _from_waves(matmul(rows, _waves(w).conj().transpose(2, 1, 0)), size)
    return y.reshape(*x.shape[:-1], -1), (x if needs[1] else None, w, needs[0])


@circulant_linear.backward
def _(g, x, w, x_needed):
    outs, ins, size = w.shape
    rows, dx, dw = _to_waves(g, outs, size), None, None
    if x_needed:
        dx = _from_waves(matmul(rows, _waves(w).transpose(2, 0, 1)), size).reshape(*g.shape[:-1], -1)
    if x is not None:
        products = matmul(rows.conj().transpose(0, 2, 1), _to_waves(x, ins, size))  # (frequencies, outs, ins)
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
    y = matmul(x, spectral_weight(c, places, shape).T)
    return y, (x if needs[1] else None, c, places, shape, needs[0])


@spectral_linear.backward
def _(g, x, c, places, shape, x_needed):
    dx = matmul(g, spectral_weight(c, places, shape)) if x_needed else None
    if x is None:
        return dx, None
    return dx, spectral_gradient(matmul(g.reshape(-1, shape[0]).T, x.reshape(-1, shape[1])), places)


def spectral_weight(c: Array, places: Array, shape: tuple[int, int]) -> Array:
    """The real part of the inverse Fourier transform, divided by its size, of a matrix of this shape that holds c (k,)
    at `places` (k,), counted row by row, and zeros elsewhere."""
    xp = xp_of(c)
    spectrum = xp.zeros(shape[0] * shape[1], c.dtype)
    spectrum[places] = c
    half = _cosines(spectrum.reshape(shape))
    rest = xp.roll(half[::-1, (shape[1] - 1) // 2 : 0 : -1], 1, axis=0)
    return xp.concatenate((half, rest), axis=1)


def spectral_gradient(dw: Array, places: Array) -> Array:
    """The gradient of c (k,), by that of `spectral_weight`."""
    height, width = dw.shape
    down, across = places // width, places % width
    mirrored = across > width // 2  # the other half is the same, turned around
    where_ = xp_of(dw).where
    down, across = where_(mirrored, -down % height, down), where_(mirrored, width - across, across)
    return _cosines(dw)[down, across]


def _cosines(matrix: Array) -> Array:
    """The left half of the real part of a real matrix's Fourier transform, divided by its size."""
    return (xp_of(matrix).fft.rfft2(matrix).real / matrix.size).astype(matrix.dtype, copy=False)


# ---- square waves ----------------------------------------------------------------------------------------------------

_CHUNK = 64  # numbers that one product of `hadamard` transforms


@op
def fastfood(needs, x, *, signs, order, gauss, size):
    """The first `size` numbers of H G P H B x / sqrt(size sum(G^2)), for x (d,) filled up with zeros.

    A random projection (Le et al., 2013, "Fastfood", section 3) that about keeps lengths, and is nowhere a matrix: B is
    `signs`, P takes what is at `order`, G is `gauss`, all (n,), n a power of 2 of at least d and `size`; H: `hadamard`.
    """
    gauss = gauss.astype(x.dtype, copy=False)
    padded = xp_of(x).zeros(len(gauss), x.dtype)
    padded[: len(x)] = x
    y = hadamard(hadamard(padded * signs)[order] * gauss)[:size] / _length(gauss, size)
    return y.astype(x.dtype, copy=False), (signs, order, gauss, len(x))


@fastfood.backward
def _(g, signs, order, gauss, count):
    padded = xp_of(g).zeros(len(gauss), g.dtype)
    padded[: len(g)] = g / _length(gauss, len(g))
    back = xp_of(g).empty_like(padded)
    back[order] = hadamard(padded) * gauss
    return ((hadamard(back) * signs)[:count].astype(g.dtype, copy=False),)


def fastfood_from_seed(x: Tensor, shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """`fastfood` of x (d,) in any shape, with what is random in it made of a seed and a name, Gaussian numbers float32.

    It is made where x is, of the same bits everywhere, and is larger than the result: see refpeft.tensor.checkpoint.
    """
    size, xp = prod(shape), xp_of(x.data)
    n = 1 << (max(size, len(x.data)) - 1).bit_length()
    signs, order, gauss = (Stream(seed, name, what, xp=xp) for what in ("signs", "order", "gauss"))
    signs, gauss = (signs.bits(n) & 1).astype("i1") * 2 - 1, gauss.standard_normal(n).astype("f4")
    return reshape(fastfood(x, signs=signs, order=order.permutation(n), gauss=gauss, size=size), shape=shape)


def _length(gauss: Array, size: int) -> Array:
    return xp_of(gauss).sqrt(size * (gauss * gauss).sum())


def hadamard(x: Array) -> Array:
    """H x for x (n,), n a power of 2: H[i, j] is -1 where i and j have an odd number of bits in common, or else 1."""
    rest = n = len(x)
    while rest > 1:  # H is a Kronecker product of small ones: each in turn meets the first axis, which then is the last
        size = min(rest, _CHUNK)
        x = matmul(x.reshape(size, -1).T, _hadamard_matrix(size, x))
        rest //= size
    return x.reshape(n)


def _hadamard_matrix(n: int, like: Array) -> Array:
    xp, H = xp_of(like), xp_of(like).ones((1, 1), like.dtype)
    while len(H) < n:
        H = xp.concatenate((xp.concatenate((H, H), axis=1), xp.concatenate((H, -H), axis=1)))
    return H
