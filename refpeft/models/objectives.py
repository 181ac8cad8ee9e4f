"""What training minimises, by what a model's head says: functions (model, batch, denominator) -> Tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft import fused, ops
from refpeft.errors import RefpeftError
from refpeft.tensor import Tensor, checkpoint

if TYPE_CHECKING:
    from refpeft.models.base import Model

_SHARPNESS = 20.0
"""Cosines are multiplied by this before the softmax over a batch's texts, as sentence-transformers does."""


def cross_entropy(model: Model, batch: Any, denominator: float) -> Tensor:
    """The sum of -log p(target) times its weight, over `denominator`.

    Only positions with a target go through the last norm and the head, and logits never exist as a whole.
    """
    rows, targets, weights = batch.picked(model.xp)
    hidden = model.states(batch, rows)
    if not model.head.layers:
        frozen = {"weight": model.head.weight, "bias": model.head.bias}
        return fused.linear_cross_entropy(hidden, targets=targets, weights=weights, denominator=denominator, **frozen)

    def loss(logits: Tensor, here: slice) -> Tensor:
        counts = None if weights is None else weights[here]
        return fused.cross_entropy(logits, targets=targets[here], weights=counts, denominator=denominator)

    return by_chunks(model, model.head.as_computed, hidden, loss)  # it computes in float32 whatever it is given


def by_chunks(
    model: Model, head: Callable[[Tensor], Tensor], hidden: Tensor, term: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """The sum of term(logits of some rows of `hidden`, which rows these are), chunk by chunk.

    `head`, the model's, gives the logits again in the backward pass, so that they never exist as a whole.
    """
    size = max(1, fused.logits_at_once(model.xp is np, hidden.dtype.itemsize) // model.head.shape[0])
    total = None
    for at in range(0, max(hidden.shape[0], 1), size):
        here = slice(at, at + size)

        def chunk(h: Tensor, here: slice = here) -> Tensor:
            model.mode.chunk = here.start  # dropout in the head: each row's own mask, the same one when recomputed
            logits = head(h)
            model.mode.chunk = 0
            return term(logits, here)

        found = checkpoint(chunk, hidden[here])
        total = found if total is None else total + found
    return total


def squared_error(model: Model, batch: Any, denominator: float) -> Tensor:
    """The sum of (output - target)^2 over `denominator`, of a head with one output."""
    rows, targets, _ = batch.picked(model.xp)
    said = model.head(model.states(batch, rows))[:, 0]
    difference = said - Tensor(targets.astype(said.dtype))
    return ops.sum(difference * difference) * (1 / denominator)


def similarity(model: Model, batch: Any, denominator: float) -> Tensor:
    """Of pairs of texts, whose rows follow one another, by the cosines of their vectors.

    With scores the sum of (cosine - score)^2 over `denominator`. Without, each first text is to find its second among
    those of all pairs: the sum of -log softmax(20 cosines)[own], over `denominator` (Henderson et al., 2017,
    arXiv:1705.00652, section 4; in-batch negatives).
    """
    if batch.rows_each != 2:
        raise RefpeftError("similarity is learned from pairs of texts: rows of text_a and text_b")
    targets = batch.targets[::2, 0]
    vectors = model(batch.ids, segments=batch.segments)
    a, b = vectors[::2], vectors[1::2]
    if targets.dtype.kind == "f":
        difference = ops.sum(a * b, axis=-1) - Tensor(model.xp.asarray(targets).astype(vectors.dtype))
        return ops.sum(difference * difference) * (1 / denominator)
    own = model.xp.arange(len(targets))
    return fused.cross_entropy(a @ b.transpose() * _SHARPNESS, targets=own, denominator=denominator)
