"""MXFP4: E2M1 and its packing, the scale of the OCP, and what holds for any weight."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import rowwise
from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.quant import make_quantizer

F4 = np.dtype("f4")
QUANTIZER = make_quantizer("mxfp4")


def round_trip(weight):
    parts = QUANTIZER.pack(weight)
    return parts, QUANTIZER.dense(parts, weight.shape, F4)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def test_a_tie_between_two_e2m1_takes_the_even_code():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], "f4")
    assert rowwise.magnitudes(rowwise.E2M1)[rowwise.round_to(rowwise.E2M1, ties)].tolist() == [0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("kind, largest", [(rowwise.E2M1, 6), (rowwise.E4M3, 448)])
def test_small_floats_are_those_of_ml_dtypes(kind, largest):
    levels = rowwise.magnitudes(kind)
    near = np.concatenate(
        [np.nextafter(x, np.float32(to)) for x in (levels, (levels[1:] + levels[:-1]) / 2) for to in (0, 9e9)]
    )
    values = np.concatenate([near, abs(normal(5000, scale=largest / 3))])
    values = values[values <= largest]
    assert levels[-1] == largest
    assert np.array_equal(rowwise.round_to(kind, values), values.astype(kind).view("u1"))
    assert rowwise.round_to(kind, np.array([largest * 1.5, 3e38], "f4")).tolist() == [len(levels) - 1] * 2


def test_codes_of_a_pair_lie_low_half_first_and_bit_3_is_the_sign():
    values = np.array([[1, -6, -0.5, 3], [-0.0, 0, 4, 2]], "f4")
    packed = rowwise.encode_e2m1(values)
    assert packed.tolist() == [[0xF2, 0x59], [0x08, 0x46]]
    back = np.empty_like(values)
    rowwise.decode_e2m1(packed, back)
    assert np.array_equal(back, values) and np.signbit(back[1, 0])


def test_every_byte_decodes_to_two_values_of_ml_dtypes():
    packed, values = np.arange(256, dtype="u1"), np.empty(512, "f4")
    rowwise.decode_e2m1(packed, values)
    pairs = np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1)
    assert np.array_equal(values, pairs.view(ml_dtypes.float4_e2m1fn).astype("f4"))


@pytest.mark.parametrize(
    "largest, exponent", [(4, 0), (7.99, 0), (8, 1), (1, -2), (0.02, -8), (1e-38, -127), (3e38, 125)]
)
def test_the_scale_is_a_power_of_two_two_below_the_largest(largest, exponent):
    parts, back = round_trip(np.array([largest] + [0] * 31, "f4"))
    assert parts["scales"].tolist() == [exponent + 127]
    assert abs(back[0] - largest) <= largest / 4 and (back[1:] == 0).all()


def test_what_is_above_six_scales_saturates():
    assert round_trip(np.array([7.9, -7.9, 4], "f4"))[1].tolist() == [6, -6, 4]


def test_the_layout_is_that_of_gpt_oss():
    parts, back = round_trip(normal(3, 5, 96))
    assert parts["blocks"].shape == (3, 5, 3, 16) and parts["scales"].shape == (3, 5, 3)
    assert back.shape == (3, 5, 96)


def test_zeros_are_zeros():
    weight = normal(2, 64)
    weight[0, :32] = 0
    for one in (weight, np.zeros_like(weight)):
        parts, back = round_trip(one)
        assert parts["scales"][0, 0] == 0 and np.isfinite(back).all() and (back[one == 0] == 0).all()


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple) | st.tuples(st.integers(1, 3), st.just(150))


@given(SHAPES, st.sampled_from([1e-36, 0.02, 1e38]), st.integers(0, 99))
def test_any_weight_comes_back_within_a_quarter_of_its_blocks_largest(shape, scale, seed):
    weight = np.random.default_rng(seed).uniform(-1, 1, shape).astype("f4") * np.float32(scale)
    back = round_trip(weight)[1]
    largest = np.repeat(abs(rowwise.blocks_of(weight, 32)).max(axis=2), 32, axis=1)[:, : shape[-1]].reshape(shape)
    assert back.shape == shape and (abs(back - weight) <= largest / 4).all()


@given(SHAPES, st.integers(0, 99))
def test_packing_again_changes_nothing(shape, seed):
    once, back = round_trip(normal(*shape, seed=seed))
    twice, again = round_trip(back)
    assert all(np.array_equal(once[name], twice[name]) for name in once) and np.array_equal(back, again)


def test_the_device_makes_the_same_bits(monkeypatch):
    weight = normal(5, 150)
    here, back = round_trip(weight)
    xp = device.install(monkeypatch)
    with device.capture():
        there = QUANTIZER.pack(xp.asarray(weight))
        again = QUANTIZER.dense(there, weight.shape, F4)
    assert all(np.array_equal(to_host(there[name]), part) for name, part in here.items())
    assert np.array_equal(to_host(again), back)


# ---- the peer --------------------------------------------------------------------------------------------------------


def test_scales_are_those_of_the_gguf_package_and_values_differ_in_ties_alone():
    """It has the same scales and the nearest level, but splits a block in halves and gives a tie to the lower level."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.MXFP4
    weight = normal(64, 256)
    parts, back = round_trip(weight)
    theirs = gguf.quants.quantize(weight, kind)
    assert np.array_equal(parts["scales"], theirs.reshape(64, 8, 17)[:, :, 0])
    assert np.array_equal(back, gguf.quants.dequantize(theirs, kind))
