"""Block-wise quantization to a code book: what NF4, FP4 and the 8-bit maps have in common. For authors of quantizers.

The rules, wherever a `compat` option does not say otherwise (golden/README.md has them for other implementations):
- Blocks run over the flattened array; the last one may be short, and is treated as any other.
- All arithmetic is float32. absmax is a block's largest magnitude; a value is multiplied by the rounded 1 / absmax.
- A code is the number of midpoints between neighbouring levels that lie below the scaled value: a tie takes the lower.
- A block of zeros (or of values whose magnitudes are below float32's smallest normal number) decodes to zeros.
- Of two 4-bit codes in a byte the first is the high half; an unused half is the code of 0.
- NaN and infinity are refused before (refpeft.quant).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np

from .backend import Array, xp_of


def encode(array: Array, block: int, levels: Array) -> tuple[Array, Array]:
    """(uint8 codes of the flattened float32 array, absmax (blocks,)); `levels` are sorted."""
    xp = xp_of(array)
    flat = array.reshape(-1)
    blocks = xp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    absmax = xp.abs(blocks).max(axis=1)
    scaled = blocks * (1 / xp.maximum(absmax, np.finfo("f4").tiny))[:, None]  # smaller ones are 0 on the GPU
    return xp.searchsorted((levels[1:] + levels[:-1]) / 2, scaled.reshape(-1)[: flat.size]).astype("u1"), absmax


def decode(codes: Array, absmax: Array, block: int, levels: Array) -> Array:
    """The float32 vector of uint8 codes."""
    return levels[codes] * absmax.repeat(block)[: codes.size]


def pack_nibbles(codes: Array, unused: int) -> Array:
    """4-bit codes two in a byte, the first in the high half; the last half of an odd number is `unused`."""
    xp = xp_of(codes)
    codes = xp.pad(codes, (0, codes.size % 2), constant_values=unused)
    return codes[0::2] << 4 | codes[1::2]


def unpack_nibbles(packed: Array, count: int) -> Array:
    """The 4-bit codes of pack_nibbles."""
    return xp_of(packed).stack((packed >> 4, packed & 15), axis=-1).reshape(-1)[:count]


@cache
def dynamic_map(xp: ModuleType = np, signed: bool = True) -> Array:
    """The dynamic map of arXiv:2110.02861, section 1.3: 256 sorted levels in [-1, 1] ([0, 1] unsigned), dense near 0."""
    low, parts = np.float32(0.1), [np.array([0, 1], "f4")]
    for i in range(7):  # the middles of n intervals of [0.1, 1], times 10^(i - 6), with either sign
        n = 2**i if signed else 2 ** (i + 1)
        at = np.arange(n + 1)
        step = np.float64((1 - low) / np.float32(n))  # torch.linspace: a float32 step, counted from the nearer end
        ends = np.where(at < (n + 1) // 2, low + step * at, 1 - step * (n - at)).astype("f4")
        middles = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / 2)
        parts += [middles, -middles] if signed else [middles]
    return xp.asarray(np.sort(np.concatenate(parts)))
