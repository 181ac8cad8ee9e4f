"""One counter-based random stream: Philox 4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

A value depends on the seed, on what it is for, and on its index: not on what was drawn before. So the order of calls
does not matter, a resumed run equals an unbroken one, and NumPy and CuPy give the same bits.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .backend import Array, xp_of
from .errors import RefpeftError
from .feed import feed

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_32, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


_BLOCK = 2**14
"""Counters at a time on the host, a power of two: 128 KiB for a word of each, so that rounds stay in a core's cache."""


def philox4x32(c0, c1, c2, c3, k0: int, k1: int):
    """Ten rounds on counters of four words below 2^32; returns four words of each, as uint64.

    A word is an array of NumPy or CuPy, or an np.uint64 where it is the same in all counters; one is an array.
    """
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = p1 >> _32, p0 >> _32
        c0 ^= c1
        c0 ^= np.uint64(k0)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        p0 &= _LOW
        p1 &= _LOW
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


_recording: ContextVar[Slots | None] = ContextVar("recording", default=None)  # where streams read from, here and now


class Step(int):
    """The number of the optimizer's step as part of a purpose: what differs when a captured step runs again."""


@dataclass(frozen=True)
class Order:
    """Which of a stream's numbers an array has that lies in other rows than the stream counts by.

    The array's number i is that at begins[i // row] * width + i % row; `begins` (rows,) is int32, and lies where the
    array does.
    """

    begins: Array
    row: int
    width: int

    def places(self, words: int) -> Array:
        """Where the words are of each number, of so many words each: uint64, one after the other."""
        xp = xp_of(self.begins)
        numbers = self.begins[:, None].astype("u8") * np.uint64(self.width) + xp.arange(self.row, dtype="u8")
        return (numbers[..., None] * np.uint64(words) + xp.arange(words, dtype="u8")).reshape(-1)


class Stream:
    """Random numbers of one purpose: `Stream(seed, "init", "lora", site.name)`.

    A purpose is any sequence of strings and integers. Every call draws what comes next in this stream, as from
    numpy.random.Generator, whose names are used. `xp` chooses where the bits are made; they are the same on each.
    """

    def __init__(self, seed: int, *purpose: str | int, xp: Any = np):
        if seed < 0:
            raise RefpeftError(f"seed is {seed}: expected 0 or more")
        self.seed, self.purpose, self.xp = seed, purpose, xp
        self.words = _words("\0".join(map(str, purpose)))  # the upper half of counters
        self._next = 0  # index of the next word, of 32 bits; a counter gives four
        self.order: Order | None = None

    def skip(self, words: int) -> Stream:
        """This stream, from `words` of 32 bits further on; a float64 is made of two."""
        self._next += words
        return self

    def of(self, order: Order) -> Stream:
        """This stream, for one array of another order."""
        self.order = order
        return self

    @property
    def slot(self) -> Array | None:
        """Where the device finds `words` as (2,) uint64, where a step is recorded for others (Slots); else None."""
        slots = _recording.get()
        return slots.of(self.purpose) if slots and slots.xp is self.xp else None

    def take(self, n: int) -> int:
        """The index of the next of `n` uint32 that the caller makes itself: they count as drawn."""
        first = self._next
        self._next = -(-(first + n) // 4) * 4
        return first

    def bits(self, n: int) -> Any:
        """The next `n` uint32."""
        return self._whole(list(self._pieces(n)), "u4")

    def keeps(self, n: int, rate: float) -> Any:
        """`n` booleans, each false with probability `rate`: whether the next of the `bits` is at least rate 2^32."""
        least = least_kept(rate)
        return self._whole([words >= least for words in self._pieces(n)], "?")

    def _whole(self, pieces: list[Any], dtype: str) -> Any:
        if len(pieces) == 1:
            return pieces[0]
        return self.xp.concatenate([self.xp.empty(0, dtype), *pieces])

    def _pieces(self, n: int) -> Iterator[Any]:
        """The next `n` uint32, array after array."""
        xp = self.xp
        if self.order is not None:
            yield self._at(self.order.places(n // (len(self.order.begins) * self.order.row)))
            return
        if n >= 2**60:  # where NumPy has another exception
            raise MemoryError(f"{n:,} random numbers are wanted at once")
        taken = self.take(n)
        first, end, start = taken // 4, -(-(taken + n) // 4), taken % 4
        size = _BLOCK if xp is np else 2**32
        for block in range(first // size, -(-end // size)):
            low, stop = max(first, block * size), min(end, (block + 1) * size)
            index = xp.arange(
                low % 2**32, low % 2**32 + stop - low, dtype="u8"
            )  # the upper half is one number in a block
            words = xp.empty((len(index), 4), "u4")
            for column, word in enumerate(self._four(index, np.uint64(low >> 32))):
                words[:, column] = word
            piece = words.reshape(-1)[start : start + n]
            start, n = 0, n - len(piece)
            yield piece

    def _at(self, places: Any) -> Any:
        """The uint32 at these places, which are uint64."""
        counter, lane = places >> np.uint64(2), places & np.uint64(3)
        first, *others = self._four(counter & _LOW, counter >> _32)
        for number, words in enumerate(others, 1):
            first = self.xp.where(lane == number, words, first)
        return first.astype("u4")

    def _four(self, low: Any, high: Any) -> tuple[Any, ...]:
        """The four words of counters whose lower half has these two."""
        slot = self.slot
        upper = self.words if slot is None else [self.xp.broadcast_to(slot[i], low.shape) for i in range(2)]
        return philox4x32(low, high, *upper, self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF)

    def _unit(self, n: int) -> Any:
        """`n` float64 in [0, 1), 53 bits each."""
        words = self.bits(2 * n).astype("u8")
        return ((words[0::2] << _32 | words[1::2]) >> np.uint64(11)).astype("f8") * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | tuple[int, ...] = ()) -> Any:
        """float64 in [low, high)."""
        return (low + (high - low) * self._unit(_count(size))).reshape(size)

    def standard_normal(self, size: int | tuple[int, ...] = ()) -> Any:
        """float64 from N(0, 1), by Box and Muller's transform."""
        n = _count(size)
        u = self._unit(2 * n)
        radius = self.xp.sqrt(-2.0 * self.xp.log1p(-u[:n]))
        return (radius * self.xp.cos(2.0 * math.pi * u[n:])).reshape(size)

    def permutation(self, n: int) -> Any:
        """The numbers 0 .. n - 1 (int64) in random order."""
        words = self.bits(2 * n).astype("u8")
        return self.xp.argsort(words[0::2] << _32 | words[1::2], kind="stable")


def least_kept(rate: float) -> np.uint32:
    """The least of the 2^32 words for which an element is kept that is dropped with probability `rate`."""
    return np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _words(purpose: str) -> tuple[np.uint64, np.uint64]:
    text = purpose.encode()
    return np.uint64(zlib.crc32(text)), np.uint64(zlib.adler32(text))


def _count(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else math.prod(size)


# ---- streams of a captured step --------------------------------------------------------------------------------------


class Slots:
    """The words of streams' purposes in an array of the device, so that a captured step can run as another step.

    While a step is `recording`, streams on `xp` note here what they are for, and their numbers are made from the words
    that lie here when the graph runs. Before each run `refill` puts those of its step there.
    """

    def __init__(self, xp: ModuleType, most: int = 2**16):
        self.xp, self._most = xp, most
        self._feed = feed(xp, (most, 2), "u8")
        self._slots: dict[tuple[str, ...], Array] = {}  # by a purpose's text, in pieces where its Steps stand between

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, streams read from here."""
        token = _recording.set(self)
        try:
            yield
        finally:
            _recording.reset(token)

    def of(self, purpose: tuple[str | int, ...]) -> Array:
        """(2,) uint64: where the words of a purpose lie once `refill` was called."""
        texts = _between_steps(purpose)
        if texts not in self._slots:
            if len(self._slots) == self._most:
                raise RefpeftError(f"a captured step has more than {self._most:,} random streams")
            self._slots[texts] = self._feed.array[len(self._slots)]
        return self._slots[texts]

    def refill(self, step: int) -> None:
        """Puts the words there that the purposes have in this step, without waiting for the device."""
        if self._slots:
            self._feed.fill(np.array([_words(str(step).join(texts)) for texts in self._slots]))


def _between_steps(purpose: tuple[str | int, ...]) -> tuple[str, ...]:
    texts = [""]
    for i, word in enumerate(purpose):
        texts[-1] += "\0" if i else ""
        if isinstance(word, Step):
            texts.append("")
        else:
            texts[-1] += str(word)
    return tuple(texts)
