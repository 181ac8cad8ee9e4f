"""Blocks along rows, and floats of 4 and 8 bits: what the row-wise formats have in common. For authors of quantizers.

A row runs along the last axis. Blocks end where a row does: the last one of a row is filled up with zeros.
"""

from __future__ import annotations

from functools import cache
from math import prod
from types import ModuleType

import ml_dtypes
import numpy as np

from .backend import Array, xp_of

E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
"""The small floats of the OCP: magnitudes up to 6 and up to 448."""


def blocks_of(array: Array, size: int) -> Array:
    """`array` (..., length) as (rows, blocks, size)."""
    rows = array.reshape(prod(array.shape[:-1]), array.shape[-1])
    missing = -rows.shape[1] % size
    if missing:
        rows = xp_of(array).pad(rows, ((0, 0), (0, missing)))
    return rows.reshape(len(rows), -1, size)


def rows_of(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The array of this shape that blocks_of took apart."""
    return blocks.reshape(prod(shape[:-1]), -1)[:, : shape[-1]].reshape(shape)


@cache
def magnitudes(kind: type, xp: ModuleType = np) -> Array:
    """The finite values of E2M1 or E4M3 that are not negative, by code: float32, rising. A GPU has these types no more
    than NumPy does, and no ml_dtypes: there they are tables."""
    values = np.arange(8 if kind is E2M1 else 128, dtype="u1").view(kind).astype("f4")
    return xp.asarray(values[np.isfinite(values)])


@cache
def _bounds(kind: type) -> list[np.float32]:
    """Where a magnitude gets the next code: above the middles, and at those middles whose upper code is even."""
    levels = magnitudes(kind)
    middles = (levels[1:] + levels[:-1]) / 2
    middles[1::2] = np.nextafter(middles[1::2], np.float32(0))
    return list(middles)


def round_to(kind: type, array: Array) -> Array:
    """uint8 codes of the nearest magnitudes of E2M1 or E4M3 (a tie takes the even code); above the largest, that one.

    `array` is float32 and not negative.
    """
    codes = xp_of(array).zeros(array.shape, "u1")
    for bound in _bounds(kind):  # a third of the time of searchsorted, an eighth of its memory
        codes += array > bound
    return codes


def encode_e2m1(array: Array) -> Array:
    """E2M1 codes of a float32 array (..., even), two in a byte, the first in the low half; bit 3 is the sign."""
    xp = xp_of(array)
    codes = round_to(E2M1, xp.abs(array)) | xp.signbit(array).astype("u1") << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def decode_e2m1(packed: Array) -> Array:
    """The float32 array of encode_e2m1's bytes."""
    xp = xp_of(packed)
    levels = magnitudes(E2M1, xp)
    codes = xp.stack((packed & 15, packed >> 4), axis=-1)
    return xp.concatenate((levels, -levels))[codes].reshape(*packed.shape[:-1], -1)
