"""Cross-entropy for float32 arrays of NumPy: of logits that are there, and of a frozen head whose logits never are."""

from __future__ import annotations

import numpy as np

from .. import arena, fused
from ..quant import Frozen, frozen
from .blocks import SHORT_CHAIN

WORDS = 4096
"""Words of the vocabulary whose logits are there at once, of many rows: BLAS is slower for few rows and all words."""


# ---- logits that are there -------------------------------------------------------------------------------------------


@fused.cross_entropy.override(np.ndarray, "f4")
def cross_entropy(needs, logits, *, targets, denominator, weights=None):
    if logits.ndim != 2 or _unfit(targets, weights, *logits.shape):
        return NotImplemented
    counts, index = _counts(targets, weights), np.maximum(targets, 0)
    slope = arena.like(logits)
    losses = np.empty(len(logits), logits.dtype)
    step = max(1, SHORT_CHAIN // max(1, logits.shape[1]))
    for at in range(0, len(logits), step):
        rows = slice(at, at + step)
        z, own = slope[rows], (np.arange(len(losses[rows])), index[rows])
        np.subtract(logits[rows], logits[rows].max(axis=1, keepdims=True), out=z)
        at_target = z[own]
        np.exp(z, out=z)
        total = z.sum(axis=1)
        losses[rows] = (np.log(total) - at_target) * counts[rows]
        if needs[0]:
            np.multiply(z, (counts[rows] / total)[:, None], out=z)
            z[own] -= counts[rows]
    scale = logits.dtype.type(1) / np.asarray(denominator, logits.dtype)
    return _sum(losses) * scale, (slope if needs[0] else None, scale)


@cross_entropy.backward
def _(g, slope, scale):
    return (np.multiply(slope, g * scale, out=slope),)


# ---- logits of a frozen head -----------------------------------------------------------------------------------------


@fused.linear_cross_entropy.override(np.ndarray, "f4")
def linear_cross_entropy(needs, hidden, *, weight, targets, denominator, bias=None, weights=None):
    head = frozen(weight)
    words, width = head.shape
    if head.dtype != hidden.dtype or hidden.ndim != 2 or hidden.shape[1] != width:
        return NotImplemented
    if _unfit(targets, weights, len(hidden), words) or not (bias is None or bias.shape == (words,)):
        return NotImplemented
    counts = _counts(targets, weights)
    losses = np.empty(len(hidden), hidden.dtype)
    dx = arena.like(hidden) if needs[0] else None
    step = max(1, fused.LOGITS_AT_ONCE // min(words, WORDS))
    for at in range(0, len(hidden), step):
        rows = slice(at, at + step)
        slope = None if dx is None else dx[rows]
        losses[rows] = _losses(hidden[rows], head, bias, targets[rows], counts[rows], slope)
    scale = hidden.dtype.type(1) / np.asarray(denominator, hidden.dtype)
    return _sum(losses) * scale, (dx, scale)


@linear_cross_entropy.backward
def _(g, dx, scale):
    return (np.multiply(dx, g * scale, out=dx),)


def _losses(
    hidden: np.ndarray,
    head: Frozen,
    bias: np.ndarray | None,
    targets: np.ndarray,
    counts: np.ndarray,
    dx: np.ndarray | None,
) -> np.ndarray:
    """The losses of rows, times `counts`; their derivatives by `hidden` go into `dx`, unless that is None.

    One pass over the head: exponentials are summed under the largest logit so far, and these sums shrink where a larger
    one is met (Milakov & Gimelshein, 2018, arXiv:1805.02867).
    """
    top = np.full((len(hidden), 1), np.finfo(hidden.dtype).min)  # not -inf, which a logit may be
    total = np.zeros((len(hidden), 1))
    at_target = np.zeros(len(hidden), hidden.dtype)
    if dx is not None:
        rows_of_targets = arena.like(hidden)
        rows_of_targets.fill(0)
        dx.fill(0)
    for words, dense in head.panels(WORDS):
        logits = np.matmul(hidden, dense.T, out=arena.empty((len(hidden), len(dense)), hidden.dtype))
        here = np.flatnonzero((words.start <= targets) & (targets < words.stop))
        ids = targets[here] - words.start
        at_target[here] = logits[here, ids] + (0 if bias is None else bias[words][ids])
        shrink = _exponentiate(logits, None if bias is None else bias[words], top, total)
        if dx is not None:
            rows_of_targets[here] = dense[ids]
            np.multiply(dx, shrink, out=dx)
            np.add(dx, np.matmul(logits, dense, out=arena.like(hidden)), out=dx)
        del logits, dense  # before the next ones are made
    if dx is not None:
        np.multiply(dx, (counts[:, None] / total).astype(dx.dtype), out=dx)
        np.multiply(rows_of_targets, counts[:, None], out=rows_of_targets)
        np.subtract(dx, rows_of_targets, out=dx)
    return (np.log(total[:, 0]) + top[:, 0] - at_target) * counts


def _exponentiate(logits: np.ndarray, bias: np.ndarray | None, top: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Makes `logits` e**(logits + bias - top), `top` the largest so far, and adds their sums to `total`.

    Returns by what sums of earlier exponentials are to be multiplied, as `total` is.
    """
    before, sums = top.copy(), np.empty_like(total)
    step = max(1, SHORT_CHAIN // logits.shape[1])
    for at in range(0, len(logits), step):
        rows = slice(at, at + step)
        z, peak = logits[rows], top[rows]
        if bias is not None:
            np.add(z, bias, out=z)
        np.maximum(peak, z.max(axis=1, keepdims=True), out=peak)
        np.subtract(z, peak, out=z)
        np.exp(z, out=z)
        z.sum(axis=1, keepdims=True, out=sums[rows])
    shrink = np.exp(before - top)
    np.multiply(total, shrink, out=total)
    np.add(total, sums, out=total)
    return shrink


# ---- both ------------------------------------------------------------------------------------------------------------


def _unfit(targets: np.ndarray, weights: np.ndarray | None, rows: int, words: int) -> bool:
    """Whether these are not the targets of so many rows, numbers below `words`, and their weights."""
    shapes = {targets.shape, targets.shape if weights is None else weights.shape}
    return shapes != {(rows,)} or targets.max(initial=0) >= words


def _counts(targets: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """How much each row counts: 0 where its target is negative."""
    kept = targets >= 0
    return (kept if weights is None else kept * weights).astype("f4")


def _sum(losses: np.ndarray) -> np.float32:
    return losses.sum(dtype="f8").astype("f4")
