"""What holds training near the base model: L2-SP on what is trained, and KL(base || model) on what is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import fused, learning, ops, sites
from .batches import Batch
from .errors import RefpeftError
from .models.base import Model
from .models.objectives import by_chunks
from .tensor import Tensor, no_grad


class FirstValues:
    """L2-SP (Li et al., 2018, arXiv:1802.01483): strength / 2 times the sum of (value - first value)^2.

    First values are those at the start of the run, when methods have been fitted to weights and data. Of a method that
    trains weights in place of frozen ones they are the base's, as in the paper; of one that adds something they are its
    own: it is held where it began, such as LoRA's A at its draw and its B at zero. What is trained of the task's head
    is left out, as the paper leaves the new layer out.
    """

    def __init__(self, model: Model, strength: float):
        head = {id(value) for layer in _head_layers(model) for value in layer.values.values()}
        self.strength = strength
        self.held = [(value, Tensor(value.data.copy())) for _, value in model.trained() if id(value) not in head]
        if not self.held:
            raise RefpeftError("train.l2_sp holds nothing: what is trained is the task's head, which it leaves out")

    def penalties(self) -> Iterator[Tensor]:
        """The terms, one for each value that is trained."""
        for value, first in self.held:
            difference = value - first
            yield ops.sum(difference * difference) * (self.strength / 2)


def _head_layers(model: Model) -> list[Any]:
    return [layer for adapter in model.adapters for layer in adapter.layers if layer.site.name in model.trained_head]


def check_kl(model: Model) -> None:
    """Raises RefpeftError where there is no KL(base || model): the base has no probabilities, or no head of its own."""
    if model.task in ("regress", "embed"):
        raise RefpeftError(f"train.kl compares probabilities, and the task {model.task!r} has none: leave it out")
    if model.new_head:
        raise RefpeftError(
            f"train.kl compares with what the base says, and it has no head for {model.task!r} ({model.new_head[0]} is "
            "not in its files): leave it out, or take train.l2_sp"
        )
    if name := learning.own_objective(model):
        raise RefpeftError(f"train.kl and {name}, which has an objective of its own, exclude one another")


def objective(model: Model, batch: Batch, denominator: float, strength: float) -> Tensor:
    """model.loss and strength times KL(base || model), summed over the targets of `batch`, over `denominator`.

    KL is over the vocabulary, or the labels, at each target, and counts as much as that; the base is the model without
    all that is attached to it.
    """
    rows, targets, weights = batch.picked(model.xp)
    with sites.bypassed(model), no_grad():
        of_base = model.states(batch, rows)
    hidden = model.states(batch, rows)

    def term(logits: Tensor, here: slice) -> Tensor:
        with sites.bypassed(model), no_grad():
            log_base = ops.log_softmax(model.head(of_base[here]))
        counts = None if weights is None else weights[here]
        loss = fused.cross_entropy(logits, targets=targets[here], weights=counts, denominator=denominator)
        kl = ops.sum(ops.exp(log_base) * (log_base - ops.log_softmax(logits)), axis=-1)
        if counts is not None:
            kl = kl * Tensor(counts.astype(kl.dtype))
        return loss + ops.sum(batch.counted(kl, here)) * (strength / denominator)

    return by_chunks(model, model.head, hidden, term)
