"""Small arrays that the host fills anew before every step, for what the device reads during it.

A number that Python holds becomes part of a captured CUDA graph; one in an array is read whenever the graph runs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np


class Feed:
    """`array`, zeros at first and always the same memory, and `fill`, which returns before the device has read it."""

    def __init__(self, xp: ModuleType, shape: tuple[int, ...], dtype: np.dtype | str):
        self._xp, self.array = xp, xp.zeros(shape, dtype)

    def fill(self, values: np.ndarray) -> None:
        """Puts `values`, as many rows as there are, at the start of `array`, after what the device was asked so far."""
        self.array[: len(values)] = self._xp.asarray(values, self.array.dtype)


class PinnedFeed(Feed):
    """The same through pinned memory, on the current stream: a copy from other memory may wait for the device.

    There are two buffers in turn, so that one is filled while the other may still be read.
    """

    def __init__(self, cupy: Any, shape: tuple[int, ...], dtype: np.dtype | str):
        import cupyx

        super().__init__(cupy, shape, dtype)
        self._buffers = [cupyx.empty_pinned(shape, self.array.dtype) for _ in range(2)]
        self._read = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]

    def fill(self, values: np.ndarray) -> None:
        buffer, read = self._buffers[0], self._read[0]
        self._buffers.reverse()
        self._read.reverse()
        read.synchronize()  # of the fill before the last one: it waits for a device that is two steps behind
        part = slice(len(values))
        buffer[part] = values
        stream = self._xp.cuda.get_current_stream()
        self.array[part].set(buffer[part], stream=stream)
        read.record(stream)


def feed(xp: ModuleType, shape: tuple[int, ...], dtype: np.dtype | str) -> Feed:
    """A Feed of the module that `xp` is."""
    return PinnedFeed(xp, shape, dtype) if hasattr(xp, "cuda") else Feed(xp, shape, dtype)
