"""Cross-entropy: of logits that are there, and of a frozen head whose logits exist for some rows at a time.

The derivative by the logits has 1 / denominator in it when it is rounded, in float32 before. The gradient that comes
from above is multiplied in float32 too, in the backward pass: where it is 1, as of a step's own loss, nothing is
rounded a second time, or even read.
"""

from __future__ import annotations

import cupy
import numpy as np

from refpeft import fused
from refpeft.backend import Array, bfloat16
from refpeft.cuda.blas import product
from refpeft.cuda.kernels import Source, contiguous, row_block
from refpeft.cuda.linear import low_weight
from refpeft.cuda.override import override

AT_ONCE = fused.LOGITS_ON_GPU
_source = Source("losses.cu")
_float32 = np.dtype("f4")


def rows_at_once(rows: int, words: int, itemsize: int) -> int:
    """How many of so many rows are treated at once by a frozen head of so many words."""
    most = max(1, AT_ONCE // (_padded(words) * itemsize))
    most -= most % 128 if most > 128 else 0  # products go by tiles of 128 rows
    each = -(-rows // max(1, -(-rows // most)))
    return max(1, min(most, -(-each // 128) * 128))


def _padded(words: int) -> int:
    """Numbers from one row of logits to the next: rows begin at multiples of 16 bytes, whatever the vocabulary."""
    return -(-words // 8) * 8


# ---- logits of a frozen head -----------------------------------------------------------------------------------------


@override(fused.linear_cross_entropy, "bfloat16", "float32")
def linear_cross_entropy(needs, hidden, *, weight, targets, denominator, bias=None, weights=None):
    head = low_weight(weight) if hidden.dtype == bfloat16 else weight()
    if hidden.ndim != 2 or head.dtype != hidden.dtype or head.shape[1:] != hidden.shape[1:]:
        return NotImplemented
    rows, words = len(hidden), len(head)
    if _unfit(targets, weights, rows) or not (bias is None or bias.shape == (words,)):
        return NotImplemented
    step = rows_at_once(rows, words, hidden.itemsize)
    buffer = cupy.empty((min(step, rows), _padded(words)), hidden.dtype)
    losses = _Losses(targets, weights, bias, denominator)
    dx = cupy.empty(hidden.shape, hidden.dtype) if needs[0] else None
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        logits = buffer[: part.stop - start, :words]
        product(hidden[part], head.T, out=logits)
        losses.take(part, logits, logits if needs[0] else None)
        if dx is not None:
            product(logits, head, out=dx[part])
    return losses.mean(), (dx,)


@linear_cross_entropy.backward
def _(g, dx):
    return (_scaled(dx, g),)


# ---- logits that are there -------------------------------------------------------------------------------------------


@override(fused.cross_entropy, "bfloat16", "float32", takes_over=True)
def cross_entropy(needs, logits, *, targets, denominator, weights=None, spare):
    if logits.ndim != 2 or not logits.shape[1] or _unfit(targets, weights, len(logits)):
        return NotImplemented
    logits = contiguous(logits)
    slope = None
    if needs[0]:
        slope = logits if spare else cupy.empty(logits.shape, logits.dtype)
    losses = _Losses(targets, weights, None, denominator)
    losses.take(slice(0, len(logits)), logits, slope)
    return losses.mean(), (slope,)


@cross_entropy.backward
def _(g, slope):
    return (_scaled(slope, g),)


# ---- both ------------------------------------------------------------------------------------------------------------


def _unfit(targets: Array, weights: Array | None, rows: int) -> bool:
    """Whether these are not the targets of so many rows, and their weights."""
    return targets.shape != (rows,) or not (weights is None or weights.shape == (rows,))


class _Losses:
    """The losses of all rows, taken part by part; `denominator` is a number, or an array without axes on the device."""

    def __init__(self, targets: Array, weights: Array | None, bias: Array | None, denominator: Array | float):
        self._targets = contiguous(targets.astype(np.int32, copy=False))
        self._weights, self._bias = (None if a is None else _in_float32(a) for a in (weights, bias))
        there = isinstance(denominator, cupy.ndarray)
        self._denominator = (_in_float32(denominator), 1.0) if there else (None, float(denominator))
        self._losses = cupy.empty(targets.shape, _float32)
        self._mean = _source("mean_loss", _float32)  # first: after `take` it is too late for another pair

    def take(self, part: slice, logits: Array, slope: Array | None) -> None:
        """The rows `part`, whose logits these are; `slope` becomes the derivative of `mean()` by them."""
        count, words = logits.shape
        if not count:
            return
        stride = logits.strides[0] // logits.itemsize
        aligned = stride % 8 == 0 and logits.data.ptr % 16 == 0
        _source("row_losses", logits.dtype)(
            count, row_block(words), logits, slope, self._losses[part], self._targets[part],
            None if self._weights is None else self._weights[part], self._bias, *self._denominator,
            words, np.int64(stride), words // 8 * 8 if aligned else 0,
        )  # fmt: skip

    def mean(self) -> Array:
        """Their sum over the denominator."""
        loss = cupy.empty((), _float32)
        self._mean(1, 1024, self._losses, loss, *self._denominator, self._losses.size)
        return loss


def _in_float32(array: Array) -> Array:
    return contiguous(array.astype(_float32, copy=False))


def _scaled(slope: Array, g: Array) -> Array:
    """`slope` times g (), in place: it is what forward made for this."""
    if slope.size:
        blocks = -(-slope.size // (8 * 256))
        _source("scale_by", slope.dtype)(blocks, 256, slope, _in_float32(g), np.int64(slope.size))
    return slope
