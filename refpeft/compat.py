"""The option `compat` of quantizers: codes and constants as bitsandbytes 0.50.2 makes them, where its rules are others.

Beside the rules of refpeft.blockwise; "bnb-cpu" is bitsandbytes on a CPU, "bnb-cuda" on an NVIDIA GPU:
- bnb-cpu, 4 bits: absmax counts as 1e-38 at least; a short last block keeps that as its absmax, and divides by it.
- bnb-cpu, 8 bits: a code comes from a table of 65536 bins, which is not always the nearest: not even of 0.
- bnb-cpu: the mean of double quantization is torch's in float32, in its order of summation.
- bnb-cpu, FP4: one of the midpoints lies between both zeros, so that small positive values become "minus zero".
- bnb-cuda: all codes of a block of zeros are code 0, which in NF4 and the 8-bit maps is the lowest level.
- bnb-cuda, NF4: midpoints are decimals of 16 digits; in float32, four of them are neighbours of the midpoint.
- bnb-cuda, FP4: midpoints are decimals that were cut off; negative values keep their sign.
- bnb-cuda, 8 bits: on the midpoint of two levels the even code is taken.
bitsandbytes compiles for GPUs with approximate division, so that one code in millions can still differ there (in int8
one in ten thousand); and its mean there has an order of its own: ours is float64's.
"""

from __future__ import annotations

from functools import reduce
from types import ModuleType
from typing import Literal

import numpy as np

from . import blockwise
from .backend import Array, to_host, xp_of
from .blockwise import Book

Compat = Literal["none", "bnb-cpu", "bnb-cuda"]

SMALLEST = np.float32(1e-38)
FINITE = np.nextafter(np.float32(2.0**-128), np.float32(1))  # the least number whose reciprocal float32 holds


def encode(array: Array, block: int, book: Book, compat: Compat) -> tuple[Array, Array]:
    """refpeft.blockwise.encode under the rules that `compat` names."""
    if compat == "none":
        return blockwise.encode(array, block, book)
    if compat == "bnb-cuda":
        return _encode_on_cuda(array, block, book)
    on_cpu = _encode_4_bits_on_cpu if len(book.levels) == 16 else _encode_8_bits_on_cpu
    parts = on_cpu(to_host(array), block, Book(*map(to_host, book)))  # 1e-38 is 0 on a GPU
    return tuple(map(xp_of(array).asarray, parts))


def _encode_on_cuda(array: Array, block: int, book: Book) -> tuple[Array, Array]:
    codes, absmax = blockwise.encode(array, block, book)
    length = block // 2 if len(book.levels) == 16 else block
    codes[(absmax == 0).repeat(length)[: codes.size]] = 0  # 0 * (1 / 0) is NaN there, which is above no bound
    return codes, absmax


def _encode_4_bits_on_cpu(array: np.ndarray, block: int, book: Book) -> tuple[np.ndarray, np.ndarray]:
    flat = array.reshape(-1)
    whole = flat.size - flat.size % block
    codes, absmax = blockwise.encode(flat[:whole], block, book, lambda absmax: 1 / np.maximum(absmax, SMALLEST))
    if whole == flat.size:
        return codes, absmax
    last = flat[whole:]
    largest = np.maximum(np.abs(last).max(keepdims=True), SMALLEST)
    its_codes, _ = blockwise.encode(last / largest, block, book, np.ones_like)
    return np.concatenate((codes, its_codes)), np.concatenate((absmax, largest))


def _encode_8_bits_on_cpu(array: np.ndarray, block: int, book: Book) -> tuple[np.ndarray, np.ndarray]:
    codes, absmax = blockwise.encode(array, block, book, lambda absmax: 1 / np.maximum(absmax, FINITE))
    infinite = (absmax < FINITE).repeat(block)[: codes.size]
    codes[infinite] = (array.reshape(-1)[infinite] > 0) * 255  # 0 * infinity is NaN, whose bin is the first
    return codes, absmax


# ---- code books ------------------------------------------------------------------------------------------------------


def both_zeros(levels: np.ndarray, xp: ModuleType = np) -> Book:
    """FP4's book on the CPU: the midpoints of all 16 levels, two of which are 0."""
    order = np.argsort(levels, stable=True)
    rising = levels[order]
    return _book(levels, (rising[1:] + rising[:-1]) / 2, order, xp)


def decimals(levels: np.ndarray, xp: ModuleType = np) -> Book:
    """NF4's book on a GPU: all midpoints lie halfway between two float32 numbers or on one, before they are rounded; in
    four of them the digits that were left off decide, where elsewhere it is the even number."""
    bounds = (levels[1:] + levels[:-1]) / 2
    bounds[[0, 12, 14]] = np.nextafter(bounds[[0, 12, 14]], np.float32(-1))
    bounds[8] = np.nextafter(bounds[8], np.float32(1))
    return _book(levels, bounds, np.arange(16), xp)


def cut_decimals(levels: np.ndarray, xp: ModuleType = np) -> Book:
    """FP4's book on a GPU: thresholds of the magnitude, and then the sign of what is below 0."""
    above = np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], "f4")
    below = np.nextafter(-above[::-1], np.float32(-1))  # a magnitude on a threshold takes the lower
    order = np.argsort(levels[:8])
    levels = np.where(np.arange(16) == 8, -levels, levels)  # code 8 is decoded to minus zero
    return _book(
        levels, np.concatenate((below, [-blockwise.TINY], above)), np.concatenate((8 + order[::-1], order)), xp
    )


def ties_to_even(levels: np.ndarray, xp: ModuleType = np) -> Book:
    """The 8-bit maps' book on a GPU, where a bisection ends on an even code and leaves it for what is nearer only."""
    bounds = (levels[1:] + levels[:-1]) / 2
    bounds[1::2] = np.nextafter(bounds[1::2], np.float32(-1))
    return _book(levels, bounds, np.arange(len(levels)), xp)


def binned(levels: np.ndarray, xp: ModuleType = np) -> Book:
    """The 8-bit maps' book on the CPU: the code of each of 65536 bins of [-1, 1]; not all codes have one."""
    table = np.searchsorted((levels[1:] + levels[:-1]) / 2, -1 + 2 * np.arange(65536, dtype="f4") / 65535)
    starts = np.flatnonzero(np.diff(table)) + 1
    low, high = -np.ones(len(starts)), np.ones(len(starts))
    for _ in range(70):  # bisection for the largest float32 in a bin before each start
        middle = (low + high) / 2
        before = _bin(middle.astype("f4")) < starts
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    return _book(levels, low.astype("f4"), table[np.concatenate(([0], starts))], xp)


def _bin(scaled: np.ndarray) -> np.ndarray:
    """Where the table is read: the multiplication and the second addition are one operation, rounded once."""
    half = (scaled + 1) * np.float32(0.5)
    return (half.astype("f8") * 65535 + 0.5).astype("f4").astype("i4")


def _book(levels: np.ndarray, bounds: np.ndarray, codes: np.ndarray, xp: ModuleType) -> Book:
    return Book(xp.asarray(levels), xp.asarray(bounds.astype("f4")), xp.asarray(codes.astype("u1")))


# ---- torch's mean ----------------------------------------------------------------------------------------------------


def torch_mean(vector: np.ndarray, threads: int = 1) -> np.float32:
    """The mean of a float32 vector as torch sums it on a CPU with this many threads, which matter from 32768 values."""
    return _torch_sum(vector, threads) / np.float32(vector.size)


def _torch_sum(vector: np.ndarray, threads: int) -> np.float32:
    if threads > 1 and vector.size >= 32768:
        parts = np.zeros(threads, "f4")
        length = -(-vector.size // min(threads, -(-vector.size // 32768)))
        for i, start in enumerate(range(0, vector.size, length)):
            parts[i] = _torch_sum(vector[start : start + length], 1)
        return _torch_sum(parts, 1)
    lanes = 8 if vector.size >= 8 else 1
    rows = vector[: vector.size // lanes * lanes].reshape(-1, lanes)
    turns = len(rows) // 4
    sums = _cascade(rows[: 4 * turns].reshape(turns, 4, lanes))  # row i goes to sum i mod 4
    for row in rows[4 * turns :]:
        sums[0] += row
    return reduce(np.add, (*vector[rows.size :], *reduce(np.add, sums)), np.float32(0))


def _cascade(rows: np.ndarray) -> np.ndarray:
    """The sum over the first axis in four levels: each is added to the next whenever it is full."""
    levels = np.zeros((4, *rows.shape[1:]), "f4")
    power = max(4, max(len(rows) - 1, 0).bit_length() // 4)
    for i, row in enumerate(rows, 1):
        levels[0] += row
        for level in range(1, 4):
            if i % 2 ** (power * level):
                break
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
    return reduce(np.add, levels)
