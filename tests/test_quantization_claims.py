"""What papers and documentation claim of quantizers, measured here; the reports behind it are in the docstrings."""

import numpy as np
import pytest
from variants import has_constants

from refpeft import manager
from refpeft.quant import Quantizer, make_quantizer

F4 = np.dtype("f4")
QUANTIZERS = [name for name, listing in manager.catalogue().items() if listing.kind == "quantizer"]
VARIANTS = [(name, {}) for name in QUANTIZERS] + [
    ("affine", {"bits": 8}),
    ("affine", {"per": "row"}),
    ("affine", {"nested": True}),
    ("gguf", {"type": "Q4_0"}),
    ("gguf", {"type": "Q4_1"}),
]


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def relative_error(name: str, weight: np.ndarray, **options) -> float:
    back = make_quantizer(name, options)(weight, F4)()
    return float(np.linalg.norm(back - weight) / np.linalg.norm(weight))


def codes(parts: dict) -> dict:
    """What says which level a weight has, and not how the constants are kept."""
    return {name: part for name, part in parts.items() if part.dtype != F4 and "." not in name}


# ---- QLoRA, arXiv:2305.14314 -----------------------------------------------------------------------------------------


def test_double_quantization_takes_constants_from_0_5_to_0_127_bits_a_parameter():
    """Section 3: 32 / 64 = 0.5 bits become 8 / 64 + 32 / (64 * 256) = 0.126953, besides one number for each tensor."""
    weight = normal(1024, 1024)
    bits = {}
    for double_quant in (False, True):
        parts = make_quantizer("nf4", {}, double_quant).pack(weight)
        assert parts.pop("packed").nbytes * 8 / weight.size == 4
        bits[double_quant] = sum(part.nbytes for part in parts.values() if part.ndim) * 8 / weight.size
    assert bits == {False: 0.5, True: 0.126953125}


def test_double_quantization_costs_next_to_nothing():
    weight = normal(512, 1024)
    single, double = (make_quantizer("nf4", {}, on)(weight, F4)() for on in (False, True))
    lost = [np.linalg.norm(back - weight) / np.linalg.norm(weight) for back in (single, double)]
    assert lost[0] < lost[1] < lost[0] * 1.001


def test_nf4_is_closer_to_normal_weights_than_bitsandbytes_fp4_and_symmetric_int4():
    """0.092 against 0.122 and 0.108. OCP's E2M1 is better than bitsandbytes' FP4, which lacks its level 1/12."""
    weight = normal(512, 1024)
    error = {name: relative_error(name, weight) for name in ("nf4", "fp4", "int4")}
    assert error == pytest.approx({"nf4": 0.0919, "fp4": 0.1219, "int4": 0.1077}, abs=5e-4)


def test_the_order_is_another_for_uniform_weights():
    weight = np.random.default_rng(0).uniform(-1, 1, (512, 1024)).astype("f4")
    assert relative_error("int4", weight) < 0.8 * relative_error("nf4", weight)


# ---- quantizing twice ------------------------------------------------------------------------------------------------


def drifts(quantizer: Quantizer, weight: np.ndarray) -> bool:
    """Whether the codes change when what was dequantized is quantized again."""
    once = quantizer.pack(weight)
    twice = quantizer.pack(quantizer.dense(once, weight.shape, F4))
    return any(not np.array_equal(part, codes(twice)[name]) for name, part in codes(once).items())


NO_FIXED_POINTS = ("dynamic8", "nf4_normal")
FIXED_POINTS = [v for v in VARIANTS if v[0] not in NO_FIXED_POINTS]
TWICE = [(*v, True) for v in FIXED_POINTS if has_constants(*v)]


@pytest.mark.parametrize("name, options, double_quant", [(*v, False) for v in FIXED_POINTS] + TWICE, ids=str)
def test_quantizing_twice_changes_no_code(name, options, double_quant):
    quantizer = make_quantizer(name, options, double_quant)
    assert not any(drifts(quantizer, normal(64, 256, seed=seed)) for seed in range(4))


def test_the_8_bit_map_has_no_minus_one_and_mean_and_deviation_no_tails_so_these_two_drift():
    """A block whose largest magnitude is negative comes back at 0.993 of it and has another absmax. What lies beyond
    the outermost normal quantile is cut off, and the deviation of what is left is smaller."""
    weight = normal(64, 256)
    assert all(drifts(make_quantizer(name), weight) for name in NO_FIXED_POINTS)
    blocks = weight.reshape(-1, 256)
    positive = blocks * np.sign(blocks[np.arange(64), abs(blocks).argmax(axis=1)])[:, None]
    assert not drifts(make_quantizer("dynamic8"), positive)


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delta_std, requantized, in_bfloat16",
    [(1e-4, 1.12, 0.32), (5e-4, 1.08, 0.066), (1e-3, 1.03, 0.033), (5e-3, 0.375, 0.007)],
)
def test_merging_a_typical_delta_into_nf4_loses_it(delta_std, requantized, in_bfloat16):
    """|what is left of D - D| / |D| for weights of deviation 0.02: dequantized weights lie on levels, and what is less
    than half of the way to the next one is rounded back (huggingface/transformers#31293, ml-explore/mlx-lm#1172)."""
    from refpeft.backend import bfloat16

    rng, quantizer = np.random.default_rng(0), make_quantizer("nf4")
    base = quantizer(normal(512, 512), F4)()
    delta = (rng.normal(size=(512, 16)) @ rng.normal(size=(16, 512))).astype("f4")
    delta *= np.float32(delta_std) / delta.std()
    merged = base + delta

    def lost(now: np.ndarray) -> float:
        return float(np.linalg.norm(now - merged) / np.linalg.norm(delta))

    assert lost(quantizer(merged, F4)()) == pytest.approx(requantized, rel=0.05)
    assert lost(merged.astype(bfloat16).astype("f4")) == pytest.approx(in_bfloat16, rel=0.1)
