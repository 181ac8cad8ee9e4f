"""Examples as batches: which rows an optimizer step sees depends on the seed and the step's number only.

A step's batch can be asked for in any order, so a resumed run continues with the very rows that an unbroken one sees.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refpeft.data import Example
from refpeft.errors import RefpeftError
from refpeft.rng import Stream

IGNORE = -100  # a target that does not count


@dataclass(frozen=True)
class Batch:
    """int32 arrays (batch, time); padding is on the right.

    targets     the token that comes next, where it is learned; else -100. Already shifted, never of another document
    positions   of each token in its document; None where that is 0, 1, 2, ... in every row
    segments    number of the document in its row, -1 for padding; None where each row is one document without padding
    """

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are not padding."""
        return self.ids.size if self.segments is None else int((self.segments >= 0).sum())

    @property
    def supervised(self) -> int:
        """How many targets count."""
        return int((self.targets >= 0).sum())


class Batches:
    """The batches of a data set, epoch after epoch.

    examples   of refpeft.data
    batch      rows of a batch; the last batch of an epoch may have fewer
    length     the most tokens of a row; with `pack` several documents share a row
    shuffle    a new order of rows in every epoch. Without it (for evaluation) rows come longest first. The sum of the
               losses is the same in any order; this one needs little padding, and a batch that is too large comes first
    """

    def __init__(
        self, examples: list[Example], batch: int, length: int, pack: bool = False, seed: int = 0, shuffle: bool = True
    ):
        if not examples:
            raise RefpeftError("there are no examples to make batches of")
        if batch < 1:
            raise RefpeftError(f"batch is {batch}: expected 1 or more rows")
        longest = max(map(len, examples))
        if longest > length:
            raise RefpeftError(f"an example has {longest:,} tokens, but a row {length:,}: fit the examples first")
        self.batch, self.seed, self.shuffle = batch, seed, shuffle
        # Rows are packed once: then every epoch has the same number of steps. Only their order changes.
        self.rows = pack_rows(examples, length, seed) if pack else [[example] for example in examples]
        self.rows.sort(key=lambda row: -sum(map(len, row)))
        self.packed = pack
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch)

    @property
    def longest(self) -> int:
        """Tokens of the longest row: what a step's memory depends on."""
        return sum(map(len, self.rows[0]))

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)[index * self.batch : (index + 1) * self.batch]
        return collate([self.rows[i] for i in order], self.packed)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the first epoch."""
        return (self.at(step) for step in range(self.steps_per_epoch))

    def _epoch(self, epoch: int) -> np.ndarray:
        """The order of rows in an epoch."""
        if not self.shuffle:
            return np.arange(len(self.rows))
        if self._order[0] != epoch:
            self._order = epoch, Stream(self.seed, "data", epoch).permutation(len(self.rows))
        return self._order[1]


def pack_rows(examples: list[Example], length: int, seed: int = 0) -> list[list[Example]]:
    """Rows of at most `length` tokens, by best-fit decreasing: longest first, each into the fullest row that has room.

    Ties in length are in random order, so that neighbours in the file do not share a row.
    """
    order = Stream(seed, "pack").permutation(len(examples))
    order = sorted(order.tolist(), key=lambda i: -len(examples[i]))
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in order:
        example = examples[i]
        fit = bisect_left(room, (len(example), -1))
        if fit < len(room):
            free, row = room.pop(fit)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(room, (free - len(example), row))
    return rows


def collate(rows: list[list[Example]], packed: bool = False) -> Batch:
    """A batch of rows, each a list of documents (one, unless packed), padded to the longest row."""
    time = max(sum(map(len, row)) for row in rows)
    shape = len(rows), time
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    targets, segments = np.full(shape, IGNORE, np.int32), np.full(shape, -1, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row):
            here = slice(at, at + len(example))
            ids[r, here] = example.ids
            positions[r, here] = np.arange(len(example))
            segments[r, here] = number
            before = slice(at, at + len(example) - 1)
            targets[r, before] = np.where(example.supervised[1:], example.ids[1:], IGNORE)
            at += len(example)
    full = not packed and (segments == 0).all()
    return Batch(ids, targets, positions if packed else None, None if full else segments)


def split(batch: Batch, rows: int) -> list[Batch]:
    """A batch in parts of at most `rows` rows, for the accumulation of gradients; each without needless padding."""
    return [_part(batch, slice(start, start + rows)) for start in range(0, len(batch.ids), rows)]


def _part(batch: Batch, rows: slice) -> Batch:
    if batch.segments is None:
        return Batch(batch.ids[rows], batch.targets[rows])
    segments = batch.segments[rows]
    time = int((segments >= 0).sum(axis=1).max())
    cut = (rows, slice(0, time))
    segments = segments[:, :time]
    positions = None if batch.positions is None else batch.positions[cut]
    full = positions is None and (segments == 0).all()
    return Batch(batch.ids[cut], batch.targets[cut], positions, None if full else segments)
