"""Batches on their way to the device: the next one is copied there while a step is computed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import cupy
import cupyx
import numpy as np

from refpeft.backend import Array

_APART = 256  # bytes: where arrays begin
_FIRST = 2**16  # bytes that there is room for at first


class Ahead:
    """One set of arrays after the other: `send` starts the copy of the next one, `receive` puts it where steps read.

    That is always the same place for arrays of the same shapes, as captured work needs it. What is sent lies in one
    stretch of pinned memory, so that one copy on a stream of its own moves it, and nobody waits for it.
    """

    def __init__(self) -> None:
        self._side = cupy.cuda.Stream(non_blocking=True)
        self._arrived, self._taken = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._places: list[tuple[slice, np.dtype, tuple[int, ...]]] = []
        self._size = self._moves = 0
        self._grow(_FIRST)

    def send(self, arrays: Sequence[np.ndarray]) -> None:
        """Starts to copy host arrays, after those of the last `receive` are in their place."""
        self._places, at = [], 0
        for array in arrays:
            self._places.append((slice(at, at + array.nbytes), array.dtype, array.shape))
            at += -(-array.nbytes // _APART) * _APART
        self._size = at
        self._arrived.synchronize()  # of the last one, long ago: the pinned memory can be written again
        if at > self._pinned.size:
            self._grow(2 * at)
        for view, array in zip(self._views(self._pinned), arrays, strict=True):
            view[...] = array
        self._side.wait_event(self._taken)
        self._staging[:at].set(self._pinned[:at], stream=self._side)
        self._arrived.record(self._side)

    def receive(self) -> Hashable:
        """Puts what was sent in its place, on the current stream; gives what tells this place from others."""
        stream = cupy.cuda.get_current_stream()
        stream.wait_event(self._arrived)
        self._static[: self._size] = self._staging[: self._size]
        self._taken.record(stream)
        return self._moves, tuple((place.start, dtype.str, shape) for place, dtype, shape in self._places)

    def arrays(self) -> list[Array]:
        """The arrays that were received, on the device."""
        return self._views(self._static)

    def _views(self, memory: Array) -> list[Array]:
        return [memory[place].view(dtype).reshape(shape) for place, dtype, shape in self._places]

    def _grow(self, size: int) -> None:
        self._pinned = cupyx.empty_pinned(size, np.uint8)
        self._staging, self._static = (cupy.empty(size, np.uint8) for _ in range(2))
        self._moves += 1
        cupy.cuda.get_current_stream().synchronize()  # it may still use this memory, which the other stream cannot know
