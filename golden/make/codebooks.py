"""fp4, dynamic8, int8 and nf4_normal, and nf4's other block sizes: scalar float32, written from golden/README.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from statistics import NormalDist

import numpy as np
import torch
from bitsandbytes import functional as bnb
from bitsandbytes_rules import FP4, FP4_ORDER
from common import Case, Draw, default_dtype
from nf4 import BOUNDARIES as NF4_BOUNDARIES
from nf4 import CODEBOOK as NF4
from nf4 import NESTED_BLOCK, NESTED_BOUNDARIES, NESTED_MAP, VERSION, encode_blocks, f32, safe
from quantizing import Decode, Encode, Parts, doubled, far_from_halves, pack_high_first, pair, unpack_high_first

FP4_SPEC = "golden/README.md, NF4, FP4 and the 8-bit map; bitsandbytes' FP4"
DYNAMIC8_SPEC = "golden/README.md, NF4, FP4 and the 8-bit map; arXiv:2110.02861, section 2.1"
INT8_SPEC = "golden/README.md, 8-bit integers; arXiv:2208.07339, section 2.1"
NORMAL_SPEC = "golden/README.md, Normalised blocks"
NF4_SPEC = "arXiv:2305.14314, section 3; golden/README.md, NF4, FP4 and the 8-bit map"

FP4_SORTED = [code for code in FP4_ORDER if code != 8]  # one zero
FP4_BOUNDARIES = (FP4[FP4_SORTED][:-1] + FP4[FP4_SORTED][1:]) / f32(2)

# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def four_bits(
    levels: np.ndarray, boundaries: np.ndarray, order: list[int], zero: int, block: int
) -> tuple[Encode, Decode]:
    """`order` is the codes by rising level, without those that are not made; `zero` is the place of 0 among them."""

    def encode(weight: np.ndarray) -> Parts:
        places, absmax = encode_blocks(weight.reshape(-1), block, boundaries, zero=zero)
        return {"packed": pack_high_first([order[place] for place in places], unused=order[zero]), "absmax": absmax}

    def decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
        codes = unpack_high_first(parts["packed"], prod(shape))
        return f32([levels[code] * parts["absmax"][i // block] for i, code in enumerate(codes)])

    return encode, decode


def bnb_four_bits(kind: str, levels: np.ndarray, block: int) -> tuple[Encode, Decode]:
    def encode(weight: np.ndarray) -> Parts:
        with default_dtype(torch.float32):
            packed, state = bnb.quantize_4bit(torch.from_numpy(weight), quant_type=kind, blocksize=block)
        return {"packed": packed.reshape(-1).numpy(), "absmax": state.absmax.numpy()}

    def decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
        state = bnb.QuantState(
            absmax=torch.from_numpy(parts["absmax"]),
            shape=torch.Size([1, prod(shape)]),  # one row: see nf4.bnb_decode
            code=torch.from_numpy(levels),
            blocksize=block,
            quant_type=kind,
            dtype=torch.float32,
        )
        with default_dtype(torch.float32):
            return bnb.dequantize_4bit(torch.from_numpy(parts["packed"]).reshape(-1, 1), state).numpy()

    return encode, decode


def fp4_cases() -> Iterator[Case]:
    draw = Draw("fp4-cases")
    zero = draw.normal(3, 64)
    zero[1] = 0
    around = np.concatenate(
        [np.nextafter(FP4_BOUNDARIES, f32(-2)), FP4_BOUNDARIES, np.nextafter(FP4_BOUNDARIES, f32(2))]
    )
    edges = np.concatenate([around, f32([1.0, 0.0, -0.0]), f32(np.linspace(-1, 1, 19))])
    book = np.concatenate([FP4, FP4 * f32(-0.3), FP4[:16] * f32(0.999), FP4])
    rows = [  # variant, weight, flags, comment
        ("normal", draw.normal(4, 64, scale=0.02), "Fp4Codebook Fp4Thresholds Fp4ZeroSign", ""),
        ("odd", draw.normal(3, 43), "ShortBlock OddCount", "the last block is one element; the last low half is 0"),
        ("zero-block", zero, "ZeroBlock", "a block of zeros: absmax 0, code 0"),
        (
            "midpoints", edges.reshape(1, -1), "Fp4Thresholds Fp4ZeroSign",
            "every boundary and its two neighbours: a value on a boundary takes the lower level; zeros have code 0",
        ),
        ("codebook", book.reshape(1, 64), "Fp4Codebook Fp4ZeroSign", "the codes' own values"),
    ]  # fmt: skip
    functions = four_bits(FP4, FP4_BOUNDARIES, FP4_SORTED, zero=7, block=64)
    maps, config = {"codebook": FP4}, {"block": 64, "double_quant": False}
    for variant, weight, flags, comment in rows:
        if variant not in ("midpoints", "codebook") and not safe(weight, FP4_BOUNDARIES):
            raise SystemExit(f"fp4 {variant}: a value is too close to a boundary")
        _, decode = bnb_four_bits("fp4", FP4, 64)
        agrees = {VERSION: (None, decode)}  # it encodes small positive values with the other zero
        yield from pair(
            "fp4", variant, weight, config, *functions,
            maps=maps, flags=flags, comment=comment, spec=FP4_SPEC, agrees=agrees,
        )  # fmt: skip
    weight = draw.normal(12, 64, scale=0.02) * np.exp(draw.normal(12, 1, scale=0.7))
    config = {"block": 64, "double_quant": True, "nested_block": NESTED_BLOCK}
    maps |= {"nested_map": NESTED_MAP}
    twice = doubled(*functions, "absmax")
    flags = "DoubleQuantization OffsetMean"
    yield from pair("fp4", "plain", weight, config, *twice, maps=maps, flags=flags, spec=FP4_SPEC)


def all_bytes() -> Iterator[Case]:
    """Decoding of every byte, so of every pair of codes; fp4's code 8, which is not made here, is among them."""
    for name, levels in (("nf4", NF4), ("fp4", FP4)):
        functions = four_bits(levels, NF4_BOUNDARIES, list(range(16)), zero=7, block=64)
        draw = Draw(f"{name}-decode-all_bytes")
        _, case = pair(
            name,
            "all_bytes",
            np.zeros((2, 4, 64), f32),
            {"block": 64, "double_quant": False},
            *functions,
            maps={"codebook": levels},
            flags=f"{name.capitalize()}Codebook Nf4NibbleOrder",
            comment="every byte, in three dimensions",
            spec=FP4_SPEC if name == "fp4" else NF4_SPEC,
            agrees={VERSION: (None, bnb_four_bits(name, levels, 64)[1])},
        )
        case.inputs["packed"] = draw.generator.permutation(256).astype(np.uint8)
        case.inputs["absmax"] = draw.uniform(8, low=0.01, high=0.1)
        yield case


def two_nested() -> Iterator[Case]:
    """258 blocks of 32: two nested blocks."""
    weight = Draw("nf4-double-nested-blocks").normal(258, 32, scale=0.02)
    weight[256:] *= 3
    functions = four_bits(NF4, NF4_BOUNDARIES, list(range(16)), zero=7, block=32)
    yield from pair(
        "nf4",
        "nested-blocks",
        weight,
        {"block": 32, "double_quant": True, "nested_block": NESTED_BLOCK},
        *doubled(*functions, "absmax"),
        maps={"codebook": NF4, "nested_map": NESTED_MAP},
        flags="DoubleQuantization ShortBlock",
        comment="258 blocks of 32: two nested blocks, the second of two",
        spec=NF4_SPEC,
    )


def nf4_blocks() -> Iterator[Case]:
    """Other sizes of blocks."""
    for block, shape in ((32, (3, 50)), (4096, (65, 64))):
        weight = Draw(f"nf4-block_{block}").normal(*shape, scale=0.02)
        weight[-1] *= 20
        functions = four_bits(NF4, NF4_BOUNDARIES, list(range(16)), zero=7, block=block)
        yield from pair(
            "nf4",
            f"block_{block}",
            weight,
            {"block": block, "double_quant": False},
            *functions,
            maps={"codebook": NF4},
            flags="BlockSize ShortBlock",
            comment=f"blocks of {block}, a short last one",
            spec=NF4_SPEC,
            agrees={VERSION: bnb_four_bits("nf4", NF4, block)},
        )


# ---- the 8-bit map ---------------------------------------------------------------------------------------------------


def dynamic8(offset: bool) -> tuple[Encode, Decode]:
    def encode(weight: np.ndarray) -> Parts:
        mean = f32(weight.astype(np.float64).mean()) if offset else f32(0)
        codes, absmax = encode_blocks((weight - mean).reshape(-1), NESTED_BLOCK, NESTED_BOUNDARIES, zero=127)
        parts = {"codes": np.uint8(codes).reshape(weight.shape), "absmax": absmax}
        return parts | ({"offset": np.array(mean)} if offset else {})

    def decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
        codes = parts["codes"].reshape(-1)
        values = f32([NESTED_MAP[code] * parts["absmax"][i // NESTED_BLOCK] for i, code in enumerate(codes)])
        return values + parts.get("offset", f32(0))

    return encode, decode


def bnb_decode_dynamic8(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    codes, absmax = torch.from_numpy(parts["codes"]), torch.from_numpy(parts["absmax"])
    return bnb.dequantize_blockwise(codes, absmax=absmax, code=torch.from_numpy(NESTED_MAP), blocksize=256).numpy()


def dynamic8_cases() -> Iterator[Case]:
    draw = Draw("dynamic8-cases")
    ulp = [np.nextafter(NESTED_BOUNDARIES, f32(-2)), NESTED_BOUNDARIES, np.nextafter(NESTED_BOUNDARIES, f32(2))]
    edges = np.concatenate([np.append(part, f32(1)) for part in ulp])
    zero = draw.normal(3, 256)
    zero[1] = 0
    zero[2, :100] = 0
    levels = np.stack([NESTED_MAP, NESTED_MAP * f32(0.1)])
    wide = draw.normal(2, 300) * np.exp(draw.normal(2, 300, scale=3))
    rows = [  # variant, weight, offset, flags, comment
        ("normal", draw.normal(2, 256), False, "DynamicMap", ""),
        ("wide", wide, False, "CoarseTable DynamicMap ShortBlock", "from 1e-4 to 1e4; the last block has 88 elements"),
        ("levels", levels, False, "CoarseTable DynamicMap", "the levels' own values"),
        (
            "midpoints", edges.reshape(3, 256), False, "CoarseTable DynamicMap",
            "every boundary and its two neighbours, absmax 1: a value on a boundary takes the lower level",
        ),
        ("zero-block", zero, False, "ZeroBlock CoarseTable", "zeros have code 127, in a block of zeros and elsewhere"),
        (
            "offset", np.abs(draw.normal(2, 150)) + f32(1), True, "DoubleQuantization",
            "the mean is taken off before: float64, rounded to float32",
        ),
    ]  # fmt: skip
    for variant, weight, offset, flags, comment in rows:
        if variant not in ("levels", "midpoints") and not offset and not safe(weight, NESTED_BOUNDARIES, 256):
            raise SystemExit(f"dynamic8 {variant}: a value is too close to a boundary")
        config = {"block": NESTED_BLOCK} | ({"offset": True} if offset else {})
        agrees = {} if offset else {VERSION: (None, bnb_decode_dynamic8)}
        yield from pair(
            "dynamic8", variant, weight, config, *dynamic8(offset),
            maps={"map": NESTED_MAP}, flags=flags, comment=comment, spec=DYNAMIC8_SPEC, agrees=agrees,
        )  # fmt: skip


# ---- 8-bit integers --------------------------------------------------------------------------------------------------


def int8_encode(weight: np.ndarray) -> Parts:
    rows = weight.reshape(-1, weight.shape[-1])
    scale = np.abs(rows).max(axis=1)
    factors = [f32(127) / s if s else f32(0) for s in scale]
    codes = [[round(float(v * factor)) for v in row] for row, factor in zip(rows, factors, strict=True)]
    return {"codes": np.int8(codes).reshape(weight.shape), "scale": scale.reshape(weight.shape[:-1])}


def int8_on_cpu(weight: np.ndarray) -> Parts:
    """What bitsandbytes makes on a CPU of weights that float16 holds: the factor is 127 * (1 / scale)."""
    scale = np.abs(weight).max(axis=1)
    codes = np.rint(weight * (f32(127) * (f32(1) / scale))[:, None])
    return {"codes": codes.astype(np.int8), "scale": scale}


def int8_from_float16(weight: np.ndarray) -> Parts:
    return int8_encode(weight.astype(np.float16).astype(f32))


def int8_decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    return f32(
        [[f32(c) * s * f32(1 / 127) for c in row] for row, s in zip(parts["codes"], parts["scale"], strict=True)]
    )


def bnb_int8_encode(weight: np.ndarray) -> Parts:
    codes, scale, _ = bnb.int8_vectorwise_quant(torch.from_numpy(weight).half())
    return {"codes": codes.numpy(), "scale": scale.numpy()}


def bnb_int8_decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    return bnb.int8_vectorwise_dequant(torch.from_numpy(parts["codes"]), torch.from_numpy(parts["scale"])).numpy()


def int8_reciprocals() -> Iterator[Case]:
    """Ties by one division, of which 127 * (1 / scale) takes half to the odd code."""
    scale = f32(15 * 127 / 1024)
    weight = np.append(scale, (np.arange(39, dtype=f32) + f32(0.5)) * f32(15 / 1024)).reshape(1, -1)
    weight[:, 1::2] *= -1
    assert (int8_encode(weight)["codes"] != int8_on_cpu(weight)["codes"]).sum() > 9
    rows = [  # variant, level, config, encode, witness, flags, comment
        (
            "reciprocal", "must", {}, int8_encode, None, "Int8Reciprocal Int8Rows",
            "the factor is 127 / scale, divided once; 127 * (1 / scale) is the next float32 number",
        ),
        (
            "reciprocal-cpu", "interop", {"compat": "bnb-cpu"}, int8_on_cpu, bnb_int8_encode, "Int8Reciprocal",
            f"{VERSION}: the factor is 127 * (1 / scale), which is not 127 / scale; float16 holds the weights",
        ),
    ]  # fmt: skip
    for variant, level, config, encode, witness, flags, comment in rows:
        first, _ = pair(
            "int8", variant, weight, config, encode, int8_decode, flags=flags, comment=comment, spec=INT8_SPEC,
            agrees={VERSION: (witness, None)},
        )  # fmt: skip
        first.level = level
        yield first


def int8_cases() -> Iterator[Case]:
    draw = Draw("int8-cases")
    zero = draw.normal(3, 40)
    zero[1] = 0
    normal = draw.normal(4, 65, scale=0.02)
    negative = draw.normal(2, 32)
    negative[:, 3] = -6
    ties = f32([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3, 63.5, 0]).reshape(1, 12) / f32(32)
    rows = [
        ("normal", normal, {}, "Int8Rows Int8Float16", "a scale for each row; SCB and CB of LLM.int8()"),
        ("zero-row", zero, {}, "ZeroBlock Int8Float16", "a row of zeros: scale 0, codes 0"),
        (
            "negative", negative, {}, "SignedAbsmax Int8Float16",
            "the largest magnitude is negative: code -127; -128 is not made",
        ),
        ("ties", ties, {}, "AffineRounding", "halves of a step go to the even code; scale / 127 is 1/32"),
        (
            "float16", normal, {"compat": "bnb-cpu"}, "Int8Float16",
            f"{VERSION}: the weight is rounded to float16 first, so that scales and some codes are others",
        ),
    ]  # fmt: skip
    for variant, weight, config, flags, comment in rows:
        encode = int8_from_float16 if config else int8_encode
        if variant not in ("ties", "float16"):
            far_from_halves(weight / np.maximum(np.abs(np.float64(weight)).max(axis=1, keepdims=True), 1e-30) * 127)
        agrees = {VERSION: (bnb_int8_encode if config else None, bnb_int8_decode)}
        cases = pair(
            "int8", variant, weight, config, encode, int8_decode,
            flags=flags, comment=comment, spec=INT8_SPEC, agrees=agrees,
        )  # fmt: skip
        for case in cases:
            case.level = "interop" if config else "must"
            yield case
    yield from int8_reciprocals()
    config = {"double_quant": True, "nested_block": NESTED_BLOCK}
    weight = draw.normal(20, 16) * np.exp(draw.normal(20, 1))
    twice, maps = doubled(int8_encode, int8_decode, "scale"), {"nested_map": NESTED_MAP}
    yield from pair("int8", "plain", weight, config, *twice, maps=maps, flags="DoubleQuantization", spec=INT8_SPEC)
    yield int8_product(draw)


def int8_product(draw: Draw) -> Case:
    """Integers times integers, as LLM.int8() multiplies them: of both factors codes and scales are given."""
    inputs = {"x_codes": draw.integers(-127, 128, 3, 24).astype(np.int8), "x_scale": draw.uniform(3, low=0.5, high=2)}
    inputs |= {"codes": draw.integers(-127, 128, 5, 24).astype(np.int8), "scale": draw.uniform(5, low=0.01, high=0.1)}

    def compute(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = t["x_codes"].to(t["scale"].dtype) @ t["codes"].to(t["scale"].dtype).T
        return {"y": whole * t["x_scale"][:, None] * t["scale"] / 127**2}

    return Case(
        id="int8-linear-product",
        kind="quantizer",
        name="int8",
        at="linear",
        flags=("Int8Product",),
        comment="x = x_codes x_scale / 127, y = x weight.T; all products of codes are exact integers",
        spec=INT8_SPEC,
        config={"shape": [5, 24]},
        inputs=inputs,
        compute=compute,
    )


# ---- normalised blocks -----------------------------------------------------------------------------------------------

BELOW = [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, 7, endpoint=False)]
ABOVE = [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, 8, endpoint=False)]
NORMAL_LEVELS = np.sort(f32([-level for level in BELOW] + [0.0] + ABOVE))
NORMAL_BOUNDARIES = (NORMAL_LEVELS[:-1] + NORMAL_LEVELS[1:]) / f32(2)


def normal_encode(weight: np.ndarray, block: int = 64) -> Parts:
    codes, means, deviations = [], [], []
    values = weight.reshape(-1)
    for at in range(0, len(values), block):
        part = values[at : at + block]
        mean = f32(math.fsum(part.astype(float)) / len(part))
        centred = part - mean
        deviation = f32(math.sqrt(math.fsum(centred.astype(float) ** 2) / len(part)))
        scaled = centred / deviation if deviation else centred
        if np.abs(scaled[:, None] / NORMAL_BOUNDARIES - 1).min() < 1e-6:
            raise SystemExit("nf4_normal: a value is too close to a boundary")
        codes += [int((v > NORMAL_BOUNDARIES).sum()) for v in scaled]
        means.append(mean)
        deviations.append(deviation)
    return {"packed": pack_high_first(codes, unused=7), "mean": f32(means), "std": f32(deviations)}


def normal_decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    codes = unpack_high_first(parts["packed"], prod(shape))
    return f32([NORMAL_LEVELS[c] * parts["std"][i // 64] + parts["mean"][i // 64] for i, c in enumerate(codes)])


def normal_cases() -> Iterator[Case]:
    draw = Draw("nf4_normal-cases")
    equal = draw.normal(3, 64)
    equal[1] = 0.75
    rows = [
        ("normal", draw.normal(3, 64, scale=0.02) + f32(0.01), "NormalisedBlocks", ""),
        ("odd", draw.normal(3, 43), "NormalisedBlocks ShortBlock OddCount", "the last block is one element: std 0"),
        ("equal", equal, "NormalisedBlocks", "a block of equal values: std 0, code 7, exact"),
    ]
    maps = {"codebook": NORMAL_LEVELS}
    for variant, weight, flags, comment in rows:
        yield from pair(
            "nf4_normal", variant, weight, {"block": 64}, normal_encode, normal_decode,
            maps=maps, flags=flags, comment=comment, spec=NORMAL_SPEC,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    yield from nf4_blocks()
    yield from two_nested()
    yield from all_bytes()
    yield from fp4_cases()
    yield from dynamic8_cases()
    yield from int8_cases()
    yield from normal_cases()
