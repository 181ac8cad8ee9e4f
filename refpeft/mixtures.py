"""Several data sets in one training: every row of a step comes from a set that is drawn with the set's weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.batches import Batch, Batches
from refpeft.errors import RefpeftError
from refpeft.rng import Stream

_DRAWN = 4096  # rows whose sets are drawn at a time


class Mixture(Batches):
    """Like Batches, of several data sets, each of which goes through epochs of its own in an order of its own.

    sets     the Batches of each set, of one row each
    weights  how much of the rows each set has, in any unit
    batch    rows of a step
    epoch    rows of an epoch; by default as many as the sets have together
    """

    def __init__(
        self, sets: Sequence[Batches], weights: Sequence[float], batch: int, seed: int = 0, epoch: int | None = None
    ):
        if len(sets) != len(weights) or min(weights) <= 0:
            raise RefpeftError(f"weights are {list(weights)}: expected one above 0 for each of the {len(sets)} sets")
        if len({one.of_pairs_alone for one in sets}) > 1:
            raise RefpeftError("pairs of texts of some data sets have scores, and of others none: choose one kind")
        self.batch, self.seed, self.shuffle = batch, seed, True
        self.collate, self.packed = sets[0].collate, sets[0].packed
        self.sets = list(sets)
        self.shares = tuple(weight / sum(weights) for weight in weights)
        self.rows = sorted((row for one in sets for row in one.rows), key=lambda row: -sum(map(len, row)))
        self.epoch = epoch or len(self.rows)
        self._drawn: list[np.ndarray] = []  # the set of each row, in blocks
        self._before = [np.zeros(len(sets), np.int64)]  # rows of each set before a block

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch // self.batch)

    def at(self, step: int) -> Batch:
        batch = super().at(step)
        sets = [number for number, _ in self._places(step)]
        return replace(batch, task=np.repeat(np.array(sets, np.int32), batch.rows_each))

    def _rows_at(self, step: int) -> list[list[Any]]:
        return [self.sets[number].examples_at(place) for number, place in self._places(step)]

    def _places(self, step: int) -> list[tuple[int, int]]:
        """(number of the set, number of the row in the epochs of that set) of each row of a step."""
        return [self._place(row) for row in range(step * self.batch, (step + 1) * self.batch)]

    def _place(self, row: int) -> tuple[int, int]:
        block, at = divmod(row, _DRAWN)
        while len(self._drawn) <= block:
            lots = Stream(self.seed, "mixture", len(self._drawn)).uniform(size=_DRAWN)
            drawn = np.searchsorted(np.cumsum(self.shares)[:-1], lots, side="right")
            self._drawn.append(drawn)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.sets)))
        drawn = self._drawn[block]
        number = int(drawn[at])
        return number, int(self._before[block][number]) + int(np.count_nonzero(drawn[:at] == number))
