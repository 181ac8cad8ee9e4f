"""bitsandbytes' rules where they are others, against its code written out for one value at a time."""

from fractions import Fraction

import numpy as np
import pytest

from refpeft import blockwise, compat, manager
from refpeft.errors import RefpeftError
from refpeft.quant import make_quantizer

FP4 = manager.load("fp4").book(np).levels
MAPS = [blockwise.dynamic_map(), blockwise.dynamic_map(signed=False)]
F4 = np.dtype("f4")


def around(values):
    """The values and their neighbours in float32."""
    return np.concatenate([values, *(np.nextafter(values, np.float32(to)) for to in (2, -2))]).astype("f4")


def codes_of(book, scaled):
    return book.codes[np.searchsorted(book.bounds, scaled)].tolist()


def fp4_on_cuda(x):
    if abs(x) < np.finfo("f4").tiny:
        return 0
    sign, x = (8 if x < 0 else 0), abs(x)
    if x > np.float32(0.29166667):
        if x > np.float32(0.583333):
            return sign + (3 if x > np.float32(0.8333333) else 2)
        return sign + (5 if x > np.float32(0.4166667) else 4)
    if x > np.float32(0.0859375):
        return sign + (7 if x > np.float32(0.20833333) else 6)
    return sign + (1 if x > np.float32(0.00260417) else 0)


def bisected(levels, x):
    """The code that 8 bits have on CUDA."""
    pivot, upper, lower, step = 127, 255, 0, 64
    while step:
        if x > levels[pivot]:
            lower, pivot = pivot, pivot + step
        else:
            upper, pivot = pivot, pivot - step
        step //= 2
    if x > levels[pivot]:
        return upper if x > (levels[upper] + levels[pivot]) / 2 else pivot
    return lower if x < (levels[lower] + levels[pivot]) / 2 else pivot


def binned(levels, x):
    """The code that 8 bits have on a CPU, from its table of 65536 bins."""
    at = int(np.float32(np.float64((x + np.float32(1)) * np.float32(0.5)) * 65535 + 0.5))
    middle_of_bin = np.float32(-1) + np.float32(2) * np.float32(at) / np.float32(65535)
    return int(np.searchsorted((levels[1:] + levels[:-1]) / 2, middle_of_bin))


def test_nf4_on_a_gpu_has_midpoints_of_16_digits():
    literals = """-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984
    -0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668
    0.2920137718319893 0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011"""
    rounded_once = []
    for literal in literals.split():
        near = around(np.float32([literal]))
        rounded_once.append(min(near, key=lambda x: abs(Fraction(float(x)) - Fraction(literal))))
    nf4 = manager.load("nf4")
    assert np.array_equal(nf4.book(np, "bnb-cuda").bounds, rounded_once)
    assert (nf4.book(np, "bnb-cuda").bounds != nf4.book(np).bounds).sum() == 4


def test_fp4_on_a_gpu_has_cut_decimals_and_keeps_the_sign():
    book = compat.cut_decimals(FP4)
    scaled = np.concatenate((around(book.bounds), FP4, np.linspace(-1, 1, 999, dtype="f4"), np.float32([0, -0.0])))
    assert codes_of(book, scaled) == [fp4_on_cuda(x) for x in scaled]


@pytest.mark.parametrize("levels", MAPS, ids=["signed", "unsigned"])
def test_8_bits_on_a_gpu_are_bisected(levels):
    scaled = np.concatenate((around((levels[1:] + levels[:-1]) / 2), around(levels), np.float32([-1, 0, 1])))
    assert codes_of(compat.ties_to_even(levels), scaled) == [bisected(levels, x) for x in scaled]


@pytest.mark.parametrize("levels", MAPS, ids=["signed", "unsigned"])
def test_8_bits_on_a_cpu_come_from_a_table(levels):
    book = compat.binned(levels)
    bounds = np.clip(around(book.bounds), -1, 1)
    scaled = np.concatenate((bounds, levels, np.linspace(-1, 1, 4999, dtype="f4"), np.float32([0, 1e-30, -1e-30])))
    assert codes_of(book, scaled) == [binned(levels, x) for x in scaled]
    assert codes_of(book, np.float32([0])) != codes_of(blockwise.nearest(levels), np.float32([0]))


def test_fp4_on_a_cpu_calls_small_positive_values_minus_zero():
    weight = np.zeros((1, 32), "f4")
    weight[0, :4] = 1, 1e-4, -1e-4, 0
    for rules, expected in {"none": [0x30, 0x00], "bnb-cpu": [0x38, 0x00], "bnb-cuda": [0x30, 0x80]}.items():
        kept = make_quantizer("fp4", {"compat": rules, "block": 32})(weight, F4)
        assert kept.parts["packed"][:2].tolist() == expected
        assert np.array_equal(kept()[0, :4], [1, 0, 0, 0])
        assert np.signbit(kept()[0, :4]).tolist() == [False, False, rules == "bnb-cuda", False]


@pytest.mark.parametrize("name, of_zeros", [("nf4", 0x77), ("fp4", 0x00)])
def test_all_codes_of_a_block_of_zeros_are_0_on_a_gpu(name, of_zeros):
    weight = np.random.default_rng(0).standard_normal(64 + 64 + 33).astype("f4")
    weight[64:128] = 0
    weight[128:] = 0
    for rules, byte in {"none": of_zeros, "bnb-cpu": of_zeros, "bnb-cuda": 0}.items():
        parts = make_quantizer(name, {"compat": rules})(weight, F4).parts
        assert set(parts["packed"][32:].tolist()) == {byte}
        assert parts["absmax"].tolist()[1:] == [0, np.float32(1e-38) if rules == "bnb-cpu" else 0]


def test_a_block_of_zeros_on_a_gpu_is_no_longer_zero_when_its_absmax_is_quantized():
    weight = np.random.default_rng(0).normal(0, 0.02, (300, 64)).astype("f4")
    weight[5] = 0
    off = {rules: make_quantizer("nf4", {"compat": rules}, True)(weight, F4)()[5] for rules in ("none", "bnb-cuda")}
    assert not off["none"].any() and (abs(off["bnb-cuda"]) > 1e-5).all()


def test_a_short_last_block_is_divided_by_its_absmax_on_a_cpu():
    """Multiplying by the rounded reciprocal, as everywhere else, gives another code here."""
    middle = manager.load("nf4").book(np).bounds[8]
    for largest in np.linspace(0.01, 1, 4000, dtype="f4"):
        value = np.nextafter(middle * largest, np.float32(1))
        divided, multiplied = value / largest > middle, value * (1 / largest) > middle
        if divided != multiplied:
            break
    weight = np.float32([largest, value])
    low = {r: make_quantizer("nf4", {"compat": r})(weight, F4).parts["packed"][0] & 15 for r in ("none", "bnb-cpu")}
    assert low == {"none": 8 + multiplied, "bnb-cpu": 8 + divided}


def test_int8_passes_through_float16_and_refuses_what_that_cannot_hold():
    weight = np.float32([[1, 0.5 + 2**-13, -0.25], [70000, 1, 1]])
    rounded = make_quantizer("int8", {"compat": "bnb-cpu"})(weight[:1] * 4097, F4).parts["scale"]
    assert rounded.tolist() == [4096]
    with pytest.raises(RefpeftError, match="a weight is more than float16 holds"):
        make_quantizer("int8", {"compat": "bnb-cuda"})(weight, F4)


def test_double_quantization_takes_the_mean_that_torch_takes():
    weight = np.random.default_rng(3).normal(0, 0.02, (999, 640)).astype("f4")
    kept = {rules: make_quantizer("nf4", {"compat": rules}, True)(weight, F4).parts for rules in ("none", "bnb-cpu")}
    absmax = make_quantizer("nf4")(weight, F4).parts["absmax"]
    assert kept["none"]["absmax.offset"] == np.float32(absmax.astype("f8").mean())
    assert kept["bnb-cpu"]["absmax.offset"] == compat.torch_mean(absmax)
    assert abs(kept["none"]["absmax.offset"] - compat.torch_mean(absmax)) <= 2 * np.spacing(absmax.mean())
