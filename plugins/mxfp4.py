"""MXFP4: 4-bit floats (E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6, with a sign) times a power of two for every 32 along the row.

OCP Microscaling Formats (MX) v1.0; arXiv:2310.10537, Algorithm 1. The scale, 2^(floor(log2(max |weight|)) - 2), is kept
as its exponent + 127 in a byte (E8M0; at most 252, and its NaN, 255, does not occur). weight / scale is rounded to the
nearest E2M1, a tie to the even code. Above 6 it saturates, which is what this rule costs: the largest weight of a block
may lose a quarter. Blocks of zeros have the scale 2^-127 and are zeros.

The layout is that of gpt-oss: `blocks` (..., blocks of a row, 16), the even of two codes in the low half of a byte, and
`scales` (..., blocks of a row). A short last block of a row is filled up with zeros.
"""

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.rowwise import blocks_of, decode_e2m1, encode_e2m1, pack_rows, unpack_rows

BLOCK, BIAS = 32, 127


@hookimpl
def quant_pack(weight):
    packed, exponent = pack_rows(_pack, weight)
    return {
        "blocks": packed.reshape(*weight.shape[:-1], -1, BLOCK // 2),
        "scales": (exponent + BIAS).astype("u1").reshape(*weight.shape[:-1], -1),
    }


@hookimpl
def quant_unpack(parts, shape, dtype, rows):
    flat = [part.reshape(-1) for part in (parts["blocks"], parts["scales"])]
    return unpack_rows(_unpack, shape, dtype, flat, BLOCK, rows)


def _pack(rows):
    xp = xp_of(rows)
    blocks = blocks_of(rows, BLOCK)
    largest = xp.maximum(xp.abs(blocks).max(axis=2), np.finfo("f4").tiny)
    exponent = xp.maximum(xp.frexp(largest)[1] - 3, -BIAS)  # frexp counts from 1/2, so floor(log2) is one less
    return encode_e2m1(blocks * _power(-exponent)), exponent


def _unpack(values, packed, scales):
    decode_e2m1(packed, values)
    values = values.reshape(-1, BLOCK)
    values /= 4  # because 2^-127 is 0 on a GPU, and 2^-125 is not
    values *= _power(scales.astype("i4") - BIAS + 2)


def _power(exponent):
    xp = xp_of(exponent)
    return xp.ldexp(xp.ones(exponent.shape, "f4"), exponent)[..., None]
