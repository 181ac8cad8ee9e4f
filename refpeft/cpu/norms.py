"""RMSNorm and LayerNorm, for float32 arrays of NumPy: means are products, and what was saved is written over."""

from __future__ import annotations

import numpy as np

from .. import arena, fused
from .blocks import blocks, sum_of_rows


@fused.rms_norm.override(np.ndarray, "f4")
def rms_norm(needs, x, w, *, eps):
    if w.shape != x.shape[-1:] or not x.size:
        return NotImplemented
    y, r = arena.like(x), arena.empty((*x.shape[:-1], 1), x.dtype)
    n = arena.like(x) if any(needs) else y
    for x_, n_, r_, y_ in blocks(x, n, r, y):
        _reciprocal_size(x_, eps, r_)
        np.multiply(x_, r_, out=n_)
        np.multiply(n_, w, out=y_)
    return y, (n, r if needs[0] else None, w if needs[0] else None, needs[1])


@rms_norm.backward
def _(g, n, r, w, w_needed):
    dw = np.zeros(n.shape[-1], n.dtype) if w_needed else None
    dx = None if r is None else arena.like(n)
    for g_, n_, r_, dx_, t in blocks(g, n, r, dx, scratch=1):
        if w_needed:
            dw += sum_of_rows(np.multiply(g_, n_, out=t))
        if dx_ is not None:
            np.multiply(g_, w, out=dx_)
            _away_from(n_, dx_)
            dx_ *= r_
    return dx, dw


@fused.layer_norm.override(np.ndarray, "f4")
def layer_norm(needs, x, w, b, *, eps):
    if not w.shape == b.shape == x.shape[-1:] or not x.size:
        return NotImplemented
    y, r = arena.like(x), arena.empty((*x.shape[:-1], 1), x.dtype)
    keeps = needs[0] or needs[1]
    n = arena.like(x) if keeps else y
    share = np.full_like(w, 1 / len(w))
    for x_, n_, r_, y_ in blocks(x, n, r, y):
        np.subtract(x_, _column(x_ @ share), out=n_)
        _reciprocal_size(n_, eps, r_)
        n_ *= r_
        np.multiply(n_, w, out=y_)
        y_ += b
    return y, (n if keeps else None, r if needs[0] else None, w if needs[0] else None, needs)


@layer_norm.backward
def _(g, n, r, w, needs):
    dw, db = (np.zeros(g.shape[-1], g.dtype) if need else None for need in needs[1:])
    dx, share = (arena.like(n), np.full_like(w, 1 / len(w))) if needs[0] else (None, None)
    for g_, n_, r_, dx_, t in blocks(g, n, r, dx, scratch=1):
        if dw is not None:
            dw += sum_of_rows(np.multiply(g_, n_, out=t))
        if db is not None:
            db += sum_of_rows(g_)
        if dx_ is not None:
            np.multiply(g_, w, out=dx_)
            mean = dx_ @ share
            _away_from(n_, dx_)
            dx_ -= _column(mean)
            dx_ *= r_
    return dx, dw, db


def _reciprocal_size(x: np.ndarray, eps: float, r: np.ndarray) -> None:
    """Fills `r` (rows, 1) with 1 / sqrt(mean(x^2) + eps)."""
    np.vecdot(x, x, out=r[:, 0])
    r /= x.shape[-1]
    r += eps
    np.sqrt(r, out=r)
    np.reciprocal(r, out=r)


def _away_from(n: np.ndarray, d: np.ndarray) -> None:
    """Takes n mean(d n) from each row of `d`, and writes over `n`."""
    share = np.vecdot(d, n)
    share /= n.shape[-1]
    n *= _column(share)
    d -= n


def _column(values: np.ndarray) -> np.ndarray:
    return values[:, None]
