"""Decoding what a file holds, where readers go wrong: stored maps, dtypes, rows, shapes, roundings; nf4 and dynamic8;
and computing with it.

Scalar float32 (golden/make/nf4.py); one rounding more where the answer is wanted in a narrower dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from bitsandbytes import functional as bnb
from common import Case, Compute, Draw, Tensors
from nf4 import BLOCK, CODEBOOK, NESTED_BLOCK, NESTED_MAP, VERSION, bnb_decode, decode, encode, f32

OLD_MAP = np.concatenate([f32([-1.0]), NESTED_MAP[1:]])
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def narrower(compute: Compute, dtype: str) -> Compute:
    """The decoded weight rounded once, to the nearest of `dtype`."""
    return lambda t: {"weight": compute(t)["weight"].float().to(DTYPES[dtype]).float()}


def roundings(weight: np.ndarray, parts: dict[str, np.ndarray]) -> None:
    """Raises SystemExit where the mistakes that the narrow cases are for would not show."""
    codes = np.stack([parts["packed"] >> 4, parts["packed"] & 15], axis=1).reshape(-1)
    code, absmax = torch.from_numpy(CODEBOOK[codes]), torch.from_numpy(parts["absmax"].repeat(BLOCK)[: codes.size])
    once = (code * absmax).bfloat16()
    twice = (code * absmax).half().bfloat16()
    factors = code.bfloat16() * absmax.bfloat16()
    if (once != twice).sum() < 4 or (once != factors).sum() < 20:
        raise SystemExit("nf4-decode-bfloat16: a second rounding does not show")


def parts_of(weight: np.ndarray, double: bool = False) -> dict[str, np.ndarray]:
    return {name: part.numpy() for name, part in encode({"weight": torch.from_numpy(weight)}, double).items()}


def fused_differently() -> dict[str, np.ndarray]:
    """Nested constants of 32 blocks whose absmax is another number where product and sum are rounded only once."""
    draw = Draw("nf4-double-decode-roundings")
    nested_absmax, offset = draw.uniform(1, low=0.01, high=0.02), draw.uniform(1, low=0.05, high=0.06)[0]
    twice = NESTED_MAP * nested_absmax + offset
    once = f32(NESTED_MAP.astype("f8") * nested_absmax.astype("f8") + np.float64(offset))
    codes = draw.generator.permutation(np.flatnonzero(once != twice))[:32].astype("u1")
    packed = draw.integers(0, 256, 32 * BLOCK // 2).astype("u1")
    offset = np.array(offset)
    return {"packed": packed, "offset": offset, "nested_absmax": nested_absmax, "nested_codes": np.resize(codes, 32)}


def cases() -> Iterator[Case]:
    wide = Draw("nf4-decode-rows_96").normal(3, 96, scale=0.02) * f32([[1], [5], [0.2]])
    comment = "the second block is half in row 0 and half in row 1; rows have 96 = 1.5 * 64 elements"
    yield nf4("decode-rows_96", parts_of(wide), [3, 96], "BlocksOverRows", comment)
    vector = Draw("nf4-decode-vector").normal(66)
    yield nf4("decode-vector", parts_of(vector), [66], "VectorShape", "one dimension in, one dimension out")
    pair = f32([0.3, -2.0])
    yield nf4("decode-pair", parts_of(pair), [2], "VectorShape", "one byte: it is no transposed matrix")

    narrow = Draw("nf4-decode-bfloat16").normal(4, 64, scale=0.02)
    roundings(narrow, parts_of(narrow))
    comment = "asked for in {}: code * absmax in float32, then one rounding, in the forward and in the backward pass"
    for dtype in DTYPES:
        flags = "RoundedTwice RoundedFactors" if dtype == "bfloat16" else "RoundedFactors"
        yield nf4(f"decode-{dtype}", parts_of(narrow), [4, 64], flags, comment.format(dtype), dtype=dtype)

    comment = (
        "product and sum are rounded one after the other: a fused multiplication and addition gives another absmax"
    )
    yield nf4("double-decode-roundings", fused_differently(), [32, 64], "FusedNested", comment)
    old = Draw("nf4-double-decode-old_map").normal(8, 64, scale=0.02) * np.exp(Draw("nf4-old_map-scales").normal(8, 1))
    parts = parts_of(old, double=True)
    parts["nested_codes"][3] = 0
    comment = "a file of bitsandbytes 0.49 or older on a CPU: its nested map begins with -1.0 instead of -0.9930"
    yield nf4("double-decode-old_map", parts, [8, 64], "StoredMap", comment, nested_map=OLD_MAP, level="interop")
    zeros = Draw("nf4-double-decode-cuda_zeros").normal(4, 64, scale=0.02)
    zeros[2] = 0
    parts = parts_of(zeros, double=True)
    parts["packed"][64:96] = 0
    comment = (
        "a file of bitsandbytes on CUDA: a block of zeros has code 0, which is -1 times what its absmax decodes to"
    )
    yield nf4("double-decode-cuda_zeros", parts, [4, 64], "ZeroBlock", comment, level="interop")
    yield dynamic8_old_map()
    yield from layers(narrow)


def nf4(
    variant: str,
    parts: dict,
    shape: list[int],
    flags: str,
    comment: str,
    level="must",
    dtype=None,
    nested_map=NESTED_MAP,
) -> Case:
    double = "offset" in parts
    config = {"block": BLOCK, "double_quant": double} | ({"nested_block": NESTED_BLOCK} if double else {})
    config |= {"shape": shape} | ({"dtype": dtype} if dtype else {})

    def compute(t: Tensors) -> Tensors:
        return decode(t, shape)

    witness = bnb_decode(shape)
    return Case(
        id=f"nf4-{variant}",
        kind="quantizer",
        name="nf4",
        at="decode",
        level=level,
        flags=tuple(flags.split()),
        comment=comment,
        spec="arXiv:2305.14314, section 3; golden/README.md, NF4",
        config=config,
        inputs=parts | {"codebook": CODEBOOK} | ({"nested_map": nested_map} if double else {}),
        compute=narrower(compute, dtype) if dtype else compute,
        oracle="scalar float32",
        witnesses={VERSION: narrower(witness, dtype) if dtype else witness},
        limits={"weight": "exact"},
    )


def layers(narrow: np.ndarray) -> Iterator[Case]:
    """Layers that are trained through, and layers that are used and then saved."""
    draw = Draw("nf4-linear-float16")
    inputs = {"x": draw.normal(3, 64), **parts_of(narrow), "codebook": CODEBOOK, "g": draw.normal(3, 4)}
    comment = "the file says float16, x has another dtype: the backward pass has the forward pass' weight"
    yield linear("float16", inputs, narrow.shape, "float16", "RoundedTwice", comment)
    for variant, shape, flags, comment in (
        (
            "used",
            (64, 128),
            "RoundedFactors UsedWeight",
            "inference leaves the weight as it was, in memory and in files",
        ),
        ("sizes", (6, 96), "LayerSizes", "6 outputs of 96 inputs, one and a half blocks"),
    ):
        draw = Draw(f"nf4-linear-{variant}")
        weight = draw.normal(*shape, scale=0.02) * np.exp(draw.normal(shape[0], 1))
        inputs = {"x": draw.normal(3, shape[1]), **parts_of(weight), "codebook": CODEBOOK}
        yield linear(variant, inputs, shape, "float32", flags, comment)


def linear(variant: str, inputs: dict, shape: tuple[int, ...], dtype: str, flags: str, comment: str) -> Case:
    """With g a step of training, without it inference."""

    def compute(t: Tensors) -> Tensors:
        weight = decode(t, list(shape))["weight"].to(t["x"].dtype)
        y = t["x"] @ weight.T
        return {"y": y, "grad.x": t["g"] @ weight} if "g" in t else {"y": y, "weight": weight}

    return Case(
        id=f"nf4-linear-{variant}",
        kind="quantizer",
        name="nf4",
        at="linear",
        flags=tuple(flags.split()),
        comment=comment,
        spec="golden/README.md, NF4, FP4 and the 8-bit map",
        config={"block": BLOCK, "double_quant": False, "shape": list(shape), "dtype": dtype},
        inputs=inputs,
        compute=compute,
        oracle="float32 weights; products in float64",
        exact=("weight",),
    )


def dynamic8_old_map() -> Case:
    draw = Draw("dynamic8-decode-old_map")
    codes = draw.integers(0, 256, 2, 160).astype("u1")
    codes[0, :4] = codes[1, -4:] = 0
    absmax = draw.uniform(2, low=0.5, high=2.0)

    def compute(t: Tensors) -> Tensors:
        levels, scales = t["map"].numpy().astype(f32), t["absmax"].numpy().astype(f32)
        values = [levels[c] * scales[i // 256] for i, c in enumerate(t["codes"].numpy().reshape(-1))]
        return {"weight": torch.from_numpy(f32(values).reshape(2, 160))}

    def witness(t: Tensors) -> Tensors:
        return {
            "weight": bnb.dequantize_blockwise(
                t["codes"], absmax=t["absmax"].float(), code=t["map"].float(), blocksize=256
            )
        }

    return Case(
        id="dynamic8-decode-old_map",
        kind="quantizer",
        name="dynamic8",
        at="decode",
        level="interop",
        flags=("StoredMap",),
        comment="bitsandbytes 0.49 or older on a CPU: the map begins with -1.0 instead of -0.9930",
        spec="arXiv:2110.02861, section 2.1; golden/README.md, 8-bit dynamic map",
        config={"block": 256, "shape": [2, 160]},
        inputs={"codes": codes, "absmax": absmax, "map": OLD_MAP},
        compute=compute,
        oracle="scalar float32",
        witnesses={VERSION: witness},
        limits={"weight": "exact"},
    )
