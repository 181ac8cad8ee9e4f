"""8-bit integers: weight = code * scale / 127, codes -127 ... 127, scale the largest magnitude of a row.

The weights of LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339, section 2.1), there called CB and SCB; activations
stay as they are. A row runs along the last axis. code = round(weight * (127 / scale)) in float32, ties to even; a row
of zeros, or of magnitudes below 4e-37, is zeros. Decoded: code * scale, rounded, times float32(1 / 127), rounded.
With `compat` weights become float16 first, as in bitsandbytes; on a CPU 127 / scale is (1 / scale) * 127 then.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.blockwise import Blocks, decode
from refpeft.compat import Compat
from refpeft.errors import RefpeftError

LEAST = np.float32(4e-37)  # 127 / scale of a smaller scale is more than float32 holds
UNIT = np.float32(1 / 127)
CHUNK = 1 << 20  # weights in work at a time


@dataclass(frozen=True)
class Config:
    compat: Compat = "none"  # quantize as bitsandbytes does on a CPU or a GPU


@hookimpl
def quant_pack(weight, cfg):
    xp, rows = xp_of(weight), weight.reshape(-1, weight.shape[-1])
    codes, scale = xp.empty(rows.shape, "i1"), xp.empty(len(rows), "f4")
    step = max(1, CHUNK // rows.shape[1])
    for at in range(0, len(rows), step):
        some = slice(at, at + step)
        part = rows[some] if cfg.compat == "none" else _in_float16(rows[some])
        codes[some], scale[some] = _quantize(part, cfg.compat)
    return {"codes": codes.reshape(weight.shape), "scale": scale.reshape(weight.shape[:-1])}


@hookimpl
def quant_unpack(parts, shape, dtype, rows):
    codes, scale = parts["codes"], parts["scale"]
    if xp_of(codes) is not np:
        blocks = Blocks(codes.view("u1"), scale, shape[-1], levels(xp_of(codes)), factor=UNIT)
        return decode(blocks, shape, dtype, rows)
    some = ... if rows is None else rows
    values = codes[some].astype("f4")  # faster here than to look levels up
    values *= scale[some][..., None]
    values *= UNIT
    return values.astype(dtype, copy=False)


@cache
def levels(xp):
    """What a byte stands for."""
    return xp.asarray(np.arange(256, dtype="u1").view("i1").astype("f4"))


def _quantize(rows, compat):
    xp = xp_of(rows)
    scale = xp.abs(rows).max(axis=1)
    divisor = xp.maximum(scale, LEAST)
    factor = (1 / divisor * 127 if compat == "bnb-cpu" else 127 / divisor) * (scale >= LEAST)
    return xp.rint(rows * factor[:, None]), scale


def _in_float16(rows):
    if abs(rows).max() > np.finfo("f2").max:
        raise RefpeftError(
            "a weight is more than float16 holds, and bitsandbytes quantizes that: leave int8.compat out"
        )
    return rows.astype("f2").astype("f4")
