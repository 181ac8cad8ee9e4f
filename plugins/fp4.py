"""FP4: 4 bits a weight, sign and one of the magnitudes 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1, times the block's absmax.

bitsandbytes' form (Dettmers et al., 2023, arXiv:2305.14314, compare NF4 with it); not the E2M1 of MXFP4, whose smallest
magnitude is another. Codes 0 and 8 are both zero, 8 is not made. The rules are refpeft.blockwise's.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.blockwise import Blocks, nearest
from refpeft.compat import Compat, both_zeros, cut_decimals, encode

TWELFTHS = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], "f4")
LEVELS = np.concatenate((TWELFTHS, 0 - TWELFTHS)) / np.float32(12)
BOOKS = {"none": nearest, "bnb-cpu": both_zeros, "bnb-cuda": cut_decimals}


@dataclass(frozen=True)
class Config:
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64  # weights that share an absmax
    compat: Compat = "none"  # quantize as bitsandbytes does on a CPU or a GPU


@cache
def book(xp, compat="none"):
    """The code book."""
    return BOOKS[compat](LEVELS, xp)


@hookimpl
def quant_pack(weight, cfg):
    packed, absmax = encode(weight, cfg.block, book(xp_of(weight), cfg.compat), cfg.compat)
    return {"packed": packed, "absmax": absmax}


@hookimpl
def quant_blocks(parts, cfg):
    levels = parts.get("levels", book(xp_of(parts["packed"]), cfg.compat).levels)
    return Blocks(parts["packed"], parts["absmax"], cfg.block, levels)
