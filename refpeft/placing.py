"""The batch of a step as a device computes it: shapes of few kinds, and nothing left to be looked up on the host.

A captured step has fixed shapes. So rows are padded to one of a few lengths, and the loss is taken of a round number of
positions: those that count, and others whose target is ignored. Losses and gradients are the same, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .backend import Array
from .batches import IGNORE, Batch, split
from .models.base import Model
from .models.config import ModelConfig
from .tensor import Tensor

UNIT = 64
"""Lengths of rows, and numbers of positions that a loss is taken of, are multiples of it."""

LENGTHS, _POSITIONS = 8, 4  # how many of each there are between a power of two and the next
_WASTE = 1.25  # the parts of a step get the same shape where that is at most so many times the work
_MOST = 3 / 4  # a loss that would be taken of a larger share of the positions is taken of all


@dataclass(frozen=True)
class Placed(Batch):
    """A part of a step's batch, with what its loss asks for: NumPy's arrays at first, then the device's.

    rows     the positions that the loss is taken of, in the flattened array of targets, none twice
    chosen   the targets there, of which some may be IGNORE
    counts   the weights there; None: 1
    """

    rows: Array | None = None
    chosen: Array | None = None
    counts: Array | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """All arrays, by name."""
        return {name: value for name, value in vars(self).items() if hasattr(value, "dtype")}

    def picked(self, xp: Any) -> tuple[Array, Array, Array | None]:
        return self.rows, self.chosen, self.counts

    def counted(self, each: Tensor, here: slice = slice(None)) -> Tensor:
        return each * (self.chosen[here] >= 0)


class Placing:
    """Called with the batch of a step, it gives the parts that are computed one after the other.

    `model` says what padding means to it, and raises RefpeftError for tokens that it does not have.
    """

    def __init__(self, model: Model, rows_at_a_time: int):
        self._model, self._rows, self._room = model, rows_at_a_time, model.room
        rope = getattr(model.config, "rope", None)
        self._stretches = rope is None or rope.kind != "dynamic"  # whose angles go by the row's length
        # padding stands behind a text, where no token sees it; the mean over a row's tokens has to know of it
        self._blind = isinstance(model.config, ModelConfig) and model.read != "mean"

    def __call__(self, batch: Batch) -> list[Placed]:
        parts = split(batch, self._rows)
        times = self._lengths([part.ids.shape[1] for part in parts])
        said = self._lengths([part.said.shape[1] for part in parts]) if batch.said is not None else times
        parts = [self._padded(part, *lengths) for part, *lengths in zip(parts, times, said, strict=True)]
        asked = [part.asked for part in parts]
        counts = _alike([rounded(len(rows), _POSITIONS) for rows in asked])
        return [_chosen(part, rows, count) for part, rows, count in zip(parts, asked, counts, strict=True)]

    def _lengths(self, lengths: list[int]) -> list[int]:
        if not self._stretches:
            return lengths
        return _alike([int(max(n, min(rounded(n, LENGTHS), self._room))) for n in lengths])

    def _padded(self, part: Batch, time: int, said: int) -> Batch:
        """`part` with rows of so many tokens, and without `segments` where these say nothing to the model."""
        self._model.check_ids(part.ids)
        if part.said is not None:
            self._model.check_ids(part.said)
        segments = part.segments
        if self._blind and part.positions is None:
            segments = None
        elif segments is None and time > part.ids.shape[1]:
            segments = np.zeros(part.ids.shape, np.int32)
        arrays = vars(part) | {"segments": segments, "starts": None}
        for name, array in arrays.items():
            if isinstance(array, np.ndarray) and array.ndim == 2:
                wanted = said if name in ("said", "targets", "weights") else time
                fill = {"segments": -1, "targets": IGNORE if array.dtype.kind == "i" else np.nan}.get(name, 0)
                more = (0, 0), (0, wanted - array.shape[1])
                arrays[name] = np.pad(array, more, constant_values=fill)
        return replace(part, **arrays)


def rounded(n: int, between: int) -> int:
    """`n` or a little more: a multiple of UNIT, of which `between` lie between a power of two and the next at most."""
    unit = max(UNIT, 2 ** (max(n, 1).bit_length() - 1) // between)
    return max(unit, -(-n // unit) * unit)


def _alike(sizes: list[int]) -> list[int]:
    """The largest size for all, so that steps are of few kinds; the sizes as they are where that would waste much."""
    most = max(sizes)
    return [most] * len(sizes) if most * len(sizes) <= _WASTE * sum(sizes) else sizes


def _chosen(part: Batch, asked: np.ndarray, count: int) -> Placed:
    """`part`, and `count` positions that its loss is taken of: those `asked` for first, in their order.

    Of numbers (float targets) just those are taken: there is none that a loss ignores.
    """
    targets = part.targets.reshape(-1)
    if targets.dtype.kind == "f":
        rows = asked
    elif count > _MOST * targets.size:
        rows = np.arange(targets.size)
    else:
        others = np.setdiff1d(np.arange(targets.size), asked, assume_unique=True)
        rows = np.concatenate((asked, others[: count - len(asked)]))
    counts = None if part.weights is None else part.weights.reshape(-1)[rows]
    return Placed(**vars(part), rows=rows, chosen=targets[rows], counts=counts)
