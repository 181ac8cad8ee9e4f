"""NF4: 4 bits a weight, an index into 16 quantiles of the normal distribution, times the block's largest magnitude.

Dettmers et al., 2023, arXiv:2305.14314, section 3, in bitsandbytes' form; the rules are refpeft.blockwise's.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.blockwise import Blocks, nearest
from refpeft.compat import Compat, decimals, encode

LEVELS = (
    "-1.0 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0.0 0.0795803 0.1609302 0.2461123 "
    "0.33791524 0.44070983 0.562617 0.72295684 1.0"
)


@dataclass(frozen=True)
class Config:
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64  # weights that share an absmax
    compat: Compat = "none"  # quantize as bitsandbytes does on a CPU or a GPU


@cache
def book(xp, compat="none"):
    """The code book."""
    return (decimals if compat == "bnb-cuda" else nearest)(np.array(LEVELS.split(), "f4"), xp)


@hookimpl
def quant_pack(weight, cfg):
    packed, absmax = encode(weight, cfg.block, book(xp_of(weight), cfg.compat), cfg.compat)
    return {"packed": packed, "absmax": absmax}


@hookimpl
def quant_blocks(parts, cfg):
    levels = parts.get("levels", book(xp_of(parts["packed"])).levels)
    return Blocks(parts["packed"], parts["absmax"], cfg.block, levels)
