"""refpeft.blockwise for NumPy arrays: the same bits, in chunks that stay in a cache, over several threads.

Nothing here is a second rule: tests hold it to the plain array code of refpeft.blockwise, for any chunk and any number
of threads. Temporary arrays are as large as a chunk, whatever the size of the weight.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from . import arena

if TYPE_CHECKING:
    from .blockwise import Blocks, Book

CHUNK = 1 << 17
"""Elements worked on at a time, whole blocks: what is needed for them fits in the second-level cache."""

THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def encode(
    array: np.ndarray, block: int, book: Book, reciprocal: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """refpeft.blockwise.encode."""
    flat = array.reshape(-1)
    per_byte = 2 if len(book.levels) == 16 else 1
    absmax = np.empty(-(-flat.size // block), "f4")
    codes = np.empty(-(-flat.size // per_byte), "u1")
    in_order = np.array_equal(book.codes, np.arange(len(book.codes)))

    def span(start: int, stop: int) -> None:
        size = min(stop - start, CHUNK)
        scratch, ranks, above = np.empty(size, "f4"), np.empty(size, "u1"), np.empty(size, bool)
        for at in range(start, stop, CHUNK):
            end = min(at + CHUNK, stop)
            blocks, scaled = flat[at:end].reshape(-1, block), scratch[: end - at].reshape(-1, block)
            top = absmax[at // block : end // block]
            np.abs(blocks, out=scaled)
            scaled.max(axis=1, out=top)
            factor = reciprocal(top)
            top *= factor > 0
            np.multiply(blocks, factor[:, None], out=scaled)
            found = _ranks(scaled.reshape(-1), book.bounds, ranks[: end - at], above[: end - at])
            if not in_order:
                found = book.codes[found]
            codes[at // per_byte : end // per_byte] = _pack_nibbles(found) if per_byte == 2 else found

    whole = flat.size - flat.size % block
    in_parallel(span, whole, CHUNK)
    if whole < flat.size:  # the short last block, filled up with zeros
        last = np.zeros(block, "f4")
        last[: flat.size - whole] = flat[whole:]
        its_codes, absmax[-1:] = encode(last, block, book, reciprocal)
        codes[whole // per_byte :] = its_codes[: codes.size - whole // per_byte]
    return codes, absmax


def decode(blocks: Blocks, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """refpeft.blockwise.decode of a whole array; constants that are encoded themselves have to be decoded before."""
    codes, absmax, block, levels, offset, factor = blocks
    if isinstance(absmax, tuple):  # Blocks
        return NotImplemented
    codes, absmax = codes.reshape(-1), absmax.reshape(-1)
    chunk = max(1, CHUNK // (2 * block)) * 2 * block  # whole blocks, and whole bytes
    count, per_byte = prod(shape), 2 if len(levels) == 16 else 1
    table = _pairs(levels) if per_byte == 2 else levels
    values = arena.empty((count + count % per_byte,), dtype)

    def span(start: int, stop: int) -> None:
        direct = dtype == np.float32
        scratch = values if direct else np.empty(min(stop - start, chunk), "f4")
        for at in range(start, stop, chunk):
            end = min(at + chunk, stop)
            part = values[at:end] if direct else scratch[: end - at]
            # mode="clip" because np.take with another mode writes to a copy first
            np.take(table, codes[at // per_byte : end // per_byte], out=part.view(table.dtype), mode="clip")
            part *= absmax[at // block : -(-end // block)].repeat(block)[: part.size]  # faster than by broadcasting
            if factor != 1:
                part *= factor
            if offset is not None:
                part += offset
            if not direct:
                values[at:end] = part

    in_parallel(span, values.size, chunk)
    return values[:count].reshape(shape)


def _ranks(scaled: np.ndarray, bounds: np.ndarray, ranks: np.ndarray, above: np.ndarray) -> np.ndarray:
    """How many bounds lie below each value; `ranks` (uint8) and `above` (bool) are room to work in."""
    if len(bounds) > 15:
        table = _table(bounds.tobytes())
        if table is None:
            return np.searchsorted(bounds, scaled)  # twenty times slower
        certain, following = table
        np.take(certain, scaled.view("<u2")[1::2], out=ranks, mode="clip")
        np.greater(scaled, following.take(ranks, mode="clip"), out=above)
        ranks += above.view("u1")
        return ranks
    ranks.fill(0)
    for bound in bounds:  # faster than searchsorted, because each comparison takes many values at a time
        np.greater(scaled, bound, out=above)
        ranks += above.view("u1")
    return ranks


@cache
def _table(bounds: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """By the upper half of a float32's bits: how many bounds lie below all such numbers; and the bounds, then infinity.

    One more bound lies below some of them, at most: None where for some halves there are more.
    """
    rising, halves = np.frombuffer(bounds, "f4"), np.arange(1 << 16, dtype="u4") << 16
    ends = np.stack((halves, halves | 0xFFFF)).view("f4")
    ends = ends[:, np.isfinite(ends).all(axis=0)]  # the largest halves of either sign are infinity and NaN
    least, most = np.searchsorted(rising, np.sort(ends, axis=0))
    if (most - least > 1).any():
        return None
    certain = np.zeros(1 << 16, "u1")
    certain[ends[0].view("u4") >> 16] = least
    return certain, np.append(rising, np.float32(np.inf))


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """refpeft.blockwise.pack_nibbles of an even number of codes, in steps of two bytes."""
    both = codes.view("<u2")  # first + 256 * second
    return (both << 4 | both >> 8).astype("u1")


def _pairs(levels: np.ndarray) -> np.ndarray:
    """The two float32 values of every byte, as 256 single elements of 8 bytes."""
    byte = np.arange(256)
    return levels[np.stack((byte >> 4, byte & 15), axis=1)].view("f8").reshape(-1)


def in_parallel(function: Callable[[int, int], None], count: int, step: int) -> None:
    """function(start, stop) for spans that make up range(count) and start at multiples of `step`.

    They run in threads, of which each has two steps to do at least.
    """
    threads = 1 if _here.alone else max(1, min(THREADS, count // (2 * step)))
    length = -(-count // (threads * step)) * step
    spans = [(start, min(start + length, count)) for start in range(0, count, length or 1)]
    others = [_pool().submit(function, *span) for span in spans[1:]]
    if spans:
        function(*spans[0])
    for other in others:
        other.result()


class _Here(threading.local):
    alone = False  # whether this thread takes no others


_here = _Here()


@contextlib.contextmanager
def alone(alone: bool = True) -> Iterator[None]:
    """Within it this thread does all the work itself, as where others are as busy."""
    before, _here.alone = _here.alone, alone
    try:
        yield
    finally:
        _here.alone = before


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, THREADS - 1), "refpeft-blocks")
