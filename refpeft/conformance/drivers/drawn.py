"""What is drawn in training, as a case says it: cases give the masks of dropout and random numbers as inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from refpeft.layers import Train
from refpeft.models.base import Model
from refpeft.tensor import Tensor

from ..vectors import Arrays

_DRAWN = ("keep", "draws", "u", "u_group")
"""Inputs: the mask of every dropout; numbers and uniform numbers in the order in which they are drawn."""


@contextmanager
def as_drawn(model: Model, given: Arrays) -> Iterator[None]:
    """Within it the model trains, where the case has something that is drawn, and that is drawn."""
    if not any(name in given for name in _DRAWN):
        yield
        return
    drawn = _Drawn(model, given)
    layers = [layer for adapter in model.adapters for layer in adapter.layers]
    for layer in layers:
        layer.train = lambda reads=None: drawn
    model.mode.training = True
    yield
    model.mode.training = False
    for layer in layers:
        del layer.train


class _Drawn(Train):
    """What hooks know of training: the same for all of them, so that they draw one after the other."""

    def __init__(self, model: Model, given: Arrays):
        super().__init__(model.mode, ())
        self._keep = given.get("keep")
        self._numbers = iter(given["draws"].ravel() if "draws" in given else ())
        self._uniform = (Tensor(model.place(given[name])) for name in ("u", "u_group") if name in given)

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        return x * self._keep * (1 / (1 - rate))

    def draw(self, n: int, apart: bool = False) -> int:
        return int(next(self._numbers))

    def uniform(self, like: Tensor) -> Tensor:
        return next(self._uniform)
