"""NF4: 4 bits a weight, an index into 16 quantiles of the normal distribution, times the block's largest magnitude.

Dettmers et al., 2023, arXiv:2305.14314, section 3, in bitsandbytes' format. Blocks run over the flattened weight; the
last may be short. In float32, a code is the number of midpoints between levels below x (1 / absmax): ties take the
lower level. The first of two codes is the byte's high half. A block of zeros has code 7: zero.
`double_quant` keeps absmax - offset in 8 bits: blocks of 256, the signed dynamic map, the nearest level, the lower in
a tie (bitsandbytes 0.50 on the CPU looks up a coarser table); offset is absmax's float64 mean, rounded to float32.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of

LEVELS = (
    "-1.0 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0.0 0.0795803 0.1609302 0.2461123 "
    "0.33791524 0.44070983 0.562617 0.72295684 1.0"
)
NESTED = 256  # absmax values that share a nested absmax


@dataclass(frozen=True)
class Config:
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64  # weights that share an absmax
    double_quant: bool = True  # quantize the absmax values too


@cache
def tables(xp):
    """The 16 levels; the two levels of each byte, seen as one 8-byte number; the 256 levels of the dynamic map."""
    levels = np.array(LEVELS.split(), "f4")
    pairs = np.stack((levels.repeat(16), np.tile(levels, 16)), axis=-1).view("f8")[:, 0]
    low, parts = np.float32(0.1), [np.array([0, 1], "f4")]
    for i in range(7):  # the middles of 2^i intervals of [0.1, 1], times 10^(i - 6), with either sign
        n, at = 2**i, np.arange(2**i + 1)
        step = np.float64((1 - low) / np.float32(n))  # torch.linspace: a float32 step, counted from the nearer end
        ends = np.where(at < (n + 1) // 2, low + step * at, 1 - step * (n - at)).astype("f4")
        middles = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / 2)
        parts += [middles, -middles]
    return tuple(map(xp.asarray, (levels, pairs, np.sort(np.concatenate(parts)))))


def encode(flat, block, levels):
    """uint8 codes of a float32 vector, filled up to whole blocks with zero's, and the largest magnitude of each."""
    xp = xp_of(flat)
    blocks = xp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    absmax = xp.abs(blocks).max(axis=1)
    scaled = blocks * (1 / xp.maximum(absmax, np.finfo("f4").tiny))[:, None]  # smaller ones are 0 on the GPU
    return xp.searchsorted((levels[1:] + levels[:-1]) / 2, scaled.reshape(-1)).astype("u1"), absmax


@hookimpl
def quant_pack(weight, cfg):
    levels, _, dynamic = tables(xp_of(weight))
    codes, absmax = encode(weight.astype("f4").reshape(-1), cfg.block, levels)
    packed = {"packed": (codes[0::2] << 4 | codes[1::2])[: (weight.size + 1) // 2]}
    if not cfg.double_quant:
        return packed | {"absmax": absmax}
    offset = absmax.mean(dtype="f8").astype("f4")
    codes, nested_absmax = encode(absmax - offset, NESTED, dynamic)
    return packed | {"nested_codes": codes[: absmax.size], "nested_absmax": nested_absmax, "offset": offset}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype):
    _, pairs, dynamic = tables(xp_of(parts["packed"]))
    absmax = parts.get("absmax")
    if cfg.double_quant:
        scales = parts["nested_absmax"].repeat(NESTED)[: parts["nested_codes"].size]
        absmax = dynamic[parts["nested_codes"]] * scales + parts["offset"]
    values = pairs.take(parts["packed"]).view("f4")
    whole = values.size // cfg.block
    blocks, rest = values[: whole * cfg.block].reshape(-1, cfg.block), values[whole * cfg.block :]
    blocks *= absmax[:whole, None]
    rest *= absmax[whole:]
    return values[: np.prod(shape, dtype=int)].reshape(shape).astype(dtype, copy=False)
