"""Integer quantizers: affine (with a zero point), int4 (symmetric); scalar float32, written from golden/README.md.

The worked example's values are exact fractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import prod

import numpy as np
import torch
from common import Case, Draw
from nf4 import NESTED_BLOCK, NESTED_MAP, f32
from quantizing import (
    Decode,
    Encode,
    Parts,
    doubled,
    far_from_halves,
    pack_high_first,
    pair,
    rows_in_blocks,
    unpack_high_first,
)

AFFINE = "golden/README.md, Affine integers; arXiv:1712.05877, section 2.1"
INT4 = "golden/README.md, Symmetric 4-bit integers"
STEPS = 15


def nearest(value: np.float32) -> int:
    """The nearest integer, the even one of two: Python's round."""
    exact = Fraction(float(value))
    return round(exact)


def groups_of(weight: np.ndarray, config: dict) -> list[list[np.ndarray]]:
    """(rows, groups) of what shares a scale."""
    if config["per"] == "tensor":
        return [[weight.reshape(-1)]]
    return rows_in_blocks(weight, weight.shape[-1] if config["per"] == "row" else config["group"])


# ---- affine ----------------------------------------------------------------------------------------------------------


def affine_group(values: np.ndarray, top: int) -> tuple[list[int], np.float32, int]:
    """(codes, scale, zero point) of one group."""
    low, high = min(values.min(), f32(0)), max(values.max(), f32(0))
    scale = (high - low) / f32(top)
    if not scale:
        return [0] * len(values), scale, 0
    zero = nearest(-low / scale)
    return [min(max(nearest(v / scale) + zero, 0), top) for v in values], scale, zero


def affine(config: dict) -> tuple[Encode, Decode]:
    top = 2 ** config["bits"] - 1

    def encode(weight: np.ndarray) -> Parts:
        rows = [[affine_group(group, top) for group in row] for row in groups_of(weight, config)]
        codes = [code for row in rows for group, _, _ in row for code in group]
        scale = f32([[s for _, s, _ in row] for row in rows])
        zero = np.uint8([[z for _, _, z in row] for row in rows])
        packed = config["bits"] == 4
        parts = (
            {"packed": pack_high_first(codes, unused=0)} if packed else {"codes": np.uint8(codes).reshape(weight.shape)}
        )
        if not config["nested"]:
            return parts | {"scale": scale, "zero": zero}
        scale_range, zero_range = f32(config["scale_range"] or scale.max()), f32(config["zero_range"] or top)
        constants = [
            step(s, scale_range) << 4 | step(f32(z), zero_range) for s, z in zip(scale.flat, zero.flat, strict=True)
        ]
        return parts | {"constants": np.uint8(constants).reshape(scale.shape), "scale_range": np.array(scale_range)}

    def decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
        if config["nested"]:
            scale = f32([[f32(c >> 4) * parts["scale_range"] / f32(STEPS) for c in row] for row in parts["constants"]])
            zero_range = f32(config["zero_range"] or top)
            zero = f32([[f32(c & 15) * zero_range / f32(STEPS) for c in row] for row in parts["constants"]])
        else:
            scale, zero = parts["scale"], f32(parts["zero"])
        codes = unpack_high_first(parts["packed"], prod(shape)) if config["bits"] == 4 else parts["codes"]
        rows = groups_of(f32(codes).reshape(shape), config)
        return f32(
            [(c - zero[r][g]) * scale[r][g] for r, row in enumerate(rows) for g, part in enumerate(row) for c in part]
        )

    return encode, decode


def step(value: np.float32, top: np.float32) -> int:
    """The step 0 .. 15 of [0, top] that is nearest to `value`."""
    if not top:
        return 0
    steps = value * f32(STEPS) / top
    if 0 < abs(steps % 1 - 0.5) < 1e-5:
        raise SystemExit(f"{value} of {top}: too close to the middle of two steps, though no tie")
    return min(nearest(steps), STEPS)


# ---- int4 ------------------------------------------------------------------------------------------------------------


def int4(config: dict) -> tuple[Encode, Decode]:
    def encode(weight: np.ndarray) -> Parts:
        rows = rows_in_blocks(weight, config["group"])
        scale = f32([[np.abs(group).max() / f32(7) for group in row] for row in rows])
        codes = [
            nearest(v / scale[r][g]) + 8 if scale[r][g] else 8
            for r, row in enumerate(rows)
            for g, group in enumerate(row)
            for v in group
        ]
        return {"packed": pack_high_first(codes, unused=8), "scale": scale}

    def decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
        rows = rows_in_blocks(f32(unpack_high_first(parts["packed"], prod(shape))).reshape(shape), config["group"])
        scale = parts["scale"]
        return f32(
            [(c - f32(8)) * scale[r][g] for r, row in enumerate(rows) for g, part in enumerate(row) for c in part]
        )

    return encode, decode


# ---- cases -----------------------------------------------------------------------------------------------------------

SIXTEENTHS = f32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 8.0, -7.0, 4.5, 0.0, 7.5]) / f32(16)
"""A range of 15 steps of 1/16 with the zero point 7: halves of a step are ties, and odd ones after adding 7."""


def cases() -> Iterator[Case]:
    yield from worked_example()
    draw = Draw("affine-cases")
    plain = {"bits": 4, "per": "group", "group": 64, "nested": False}
    normal, short = draw.normal(2, 128, scale=0.02), draw.normal(3, 45)
    zero_group = draw.normal(2, 64)
    zero_group[1, :32] = 0
    above, below = np.abs(draw.normal(2, 32)) + f32(1), -np.abs(draw.normal(2, 32)) - f32(1)
    rows = [  # variant, weight, changes, flags, comment
        ("normal", normal, {}, "AffineZeroPoint", ""),
        ("eight-bits", normal[:1], {"bits": 8}, "AffineZeroPoint", "8 bits: one code a byte"),
        ("row", draw.normal(3, 20), {"per": "row"}, "AffineAxis", "a scale and a zero point for each row"),
        ("tensor", draw.normal(3, 20), {"per": "tensor"}, "AffineAxis", "one scale and one zero point"),
        (
            "short", short, {"group": 32}, "BlocksInRows OddCount",
            "groups end where a row ends, the last of each row has 13 weights; an odd count: the last low half is 0",
        ),
        ("zero-group", zero_group, {"group": 32}, "ZeroBlock", "a group of zeros: scale 0, zero point 0, codes 0"),
        ("positive", above, {"group": 32}, "AffineRange", "the range holds 0: zero point 0"),
        ("negative", below, {"group": 32}, "AffineRange", "the range holds 0: zero point 15"),
        (
            "ties", SIXTEENTHS.reshape(1, -1), {"group": 12}, "AffineRounding",
            "halves of a step: round(weight / scale), a tie to the even number, then + zero point; scale is 1/16",
        ),
        (
            "ties-zero", f32([8.5, -6.5, 1, -1, 2, 0, 0, 3]).reshape(1, -1), {"group": 8}, "AffineRounding",
            "the zero point is a tie, 6.5: the even number, 6; scale is 1",
        ),
        (
            "nested", draw.normal(4, 64) * np.exp(draw.normal(4, 1)), {"nested": True}, "NestedZeroPoint",
            "scales in 4 bits; zero points are steps of 0 .. 15, so that they stay exact",
        ),
    ]  # fmt: skip
    for variant, weight, changes, flags, comment in rows:
        config = plain | changes | ({"scale_range": 0.0, "zero_range": 0.0} if "nested" in changes else {})
        check_distance(weight, config, flags)
        yield from pair("affine", variant, weight, config, *affine(config), flags=flags, comment=comment, spec=AFFINE)
    config = {**plain, "group": 32, "double_quant": True, "nested_block": NESTED_BLOCK}
    weight = draw.normal(3, 100) * np.exp(draw.normal(3, 1))
    comment = "the scales (3, 4) in 8 bits, the zero points as they are: no loss there"
    functions = doubled(*affine(config), "scale")
    maps = {"nested_map": NESTED_MAP}
    flags = "DoubleQuantization NestedZeroPoint"
    yield from pair("affine", "plain", weight, config, *functions, maps=maps, flags=flags, comment=comment, spec=AFFINE)
    yield from int4_cases()


def check_distance(weight: np.ndarray, config: dict, flags: str) -> None:
    """Raises SystemExit where a code hangs on the last bit of a scale, unless it is meant to be a tie."""
    if "AffineRounding" in flags:
        return
    top = 7 if "bits" not in config else 2 ** config["bits"] - 1
    for row in groups_of(weight, {"per": "group"} | config):
        for group in row:
            low, high = min(group.min(), 0.0), max(group.max(), 0.0)
            scale = np.float64(np.abs(group).max() if top == 7 else high - low) / top
            if scale:
                far_from_halves(np.append(np.float64(group), low) / scale)


def worked_example() -> Iterator[Case]:
    """Four weights by hand; the decoded values are exact fractions, and have a limit instead of being exact."""
    weight = f32([0.35, -1.2, 2.7, -0.45])
    plain = {"bits": 4, "per": "tensor", "group": 64, "nested": False}
    codes, scale, zero = [6, 0, 15, 3], Fraction(39, 10) / 15, 5
    quantized = plain | {"nested": True, "scale_range": 1.0, "zero_range": 10.0}
    nested_scale, nested_zero = (
        Fraction(round(scale * STEPS), STEPS),
        Fraction(round(Fraction(zero * STEPS, 10)) * 10, STEPS),
    )
    comment = "scale 3.9 / 15 = 0.26, zero point round(1.2 / 0.26) = 5"
    exact = [(c - zero) * scale for c in codes]
    yield from by_hand("worked", weight, plain, exact, "AffineZeroPoint", comment)
    comment = (
        "scale 0.26 is step 4 of 15 of [0, 1]: 4/15; zero point 5 is step 7.5, a tie, so 8 of 15 of [0, 10]: 16/3. The "
        "mean error doubles: an integer that 4 bits hold exactly became a fraction, and no code stands for 0 any more"
    )
    exact = [(c - nested_zero) * nested_scale for c in codes]
    yield from by_hand("worked-nested", weight, quantized, exact, "NestedZeroPoint", comment)


def by_hand(
    variant: str, weight: np.ndarray, config: dict, exact: list[Fraction], flags: str, comment: str
) -> Iterator[Case]:
    """The pair of cases of `weight`, decoded to the `exact` values; the constants are theirs rounded to float32."""
    encoded, decoded = pair(
        "affine", variant, weight, config, *affine(config), flags=flags, comment=comment, spec=AFFINE
    )
    yield encoded
    values = torch.tensor([float(value) for value in exact], dtype=torch.float64)
    rounded = decoded.compute({name: torch.from_numpy(part) for name, part in decoded.inputs.items()})["weight"]
    if not torch.allclose(rounded.double(), values, rtol=3e-7, atol=0):
        raise SystemExit(f"affine {variant}: the scalar code does not give the fractions")
    decoded.compute, decoded.oracle = lambda t: {"weight": values}, "exact fractions"
    decoded.limits = {"weight": {"float32": 8}}
    yield decoded


def int4_cases() -> Iterator[Case]:
    draw = Draw("int4-cases")
    zero_group = draw.normal(2, 64)
    zero_group[0, 32:] = 0
    ties = f32([-7, 7, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 6.5, -6.5]) / f32(8)
    rows = [
        ("normal", draw.normal(2, 128, scale=0.02), 64, "Int4Symmetric", ""),
        (
            "short", draw.normal(3, 45), 32, "BlocksInRows OddCount",
            "the last group of each row has 13 weights; the last low half is 8",
        ),
        ("zero-group", zero_group, 32, "ZeroBlock", "a group of zeros: scale 0, codes 8"),
        ("ties", ties.reshape(1, -1), 12, "AffineRounding", "halves of a step of 1/8 go to the even number"),
    ]  # fmt: skip
    for variant, weight, group, flags, comment in rows:
        config = {"group": group}
        check_distance(weight, config, flags)
        yield from pair("int4", variant, weight, config, *int4(config), flags=flags, comment=comment, spec=INT4)
    config = {"group": 32, "double_quant": True, "nested_block": NESTED_BLOCK}
    weight = draw.normal(3, 100) * np.exp(draw.normal(3, 1))
    functions, maps = doubled(*int4(config), "scale"), {"nested_map": NESTED_MAP}
    yield from pair("int4", "plain", weight, config, *functions, maps=maps, flags="DoubleQuantization", spec=INT4)
