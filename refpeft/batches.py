"""Examples as batches: which rows an optimizer step sees depends on the seed and the step's number only.

A step's batch can be asked for in any order, so a resumed run continues with the very rows that an unbroken one sees.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.errors import RefpeftError
from refpeft.rng import Stream

if TYPE_CHECKING:
    from refpeft.backend import Array
    from refpeft.examples import Example
    from refpeft.tensor import Tensor

IGNORE = -100  # a target that does not count

_WINDOW = 50
"""Batches whose rows are sorted together, at most: as in transformers, whose name for it is `group_by_length`."""


@dataclass(frozen=True)
class Share:
    """Where one of the shares of a batch lies in it.

    axis    along which the batch's arrays were cut: 0, rows; 1, the tokens of rows that were joined
    here    which rows or tokens it has, of how many in all: `whole`
    asked   which of the targets that count, of `whole_asked`
    """

    axis: int
    here: range
    whole: int
    asked: range
    whole_asked: int

    def asks_all(self, batch: Batch) -> bool:
        """Whether all targets count of the batch that `batch` is this share of."""
        return self.whole_asked == self.whole * math.prod(batch.targets.shape[self.axis + 1 :])


@dataclass(frozen=True)
class Batch:
    """int32 arrays (batch, time); padding is on the right.

    targets     what is learned at each token: the one that comes next, a label, or a number (float32); where nothing
                is, -100 or NaN. Of an encoder-decoder they belong to `said`
    positions   of each token in its document; None where that is 0, 1, 2, ... in every row
    segments    number of the document in its row, -1 for padding; None where each row is one document without padding
    types       0 in the first text of a pair and 1 in the second, where the model tells them apart
    said        what the decoder of an encoder-decoder reads: (batch, its own time)
    weights     float32, how much each target counts; None: 1
    rows_each   so many rows belong together: two of a pair of texts
    task        (batch,): the number of the data set that each row is of, in a mixture of some
    starts      where in the one row each of those begins that were joined to it; None where none were
    share       where this lies in the batch that it is a share of; None: it is a whole one
    """

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None
    types: np.ndarray | None = None
    said: np.ndarray | None = None
    weights: np.ndarray | None = None
    rows_each: int = 1
    task: np.ndarray | None = None
    starts: np.ndarray | None = None
    share: Share | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are not padding."""
        return self.ids.size if self.segments is None else int((self.segments >= 0).sum())

    @property
    def asked(self) -> np.ndarray:
        """Where the targets that count are, in the flattened array of them."""
        counts = self.targets >= 0 if self.targets.dtype.kind == "i" else ~np.isnan(self.targets)
        return np.flatnonzero(counts)

    @property
    def supervised(self) -> int:
        """How many targets count."""
        return self.asked.size

    @property
    def denominator(self) -> float:
        """What the loss of the whole batch is divided by: the sum of the targets' weights, or their number."""
        if self.weights is None:
            return self.supervised
        return float(self.weights.reshape(-1)[self.asked].sum(dtype=np.float64))

    def picked(self, xp: Any) -> tuple[np.ndarray, Array, Array | None]:
        """(positions in the flattened targets that the loss is taken of; the targets there; their weights or None).

        No position is there twice. They are the host's, the others arrays of `xp`.
        """
        rows = self.asked
        weights = None if self.weights is None else xp.asarray(self.weights.reshape(-1)[rows])
        return rows, xp.asarray(self.targets.reshape(-1)[rows]), weights

    def counted(self, each: Tensor, here: slice = slice(None)) -> Tensor:
        """`each`, a number for each of the `picked` positions, or those that are `here`; 0 where no target counts."""
        return each

    def by_turns(self) -> Batch:
        """The same rows, the longest and the shortest by turns: any stretch of them has about as many tokens as others.

        Rows that belong together, and those without padding, are left in their order.
        """
        if self.segments is None or self.rows_each > 1:
            return self
        order = np.argsort(-(self.segments >= 0).sum(axis=1), kind="stable")
        turns = np.stack([order, order[::-1]], axis=1).reshape(-1)[: len(order)]
        return replace(self, **{name: a[turns] for name, a in vars(self).items() if isinstance(a, np.ndarray)})

    def unpadded(self) -> Batch:
        """The same tokens in one row without padding, documents one after the other, each with a number of its own.

        Raises ValueError for what has rows: texts with an answer (`said`), pairs, rows of several data sets.
        """
        if self.said is not None or self.rows_each > 1 or self.task is not None:
            raise ValueError("rows that belong to something cannot be joined")
        shape = self.ids.shape
        segments = np.zeros(shape, np.int32) if self.segments is None else self.segments
        real = segments >= 0
        first = np.ones(shape, bool)  # of its document
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        places = {"positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)}
        arrays = places | {name: array for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        arrays = {name: array[real][None] for name, array in arrays.items()}
        arrays["segments"] = np.cumsum(first[real], dtype=np.int32)[None] - 1
        starts = np.append(0, np.cumsum(real.sum(axis=1))[:-1])
        return replace(self, **arrays, starts=starts)


class Batches:
    """The batches of a data set, epoch after epoch.

    examples   all of one kind of refpeft.examples
    batch      rows of a batch; the last batch of an epoch may have fewer
    length     the most tokens of a row; with `pack` several documents share a row
    shuffle    a new order of rows in every epoch. Without it (for evaluation) rows come longest first, and what is
               drawn of them (hidden tokens) is always the same. The sum of the losses is the same in any order; this
               one needs little padding, and a batch that is too large comes first
    by_length  rows of a batch are about equally long, in an order that is otherwise random; the longest of an epoch's
               batches comes first
    """

    shares: tuple[float, ...] = ()  # of several data sets, see refpeft.mixtures

    def __init__(
        self,
        examples: list[Any],
        batch: int,
        length: int,
        pack: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        by_length: bool = False,
    ):
        if not examples:
            raise RefpeftError("there are no examples to make batches of")
        if batch < 1:
            raise RefpeftError(f"batch is {batch}: expected 1 or more rows")
        longest = max(map(len, examples))
        if longest > length:
            raise RefpeftError(f"an example has {longest:,} tokens, but a row {length:,}: fit the examples first")
        self.batch, self.seed, self.shuffle = batch, seed, shuffle
        self.collate = type(examples[0]).collate
        # Rows are packed once: then every epoch has the same number of steps. Only their order changes.
        self.rows = pack_rows(examples, length, seed) if pack else [[example] for example in examples]
        self.rows.sort(key=lambda row: -sum(map(len, row)))
        self.packed, self.by_length = pack, by_length
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch)

    @property
    def longest(self) -> int:
        """Tokens of the longest row: what a step's memory depends on."""
        return sum(map(len, self.rows[0]))

    @property
    def of_pairs_alone(self) -> bool:
        """Whether examples are pairs of texts without scores, which are compared with one another."""
        first = self.rows[0][0]
        return hasattr(first, "score") and first.score is None

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0 over all epochs."""
        draw = Stream(self.seed, "batch", step) if self.shuffle else Stream(self.seed, "held out")
        return self.collate(self._rows_at(step), self.packed, draw)

    def examples_at(self, step: int) -> list[Any]:
        """The examples of that batch, row by row."""
        return [example for row in self._rows_at(step) for example in row]

    def _rows_at(self, step: int) -> list[list[Any]]:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)[index * self.batch : (index + 1) * self.batch]
        return [self.rows[i] for i in order]

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
            order = Stream(self.seed, "data", epoch).permutation(len(self.rows))
            self._order = epoch, self._sorted(order, epoch) if self.by_length else order
        return self._order[1]

    def _sorted(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """An order of rows in which those of a batch are about equally long.

        Within windows of some batches rows are sorted by length, and then all batches are shuffled. The rows that are
        too few for a batch stay the last ones.
        """
        whole = len(order) - len(order) % self.batch
        if not whole:
            return order
        window = self.batch * min(max(whole // (4 * self.batch), 1), _WINDOW)
        lengths = np.array([sum(map(len, row)) for row in self.rows])
        windows = np.split(order[:whole], range(window, whole, window))
        batches = np.concatenate([rows[np.argsort(-lengths[rows], kind="stable")] for rows in windows])
        batches = batches.reshape(-1, self.batch)
        batches = batches[Stream(self.seed, "batches", epoch).permutation(len(batches))]
        first = lengths[batches].max(axis=1).argmax()
        batches[[0, first]] = batches[[first, 0]]
        return np.concatenate((batches.reshape(-1), order[whole:]))


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


def split(batch: Batch, rows: int) -> list[Batch]:
    """A batch in parts of at most `rows` rows, for the accumulation of gradients; each without needless padding."""
    rows *= batch.rows_each
    return [_part(batch, slice(start, start + rows)) for start in range(0, len(batch.ids), rows)]


def _part(batch: Batch, rows: slice) -> Batch:
    arrays = {name: array[rows] for name, array in vars(batch).items() if isinstance(array, np.ndarray)}
    segments = arrays.get("segments")
    time = batch.ids.shape[1] if segments is None else int((segments >= 0).sum(axis=1).max())
    said = 0
    if batch.said is not None:
        said = 1 + int((arrays["targets"] >= 0).nonzero()[1].max())
    for name, array in arrays.items():
        if array.ndim < 2:
            continue
        of_decoder = batch.said is not None and name in ("targets", "said", "weights")
        arrays[name] = array[:, : said if of_decoder else time]
    if segments is not None and batch.positions is None and (arrays["segments"] == 0).all():
        arrays["segments"] = None
    return replace(batch, **arrays)


def shares(batch: Batch, n: int) -> list[Batch]:
    """A batch as at most `n` parts that can be computed at the same time, one after the other in its own order.

    None is empty, rows that belong together stay so, and each computes about as much as the others: rows are as long as
    they were, and joined rows are cut where they were joined. With the loss over the whole batch's denominator, losses
    and gradients add up to the batch's.
    """
    axis = 0 if batch.starts is None else 1
    whole = batch.ids.shape[axis]
    starts = np.arange(0, whole, batch.rows_each) if batch.starts is None else batch.starts
    ends = np.append(starts[1:], whole)
    ideal = whole * np.arange(1, n) / n
    edges = sorted({0, whole} | {int(ends[abs(ends - at).argmin()]) for at in ideal})
    asked = batch.asked if axis else batch.asked // batch.targets.shape[1]
    counts = np.searchsorted(asked, edges).tolist()
    return [
        _share(batch, Share(axis, range(*edges[i : i + 2]), whole, range(*counts[i : i + 2]), len(asked)))
        for i in range(len(edges) - 1)
    ]


def _share(batch: Batch, share: Share) -> Batch:
    start, stop = share.here.start, share.here.stop
    cut = (slice(None),) * share.axis + (slice(start, stop),)
    arrays = {name: array for name, array in vars(batch).items() if isinstance(array, np.ndarray)}
    starts = arrays.pop("starts", None)
    if starts is not None:
        starts = starts[(starts >= start) & (starts < stop)] - start
    return replace(batch, **{name: array[cut] for name, array in arrays.items()}, starts=starts, share=share)
