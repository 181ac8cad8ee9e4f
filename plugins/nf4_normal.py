"""Blocks of zero mean and unit variance in 4 bits: weight = mean + std * level, the levels normal quantiles.

So some texts describe QLoRA. Its paper (arXiv:2305.14314, section 3) and its code divide by a block's largest magnitude
instead: the plugin nf4, which is better. This one is here to show that. Its levels are NF4's before these are scaled to
[-1, 1]: 0, 8 quantiles above and 7 below, from -1.848 to 1.848; what lies beyond is cut off (6 % of normal weights), 0
is no value of most blocks, and a block has two constants. Mean and standard deviation (of the whole block) are summed
in float64 and kept in float32. Blocks run over the flattened array, a tie takes the lower level, and blocks of zeros,
or of any one value, are exact. Two codes lie in a byte, the first in the high half.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from statistics import NormalDist
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.blockwise import pack_nibbles, unpack_nibbles

OUTERMOST = 0.9677083  # the probability below the largest level
ZERO = 7  # its code


@dataclass(frozen=True)
class Config:
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64  # weights that share a mean and a deviation


@cache
def levels_of(xp):
    """The 16 levels."""
    below, above = (
        [NormalDist().inv_cdf(p) for p in np.linspace(OUTERMOST, 0.5, count, endpoint=False)] for count in (7, 8)
    )
    return xp.asarray(np.sort(np.array([-level for level in below] + [0.0] + above, "f4")))


@hookimpl
def quant_pack(weight, cfg):
    xp, levels = xp_of(weight), levels_of(xp_of(weight))
    blocks = xp.pad(weight.reshape(-1), (0, -weight.size % cfg.block)).reshape(-1, cfg.block)
    inside = (xp.arange(blocks.size) < weight.size).reshape(blocks.shape)  # the last block may be short
    count = inside.sum(axis=1)
    mean = (blocks.sum(axis=1, dtype="f8") / count).astype("f4")
    centred = (blocks - mean[:, None]) * inside
    std = xp.sqrt((centred * centred).sum(axis=1, dtype="f8") / count).astype("f4")
    scaled = centred / xp.maximum(std, np.finfo("f4").tiny)[:, None]
    codes = xp.searchsorted((levels[1:] + levels[:-1]) / 2, scaled.reshape(-1)[: weight.size]).astype("u1")
    return {"packed": pack_nibbles(codes, unused=ZERO), "mean": mean, "std": std}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype):
    codes = unpack_nibbles(parts["packed"], prod(shape))
    mean, std = (parts[name].repeat(cfg.block)[: codes.size] for name in ("mean", "std"))
    values = levels_of(xp_of(codes))[codes]
    values *= std
    values += mean
    return values.reshape(shape).astype(dtype, copy=False)
