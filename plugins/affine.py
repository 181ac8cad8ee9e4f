"""Integers with a zero point: weight = (code - zero) * scale, in 4 or 8 bits; per group along the row, row or tensor.

scale = (max - min) / (2^bits - 1) over a range that is widened to hold 0, zero = round(-min / scale), code =
round(weight / scale) + zero, within 0 ... 2^bits - 1; Jacob et al., 2017, arXiv:1712.05877, section 2.1. Float32, ties
to even; groups of zeros are zeros. 4-bit codes lie two in a byte, the first in the high half, over the ends of rows.

With `nested`, the constants are steps 0 ... 15 of a range. A scale bears that. A zero point does not: it is an integer,
which 4 bits hold exactly, and 0 is a value only while it is one. Of 0.35, -1.2, 2.7, -0.45 the mean error is .0900 with
exact constants, .0833 with a nested scale, and .1722 if the zero point 5 becomes 8 steps of 10 / 15, that is 5.33.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.blockwise import TINY, pack_nibbles
from refpeft.rowwise import aligned, blocks_of, look_up, pack_rows, rows_of, unpack_rows

STEPS = 15  # of a nested constant's range


@dataclass(frozen=True)
class Config:
    bits: Literal[4, 8] = 4
    per: Literal["tensor", "row", "group"] = "group"  # what shares a scale and a zero point
    group: int = 64  # weights in a group; the last group of a row may be short
    nested: bool = False  # keep scales and zero points in 4 bits each
    scale_range: float = 0.0  # nested scales are steps of this; 0: of the largest scale
    zero_range: float = 0.0  # nested zero points are steps of this; 0: of the largest code
    only_with = (("group", "per", "group"), ("scale_range", "nested", True), ("zero_range", "nested", True))

    def __post_init__(self):
        if self.group < 1 or min(self.scale_range, self.zero_range) < 0:
            raise ValueError("group must be at least 1, and the ranges must not be negative")


@hookimpl
def quant_pack(weight, cfg):
    def pack(rows, step, zero):
        codes = xp.rint(blocks_of(rows, size) / step[..., None]) + zero[..., None]
        codes = rows_of(codes.clip(0, top).astype("u1"), rows.shape)
        return (pack_nibbles(codes.reshape(-1), unused=0) if cfg.bits == 4 else codes,)

    xp, top = xp_of(weight), 2**cfg.bits - 1
    size = min(cfg.group, weight.shape[-1]) if cfg.per == "group" else weight.shape[-1]
    sharing = weight.reshape(1, 1, -1) if cfg.per == "tensor" else blocks_of(weight, size)
    low, high = xp.minimum(sharing.min(axis=2), 0), xp.maximum(sharing.max(axis=2), 0)
    scale = (high - low) / top
    step = xp.maximum(scale, TINY)  # smaller numbers are 0 on a GPU
    zero = xp.rint(-low / step)
    (codes,) = pack_rows(pack, weight, step, zero)
    parts = {"packed": codes} if cfg.bits == 4 else {"codes": codes.reshape(weight.shape)}
    if not cfg.nested:
        return parts | {"scale": scale, "zero": zero.astype("u1")}
    whole = xp.full((), cfg.scale_range, "f4") if cfg.scale_range else step.max()
    nested = ((scale, whole), (zero, cfg.zero_range or top))
    high, low = (xp.rint(part * STEPS / most).clip(0, STEPS).astype("u1") for part, most in nested)
    return parts | {"constants": high << 4 | low, "scale_range": whole}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype, rows):
    def unpack(values, codes, scale, zero):
        if cfg.bits == 4:
            look_up(tuple(range(16)), codes, values)
        else:
            values[:] = codes.reshape(values.shape)
        values, scale, zero = aligned(values, size, scale, zero.astype("f4"))
        values -= zero
        values *= scale

    size = min(cfg.group, shape[-1]) if cfg.per == "group" else shape[-1]
    scale, zero = parts.get("scale"), parts.get("zero")
    if cfg.nested:
        scale = (parts["constants"] >> 4) * parts["scale_range"] / STEPS
        zero = (parts["constants"] & 15).astype("f4") * (cfg.zero_range or 2**cfg.bits - 1) / STEPS
    codes = parts["packed" if cfg.bits == 4 else "codes"].reshape(-1)
    return unpack_rows(unpack, shape, dtype, (codes, scale, zero), rows=rows)
