"""Buffers that are used again: a step's arrays take the memory of those that are no longer there.

Memory that is fresh from the system costs a page fault for every 4 KiB, as much time as computing with it. An Arena
keeps every buffer that it made and hands one out again once nobody has an array in it: Python counts references to a
buffer, and each array and each view of one is such a reference. So nothing has to be given back, and what is kept
longer, by a user or a tape, is never written over.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

import numpy as np

from .backend import Array, bfloat16, xp_of

SMALLEST = 2**15
"""Bytes below which arrays are left to malloc, which is as fast."""

_LINE = 64  # bytes of a cache line
_HUGE = 2**22  # bytes from which on huge pages are asked for, as NumPy does
_CLASSES = 8  # sizes of buffers between a power of two and the next
_LOOSE = 2  # a buffer is handed out for less than its size, but not for as little as this part of it

_FLAGS = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Of memory that may lie in huge pages, and that no forked process writes into; Windows has no such flags."""


class Arena:
    """The buffers of one thread.

    Steps of one shape after another use the same buffers. Where shapes differ from step to step, buffers come to be as
    large as the largest steps need, and smaller steps use them too.
    """

    def __init__(self):
        self._buffers: dict[int, list[np.ndarray]] = {}  # by size
        self._sizes: list[int] = []  # those of `_buffers`, smallest first
        self._used: dict[int, int] = {}  # the step in which a buffer was last handed out, by its id
        self._step = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in C order, in a buffer that nobody else has."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALLEST:
            return np.empty(shape, dtype)
        size = _rounded(nbytes)
        buffer = self._free(size)
        if buffer is None:
            self._give_back(size)
            buffer = self._new(size)
        self._used[id(buffer)] = self._step
        return np.ndarray(shape, dtype, buffer)

    def _free(self, least: int) -> np.ndarray | None:
        """The smallest buffer that nobody has and that is large enough, but not much too large."""
        fit = slice(bisect_left(self._sizes, least), bisect_left(self._sizes, _LOOSE * least))
        for size in self._sizes[fit]:
            for buffer in self._buffers[size]:
                if sys.getrefcount(buffer) == _ALONE:
                    return buffer
        return None

    def _new(self, size: int) -> np.ndarray:
        buffer = _fresh(size)
        if size not in self._buffers:
            self._buffers[size] = []
            insort(self._sizes, size)
        self._buffers[size].append(buffer)
        return buffer

    def next_step(self) -> None:
        """Says that another step begins: buffers that it does not use make room for others."""
        self._step += 1

    def _give_back(self, nbytes: int) -> None:
        """Lets go of buffers that this step has not used, until there is so much room."""
        for size in reversed(self._sizes):
            kept = []
            for buffer in self._buffers[size]:
                if nbytes > 0 and sys.getrefcount(buffer) == _ALONE and self._used[id(buffer)] < self._step:
                    nbytes -= size
                    del self._used[id(buffer)]
                else:
                    kept.append(buffer)
            self._buffers[size] = kept

    def clear(self) -> None:
        """Lets go of all buffers: the memory goes back, of those that somebody has once nobody does."""
        self.__init__()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(size * len(buffers) for size, buffers in self._buffers.items())


def _fresh(size: int) -> np.ndarray:
    """So many bytes, at the beginning of a page, straight from the system: malloc might keep them once nobody has them.

    Raises MemoryError.
    """
    try:
        memory = mmap.mmap(-1, size, **_FLAGS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes are wanted at once") from error
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a system that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _rounded(nbytes: int) -> int:
    """`nbytes` or up to an eighth more, so that arrays of about the same size share buffers."""
    unit = max(_LINE, 2 ** (nbytes.bit_length() - 1) // _CLASSES)
    return -(-nbytes // unit) * unit


def _alone() -> int:
    """What sys.getrefcount says within a loop of a buffer that only the list has."""
    buffers = [np.empty(1)]
    return next(sys.getrefcount(buffer) for buffer in buffers)


_ALONE = _alone()


# ---- the arena of a thread -------------------------------------------------------------------------------------------


class _State(threading.local):
    arena: Arena | None = None


_state = _State()


@contextlib.contextmanager
def using(arena: Arena) -> Iterator[None]:
    """Within it, this thread's ops take memory from `arena`; elsewhere from malloc."""
    before, _state.arena = _state.arena, arena
    try:
        yield
    finally:
        _state.arena = before


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A NumPy array whose values are yet to be written."""
    found = _state.arena
    return np.empty(shape, dtype) if found is None else found.empty(shape, np.dtype(dtype))


def like(array: np.ndarray) -> np.ndarray:
    """The same for an array of this shape and dtype."""
    return empty(array.shape, array.dtype)


def zeros(like: Array, shape: tuple[int, ...]) -> Array:
    """Zeros in the dtype of `like`, where that is."""
    if type(like) is not np.ndarray:
        if like.dtype != bfloat16:
            return xp_of(like).zeros(shape, like.dtype)
        from .cuda import margins

        return margins.zeros(shape)  # a gradient, which linear layers read
    found = empty(shape, like.dtype)
    found.fill(0)
    return found


def add(a: Array, b: Array) -> Array:
    """a + b of two arrays of one shape."""
    if type(a) is type(b) is np.ndarray:
        return np.add(a, b, out=like(a))
    if a.dtype == bfloat16 and xp_of(a) is not np:
        from .cuda import elementwise

        return elementwise.total(a, b)
    return a + b


def add_to(a: Array, b: Array) -> None:
    """a += b"""
    if a.dtype == bfloat16 and xp_of(a) is not np:
        from .cuda import elementwise

        elementwise.total(a, b, out=a)
    else:
        a += b


def put(array: Array, key: Any, g: Array, add: bool) -> None:
    """array[key] = g, or += where that is asked; the key says no place twice."""
    if array.dtype == bfloat16 and xp_of(array) is not np:
        from .cuda import gather

        gather.put(array, key, g, add)
    elif add:
        array[key] += g
    else:
        array[key] = g
