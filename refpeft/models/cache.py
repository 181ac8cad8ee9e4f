"""What generation keeps of the tokens so far, so that each is read once: their keys and values in every layer."""

from __future__ import annotations

from refpeft.backend import Array, xp_of
from refpeft.tensor import Tensor

SPARE = 64
"""Tokens for which there is room at least where room is made."""


class Cache:
    """Keys and values of the tokens so far: (rows, kv_heads, time, head_dim).

    There is a pair for each layer of the model, by its number or name, and for each that a method adds: (adapter, part,
    site).
    """

    def __init__(self):
        self.layers: dict[int | str | tuple[str, ...], tuple[Growing, Growing]] = {}
        self.tokens = 0
        """How many real tokens are in it; keys of virtual tokens are not counted."""

    def extend(self, layer: int | str | tuple[str, ...], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, with these appended."""
        before = self.layers.get(layer)
        if before is None:
            self.layers[layer] = Growing(k.data), Growing(v.data)
            return k, v
        return Tensor(before[0].append(k.data)), Tensor(before[1].append(v.data))

    def take(self, rows: Array) -> None:
        """Goes on with these rows, integers of this device: a row may be there several times, or no more."""
        for array in self._arrays():
            array.take(rows)

    def reorder(self, rows: Array, to: Array) -> None:
        """Puts `rows` in the places `to`, which began with the very same tokens: what came first stays where it is."""
        for array in self._arrays():
            array.reorder(rows, to)

    def _arrays(self) -> list[Growing]:
        return [array for pair in self.layers.values() for array in pair]


class Growing:
    """An array (rows, heads, time, width) that grows along time, in a larger one where it did so before."""

    def __init__(self, array: Array):
        self._room = array
        self.first = self.time = array.shape[2]  # tokens: at the beginning, now

    @property
    def array(self) -> Array:
        return self._room[:, :, : self.time]

    def append(self, more: Array) -> Array:
        """The whole array, with `more` (rows, heads, more time, width) at its end."""
        start, self.time = self.time, self.time + more.shape[2]
        if self.time > self._room.shape[2]:
            rows, heads, _, width = self._room.shape
            before = self._room
            self._room = xp_of(more).empty((rows, heads, self.time + max(SPARE, self.time // 4), width), more.dtype)
            self._room[:, :, :start] = before[:, :, :start]
        self._room[:, :, start : self.time] = more
        return self.array

    def take(self, rows: Array) -> None:
        self._room = self._room[rows]

    def reorder(self, rows: Array, to: Array) -> None:
        self._room[to, :, self.first : self.time] = self._room[rows, :, self.first : self.time]
