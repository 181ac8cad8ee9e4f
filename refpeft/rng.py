"""One counter-based random stream: Philox 4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

A value depends on the seed, on what it is for, and on its index: not on what was drawn before. So the order of calls
does not matter, a resumed run equals an unbroken one, and NumPy and CuPy give the same bits.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from .errors import RefpeftError

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_32 = np.uint64(32)


def philox4x32(c0, c1, c2, c3, k0: int, k1: int):
    """Ten rounds on counters of uint32 arrays (NumPy or CuPy); returns four uint32 arrays of the same shape."""
    for _ in range(10):
        p0, p1 = c0.astype("u8") * _M0, c2.astype("u8") * _M1
        key0, key1 = np.uint32(k0), np.uint32(k1)
        c0, c1, c2, c3 = (
            (p1 >> _32).astype("u4") ^ c1 ^ key0,
            p1.astype("u4"),
            (p0 >> _32).astype("u4") ^ c3 ^ key1,
            p0.astype("u4"),
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


class Stream:
    """Random numbers of one purpose: `Stream(seed, "init", "lora", site.name)`.

    A purpose is any sequence of strings and integers. Every call draws what comes next in this stream, as from
    numpy.random.Generator, whose names are used. `xp` chooses where the bits are made; they are the same on each.
    """

    def __init__(self, seed: int, *purpose: str | int, xp: Any = np):
        if seed < 0:
            raise RefpeftError(f"seed is {seed}: expected 0 or more")
        self.seed, self.purpose, self.xp = seed, purpose, xp
        text = "\0".join(map(str, purpose)).encode()
        self._purpose = zlib.crc32(text), zlib.adler32(text)
        self._next = 0  # index of the next word, of 32 bits; a counter gives four

    def skip(self, words: int) -> Stream:
        """This stream, from `words` of 32 bits further on; a float64 is made of two."""
        self._next += words
        return self

    def bits(self, n: int) -> Any:
        """The next `n` uint32."""
        xp = self.xp
        if n >= 2**60:  # where NumPy has another exception
            raise MemoryError(f"{n:,} random numbers are wanted at once")
        first, end = self._next // 4, -(-(self._next + n) // 4)
        start, self._next = self._next - 4 * first, 4 * end
        blocks = end - first
        index = xp.arange(first, end, dtype="u8")
        zero = xp.zeros(blocks, "u4")
        words = philox4x32(
            index.astype("u4"),
            (index >> _32).astype("u4"),
            zero + np.uint32(self._purpose[0]),
            zero + np.uint32(self._purpose[1]),
            self.seed & 0xFFFFFFFF,
            self.seed >> 32 & 0xFFFFFFFF,
        )
        return xp.stack(words, axis=1).reshape(-1)[start : start + n]

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


def _count(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else math.prod(size)
