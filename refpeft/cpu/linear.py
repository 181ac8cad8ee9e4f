"""Products with frozen and trained matrices, for float32 arrays of NumPy.

A weight has one layout, (out, in): BLAS reads it as well from either side. A frozen weight that is not kept in float32
comes in panels of rows (refpeft.quant), each used and forgotten: it never exists as a whole.
"""

from __future__ import annotations

import numpy as np

from .. import arena, fused, ops
from ..quant import Frozen, frozen
from .blocks import SHORT_CHAIN
from .products import product


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.matmul(a, b, out=arena.empty((a.shape[0], b.shape[1]), a.dtype))


# ---- frozen weights --------------------------------------------------------------------------------------------------


@fused.frozen_linear.override(np.ndarray, "f4")
def frozen_linear(needs, x, bias=None, *, weight):
    kept = frozen(weight)
    out, width = kept.shape
    if kept.dtype != x.dtype or x.shape[-1] != width or not (bias is None or bias.shape == (out,)):
        return NotImplemented
    rows = x.reshape(-1, width)
    y = arena.empty((len(rows), out), x.dtype)
    for part, dense in kept.panels():
        product(rows, dense, y[:, part])
        del dense  # before the next one is made
    if bias is not None:
        np.add(y, bias, out=y)  # not block by block after a product of as many rows: smaller products cost more
    return y.reshape(*x.shape[:-1], out), (weight if needs[0] else None, needs)


@frozen_linear.backward
def _(g, weight, needs):
    rows = g.reshape(-1, g.shape[-1])
    dx = None
    if weight is not None:
        kept = frozen(weight)
        dx = _times(rows, kept).reshape(*g.shape[:-1], kept.shape[1])
    return (dx, rows.sum(axis=0) if needs[1:] == (True,) else None)[: len(needs)]


def _times(rows: np.ndarray, weight: Frozen) -> np.ndarray:
    """rows (n, out) @ weight()."""
    total = None
    for part, dense in weight.panels():
        more = _product(rows[:, part], dense)
        total = more if total is None else np.add(total, more, out=total)
        del dense, more  # before the next ones are made
    return total


# ---- trained matrices ------------------------------------------------------------------------------------------------


@ops.linear.override(np.ndarray, "f4")
def linear(needs, x, w, b=None):
    if w.ndim != 2 or x.shape[-1] != w.shape[1] or not (b is None or b.shape == w.shape[:1]):
        return NotImplemented
    y = _product(x.reshape(-1, x.shape[-1]), w.T)
    if b is not None:
        np.add(y, b, out=y)
    saved = w if needs[0] else None, x if needs[1] else None, needs
    return y.reshape(*x.shape[:-1], len(w)), saved


@linear.backward
def _(g, w, x, needs):
    rows = g.reshape(-1, g.shape[-1])
    dx = None if w is None else _product(rows, w).reshape(*g.shape[:-1], w.shape[1])
    dw = None if x is None else _product(rows.T, x.reshape(-1, x.shape[-1]))
    return (dx, dw, rows.sum(axis=0) if needs[2:] == (True,) else None)[: len(needs)]


@fused.addmm.override(np.ndarray, "f4")
def addmm(needs, y, u, B, *, alpha):
    if B.ndim != 2 or y.shape != (*u.shape[:-1], len(B)) or u.shape[-1] != B.shape[1]:
        return NotImplemented
    alpha = y.dtype.type(alpha)
    scaled = np.multiply(B.T, alpha, out=arena.empty(B.shape[::-1], B.dtype))
    given, low = y.reshape(-1, len(B)), u.reshape(-1, u.shape[-1])
    found = arena.empty(given.shape, y.dtype)
    step = max(1, SHORT_CHAIN // len(B))
    for at in range(0, len(found), step):
        block = found[at : at + step]
        np.matmul(low[at : at + step], scaled, out=block)
        np.add(block, given[at : at + step], out=block)
    return found.reshape(y.shape), (alpha, B if needs[1] else None, u if needs[2] else None, needs[0])


@addmm.backward
def _(g, alpha, B, u, y_needed):
    rows = g.reshape(-1, g.shape[-1])
    du = None if B is None else _product(rows, alpha * B).reshape(*g.shape[:-1], B.shape[1])
    dB = None if u is None else _product(rows.T, u.reshape(-1, u.shape[-1]))
    if dB is not None:
        np.multiply(dB, alpha, out=dB)
    return g if y_needed else None, du, dB
