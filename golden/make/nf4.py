"""NF4 in blocks of 64 and double quantization (QLoRA, arXiv:2305.14314), element by element in scalar float32.

The format is bitsandbytes'; the rules where its versions and devices differ are golden/README.md's. bitsandbytes is the
witness wherever it follows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional as bnb
from common import Case, Compute, Draw, Tensors, default_dtype

VERSION = f"bitsandbytes {bitsandbytes.__version__}"
f32 = np.float32

CODEBOOK = f32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
BOUNDARIES = (CODEBOOK[:-1] + CODEBOOK[1:]) / f32(2)


def dynamic_map(signed: bool) -> np.ndarray:
    """bitsandbytes' create_dynamic_map; its torch.linspace has other last bits where a processor has no FMA."""
    levels = [f32(0), f32(1)]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        width = (f32(1) - f32(0.1)) / f32(parts)  # from the nearer end, one rounding for each edge
        half = (parts + 1) // 2
        edges = [f32(np.float64(f32(0.1)) + np.float64(width) * k) for k in range(half)]
        edges += [f32(1 - np.float64(width) * k) for k in range(parts - half, -1, -1)]
        for low, high in pairwise(edges):
            middle = f32(10.0 ** (i - 6)) * ((low + high) / f32(2))
            levels += [middle, -middle] if signed else [middle]
    return np.sort(f32(levels))


NESTED_MAP = dynamic_map(signed=True)
NESTED_BOUNDARIES = (NESTED_MAP[:-1] + NESTED_MAP[1:]) / f32(2)
BLOCK, NESTED_BLOCK = 64, 256


def nearest(value: np.float32, boundaries: np.ndarray) -> int:
    """The number of boundaries that lie below `value`: a value on a boundary takes the lower code."""
    return int(sum(bool(b < value) for b in boundaries))


def encode_blocks(values: np.ndarray, block: int, boundaries: np.ndarray, zero: int) -> tuple[list[int], np.ndarray]:
    """Codes, and the largest magnitude of each block; a block of zeros takes the code of 0."""
    codes, largest = [], []
    for at in range(0, len(values), block):
        part = values[at : at + block]
        top = np.abs(part).max()
        largest.append(top)
        codes += [nearest(v * (f32(1) / top), boundaries) if top else zero for v in part]
    return codes, f32(largest)


def encode(t: Tensors, double: bool) -> Tensors:
    codes, absmax = encode_blocks(t["weight"].numpy().astype(f32).reshape(-1), BLOCK, BOUNDARIES, zero=7)
    codes += [7] * (len(codes) % 2)  # an odd count: the last low nibble is the code of 0
    packed = np.uint8([codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2)])  # the first is the high nibble
    answer = {"packed": torch.from_numpy(packed)}
    if not double:
        return answer | {"absmax": torch.from_numpy(absmax)}
    offset = f32(absmax.astype(np.float64).mean())
    nested_codes, nested_absmax = encode_blocks(absmax - offset, NESTED_BLOCK, NESTED_BOUNDARIES, zero=127)
    answer |= {"offset": torch.tensor(offset), "nested_absmax": torch.from_numpy(nested_absmax)}
    if nested_absmax.all():  # else every code decodes to the offset
        answer["nested_codes"] = torch.tensor(nested_codes, dtype=torch.uint8)
    return answer


def decode(t: Tensors, shape: list[int]) -> Tensors:
    """One rounding to float32 for each operation."""
    packed, count = t["packed"].numpy(), int(np.prod(shape))
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
    if "absmax" in t:
        absmax = t["absmax"].numpy().astype(f32)
    else:
        nested_absmax, offset = t["nested_absmax"].numpy().astype(f32), f32(t["offset"])
        levels = t["nested_map"].numpy().astype(f32)
        absmax = f32([levels[c] * nested_absmax[i // NESTED_BLOCK] + offset for i, c in enumerate(t["nested_codes"])])
    values = f32([CODEBOOK[c] * absmax[i // BLOCK] for i, c in enumerate(codes)])
    return {"weight": torch.from_numpy(values.reshape(shape))}


# ---- the witness -----------------------------------------------------------------------------------------------------


def bnb_encode(t: Tensors) -> Tensors:
    with default_dtype(torch.float32):  # its boundaries come out in the default dtype
        packed, state = bnb.quantize_4bit(t["weight"].float(), quant_type="nf4", blocksize=BLOCK)
    return {"packed": packed.reshape(-1), "absmax": state.absmax}


def bnb_decode(shape: list[int]) -> Compute:
    """The weight is decoded as one long row: with AVX-512, bitsandbytes 0.50.2 takes wrong absmax values where
    blocks run over the end of a row (nf4-decode-rows).
    """

    def compute(t: Tensors) -> Tensors:
        parts = {"absmax": t["absmax"].float()} if "absmax" in t else {"absmax": t["nested_codes"]}
        nested = None
        if "nested_codes" in t:
            nested = bnb.QuantState(
                absmax=t["nested_absmax"].float(),
                blocksize=NESTED_BLOCK,
                code=t["nested_map"].float(),
                dtype=torch.float32,
            )
        state = bnb.QuantState(
            **parts,
            shape=torch.Size([1, int(np.prod(shape))]),
            code=torch.from_numpy(CODEBOOK),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
            offset=t["offset"].float() if nested else None,
            state2=nested,
        )
        with default_dtype(torch.float32):  # its tables come out in the default dtype, and are kept
            return {"weight": bnb.dequantize_4bit(t["packed"].reshape(-1, 1), state).reshape(shape)}

    return compute


# ---- cases -----------------------------------------------------------------------------------------------------------


def weights() -> Iterator[tuple[str, np.ndarray, str, str]]:
    """Name, weight, flags and comment."""
    yield "normal", Draw("nf4-normal").normal(4, 64, scale=0.02), "Nf4NibbleOrder", ""
    comment = "a block runs over the end of a row"
    yield "rows", Draw("nf4-rows").normal(6, 32, scale=0.02), "Nf4NibbleOrder BlocksOverRows", comment
    yield "short", Draw("nf4-short").normal(5, 30), "ShortBlock", "the last block has 22 elements"
    yield (
        "odd",
        Draw("nf4-odd").normal(3, 43),
        "ShortBlock OddCount",
        "an odd count: the last low nibble is 7, the code of 0",
    )
    draw = Draw("nf4-zero-block")
    comment = "a block of zeros: absmax 0, code 7, decodes to 0 (bitsandbytes on CUDA takes code 0)"
    zero = np.concatenate([draw.normal(1, 64), np.zeros((1, 64), f32), draw.normal(1, 64)])
    yield "zero-block", zero, "ZeroBlock", comment
    ulp = [np.nextafter(BOUNDARIES, f32(-2)), BOUNDARIES, np.nextafter(BOUNDARIES, f32(2))]
    midpoints = np.concatenate([*ulp, f32([1.0]), np.zeros(18, f32)]).reshape(2, 32)
    comment = "every boundary and its two neighbours, absmax 1: a value on a boundary takes the lower code"
    yield "midpoints", midpoints, "Nf4Midpoint Nf4Literals", comment
    book = np.concatenate([CODEBOOK, -CODEBOOK, CODEBOOK * f32(0.3), CODEBOOK * f32(0.999)]).reshape(1, 64)
    yield "codebook", book, "Nf4Codebook", "the codes' own values come back"
    negative = Draw("nf4-negative").normal(2, 64)
    negative[:, 5] = -4.0
    yield "negative", negative, "SignedAbsmax", "the largest magnitude is negative: absmax is positive, its code is 0"
    yield "small", Draw("nf4-small").normal(2, 64, scale=1e-30), "", "very small values"


def double_weights() -> Iterator[tuple[str, np.ndarray, str, str]]:
    scales = np.exp(Draw("nf4-double-scales").normal(12, 1, scale=0.7))
    yield "plain", Draw("nf4-double").normal(12, 64, scale=0.02) * scales, "DoubleQuantization", ""
    zero = Draw("nf4-double-zero").normal(4, 64)
    zero[2] = 0
    comment = "a block of zeros has a code of absmax that decodes to something else than 0; its elements are still 0"
    yield "zero-block", zero, "DoubleQuantization ZeroBlock", comment
    comment = "one block: absmax - offset is 0, so is nested_absmax; absmax decodes to the offset"
    yield "one-block", Draw("nf4-double-one").normal(1, 64), "DoubleQuantization", comment
    comment = "258 blocks: two nested blocks, the second of two"
    yield "two-nested", Draw("nf4-double-two").normal(258, 64), "DoubleQuantization ShortBlock", comment


def safe(weight: np.ndarray, boundaries: np.ndarray = BOUNDARIES, block: int = BLOCK) -> bool:
    """Whether no code hangs on the last bit of 1 / absmax, or on dividing by absmax instead: devices differ there."""
    for at in range(0, weight.size, block):
        part = weight.reshape(-1)[at : at + block]
        top = np.abs(part).max()
        if top:
            inverse = f32(1) / top
            ways = (
                part / top,
                *(part * i for i in (np.nextafter(inverse, f32(0)), inverse, np.nextafter(inverse, f32(np.inf)))),
            )
            if len({np.searchsorted(boundaries, v).tobytes() for v in ways}) > 1:
                return False
    return True


def cases() -> Iterator[Case]:
    for double, source in ((False, weights()), (True, double_weights())):
        name = "double-" if double else ""
        config = {"block": BLOCK, "double_quant": double} | ({"nested_block": NESTED_BLOCK} if double else {})
        maps = {"codebook": CODEBOOK} | ({"nested_map": NESTED_MAP} if double else {})
        for variant, weight, flags, comment in source:
            weight = np.asarray(weight, f32)
            if variant != "midpoints" and not safe(weight):
                raise SystemExit(f"nf4 {variant}: a value is too close to a boundary")
            shared = {
                "kind": "quantizer",
                "name": "nf4",
                "flags": tuple(flags.split()),
                "comment": comment,
                "spec": "arXiv:2305.14314, section 3; golden/README.md, NF4",
                "oracle": "scalar float32",
            }
            shape = list(weight.shape)

            def encoded(t: Tensors, double=double) -> Tensors:
                return encode(t, double)

            parts = encoded({"weight": torch.from_numpy(weight)})
            yield Case(
                id=f"nf4-{name}encode-{variant}",
                at="encode",
                config=config,
                compute=encoded,
                limits=dict.fromkeys(parts, "exact"),
                inputs={"weight": weight, **maps},
                witnesses={} if double else {VERSION: bnb_encode},
                **shared,
            )
            if weight.size > 1000 or (double and "nested_codes" not in parts):
                continue
            yield Case(
                id=f"nf4-{name}decode-{variant}",
                at="decode",
                config=config | {"shape": shape},
                limits={"weight": "exact"},
                inputs={n: p.numpy() for n, p in parts.items()} | maps,
                witnesses={VERSION: bnb_decode(shape)},
                compute=lambda t, shape=shape: decode(t, shape),
                **shared,
            )
