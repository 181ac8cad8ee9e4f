"""Q4_0, Q4_1 and Q8_0: byte for byte what the gguf package makes, and what holds for any weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.quant import make_quantizer

TYPES = ("Q4_0", "Q4_1", "Q8_0")
F4 = np.dtype("f4")


def round_trip(weight, type):
    quantizer = make_quantizer("gguf", {"type": type})
    parts = quantizer.pack(weight)
    return parts["blocks"], quantizer.dense(parts, weight.shape, F4)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def block(*first):
    """One block that begins with these weights; the rest are 0."""
    return np.array([*first, *[0] * (32 - len(first))], "f4")


def test_q8_0_rounds_ties_away_from_zero():
    blocks, back = round_trip(block(127, 0.5, -0.5, 1.5, 2.5, np.float32(0.49999997)), "Q8_0")
    assert blocks[0, :2].view("f2") == 1 and blocks.shape == (1, 34)
    assert blocks[0, 2:8].view("i1").tolist() == [127, 1, -1, 2, 3, 0]
    assert back[:6].tolist() == [127, 1, -1, 2, 3, 0]


def test_q4_0_gives_the_largest_weight_the_code_0_and_its_negative_loses_an_eighth():
    blocks, back = round_trip(block(-8, 8, 3, -2), "Q4_0")
    assert blocks[0, :2].view("f2") == 1 and blocks.shape == (1, 18)
    assert (blocks[0, 2:6] & 15).tolist() == [0, 15, 11, 6] and back[:4].tolist() == [-8, 7, 3, -2]
    assert round_trip(block(8, -8), "Q4_0")[1][:2].tolist() == [8, -7]  # of two largest the first


def test_q4_1_has_a_least_weight_and_15_steps():
    blocks, back = round_trip(block(-5, 10, 0.4), "Q4_1")
    assert blocks[0, :4].view("f2").tolist() == [1, -5] and blocks.shape == (1, 20)
    assert back[:4].tolist() == [-5, 10, 0, 0]


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1"])
def test_byte_i_holds_weight_i_in_its_low_half_and_weight_i_plus_16_in_its_high_half(type):
    weight = block(-1, 0.9)
    before = round_trip(weight, type)[0]
    for i in (3, 19):
        changed = (round_trip(weight + 0.8 * np.eye(32, dtype="f4")[i], type)[0] ^ before)[0]
        assert changed.nonzero()[0].tolist() == [before.size - 16 + 3]
        assert changed.max() < 16 if i == 3 else changed.max() >= 16


@pytest.mark.parametrize("type", TYPES)
def test_zeros_are_zeros(type):
    weight = normal(2, 64)
    weight[0, :32] = 0
    for one in (weight, np.zeros_like(weight), np.full_like(weight, 1e-40)):
        back = round_trip(one, type)[1]
        assert np.isfinite(back).all() and (back[one == 0] == 0).all()


@pytest.mark.parametrize("type", TYPES)
def test_a_scale_beyond_float16_is_the_largest_float16(type):
    assert np.isfinite(round_trip(normal(4, 64, scale=1e8), type)[1]).all()


@pytest.mark.parametrize("type", TYPES)
def test_rows_of_broken_blocks_are_refused(type):
    with pytest.raises(RefpeftError, match=r"layers.0: rows of 40 \(shape \(3, 40\)\) are no multiple of .* 32: take"):
        make_quantizer("gguf", {"type": type})(normal(3, 40), F4, "layers.0")


@given(
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(1, 4),
    st.sampled_from([0.1, 1.0, 1e3]),
    st.sampled_from(TYPES),
    st.integers(0, 99),
)
def test_any_rows_of_whole_blocks_come_back_within_a_step(outer, blocks, scale, type, seed):
    shape = (*outer, 32 * blocks)
    weight = np.random.default_rng(seed).uniform(-1, 1, shape).astype("f4") * np.float32(scale)
    packed, back = round_trip(weight, type)
    assert packed.shape == (weight.size // shape[-1], blocks * {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[type])
    largest = abs(weight).max()
    step = {"Q4_0": largest / 8, "Q4_1": largest / 15, "Q8_0": largest / 254}[type]
    assert back.shape == shape and (abs(back - weight) <= step + largest * 2**-10).all()  # float16 constants


@given(st.sampled_from(TYPES), st.integers(0, 99))
def test_packing_again_changes_nothing(type, seed):
    once, back = round_trip(normal(8, 128, seed=seed), type)
    twice, again = round_trip(back, type)
    assert np.array_equal(once, twice) and np.array_equal(back, again)


@pytest.mark.parametrize("type", TYPES)
def test_the_device_makes_the_same_bits(monkeypatch, type):
    quantizer, weight = make_quantizer("gguf", {"type": type}), normal(5, 96)
    here, back = round_trip(weight, type)
    xp = device.install(monkeypatch)
    with device.capture():
        there = quantizer.pack(xp.asarray(weight))
        again = quantizer.dense(there, weight.shape, F4)
    assert np.array_equal(to_host(there["blocks"]), here) and np.array_equal(to_host(again), back)


# ---- the peer --------------------------------------------------------------------------------------------------------


WEIGHTS = {
    "normal": normal(64, 256),
    "one row": normal(96),
    "three dimensions": normal(3, 4, 64),
    "few values, many ties": np.random.default_rng(1).integers(-4, 5, (50, 64)).astype("f4") / 8,
    "uniform": np.random.default_rng(2).uniform(-1, 1, (50, 64)).astype("f4"),
    "all positive": abs(normal(20, 64)),
    "outliers": normal(64, 64) * np.where(np.random.default_rng(3).random((64, 64)) < 0.01, 500, 1).astype("f4"),
    "subnormal scales": normal(64, 64, scale=1e-6),
    "scales of 0": normal(64, 64, scale=1e-12),
    "zero blocks": normal(6, 64) * np.array([[0], [1], [1], [0], [1], [1]], "f4"),
}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_bytes_and_values_are_those_of_the_gguf_package(name, type):
    gguf = pytest.importorskip("gguf")
    kind, weight = gguf.GGMLQuantizationType[type], WEIGHTS[name]
    blocks, back = round_trip(weight, type)
    theirs = gguf.quants.quantize(weight, kind)
    assert np.array_equal(blocks.reshape(theirs.shape), theirs)
    assert np.array_equal(back, gguf.quants.dequantize(theirs, kind))
