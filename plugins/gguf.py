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
from refpeft.blockwise import TINY
from refpeft.errors import RefpeftError
from refpeft.rowwise import pack_rows, unpack_rows

BLOCK, FLOAT16 = 32, np.finfo("f2").max


@dataclass(frozen=True)
class Config:
    type: Literal["Q4_0", "Q4_1", "Q8_0"] = "Q8_0"


@hookimpl
def quant_pack(weight, cfg):
    if weight.shape[-1] % BLOCK:
        found = f"rows of {weight.shape[-1]} (shape {weight.shape}) are no multiple of GGUF's block of {BLOCK}"
        raise RefpeftError(f"{found}: take a quantizer for rows of any length, such as nf4 or affine")
    return {"blocks": pack_rows(lambda rows: _pack(rows, cfg.type), weight)[0]}


@hookimpl
def quant_unpack(parts, cfg, shape, dtype, rows):
    return unpack_rows(lambda *some: _unpack(*some, cfg.type), shape, dtype, (parts["blocks"],), rows=rows)


def _pack(rows, kind):
    xp, blocks = xp_of(rows), rows.reshape(-1, BLOCK)
    if kind == "Q8_0":
        constants = (xp.abs(blocks).max(axis=1, keepdims=True) / 127,)
    elif kind == "Q4_0":
        at = xp.abs(blocks).argmax(axis=1)[:, None]
        constants = (xp.take_along_axis(blocks, at, axis=1) / -8,)
    else:
        low = blocks.min(axis=1, keepdims=True)
        constants = ((blocks.max(axis=1, keepdims=True) - low) / 15, low)
        blocks = blocks - low
    scaled = blocks * (1 / xp.where(xp.abs(constants[0]) < TINY, np.float32(np.inf), constants[0]))
    if kind == "Q8_0":
        whole = xp.trunc(scaled)
        whole += xp.trunc(2 * (scaled - whole))  # of a half or more: 1, with its sign
        codes = whole.astype("i1").view("u1")
    else:
        codes = xp.minimum(scaled + (8.5 if kind == "Q4_0" else 0.5), 15).astype("u1")
        codes = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    heads = [xp.clip(constant, -FLOAT16, FLOAT16).astype("f2").view("u1") for constant in constants]
    return (xp.concatenate((*heads, codes), axis=1).reshape(len(rows), -1),)


def _unpack(values, rows, kind):
    blocks, start = values.reshape(-1, BLOCK), 4 if kind == "Q4_1" else 2
    head, codes = xp_of(rows).split(rows.reshape(len(blocks), -1), [start], axis=1)
    constants = xp_of(rows).ascontiguousarray(head).view("f2").astype("f4")
    if kind == "Q8_0":
        blocks[:] = codes.view("i1")
    else:
        blocks[:, : BLOCK // 2], blocks[:, BLOCK // 2 :] = codes & 15, codes >> 4
    if kind == "Q4_0":
        blocks -= 8
    blocks *= constants[:, :1]
    if kind == "Q4_1":
        blocks += constants[:, 1:]
