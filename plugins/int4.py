"""Symmetric 4-bit integers: weight = (code - 8) * scale, codes 1 ... 15, a scale for each group along the row.

scale = max |weight| / 7, code = round(weight / scale) + 8, in float32, ties to even (the integer quantization of
Jacob et al., 2017, arXiv:1712.05877, with the zero point in the middle). Groups of zeros are zeros. Two codes lie in a
byte, the first in the high half; an unused half is the code of 0.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.blockwise import Blocks, decode, pack_nibbles
from refpeft.rowwise import aligned, blocks_of, look_up, pack_rows, rows_of, unpack_rows

ZERO = 8
LEVELS = tuple(range(-ZERO, ZERO))


@dataclass(frozen=True)
class Config:
    group: int = 64  # weights that share a scale; the last group of a row may be short

    def __post_init__(self):
        if self.group < 1:
            raise ValueError("group must be at least 1")


@hookimpl
def quant_pack(weight, cfg):
    def pack(rows):
        groups = blocks_of(rows, min(cfg.group, rows.shape[1]))
        scale = xp.abs(groups).max(axis=2) / 7
        step = xp.maximum(scale, np.finfo("f4").tiny)  # smaller numbers are 0 on a GPU
        codes = (xp.rint(groups / step[..., None]) + ZERO).astype("u1")
        return pack_nibbles(rows_of(codes, rows.shape).reshape(-1), unused=ZERO), scale

    xp = xp_of(weight)
    packed, scale = pack_rows(pack, weight)
    return {"packed": packed, "scale": scale}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype, rows):
    def unpack(values, packed, scale):
        look_up(LEVELS, packed, values)
        values, scale = aligned(values, min(cfg.group, shape[-1]), scale)
        values *= scale

    if cfg.group % 2 == 0 and shape[-1] % cfg.group == 0:  # groups are blocks of the flattened weight
        packed, scale = parts["packed"], parts["scale"]
        return decode(Blocks(packed, scale, cfg.group, levels(xp_of(packed))), shape, dtype, rows)
    return unpack_rows(unpack, shape, dtype, (parts["packed"], parts["scale"]), rows=rows)


@cache
def levels(xp):
    """What a code stands for."""
    return xp.asarray(np.array(LEVELS, "f4"))
