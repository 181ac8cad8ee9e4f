"""8-bit dynamic map: an index into 256 levels that are denser near 0, times the block's largest magnitude.

Dettmers et al., 2021, arXiv:2110.02861, section 2.1, in bitsandbytes' form; the rules are refpeft.blockwise's.
With `offset`, the mean (float64, rounded to float32) is taken off before: so QLoRA (arXiv:2305.14314, section 3) keeps
the constants of another quantizer, which is what `--double-quant` does.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import blockwise, hookimpl
from refpeft.backend import xp_of


@dataclass(frozen=True)
class Config:
    block: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 256  # values that share an absmax
    offset: bool = False  # take the mean off before


@hookimpl
def quant_pack(weight, cfg):
    offset = {"offset": weight.mean(dtype="f8").astype("f4")} if cfg.offset else {}
    codes, absmax = blockwise.encode(weight - offset.get("offset", 0), cfg.block, blockwise.dynamic_map(xp_of(weight)))
    return {"codes": codes.reshape(weight.shape), "absmax": absmax} | offset


@hookimpl
def quant_unpack(parts, cfg, shape, dtype):
    levels = parts.get("levels", blockwise.dynamic_map(xp_of(parts["codes"])))
    values = blockwise.decode(parts["codes"].reshape(-1), parts["absmax"], cfg.block, levels)
    return (values + parts.get("offset", 0)).reshape(shape).astype(dtype, copy=False)
