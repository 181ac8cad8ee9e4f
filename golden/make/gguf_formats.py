"""Q4_0, Q4_1 and Q8_0 of GGUF files, scalar float32 after llama.cpp's ggml-quants.c; witness: the package gguf."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version

import gguf
import numpy as np
from common import Case, Draw
from nf4 import f32
from quantizing import Decode, Encode, Parts, far_from_halves, pair

SPEC = "golden/README.md, GGUF; llama.cpp, ggml/src/ggml-quants.c"
BLOCK = 32


def bytes_of(*constants: np.float32) -> list[int]:
    return list(np.array(constants, np.float16).tobytes())


def floor(value: np.float32) -> int:
    return math.floor(float(value))


def inverse(scale: np.float32) -> np.float32:
    return f32(1) / scale if scale else f32(0)


def halves(codes: list[int]) -> list[int]:
    return [codes[i] | codes[i + 16] << 4 for i in range(16)]


def q4_0(block: np.ndarray) -> list[int]:
    scale = block[int(np.abs(block).argmax())] / f32(-8)
    codes = [min(floor(v * inverse(scale) + f32(8.5)), 15) for v in block]
    return bytes_of(scale) + halves(codes)


def q4_1(block: np.ndarray) -> list[int]:
    low = block.min()
    scale = (block.max() - low) / f32(15)
    codes = [min(floor((v - low) * inverse(scale) + f32(0.5)), 15) for v in block]
    return bytes_of(scale, low) + halves(codes)


def q8_0(block: np.ndarray) -> list[int]:
    scale = np.abs(block).max() / f32(127)
    scaled = [v * inverse(scale) for v in block]
    codes = [int(math.copysign(floor(abs(float(v)) + 0.5), v)) for v in scaled]  # exact: a tie away from zero
    return bytes_of(scale) + [code % 256 for code in codes]


PACK = {"Q4_0": q4_0, "Q4_1": q4_1, "Q8_0": q8_0}


def functions(kind: str) -> tuple[Encode, Decode]:
    def encode(weight: np.ndarray) -> Parts:
        packed = [byte for block in weight.reshape(-1, BLOCK) for byte in PACK[kind](block)]
        return {"blocks": np.uint8(packed).reshape(len(weight.reshape(-1, weight.shape[-1])), -1)}

    def decode(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
        constants = 2 if kind == "Q4_1" else 1
        size = 2 * constants + (BLOCK if kind == "Q8_0" else BLOCK // 2)
        values = []
        for block in parts["blocks"].reshape(-1, size):
            head = f32(block[: 2 * constants].view(np.float16))
            body = block[2 * constants :]
            codes = body.view(np.int8) if kind == "Q8_0" else [*(body & 15), *(body >> 4)]
            middle = f32(8) if kind == "Q4_0" else f32(0)
            values += [(f32(c) - middle) * head[0] + (head[1] if constants == 2 else f32(0)) for c in codes]
        return f32(values)

    return encode, decode


def check_distance(kind: str, weight: np.ndarray) -> None:
    """Raises SystemExit where a code hangs on last bits, or on a fused multiplication and addition."""
    for block in weight.astype(float).reshape(-1, BLOCK):
        if kind == "Q4_1":
            far_from_halves((block - block.min()) / (block.max() - block.min()) * 15)
        else:
            far_from_halves(block / np.abs(block).max() * (8 if kind == "Q4_0" else 127))


def cases() -> Iterator[Case]:
    draw = Draw("gguf-cases")
    zero_block = draw.normal(2, 64)
    zero_block[0, 32:] = 0
    negative, positive = draw.normal(1, 32), draw.normal(1, 32)
    negative[0, 9], positive[0, 9] = -5, 5
    both = np.concatenate([negative, positive])
    both[:, 20] = [5, -5]  # the first of two equal magnitudes decides
    constant = np.full((1, 32), 0.75, f32)
    eighths = f32([-8, -7.5, -6.5, -0.5, 0.5, 1.5, 6.5, 7.5] * 4).reshape(1, 32) / f32(4)
    steps = f32([0, 15, 0.5, 1.5, 2.5, 3.5, 13.5, 14.5] * 4).reshape(1, 32) / f32(8) - f32(1)
    whole = f32([127, -127, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 100.5, -100.5, 126.5, -126.5] + [3] * 20).reshape(
        1, 32
    ) / f32(64)
    normal = draw.normal(2, 96, scale=0.02)
    rows = [  # type, variant, weight, flags, comment
        *((kind, "normal", normal, "GgufHalves", "") for kind in PACK),
        *((kind, "zero-block", zero_block, "ZeroBlock", "a block of zeros: scale 0, and codes of 0") for kind in PACK),
        (
            "Q4_0", "signs", both, "GgufSignedScale",
            "the largest magnitude keeps its sign: scale = largest / -8, so it has code 0; of two the first decides",
        ),
        ("Q4_0", "ties", eighths, "GgufRounding", "scale 1/4: halves go up, and what is above code 15 takes 15"),
        ("Q4_1", "constant", constant, "ZeroBlock", "all weights are equal: scale 0, codes 0, min 0.75"),
        ("Q4_1", "ties", steps, "GgufRounding", "scale 1/8: halves go up"),
        ("Q8_0", "ties", whole, "GgufRounding", "scale 1/64: halves go away from zero"),
    ]  # fmt: skip
    for kind, variant, weight, flags, comment in rows:
        quant_type = gguf.GGMLQuantizationType[kind]
        if variant in ("normal", "signs"):
            check_distance(kind, weight)
        agrees = {
            f"gguf {version('gguf')}": (
                lambda w, q=quant_type: {"blocks": gguf.quants.quantize(w, q)},
                lambda parts, shape, q=quant_type: gguf.quants.dequantize(parts["blocks"], q),
            )
        }
        yield from pair(
            "gguf", f"{kind.lower()}-{variant}", weight, {"type": kind}, *functions(kind),
            flags=flags, comment=comment, spec=SPEC, agrees=agrees,
        )  # fmt: skip
