"""What methods add to training: an objective, penalties, learning rates, state, and what they do around a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from . import batches, capturing, fused, manager, ops
from .backend import Array
from .batches import Batch
from .errors import RefpeftError
from .layers import Layer, Part
from .models.base import Model
from .placing import Placed, compares_texts, laid_out
from .tensor import Tensor


def _with(model: Model, hook: str) -> Iterator[tuple[Part, list[Layer]]]:
    """Every part of what is attached that has this hook, with its layers."""
    for adapter in model.adapters:
        for part in adapter.parts:
            if manager.hook(part.plugin, hook):
                yield part, [layer for layer in adapter.layers if layer.part is part]


def refuse_recomputation(model: Model) -> None:
    """Raises RefpeftError where activations cannot be computed again: a pass would not know what it was to do."""
    names = [part.name for part, _ in _with(model, "peft_objective")]
    names += [layer.part.name for adapter in model.adapters for layer in adapter.layers if layer.remembers]
    if names:
        raise RefpeftError(
            f"checkpoint_activations computes layers again in the backward pass, and {names[0]} hands on what one of "
            "them computed, or compares passes: leave it out"
        )


def own_objective(model: Model) -> str | None:
    """The name of what is attached and has an objective of its own."""
    return next((part.name for part, _ in _with(model, "peft_objective")), None)


def objective(model: Model, batch: Batch, denominator: float) -> Tensor:
    """What is minimised over a part of a step's batch: the sum of -log p(target) over `denominator`, or a method's own.

    `denominator` is that of the whole batch.
    """
    found = [part for part, _ in _with(model, "peft_objective")]
    if not found:
        return model.loss(batch, denominator)
    if len(found) > 1:
        raise RefpeftError(f"{found[0].name} and {found[1].name} both have an objective of their own: choose one")
    if model.task in ("regress", "embed"):
        raise RefpeftError(f"{found[0].name} compares probabilities, and the task {model.task!r} has none")
    rows, targets, weights = batch.picked(model.xp)
    passes = itertools.count()

    def logits() -> Tensor:
        model.mode.again = next(passes)
        return model.head(model.states(batch, rows))

    def loss(z: Tensor) -> Tensor:
        return fused.cross_entropy(z, targets=targets, weights=weights, denominator=denominator)

    def mean(each: Tensor) -> Tensor:
        return ops.sum(batch.counted(each)) * (1 / denominator)

    try:
        return found[0].call("peft_objective", logits=logits, loss=loss, mean=mean)
    finally:
        model.mode.again = 0


def shares(model: Model, batch: Batch, n: int) -> list[Batch]:
    """A batch as at most `n` parts that can be computed at the same time, whose losses and gradients add up to its own.

    Without padding where that is possible; one part alone where rows are told from one another, or what is placed for a
    device.
    """
    if isinstance(batch, Placed) or compares_texts(model, batch):
        return [batch]
    return batches.shares(laid_out(model, batch), n)


def penalties(model: Model) -> Iterator[Tensor]:
    """The penalties of all methods, one at a time: a tape of them all would be as large as what they train."""
    for part, layers in _with(model, "peft_penalty"):
        for layer in layers:
            term = part.call("peft_penalty", site=layer.site, p=layer.p, train=layer.train())
            if term is not None:
                yield term


def rates(model: Model) -> dict[str, float]:
    """The learning rates, by the name of the parameter, that methods want to be other than 1 times the run's."""
    names = {id(tensor): name for name, tensor in model.trained()}
    found: dict[str, float] = {}
    for part, layers in _with(model, "peft_rates"):
        for layer in layers:
            for key, factor in (part.call("peft_rates", site=layer.site) or {}).items():
                if id(layer.values.get(key)) not in names:
                    raise RefpeftError(f"plugin '{part.name}': peft_rates names {key!r}, which is not trained")
                if factor <= 0:
                    raise RefpeftError(f"{part.name}: {key} learns {factor} times as fast: expected more than 0")
                found[names[id(layer.values[key])]] = factor
    return found


def states(model: Model) -> dict[str, Array]:
    """What methods keep in training (peft_state), fresh: each as a flat view, by name, for checkpoints."""
    found: dict[str, Array] = {}
    for part, layers in _with(model, "peft_state"):
        for layer in layers:
            kept = part.call("peft_state", site=layer.site, p=layer.arrays) or {}
            for key, array in kept.items():
                setattr(layer.state, key, model.place(array))
                found[f"{layer.name}.{key}"] = getattr(layer.state, key).reshape(-1)
    return found


def constants(model: Model) -> dict[str, Array]:
    """The constants of methods that act around steps, where they may change them: flat views, by name."""
    return {
        f"{adapter.name}.{name}": tensor.data.reshape(-1)
        for adapter in model.adapters
        if any(manager.hook(part.plugin, "peft_step") for part in adapter.parts)
        for name, tensor in adapter.constants.items()
    }


def acts_around_steps(model: Model) -> bool:
    """Whether a method does something around the optimizer's step, by its number: `step` cannot be captured then."""
    return next(_with(model, "peft_step"), None) is not None


def step(model: Model, update: Callable[[], Any], number: int, total: int) -> None:
    """One optimizer step, `update`, with what methods do around it."""
    for part, layers in _with(model, "peft_step"):
        capturing.refuse(f"{part.name} acts around the optimizer's step")
        update = partial(part.call, "peft_step", update=update, layers=layers, step=number, total=total)
    update()
