"""8-bit dynamic map: an index into 256 levels that are denser near 0, times the block's largest magnitude.

Dettmers et al., 2021, arXiv:2110.02861, section 2.1, in bitsandbytes' form; the rules are refpeft.blockwise's.
With `offset`, the mean (float64, rounded to float32) is taken off before: so QLoRA (arXiv:2305.14314, section 3) keeps
the constants of another quantizer, which is what `--double-quant` does.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from refpeft import hookimpl
from refpeft.backend import to_host, xp_of
from refpeft.blockwise import Blocks, dynamic_map, nearest
from refpeft.compat import Compat, binned, encode, ties_to_even, torch_mean

BOOKS = {"none": nearest, "bnb-cpu": binned, "bnb-cuda": ties_to_even}


@dataclass(frozen=True)
class Config:
    block: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 256  # values that share an absmax
    offset: bool = False  # take the mean off before
    compat: Compat = "none"  # quantize as bitsandbytes does on a CPU or a GPU


@cache
def book(xp, compat="none"):
    """The code book."""
    return BOOKS[compat](dynamic_map(), xp)


@hookimpl
def quant_pack(weight, cfg):
    offset = {"offset": mean(weight, cfg.compat)} if cfg.offset else {}
    if offset:
        weight = weight - offset["offset"]
    codes, absmax = encode(weight, cfg.block, book(xp_of(weight), cfg.compat), cfg.compat)
    return {"codes": codes.reshape(weight.shape), "absmax": absmax} | offset


@hookimpl
def quant_blocks(parts, cfg):
    levels = parts.get("levels", book(xp_of(parts["codes"])).levels)
    return Blocks(parts["codes"], parts["absmax"], cfg.block, levels, parts.get("offset"))


def mean(weight, rules):
    """The float32 mean, 0-d."""
    if rules == "bnb-cpu":
        return xp_of(weight).asarray(torch_mean(to_host(weight).reshape(-1)))
    return weight.mean(dtype="f8").astype("f4")
