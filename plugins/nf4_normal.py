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
from refpeft.blockwise import pack_nibbles
from refpeft.rowwise import blocks_of, look_up, pack_rows, ranks, unpack_rows

OUTERMOST = 0.9677083  # the probability below the largest level
ZERO = 7  # its code


@dataclass(frozen=True)
class Config:
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64  # weights that share a mean and a deviation


@cache
def levels_of():
    """The 16 levels."""
    below, above = (
        [NormalDist().inv_cdf(p) for p in np.linspace(OUTERMOST, 0.5, count, endpoint=False)] for count in (7, 8)
    )
    return np.sort(np.array([-level for level in below] + [0.0] + above, "f4"))


@hookimpl
def quant_pack(weight, cfg):
    def pack(blocks, count):
        mean = (blocks.sum(axis=1, dtype="f8") / count).astype("f4")
        centred = (blocks - mean[:, None]) * (xp.arange(cfg.block) < count[:, None])
        std = xp.sqrt((centred.astype("f8") ** 2).sum(axis=1) / count).astype("f4")
        centred /= xp.maximum(std, np.finfo("f4").tiny)[:, None]
        return pack_nibbles(ranks(centred, middles).reshape(-1), unused=ZERO), mean, std

    xp, middles = xp_of(weight), (levels_of()[1:] + levels_of()[:-1]) / 2
    blocks = blocks_of(weight.reshape(-1), cfg.block)[0]
    count = xp.minimum(weight.size - xp.arange(len(blocks)) * cfg.block, cfg.block)  # the last block may be short
    packed, mean, std = pack_rows(pack, blocks, count)
    return {"packed": packed[: (weight.size + 1) // 2], "mean": mean, "std": std}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype):
    def unpack(values, packed, mean, std):
        look_up(tuple(levels_of().tolist()), packed, values)
        values *= std[:, None]
        values += mean[:, None]

    packed = blocks_of(parts["packed"], cfg.block // 2)[0]
    values = unpack_rows(unpack, (len(packed), cfg.block), dtype, (packed, parts["mean"], parts["std"]))
    return values.reshape(-1)[: prod(shape)].reshape(shape)
