"""The batch of a step as a device computes it: shapes of few kinds, and nothing left to be looked up on the host.

A captured step has fixed shapes. So rows are padded to one of a few lengths, and the loss is taken of a round number of
positions: those that count, and others whose target is ignored. Losses and gradients are the same, to rounding, and
so are masks of dropout, which go by where the host has a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import fused
from .backend import Array
from .batches import IGNORE, Batch, split
from .models.base import Model
from .models.config import ModelConfig
from .tensor import Tensor

UNIT = 64
"""Lengths of rows, and numbers of positions that a loss is taken of, are multiples of it."""

SHORT_UNIT = 8
"""Outside of training, where nothing is captured, lengths are multiples of this."""

LENGTHS, _POSITIONS = 8, 4  # how many of each there are between a power of two and the next
_WASTE = 1.25  # the parts of a step get the same shape where that is at most so many times the work
_MOST = 3 / 4  # a loss that would be taken of a larger share of the positions is taken of all


@dataclass(frozen=True)
class Placed(Batch):
    """A part of a step's batch, with what its loss asks for: NumPy's arrays at first, then the device's.

    rows     the positions that the loss is taken of, in the flattened array of targets, none twice
    chosen   the targets there, of which some may be IGNORE
    counts   the weights there; None: 1

    Where the host has what is here, as int32, for the masks of dropout; of padding it says nothing:

    lines    the row of each row
    begins   how many tokens come before each row; begins_said: before each row of `said`
    ranks    how many targets that count come before each of `rows`; None where that is the order of the rows
    """

    rows: Array | None = None
    chosen: Array | None = None
    counts: Array | None = None
    lines: Array | None = None
    begins: Array | None = None
    begins_said: Array | None = None
    ranks: Array | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """All arrays, by name."""
        return {name: value for name, value in vars(self).items() if hasattr(value, "dtype")}

    def picked(self, xp: Any) -> tuple[Array, Array, Array | None]:
        return self.rows, self.chosen, self.counts

    def counted(self, each: Tensor, here: slice = slice(None)) -> Tensor:
        return each * (self.chosen[here] >= 0)

    def places_of_tokens(self, time: int, said: bool) -> Array:
        """How many tokens the host has before each row, of hidden states (rows, time, ...), `said`: of the decoder.

        Virtual tokens count that methods put before those of each row.
        """
        begins, tokens = (self.begins_said, self.said) if said else (self.begins, self.ids)
        virtual = time - tokens.shape[1]
        return begins + self.lines * virtual if virtual else begins

    def places_of_rows(self, start: int, count: int) -> Array | None:
        """How many of the targets that count come before each of `count` of `rows` on the host."""
        return None if self.ranks is None else self.ranks[start : start + count]


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
        places = [_places(self._model, part) for part in parts]
        times = self._lengths([part.ids.shape[1] for part in parts])
        said = self._lengths([part.said.shape[1] for part in parts]) if batch.said is not None else times
        parts = [self._padded(part, *lengths) for part, *lengths in zip(parts, times, said, strict=True)]
        asked = [part.asked for part in parts]
        counts = _alike([rounded(len(rows), _POSITIONS) for rows in asked])
        return [_chosen(*each) for each in zip(parts, asked, counts, places, strict=True)]

    def whole(self, batch: Batch) -> Batch:
        """`batch` in rows of one of a few lengths, for what is computed outside of training."""
        lengths = (array.shape[1] for array in (batch.ids, batch.ids if batch.said is None else batch.said))
        return self._padded(batch, *(self._lengths([n], SHORT_UNIT)[0] for n in lengths))

    def _lengths(self, lengths: list[int], unit: int | None = None) -> list[int]:
        if not self._stretches:
            return lengths
        return _alike([int(max(n, min(rounded(n, LENGTHS, unit), self._room))) for n in lengths])

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


def rounded(n: int, between: int, unit: int | None = None) -> int:
    """`n` or a little more: a multiple of `unit`, or UNIT, with `between` of them from a power of two to the next."""
    unit = max(unit or UNIT, 2 ** (max(n, 1).bit_length() - 1) // between)
    return max(unit, -(-n // unit) * unit)


def _alike(sizes: list[int]) -> list[int]:
    """The largest size for all, so that steps are of few kinds; the sizes as they are where that would waste much."""
    most = max(sizes)
    return [most] * len(sizes) if most * len(sizes) <= _WASTE * sum(sizes) else sizes


def _chosen(part: Batch, asked: np.ndarray, count: int, places: _Places) -> Placed:
    """`part`, and `count` positions that its loss is taken of: those `asked` for first, in their order.

    Of numbers (float targets) just those are taken: there is none that a loss ignores. All positions are taken only
    where the host takes all, since layers then compute rows that are not chosen ones, with other masks of dropout.
    """
    targets = part.targets.reshape(-1)
    if targets.dtype.kind == "f":
        rows = asked
    elif places.all_asked and (places.among_others or count > _MOST * targets.size):
        rows = np.arange(targets.size)
    else:
        count = min(count, targets.size - 1)
        others = np.setdiff1d(np.arange(targets.size), asked, assume_unique=True)
        rows = np.concatenate((asked, others[: count - len(asked)]))
    counts = None if part.weights is None else part.weights.reshape(-1)[rows]
    ranks = None
    if places.ranks is not None:
        of_all = np.zeros(targets.size, np.int32)
        of_all[asked] = places.ranks
        ranks = of_all[rows]
    return Placed(**vars(part), **places.of_rows, rows=rows, chosen=targets[rows], counts=counts, ranks=ranks)


# ---- the host's layout -----------------------------------------------------------------------------------------------


def unpadded(model: Model, batch: Batch, on_host: bool = False) -> Batch:
    """`batch` in one row without padding, if that is the same to the model and what is attached; else as it is.

    Only rows that are texts of their own can be joined: not pairs, and no sources of answers; and only where attention
    goes document by document, or there would be more to compute. `on_host`: if the host computed.
    """
    kind, dtype = (np.ndarray, model.dtype) if on_host else (model.xp.ndarray, model.activations)
    whole = batch.tokens == batch.ids.size or batch.said is not None or batch.rows_each > 1
    if whole or not fused.attention.overridden(kind, dtype) or not model.joins(batch.ids.shape[1]):
        return batch
    return replace(batch, task=None).unpadded() if _text_by_text(model) else batch


def _text_by_text(model: Model) -> bool:
    """Whether nothing that is attached puts other tokens before those of a row."""
    return all(layer.text_by_text for adapter in model.adapters for layer in adapter.layers)


def evaluated(model: Model, batch: Batch) -> Batch:
    """`batch` as it is computed outside of training: in one row where that is the same, else as it is.

    On a GPU rows then come in few lengths: cuDNN plans for each new one, which takes longer than to compute it.
    """
    laid = unpadded(model, batch)
    return laid if laid is not batch or model.xp is np else Placing(model, len(batch.ids)).whole(batch)


def compares_texts(model: Model, batch: Batch) -> bool:
    """Whether the loss of a row is of all others, too."""
    return model.task == "embed" and batch.targets.dtype.kind == "i"


def laid_out(model: Model, batch: Batch, on_host: bool = False) -> Batch:
    """A part of a step's batch in the rows in which the host, or a device that places no batches, computes it."""
    return batch if compares_texts(model, batch) else unpadded(model, batch.by_turns(), on_host)


@dataclass(frozen=True)
class _Places:
    """Where the host has a part of a step's batch: what a Placed has of that, `ranks` of the targets that count."""

    of_rows: dict[str, np.ndarray]
    ranks: np.ndarray | None
    all_asked: bool  # whether all targets count that the host has, in whose rows there may be less padding
    among_others: bool  # whether there may be virtual tokens, too, which have masks where all rows are computed


def _places(model: Model, part: Batch) -> _Places:
    numbered = replace(part, ids=np.arange(part.ids.size, dtype=np.int32).reshape(part.ids.shape))
    laid = laid_out(model, numbered, on_host=True)
    order = laid.ids.reshape(-1)
    places = np.zeros(part.ids.size, np.int32)
    places[order] = np.arange(order.size)
    places = places.reshape(part.ids.shape)
    lines = _ranks(places[:, 0])
    found = {"lines": lines, "begins": places[:, 0]}
    if part.said is not None:
        found["begins_said"] = lines * part.said.shape[1]
        places = found["begins_said"][:, None] + np.arange(part.said.shape[1])
    asked = part.asked
    ranks = None if model.task == "embed" else _ranks(places.reshape(-1)[asked])
    return _Places(found, ranks, len(asked) == laid.targets.size, not _text_by_text(model))


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """How many of `numbers` come before each of them in ascending order."""
    ranks = np.empty(len(numbers), np.int32)
    ranks[np.argsort(numbers, kind="stable")] = np.arange(len(numbers))
    return ranks
