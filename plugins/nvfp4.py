"""NVFP4: 4-bit floats (E2M1) times an 8-bit float (E4M3) for every 16 along the row times one float32.

NVIDIA, 2025, arXiv:2509.25149, in the layout of ModelOpt's files: `weight` (..., in / 2), the even of two codes in the
low half of a byte; `weight_scale` (..., in / 16), E4M3; `weight_scale_2`. With the largest magnitudes of the block and
of the tensor, weight_scale_2 = tensor / (6 * 448), weight_scale = block / (6 * weight_scale_2) rounded to the nearest
E4M3, at least its smallest, 2^-9, and a code is weight / (weight_scale * weight_scale_2) rounded to the nearest E2M1;
ties take the even code, above 6 it saturates. Zeros are zeros, in a block and in a tensor of them.

The E4M3 scales are kept as bytes and decoded by table. A short last block of a row is filled up with zeros.
"""

import numpy as np

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.rowwise import E4M3, blocks_of, decode_e2m1, encode_e2m1, numbers, pack_rows, round_to, unpack_rows

BLOCK, LARGEST, LARGEST_SCALE = 16, 6, 448
LEAST = np.finfo("f4").tiny * 2**9  # of weight_scale_2: times the smallest E4M3 it is still no 0 on a GPU


@hookimpl
def quant_pack(weight):
    def pack(rows):
        blocks = blocks_of(rows, BLOCK)
        codes = xp.maximum(round_to(E4M3, xp.abs(blocks).max(axis=2) / (LARGEST * over_all)), 1)
        return encode_e2m1(blocks / _scale(codes, over_all)), codes

    xp = xp_of(weight)
    over_all = xp.maximum(xp.maximum(weight.max(), -weight.min()) / (LARGEST * LARGEST_SCALE), LEAST)
    packed, codes = pack_rows(pack, weight)
    return {
        "weight": packed.reshape(*weight.shape[:-1], -1),
        "weight_scale": codes.reshape(*weight.shape[:-1], -1),
        "weight_scale_2": over_all,
    }


@hookimpl
def quant_unpack(parts, shape, dtype, rows):
    def unpack(values, packed, scales):
        decode_e2m1(packed, values)
        blocks = values.reshape(-1, BLOCK)
        blocks *= _scale(scales, parts["weight_scale_2"])

    flat = [part.reshape(-1) for part in (parts["weight"], parts["weight_scale"])]
    return unpack_rows(unpack, shape, dtype, flat, BLOCK, rows)


def _scale(codes, over_all):
    return (numbers(E4M3, xp_of(codes))[codes] * over_all)[..., None]
