"""Training steps on a GPU: each is one CUDA graph, and its batch is there before the step before it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cupy
import numpy as np

from refpeft import learning
from refpeft.backend import Array, bfloat16, to_host
from refpeft.batches import Batches
from refpeft.cuda import aside, graph, rooms
from refpeft.cuda.ahead import Ahead
from refpeft.cuda.offload import Offload
from refpeft.models.base import Model
from refpeft.optim import Flat
from refpeft.placing import Placed, Placing

Gradients = Callable[[Sequence[Placed], Array], tuple[Array, Array]]
"""(the parts of a batch, what the loss is divided by) -> (loss, norm of the gradients), which are added to `flat`."""


@dataclass(frozen=True)
class Taken:
    """How a step went: numbers of the host."""

    loss: float
    norm: float
    tokens: int
    supervised: int


class Steps:
    """The steps of a run, in turn: see `take`.

    total     how many there are: after the last one no further batch is prepared
    capture   whether steps become graphs
    offload   whether what layers that are computed again keep lies on the host meanwhile
    """

    def __init__(
        self,
        model: Model,
        flat: Flat,
        train: Batches,
        rows_at_a_time: int,
        total: int,
        capture: bool,
        offload: bool = False,
    ):
        self._model, self._flat, self._train, self._total = model, flat, train, total
        self._place, self._update_apart = Placing(model, rows_at_a_time), learning.acts_around_steps(model)
        self._ahead, self._graphs = Ahead(), graph.Graphs(cupy.cuda.get_current_stream(), capture)
        self._offload = Offload() if offload else None
        self._sent: tuple[int, list[Placed], int, int] | None = None  # step, its parts, tokens, supervised

    def take(self, step: int, gradients: Gradients, update: Callable[[], None]) -> Taken:
        """Computes a step: `gradients` and then `update`, array code alone, of which a graph is made.

        Both must do the same for batches of the same shapes; but where a method acts around the optimizer's step,
        `update` is no part of the graph. Where memory does not suffice the graphs are given back, and it is tried
        without them.
        """
        if self._sent is None or self._sent[0] != step:
            self._send(step)
        _, parts, tokens, supervised = self._sent

        def work() -> Array:
            denominator, *arrays = self._ahead.arrays()
            lowered = (
                rooms.lowered(self._flat.values) if self._model.activations == bfloat16 else contextlib.nullcontext()
            )
            away = self._offload.of(self._model) if self._offload else contextlib.nullcontext()
            with lowered, aside.gradients_aside(self._flat.grads), away:
                loss, norm = gradients(_over(parts, arrays), denominator)
            if not self._update_apart:
                update()
            return cupy.stack((loss, norm))

        key = self._ahead.receive(), tuple(tuple(part.arrays) for part in parts)
        self._flat.norm = None
        try:
            found = self._graphs.run(key, step, work)
        except MemoryError:
            if not self._graphs or self._flat.norm is not None:  # the update had begun
                raise
            found = None  # and try again below, where the error no longer holds what was computed
        if found is None:
            self._graphs.give_back()
            self._flat.grads.fill(0)  # half of a sum
            found = work()
        if self._update_apart:
            self._flat.norm = found[1]  # which a graph does not say by itself
            update()
        if step + 1 < self._total:
            self._send(step + 1)
        loss, norm = to_host(found).tolist()
        return Taken(loss, norm, tokens, supervised)

    @property
    def refused(self) -> str:
        """Why steps are not captured, where they cannot be; else empty."""
        return self._graphs.refused

    def beside(self, work: Callable[[], Any]) -> Any:
        """What work() gives, which is no step; the graphs are given back where memory does not suffice beside them."""
        try:
            return work()
        except MemoryError:
            if not self._graphs:
                raise
        self._graphs.give_back()
        return work()

    def rest(self) -> None:
        """Gives back the memory of graphs: no step comes."""
        self._graphs.give_back()

    def _send(self, step: int) -> None:
        """Prepares the batch of a step, and starts to copy it."""
        batch = self._train.at(step)
        parts = self._place(batch)
        denominator = np.array(batch.denominator or 1, self._flat.values.dtype)
        self._ahead.send([denominator, *(array for part in parts for array in part.arrays.values())])
        self._sent = step, parts, batch.tokens, batch.supervised


def _over(parts: Sequence[Placed], arrays: Sequence[Array]) -> list[Placed]:
    """The same parts, over these arrays in the place of their own."""
    each = iter(arrays)
    return [replace(part, **{name: next(each) for name in part.arrays}) for part in parts]
