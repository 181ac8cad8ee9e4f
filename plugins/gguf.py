"""Q4_0, Q4_1 and Q8_0 of GGUF files: 32 weights along the row share a float16 scale; 4.5, 5 and 8.5 bits a weight.

https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c, bit for bit as the `gguf` package packs them: `blocks`
(rows, bytes of a row) is what lies in the file, so that a model can be trained on its own GGUF weights. All arithmetic
is float32; a weight is multiplied by the rounded 1 / scale, before the scale is rounded to float16. A block's bytes:
    Q4_0  scale = -(largest weight by magnitude, with its sign) / 8; codes floor(weight / scale + 8.5), at most 15
    Q4_1  scale = (max - min) / 15, then min in float16; codes floor((weight - min) / scale + 0.5)
    Q8_0  scale = max |weight| / 127; codes int8, rounded to the nearest, a tie away from zero
4-bit codes: byte i has code i in its low half and code i + 16 in its high half. Zeros are zeros. Where a constant is
beyond float16, the largest float16 stands for it. Rows must be made of whole blocks.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.errors import RefpeftError

BLOCK = 32
FLOAT16, TINY = np.finfo("f2").max, np.finfo("f4").tiny


@dataclass(frozen=True)
class Config:
    type: Literal["Q4_0", "Q4_1", "Q8_0"] = "Q8_0"


@hookimpl
def quant_pack(weight, cfg):
    if weight.shape[-1] % BLOCK:
        found = f"rows of {weight.shape[-1]} (shape {weight.shape}) are no multiple of GGUF's block of {BLOCK}"
        raise RefpeftError(f"{found}: take a quantizer for rows of any length, such as nf4 or affine")
    xp, blocks = xp_of(weight), weight.reshape(-1, BLOCK)
    if cfg.type == "Q8_0":
        constants = (xp.abs(blocks).max(axis=1, keepdims=True) / 127,)
        scaled = blocks * _inverse(constants[0])
        whole = xp.trunc(scaled)
        whole += xp.where(xp.abs(scaled - whole) >= 0.5, xp.sign(scaled), 0)
        codes = whole.astype("i1").view("u1")
    elif cfg.type == "Q4_0":
        at = xp.abs(blocks).argmax(axis=1)[:, None]
        constants = (xp.take_along_axis(blocks, at, axis=1) / -8,)
        codes = _halves(blocks * _inverse(constants[0]) + 8.5)
    else:
        low = blocks.min(axis=1, keepdims=True)
        constants = ((blocks.max(axis=1, keepdims=True) - low) / 15, low)
        codes = _halves((blocks - low) * _inverse(constants[0]) + 0.5)
    heads = [xp.clip(constant, -FLOAT16, FLOAT16).astype("f2").view("u1") for constant in constants]
    return {"blocks": xp.concatenate((*heads, codes), axis=1).reshape(weight.size // weight.shape[-1], -1)}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype):
    xp, start = xp_of(parts["blocks"]), 4 if cfg.type == "Q4_1" else 2
    blocks = parts["blocks"].reshape(-1, start + (BLOCK if cfg.type == "Q8_0" else BLOCK // 2))
    constants, codes = xp.ascontiguousarray(blocks[:, :start]).view("f2").astype("f4"), blocks[:, start:]
    if cfg.type == "Q8_0":
        values = codes.view("i1").astype("f4")
    else:
        values = xp.concatenate((codes & 15, codes >> 4), axis=1).astype("f4")
    if cfg.type == "Q4_0":
        values -= 8
    values *= constants[:, :1]
    if cfg.type == "Q4_1":
        values += constants[:, 1:]
    return values.reshape(shape).astype(dtype, copy=False)


def _inverse(scale):
    """1 / scale, and 0 where that is more than float32 holds."""
    xp = xp_of(scale)
    return 1 / xp.where(xp.abs(scale) < TINY, np.float32(np.inf), scale)


def _halves(codes):
    codes = xp_of(codes).minimum(codes, 15).astype("u1")
    return codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
