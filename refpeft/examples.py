"""Examples: rows of a data file as tokens with what is learned in them, and how rows of examples become a Batch.

There is a kind for each shape that what is learned has: a text that goes on, values at some tokens, hidden tokens, an
answer of its own sequence, two texts that belong together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refpeft.batches import IGNORE, Batch
from refpeft.rng import Stream

Rows = Sequence[Sequence]
"""Rows of a batch, each a list of examples: one, unless they are packed."""


@dataclass(frozen=True)
class Example:
    """A text. `supervised[t]`: whether token t is learned. Token 0 has nothing before it and is no target."""

    ids: np.ndarray  # int32 (tokens,)
    supervised: np.ndarray  # bool (tokens,)
    line: int  # of its row in the file

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many tokens of it are learned."""
        return int(self.supervised[1:].sum())

    @staticmethod
    def collate(rows: Rows, packed: bool = False, draw: Stream | None = None) -> Batch:
        """Targets are the tokens that come next, never of another document."""
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


@dataclass(frozen=True)
class Asked:
    """A text, or a pair of texts, and the values that are learned at some of its tokens: a label, tags, a number."""

    ids: np.ndarray  # int32 (tokens,)
    at: np.ndarray  # int64 (values,): which tokens
    values: np.ndarray  # int32 or float32 (values,)
    line: int
    types: np.ndarray | None = None  # int32 (tokens,): 0 in the first text and 1 in the second, where the model tells
    weights: np.ndarray | None = None  # float32 (values,): how much each counts

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        return len(self.at)

    @staticmethod
    def collate(rows: Rows, packed: bool = False, draw: Stream | None = None) -> Batch:
        """The values as targets at their tokens."""
        examples = [row[0] for row in rows]
        ids, segments = _padded([example.ids for example in examples])
        first = examples[0]
        whole = first.values.dtype.kind == "i"
        targets = np.full(ids.shape, IGNORE if whole else np.nan, np.int32 if whole else np.float32)
        types = None if first.types is None else _padded([example.types for example in examples])[0]
        weights = None if first.weights is None else np.zeros(ids.shape, np.float32)
        for r, example in enumerate(examples):
            targets[r, example.at] = example.values
            if weights is not None:
                weights[r, example.at] = example.weights
        return Batch(ids, targets, segments=segments, types=types, weights=weights)


@dataclass(frozen=True)
class Masked:
    """A text of which other tokens are hidden each time that it is seen, to be told from the rest.

    Of the tokens that may be hidden a share is drawn, at least one of them: of these 80 % become the mask's token, 10 %
    any token, 10 % stay (Devlin et al., 2018, arXiv:1810.04805, section 3.1). What is drawn does not depend on the
    texts beside it.
    """

    ids: np.ndarray  # int32 (tokens,)
    free: np.ndarray  # int64: the tokens that may be hidden
    line: int
    mask: int  # the mask's token
    vocab: int
    share: float = 0.15

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many tokens of it are hidden."""
        return min(len(self.free), max(1, round(self.share * len(self.free))))

    @staticmethod
    def collate(rows: Rows, packed: bool = False, draw: Stream | None = None) -> Batch:
        """Targets are the hidden tokens."""
        examples = [row[0] for row in rows]
        ids, segments = _padded([example.ids for example in examples])
        targets = np.full(ids.shape, IGNORE, np.int32)
        for r, example in enumerate(examples):
            own = Stream(draw.seed, *draw.purpose, zlib.crc32(example.ids.tobytes()))
            hidden = example.free[own.permutation(len(example.free))[: example.targets]]
            targets[r, hidden] = example.ids[hidden]
            lot, other = own.uniform(size=(2, len(hidden)))
            stand_in = np.where(lot < 0.8, example.mask, (other * example.vocab).astype(np.int32))
            ids[r, hidden] = np.where(lot < 0.9, stand_in, example.ids[hidden])
        return Batch(ids, targets, segments=segments)


@dataclass(frozen=True)
class Answered:
    """A source, and the answer that a decoder says to it."""

    ids: np.ndarray  # int32 (tokens,): the source
    answer: np.ndarray  # int32: what is to be said, with its end token
    start: int  # the token with which the decoder begins
    line: int

    def __len__(self) -> int:
        return max(len(self.ids), len(self.answer))

    @property
    def targets(self) -> int:
        return len(self.answer)

    @staticmethod
    def collate(rows: Rows, packed: bool = False, draw: Stream | None = None) -> Batch:
        """Targets belong to `said`: the start token and the answer so far."""
        examples = [row[0] for row in rows]
        ids, segments = _padded([example.ids for example in examples])
        said, _ = _padded([np.append(np.int32(example.start), example.answer[:-1]) for example in examples])
        targets = np.full(said.shape, IGNORE, np.int32)
        for r, example in enumerate(examples):
            targets[r, : len(example.answer)] = example.answer
        return Batch(ids, targets, segments=segments, said=said)


@dataclass(frozen=True)
class Pair:
    """Two texts whose vectors are to be near each other: as near as `score` says, or nearer than to other rows'."""

    a: np.ndarray  # int32 (tokens,)
    b: np.ndarray
    line: int
    score: float | None = None  # a cosine

    def __len__(self) -> int:
        return max(len(self.a), len(self.b))

    @property
    def targets(self) -> int:
        return 1

    @staticmethod
    def collate(rows: Rows, packed: bool = False, draw: Stream | None = None) -> Batch:
        """Two rows of each pair, one after the other; the target, a score or 0, is at the first one's first token."""
        examples = [row[0] for row in rows]
        ids, segments = _padded([text for example in examples for text in (example.a, example.b)])
        scored = examples[0].score is not None
        targets = np.full(ids.shape, np.nan if scored else IGNORE, np.float32 if scored else np.int32)
        targets[::2, 0] = [example.score if scored else 0 for example in examples]
        return Batch(ids, targets, segments=segments, rows_each=2)


def _padded(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of tokens as (batch, time) with zeros behind them, and the segments: None where all are equally long."""
    lengths = np.array([len(text) for text in texts])
    ids = np.zeros((len(texts), lengths.max()), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    segments = np.where(np.arange(ids.shape[1]) < lengths[:, None], 0, -1).astype(np.int32)
    return ids, None if segments.min() == 0 else segments
