"""8-bit integers: weight = code * scale / 127, codes -127 ... 127, scale the largest magnitude of a row.

The weights of LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339, section 2.1), there called CB and SCB; activations
stay as they are. A row runs along the last axis. code = round(weight * (127 / scale)) in float32, ties to even; a row
of zeros, or of magnitudes below 4e-37, is zeros. Decoded: code * scale, rounded, times float32(1 / 127), rounded.
With `compat` weights become float16 first, as in bitsandbytes; on a CPU 127 / scale is (1 / scale) * 127 then.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.compat import Compat
from refpeft.errors import RefpeftError
from refpeft.rowwise import pack_rows, unpack_rows

LEAST = np.float32(4e-37)  # 127 / scale of a smaller scale is more than float32 holds


@dataclass(frozen=True)
class Config:
    compat: Compat = "none"  # quantize as bitsandbytes does on a CPU or a GPU


@hookimpl
def quant_pack(weight, cfg):
    codes, scale = pack_rows(partial(_pack, compat=cfg.compat), weight)
    return {"codes": codes.reshape(weight.shape), "scale": scale.reshape(weight.shape[:-1])}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype):
    return unpack_rows(_unpack, shape, dtype, (parts["codes"].reshape(-1, shape[-1]), parts["scale"].reshape(-1)))


def _pack(rows, compat):
    xp = xp_of(rows)
    if compat != "none":
        rows = _in_float16(rows)
    scale = xp.abs(rows).max(axis=1)
    divisor = xp.maximum(scale, LEAST)
    factor = (1 / divisor * 127 if compat == "bnb-cpu" else 127 / divisor) * (scale >= LEAST)
    return xp.rint(rows * factor[:, None]).astype("i1"), scale


def _unpack(values, codes, scale):
    values[:] = codes
    values *= scale[:, None]
    values *= np.float32(1 / 127)


def _in_float16(rows):
    if abs(rows).max() > np.finfo("f2").max:
        raise RefpeftError(
            "a weight is more than float16 holds, and bitsandbytes quantizes that: leave int8.compat out"
        )
    return rows.astype("f2").astype("f4")
