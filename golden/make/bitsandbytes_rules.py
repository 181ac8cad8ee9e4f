"""Where bitsandbytes 0.50 differs from golden/README.md's rules, and from itself: `compat` of nf4, fp4 and dynamic8;
and the same weights by these rules.

Scalar float32. bitsandbytes on the CPU is the witness of bnb-cpu; bnb-cuda is written after its kernels
(csrc/kernels.cu), with a correctly rounded 1 / absmax; these cases were equal on an H200 with 0.50.2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional as bnb
from common import Case, Compute, Draw, Tensors, default_dtype
from nf4 import BOUNDARIES as NF4_BOUNDARIES
from nf4 import CODEBOOK as NF4
from nf4 import NESTED_BLOCK, NESTED_BOUNDARIES, NESTED_MAP, f32, nearest, safe
from nf4 import encode as encode_by_the_rules

VERSION = f"bitsandbytes {bitsandbytes.__version__}"
CPU, CUDA = "bnb-cpu", "bnb-cuda"
SMALLEST = f32(1e-38)

# ---- blocks ----------------------------------------------------------------------------------------------------------


def scaled_blocks(values: np.ndarray, block: int, compat: str, four_bits: bool) -> tuple[np.ndarray, np.ndarray]:
    """(values divided by their block's largest magnitude, NaN where a block on CUDA is all zeros; absmax)."""
    scaled, largest = [], []
    for at in range(0, len(values), block):
        part = values[at : at + block]
        top = np.abs(part).max()
        if compat == CPU and four_bits and len(part) < block:  # a short last block: divided, and the clamp is stored
            top = max(top, SMALLEST)
            scaled.append(part / top)
        elif compat == CPU and four_bits:
            scaled.append(part * (f32(1) / max(top, SMALLEST)))
        else:
            scaled.append(part * (f32(1) / top) if top else np.full(len(part), np.nan, f32))
        largest.append(top)
    return np.concatenate(scaled), f32(largest)


# ---- codes -----------------------------------------------------------------------------------------------------------

FP4 = f32([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / f32(12)
FP4_ORDER = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]  # codes by value: 0 and 8 are both zero
FP4_BOUNDARIES = (FP4[FP4_ORDER][:-1] + FP4[FP4_ORDER][1:]) / f32(2)
FP4_CUDA = [(0.8333333, 3), (0.583333, 2), (0.4166667, 5), (0.29166667, 4), (0.20833333, 7), (0.0859375, 6)]
FP4_CUDA += [(0.00260417, 1)]  # thresholds of the magnitude as the kernel has them: decimals that were cut off


NF4_CUDA = (
    "-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984 "
    "-0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668 "
    "0.2920137718319893 0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011"
)
"""The kernel's literals: decimals of midpoints in float64, four of which lie between two float32 numbers."""


def literal(decimal: str) -> np.float32:
    """The float32 nearest to a decimal, as a C compiler reads it: without float64 in between."""
    near = f32(float(decimal))
    around = (np.nextafter(near, f32(-2)), near, np.nextafter(near, f32(2)))
    return min(around, key=lambda number: abs(Fraction(float(number)) - Fraction(decimal)))


NF4_BOOKS = {CPU: NF4_BOUNDARIES, CUDA: f32([literal(decimal) for decimal in NF4_CUDA.split()])}


def nf4_code(value: np.float32, compat: str) -> int:
    return 0 if np.isnan(value) else nearest(value, NF4_BOOKS[compat])  # on CUDA every `x > c` is false for NaN


def fp4_code(value: np.float32, compat: str) -> int:
    if compat == CPU:
        return FP4_ORDER[nearest(value, FP4_BOUNDARIES)]
    sign = 8 if value < 0 else 0
    return next((code for threshold, code in FP4_CUDA if abs(value) > f32(threshold)), 0) + sign


def table_index(value: np.float32, fused: bool = True) -> int:
    """Where the CPU's table of 65536 bins is read for a value of [-1, 1]; `fused`: one rounding less."""
    half = (value + f32(1)) * f32(0.5)
    return int(f32(np.float64(half) * 65535 + 0.5) if fused else half * f32(65535) + f32(0.5))


def dynamic_code(value: np.float32, compat: str, levels: np.ndarray) -> int:
    boundaries = (levels[:-1] + levels[1:]) / f32(2)
    if np.isnan(value):  # a block of zeros
        return 0
    if compat == CUDA:
        return bisection(value, levels)
    return nearest(f32(-1) + f32(2) * f32(table_index(value)) / f32(65535), boundaries)


def bisection(value: np.float32, levels: np.ndarray) -> int:
    """dQuantize of csrc/kernels.cu: it ends on an even code, and leaves it for a neighbour that is nearer."""
    code, low, high = 127, 0, 255
    for step in (64, 32, 16, 8, 4, 2, 1):
        if value > levels[code]:
            low, code = code, code + step
        else:
            high, code = code, code - step
    if value > levels[code]:
        return high if value > (levels[high] + levels[code]) * f32(0.5) else code
    return low if value < (levels[low] + levels[code]) * f32(0.5) else code


FOUR_BITS = {"nf4": (NF4, nf4_code), "fp4": (FP4, fp4_code)}

# ---- encoding and decoding -------------------------------------------------------------------------------------------


def encode(name: str, config: dict) -> Compute:
    compat, block = config["compat"], config["block"]
    code_of = FOUR_BITS[name][1]

    def compute(t: Tensors) -> Tensors:
        values = t["weight"].numpy().astype(f32).reshape(-1)
        scaled, absmax = scaled_blocks(values, block, compat, four_bits=True)
        if len(scaled) % 2:  # the unused half is the code of 0 times the last block's factor
            scaled = np.append(scaled, f32(np.nan if np.isnan(scaled[-1]) else 0))
        codes = [code_of(v, compat) for v in scaled]
        packed = np.uint8([codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2)])
        answer = {"packed": torch.from_numpy(packed)}
        if not config["double_quant"]:
            return answer | {"absmax": torch.from_numpy(absmax)}
        offset = f32(absmax.astype(np.float64).mean())
        nested = {"compat": compat, "block": NESTED_BLOCK}
        inner = encode_dynamic(nested)(
            {"weight": torch.from_numpy(absmax - offset), "map": torch.from_numpy(NESTED_MAP)}
        )
        return answer | {
            "offset": torch.tensor(offset),
            "nested_absmax": inner["absmax"],
            "nested_codes": inner["codes"],
        }

    return compute


def encode_dynamic(config: dict) -> Compute:
    def compute(t: Tensors) -> Tensors:
        weight, levels = t["weight"].numpy().astype(f32), t["map"].numpy().astype(f32)
        scaled, absmax = scaled_blocks(weight.reshape(-1), config["block"], config["compat"], four_bits=False)
        codes = np.uint8([dynamic_code(v, config["compat"], levels) for v in scaled])
        return {"codes": torch.from_numpy(codes.reshape(weight.shape)), "absmax": torch.from_numpy(absmax)}

    return compute


# ---- the witness -----------------------------------------------------------------------------------------------------


def bnb_encode(name: str, config: dict) -> Compute:
    def compute(t: Tensors) -> Tensors:
        with default_dtype(torch.float32), warnings.catch_warnings():
            packed, state = bnb.quantize_4bit(
                t["weight"].float(),
                quant_type=name,
                blocksize=config["block"],
                compress_statistics=config["double_quant"],
            )
        answer = {"packed": packed.reshape(-1)}
        if not config["double_quant"]:
            return answer | {"absmax": state.absmax}
        nested = {"nested_absmax": state.state2.absmax, "nested_codes": state.absmax}
        return answer | {"offset": state.offset} | nested

    return compute


def bnb_encode_dynamic(config: dict) -> Compute:
    def compute(t: Tensors) -> Tensors:
        codes, state = bnb.quantize_blockwise(t["weight"].float(), t["map"].float(), blocksize=config["block"])
        return {"codes": codes, "absmax": state.absmax}

    return compute


# ---- weights ---------------------------------------------------------------------------------------------------------


def divided_tail(boundaries: np.ndarray) -> np.ndarray:
    """64 values and 22 more, of which six take another code when they are divided by absmax than when they are
    multiplied by 1 / absmax."""
    draw = Draw("nf4-bnb_cpu-encode-division")
    while True:
        top = np.abs(draw.normal(1)[0]) + f32(1)
        near = np.concatenate(
            [f32([np.nextafter(b * top, f32(s)) for s in (-9, 9)]) for b in boundaries] + [boundaries * top]
        )
        differs = np.searchsorted(boundaries, near / top) != np.searchsorted(boundaries, near * (f32(1) / top))
        if differs.sum() >= 6:
            return np.concatenate([draw.normal(64), near[differs][:6], draw.normal(15, scale=0.2), f32([top])])


def with_exact_mean(zero: int | None = None) -> np.ndarray:
    """A weight (16, 64) whose largest magnitudes are multiples of 2^-10 and have a mean that is the same in every order
    of summation. Some are the mean itself, or near it. Block `zero` is all zeros.
    """
    distances = np.int32([0, 1, -1, 0, 3, -3, 7, -7, 15, -15, 60, -60, 250, -250, 640, -640])
    tops = f32(640 + Draw("with_exact_mean-order").generator.permutation(distances)) / f32(1024)
    if zero is not None:
        tops[[zero, list(tops).index(0)]] = tops[[list(tops).index(0), zero]]
    weight = Draw("with_exact_mean").uniform(16, 64, low=-0.9, high=0.9)
    weight[:, 7] = 1
    return weight * tops[:, None]


def with_mean_off() -> np.ndarray:
    """A weight (4, 64) whose largest magnitudes have another mean in float32 than in float64, in whatever order they
    are added up. No code of theirs hangs on it.
    """
    draw = Draw("with_mean_off")
    while True:
        tops = draw.uniform(4, low=0.05, high=0.1)
        mean = f32(tops.astype(np.float64).mean())
        means = {total / f32(4) for total in totals(list(tops))}
        if mean not in means and all(safe(tops - m, NESTED_BOUNDARIES, NESTED_BLOCK) for m in (mean, *means)):
            break
    weight = draw.uniform(4, 64, low=-0.9, high=0.9)
    weight[:, 7] = 1
    return weight * tops[:, None]


def totals(values: list[np.float32]) -> set[np.float32]:
    """The sum in float32, in every order."""
    if len(values) == 1:
        return set(values)
    places = range(len(values))
    parts = [set(part) for size in range(1, len(values)) for part in combinations(places, size)]
    return {
        a + b
        for part in parts
        for a in totals([values[i] for i in part])
        for b in totals([values[i] for i in places if i not in part])
    }


def beside(boundaries: np.ndarray) -> np.ndarray:
    """Every boundary with its two neighbours, both zeros, the smallest normal numbers, and 1: absmax is 1."""
    around = [np.nextafter(boundaries, f32(-2)), boundaries, np.nextafter(boundaries, f32(2))]
    tiny = np.finfo(f32).tiny
    values = np.concatenate([*around, -boundaries, f32([0.0, -0.0, tiny, -tiny, 1.0])])
    return np.concatenate([values, np.zeros(-len(values) % 64, f32)]).reshape(-1, 64)


def uneven(count: int, name: str) -> np.ndarray:
    """Normal values, some exactly 0, none of which hangs on a fused multiplication in the table's index."""
    draw = Draw(name)
    values = draw.normal(count)
    values[::17] = 0
    for at in range(0, count, 256):
        part = values[at : at + 256]
        inverse = f32(1) / np.abs(part).max()
        part[[table_index(v * inverse) != table_index(v * inverse, fused=False) for v in part]] = 0.25
    return values


# ---- cases -----------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    zero_tail = np.concatenate([Draw("nf4-zero-tail").normal(64), np.zeros(64 + 11, f32)])
    odd_zeros = np.concatenate(
        [Draw("nf4-odd-zeros").normal(64), np.zeros(64, f32), Draw("nf4-odd-zeros-2").normal(64), np.zeros(5, f32)]
    )
    around_boundaries = np.concatenate([beside(NF4_BOUNDARIES[:8]), beside(NF4_BOUNDARIES[8:])])
    thresholds = f32([threshold for threshold, _ in FP4_CUDA])
    halves = FP4_BOUNDARIES[FP4_BOUNDARIES > 0]
    rows = [  # format, compat, variant, weight, double, flags, comment
        (
            "nf4", CPU, "division", divided_tail(NF4_BOUNDARIES), False, "DividedTail",
            "a short last block is divided by absmax, whole blocks are multiplied by 1 / absmax",
        ),
        (
            "nf4", CPU, "zero-tail", zero_tail, False, "StoredClamp ZeroBlock",
            "absmax is kept from falling below 1e-38; a short last block of zeros stores that, a whole one stores 0",
        ),
        (
            "nf4", CPU, "nested", with_exact_mean(), True, "CoarseTable DoubleQuantization",
            "nested codes come from a table of 65536 bins, not always the nearest; the mean is exact in any order",
        ),
        (
            "nf4", CUDA, "zero-block", odd_zeros, False, "ZeroBlock OddCount",
            "a block of zeros has code 0, as 0 times infinity is NaN and above no boundary; so has the spare half byte",
        ),
        (
            "nf4", CUDA, "nested", with_exact_mean(zero=5), True, "ZeroBlock DoubleQuantization",
            "a block of zeros has code 0; nested codes are the nearest; the mean is exact in any order",
        ),
        (
            "nf4", CUDA, "boundaries", around_boundaries, False, "Nf4Literals",
            "four boundaries are a float32 neighbour of the midpoint: their decimals are rounded to float32 only once",
        ),
        (
            "fp4", CPU, "boundaries", beside(halves), False, "Fp4Thresholds Fp4ZeroSign",
            "midpoints in float32; 0 and everything down to the midpoint of -0.0052 and 0 has code 0, tiny positive "
            "values have code 8",
        ),
        (
            "fp4", CUDA, "boundaries", beside(np.concatenate([halves, thresholds])), False, "Fp4Thresholds Fp4ZeroSign",
            "cut-off decimals for midpoints; the sign bit is set where x < 0, also where the magnitude's code is 0",
        ),
        ("fp4", CUDA, "zero-block", odd_zeros, False, "ZeroBlock", "a block of zeros has code 0, the spare half too"),
    ]  # fmt: skip
    for name, compat, variant, weight, double, flags, comment in rows:
        config = {"block": 64, "double_quant": double} | ({"nested_block": NESTED_BLOCK} if double else {})
        yield encoding(name, compat, variant, weight, config, flags, comment)
    yield from dynamic_cases()
    yield from by_the_rules(zero_tail)


def encoding(name: str, compat: str, variant: str, weight: np.ndarray, config: dict, flags: str, comment: str) -> Case:
    config |= {"compat": compat}
    maps = {"codebook": FOUR_BITS[name][0]} | ({"nested_map": NESTED_MAP} if config["double_quant"] else {})
    compute = encode(name, config)
    return Case(
        id=f"{name}-{compat.replace('-', '_')}-encode-{variant}",
        kind="quantizer",
        name=name,
        at="encode",
        level="interop",
        flags=tuple(flags.split()),
        comment=f"{VERSION}{' on CUDA' if compat == CUDA else ' on CPUs'}: {comment}",
        spec="golden/README.md, What bitsandbytes does otherwise",
        config=config,
        inputs={"weight": weight} | maps,
        compute=compute,
        **checked(compat, bnb_encode(name, config)),
        limits=dict.fromkeys(compute({"weight": torch.from_numpy(weight)}), "exact"),
    )


def by_the_rules(zero_tail: np.ndarray) -> Iterator[Case]:
    """What bitsandbytes on CPUs does otherwise, and what this suite has for it."""
    rows = [  # variant, level, weight, nested, flags, comment
        (
            "zero-tail", "must", zero_tail, False, "StoredClamp ZeroBlock ShortBlock",
            "a short last block of zeros: absmax 0, as of a whole one",
        ),
        (
            "multiplied-tail", "may", divided_tail(NF4_BOUNDARIES), False, "DividedTail",
            "weights of a short last block that have another code where they are divided by absmax: here they are "
            "multiplied by 1 / absmax, as those of whole blocks; dividing all of them is as good",
        ),
        (
            "nearest", "must", with_exact_mean(), True, "CoarseTable DoubleQuantization",
            "absmax - offset is 0, or small beside the largest: the nearest level; the mean is exact in any order",
        ),
        (
            "mean", "may", with_mean_off(), True, "OffsetMean DoubleQuantization",
            "of the float32 sum in any order, a quarter is the next float32 number; no nested code hangs on it",
        ),
    ]  # fmt: skip
    for variant, level, weight, double, flags, comment in rows:
        maps = {"codebook": NF4} | ({"nested_map": NESTED_MAP} if double else {})

        def compute(t: Tensors, double: bool = double) -> Tensors:
            return encode_by_the_rules(t, double)

        yield Case(
            id=f"nf4-{'double-' if double else ''}encode-{variant}",
            kind="quantizer",
            name="nf4",
            at="encode",
            level=level,
            flags=tuple(flags.split()),
            comment=comment,
            spec="arXiv:2305.14314, section 3; golden/README.md, NF4, FP4 and the 8-bit map",
            config={"block": 64, "double_quant": double} | ({"nested_block": NESTED_BLOCK} if double else {}),
            inputs={"weight": weight} | maps,
            compute=compute,
            oracle="scalar float32",
            limits=dict.fromkeys(compute({"weight": torch.from_numpy(weight)}), "exact"),
        )


def checked(compat: str, witness: Compute) -> dict:
    """What computed a case, and who agrees."""
    if compat == CUDA:
        return {"oracle": f"scalar float32; {VERSION} on an H200 gave the same"}
    return {"oracle": "scalar float32", "witnesses": {VERSION: witness}}


def dynamic_cases() -> Iterator[Case]:
    values = uneven(600, "dynamic8-bnb_cpu")
    zeros = uneven(600, "dynamic8-bnb_cuda")
    zeros[256:512] = 0
    middles = np.append(NESTED_BOUNDARIES, f32(1))
    zero = "a block of zeros has code 0 and absmax 0"
    rows = [  # compat, variant, weight, flags, comment
        (CPU, "coarse", values, "CoarseTable", "codes come from a table of 65536 bins: 0 has code 131, which is not 0"),
        (CPU, "zero-block", zeros, "CoarseTable ZeroBlock", zero),
        (CUDA, "zero-block", zeros, "ZeroBlock", f"{zero}; other codes are the nearest"),
        (CUDA, "ties", middles, "DynamicMap", "values on the middle of two levels take the even code"),
    ]
    for compat, variant, weight, flags, comment in rows:
        config = {"block": 256, "compat": compat}
        yield Case(
            id=f"dynamic8-{compat.replace('-', '_')}-encode-{variant}",
            kind="quantizer",
            name="dynamic8",
            at="encode",
            level="interop",
            flags=tuple(flags.split()),
            comment=f"{VERSION}{' on CUDA' if compat == CUDA else ' on CPUs'}: {comment}",
            spec="golden/README.md, What bitsandbytes does otherwise",
            config=config,
            inputs={"weight": weight.reshape(2, -1), "map": NESTED_MAP},
            compute=encode_dynamic(config),
            **checked(compat, bnb_encode_dynamic(config)),
            limits={"codes": "exact", "absmax": "exact"},
        )
