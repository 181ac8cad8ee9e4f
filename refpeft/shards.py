"""Shards: the unit of parallel work. Each has a model, a tape, an arena and gradients of its own.

Threads are the carriers here. A micro-batch is cut into shares of its rows, and each share runs forward and backward in
a thread, with BLAS at one thread: two levels of threads fight for the same cores. What the loss is divided by is known
before. Gradients are added up share by share, so that no result depends on which thread was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import threadpoolctl

from . import arena, backend, blockwise_numpy, sites
from .arena import Arena
from .backend import Array
from .layers import Layer, Part
from .models import heads
from .models.base import Model
from .optim import Flat
from .quant import Dense
from .tensor import Tensor, parameter

Share = TypeVar("Share")
Result = TypeVar("Result")

_MUCH = 1 / 8
"""Of a model's numbers: where more are trained, gradients for every thread would take too much memory."""

_ROW = 512
"""Elements of NumPy's buffers in a share: no more than a row, so that a gain or a column is not copied for each."""


@dataclass
class Shard:
    """What one thread computes with; `gradients` is flat, and those of the model's leaves are views of it."""

    model: Model
    arena: Arena
    gradients: Array


class Shards:
    """The shards of a model: the first one is `model` itself, the others are its twins, one for each of BLAS's threads.

    flat  the trained values of `model` and their gradients, where sums end up

    There is one shard, and BLAS has all threads, where arrays are not NumPy's, and where so much is trained that
    gradients for each thread would take too much memory.
    """

    def __init__(self, model: Model, flat: Flat):
        self._threads = backend.threads()
        self._shards = [Shard(model, Arena(), flat.grads)]
        for _ in range(1, number(model, flat.values.size)):
            other = twin(model)
            self._shards.append(Shard(other, Arena(), flat.gradients_of(dict(other.trained()))))
        self._blas = threadpoolctl.ThreadpoolController()
        self._pool = ThreadPoolExecutor(len(self._shards), "shard")

    def __len__(self) -> int:
        return len(self._shards)

    def run(self, work: Callable[[Model, Share], Result], shares: Sequence[Share]) -> list[Result]:
        """work(model, share) of each share, at most as many as there are shards, each in a thread.

        What they added to gradients is in those of `flat` then. With a single share BLAS has the threads. A device is
        one shard, which nothing is to be arranged for.
        """
        used = self._shards[: len(shares)]
        if used[0].model.xp is not np:
            return [work(used[0].model, *shares)]
        several = len(used) > 1
        calls = [  # each with NumPy set as it is here
            partial(copy_context().run, _within, shard, work, share, several)
            for shard, share in zip(used, shares, strict=True)
        ]
        with self._blas.limit(limits=1 if several else self._threads, user_api="blas"):
            try:
                results = self._together(calls) if several else [calls[0]()]
            except BaseException:
                for shard in used:
                    shard.gradients.fill(0)  # half of a sum
                raise
        total = used[0].gradients
        for shard in used[1:]:
            total += shard.gradients
            shard.gradients.fill(0)
        return results

    def _together(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """What each gives, in a thread of its own; all have ended then, even if one fails."""
        waiting = [self._pool.submit(call) for call in calls]
        try:
            return [one.result() for one in waiting]
        finally:
            wait(waiting)

    def next_step(self) -> None:
        """Says that another step begins."""
        for shard in self._shards:
            shard.arena.next_step()

    def rest(self) -> None:
        """Gives back the memory that steps use again: something else comes first."""
        for shard in self._shards:
            shard.arena.clear()


def number(model: Model, trained: int) -> int:
    """How many shards there are of a model of which so many numbers are trained."""
    return 1 if trained > _MUCH * model.parameters() or model.xp is not np else backend.threads()


def _within(shard: Shard, work: Callable[[Model, Share], Result], share: Share, others: bool) -> Result:
    np.setbufsize(_ROW)
    with arena.using(shard.arena), blockwise_numpy.alone(others):
        return work(shard.model, share)


# ---- twins -----------------------------------------------------------------------------------------------------------


def twin(model: Model) -> Model:
    """A second model over the same frozen weights and the same trained values, with sites, modes and leaves of its own.

    What it is to share with `model` must be decided: methods are settled, and values lie where they stay.
    """
    adapted = [layer for adapter in model.adapters for layer in adapter.layers if layer.frozen is not None]
    replaced = {f"{layer.site.name}.weight": layer.frozen for layer in adapted}  # by what an adapter has in its place
    frozen = model.frozen | replaced
    missing = Dense(model.place(np.zeros((1, 1))), model.dtype)  # of a head that the task's own took the place of

    def weights(name: str, linear: bool, transposed: bool):
        return frozen.get(name, missing)

    def stored(name: str) -> Array | None:
        return frozen[name]() if name in frozen else None

    other = type(model)(model.config, weights, model.dtype, model.xp)
    heads.put_on(other, model.task, model.labels, stored=stored)
    for name, site in other.sites.items():
        same = model.sites[name]
        site.weight, site.bias, site.tied = replaced.get(f"{name}.weight", same.weight), same.bias, same.tied
    other.frozen = dict(frozen)
    for name in ("name", "checkpoint", "tokenizer", "trained_head", "head_tensors", "new_head", "checkpointing"):
        setattr(other, name, getattr(model, name))
    leaves: dict[int, Tensor] = {}
    for adapter in model.adapters:
        sites.put_back(other, _twin_of_adapter(adapter, other, leaves))
    return other


def _twin_of_adapter(adapter: sites.Adapter, model: Model, leaves: dict[int, Tensor]) -> sites.Adapter:
    """`adapter` for `model`, not yet on it. `leaves` are the twins of trained values, by the id of the first."""

    def value(tensor: Tensor) -> Tensor:
        if tensor.node is None:
            return tensor
        return leaves.setdefault(id(tensor), parameter(tensor.data))

    def values(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value(tensor) for name, tensor in named.items()}

    parts = {
        id(part): Part(
            part.plugin,
            part.cfg,
            SimpleNamespace(**values(vars(part.shared))),
            [model.sites[site.name] for site in part.sites],
        )
        for part in adapter.parts
    }
    beside = sites.neighbours(model)
    layers = []
    for layer in adapter.layers:
        site = model.sites[layer.site.name]
        other = Layer(
            parts[id(layer.part)], site, values(layer.values), model.mode, adapter.name, beside[layer.site.home]
        )
        other.state = layer.state  # which is changed around steps only
        other.frozen = layer.site.weight if layer.frozen is not None else None
        layers.append(other)
    return sites.Adapter(
        adapter.name,
        adapter.positions,
        list(parts.values()),
        layers,
        values(adapter.params),
        values(adapter.constants),
        adapter.settled,
        adapter.read_by_head,
    )
