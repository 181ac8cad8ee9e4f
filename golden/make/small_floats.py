"""MXFP4 and NVFP4: blocks of 4-bit floats with 8-bit scales; scalar float32, written from golden/README.md.

Rounding to E2M1 and E4M3 is by distance here, with ties to the even code; ml_dtypes is the witness of the codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
from common import Case, Draw
from nf4 import f32
from quantizing import Parts, pair, rows_in_blocks

MX = "golden/README.md, MXFP4 and NVFP4; OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6.3"
NV = "golden/README.md, MXFP4 and NVFP4"
WITNESS = f"ml_dtypes {ml_dtypes.__version__}"

E2M1 = [Fraction(m, 2) for m in (0, 1, 2, 3, 4, 6, 8, 12)]
E4M3 = [
    Fraction(m, 512) if e == 0 else (1 + Fraction(m, 8)) * Fraction(2) ** (e - 7) for e in range(16) for m in range(8)
]
E4M3.pop()  # the last code is NaN
LEAST = f32(2.0**-117)  # of weight_scale_2: times the smallest E4M3, 2^-9, it is a normal number


def nearest(magnitude: float, levels: list[Fraction]) -> int:
    """The code of the nearest level: of two the even one; above the last level, the last."""
    exact = Fraction(float(magnitude))
    return min(range(len(levels)), key=lambda code: (abs(levels[code] - exact), code % 2))


def e2m1(value: np.float32) -> int:
    return nearest(abs(value), E2M1) | (8 if math.copysign(1, value) < 0 else 0)


def e2m1_witness(value: np.float32) -> int:
    return int(np.float32(value).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)) & 15


def e4m3_witness(value: np.float32, levels: list[Fraction]) -> int:
    return int(np.float32(value).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def pack_low_first(codes: list[int]) -> list[int]:
    return [codes[i] | codes[i + 1] << 4 for i in range(0, len(codes), 2)]


def filled(row: list[np.ndarray], size: int) -> list[np.ndarray]:
    """The blocks of a row, the last one filled up with zeros."""
    return [np.concatenate([block, np.zeros(size - len(block), f32)]) for block in row]


def value_of(code: int) -> np.float32:
    return f32(float(E2M1[code & 7])) * f32(-1 if code & 8 else 1)


def unpack_low_first(packed: np.ndarray) -> list[np.float32]:
    return [value_of(int(half)) for byte in packed for half in (byte & 15, byte >> 4)]


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------


def mxfp4_encode(weight: np.ndarray, code_of=e2m1) -> Parts:
    blocks, scales = [], []
    for row in rows_in_blocks(weight, 32):
        for block in filled(row, 32):
            top = float(np.abs(block).max())
            exponent = max(math.floor(math.log2(top)) - 2, -127) if top else -127
            blocks.append(pack_low_first([code_of(f32(math.ldexp(v, -exponent))) for v in block]))
            scales.append(exponent + 127)
    shape = (*weight.shape[:-1], -1)
    return {"blocks": np.uint8(blocks).reshape(*shape, 16), "scales": np.uint8(scales).reshape(shape)}


def mxfp4_decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    rows = parts["blocks"].reshape(-1, parts["scales"].shape[-1], 16)
    exponents = parts["scales"].reshape(rows.shape[:2]).astype(int) - 127
    values = [
        [v * f32(2.0**e) for block, e in zip(row, exponents[r], strict=True) for v in unpack_low_first(block)]
        for r, row in enumerate(rows)
    ]
    return f32(values)[:, : shape[-1]]


def mxfp4_cases() -> Iterator[Case]:
    draw = Draw("mxfp4-cases")
    zero_block = draw.normal(2, 64)
    zero_block[0, 32:] = 0
    ties = f32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.2499, 0.2501, 1.2499, 1.2501, 4.9999, 5.0001, 6.0, 0.0, 4.0])
    above = f32([4.0, 6.0, 6.5, 7.0, 7.5, 7.999, -6.25, -7.75] + [1.0, -3.0] * 12)
    powers = draw.uniform(4, 32, low=-0.99, high=0.99)
    powers[:, 3] = [1, -1, 1, -1]
    powers *= f32([[2.0**-20], [1.0], [np.nextafter(f32(1), f32(0))], [2.0**30]])
    rows = [  # variant, weight, flags, comment
        ("normal", draw.normal(2, 64, scale=0.02), "Mxfp4Scale LowNibbleFirst", ""),
        ("short", draw.normal(2, 3, 40), "BlocksInRows", "each row: a block of 32 and one of 8, filled up with zeros"),
        ("zero-block", zero_block, "ZeroBlock", "a block of zeros: scale byte 0, codes 0"),
        (
            "ties", np.concatenate([ties, -ties]).reshape(1, 32), "SmallFloatTies",
            "the largest is 6, the scale 1: the middles of two levels take the even code",
        ),
        ("above", above.reshape(1, 32), "SmallFloatSaturates", "between 6 and 8 times the scale there is no level: 6"),
        ("powers", powers, "Mxfp4Scale", "the largest magnitude is a power of two, or just below one"),
    ]  # fmt: skip
    for variant, weight, flags, comment in rows:
        agrees = {WITNESS: (lambda w: mxfp4_encode(w, e2m1_witness), None)}
        yield from pair(
            "mxfp4",
            variant,
            weight,
            {},
            mxfp4_encode,
            mxfp4_decode,
            flags=flags,
            comment=comment,
            spec=MX,
            agrees=agrees,
        )


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------


def nvfp4_encode(weight: np.ndarray, code_of=e2m1, scale_of=nearest) -> Parts:
    over_all = max(np.abs(weight).max() / f32(6 * 448), LEAST)
    packed, scales = [], []
    for row in rows_in_blocks(weight, 16):
        for block in filled(row, 16):
            code = max(scale_of(np.abs(block).max() / (f32(6) * over_all), E4M3), 1)
            scale = f32(float(E4M3[code])) * over_all
            packed += pack_low_first([code_of(v / scale) for v in block])
            scales.append(code)
    shape = (*weight.shape[:-1], -1)
    return {
        "weight": np.uint8(packed).reshape(shape),
        "weight_scale": np.uint8(scales).reshape(shape),
        "weight_scale_2": np.array(f32(over_all)),
    }


def nvfp4_decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    scales = parts["weight_scale"].reshape(-1, parts["weight_scale"].shape[-1])
    rows = parts["weight"].reshape(*scales.shape, 8)
    values = []
    for row, codes in zip(rows, scales, strict=True):
        factors = [f32(float(E4M3[c])) * parts["weight_scale_2"] for c in codes]
        values.append([v * s for block, s in zip(row, factors, strict=True) for v in unpack_low_first(block)])
    return f32(values)[:, : shape[-1]]


def far_from_ties(weight: np.ndarray) -> None:
    """Raises SystemExit where a code of NVFP4 hangs on the last bit of a division."""
    over_all = np.abs(np.float64(weight)).max() / (6 * 448)
    for row in rows_in_blocks(weight, 16):
        for block in row:
            wanted = np.abs(block).max() / (6 * over_all)
            scale = float(E4M3[max(nearest(wanted, E4M3), 1)]) * over_all
            for value, levels in [(wanted, E4M3), *((abs(v) / scale, E2M1) for v in block)]:
                middles = [float(a + b) / 2 for a, b in pairwise(levels)]
                if value and min(abs(value / m - 1) for m in middles) < 1e-6:
                    raise SystemExit("nvfp4: a weight is too close to the middle of two levels")


def nvfp4_cases() -> Iterator[Case]:
    draw = Draw("nvfp4-cases")
    zero_block = draw.normal(2, 32)
    zero_block[1, 16:] = 0
    steps = f32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0])
    scales = f32([448, 17, 19, 1])  # 6 * 17 / 6 and 6 * 19 / 6 are the middles of 16, 18 and 20
    tiny = draw.normal(1, 32)
    tiny[0, 16:] *= f32(1e-7)
    rows = [
        ("normal", draw.normal(3, 64, scale=0.02), "Nvfp4Scales LowNibbleFirst", ""),
        ("short", draw.normal(2, 3, 24), "BlocksInRows", "each row: a block of 16 and one of 8, filled up with zeros"),
        ("zero-block", zero_block, "ZeroBlock", "a block of zeros has the smallest scale, 2^-9 (code 1), not 0"),
        ("zeros", np.zeros((1, 32), f32), "ZeroBlock", "a tensor of zeros: weight_scale_2 is 2^-117"),
        (
            "ties", (scales[:, None] * steps).reshape(1, 64), "SmallFloatTies",
            "weight_scale_2 is 1: scales and codes in the middle of two levels take the even code",
        ),
        ("tiny-block", tiny, "Nvfp4Scales", "a block far below the others: the smallest scale, most codes are 0"),
    ]  # fmt: skip
    for variant, weight, flags, comment in rows:
        if variant not in ("ties", "zeros"):
            far_from_ties(weight)
        agrees = {WITNESS: (lambda w: nvfp4_encode(w, e2m1_witness, e4m3_witness), None)}
        yield from pair(
            "nvfp4",
            variant,
            weight,
            {},
            nvfp4_encode,
            nvfp4_decode,
            flags=flags,
            comment=comment,
            spec=NV,
            agrees=agrees,
        )


def cases() -> Iterator[Case]:
    yield from mxfp4_cases()
    yield from nvfp4_cases()
