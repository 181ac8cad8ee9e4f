"""NVFP4: its three levels of scale, the layout of ModelOpt, and what holds for any weight."""

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
QUANTIZER = make_quantizer("nvfp4")


def round_trip(weight):
    parts = QUANTIZER.pack(weight)
    return parts, QUANTIZER.dense(parts, weight.shape, F4)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def by_ml_dtypes(weight):
    """(weight, weight_scale, weight_scale_2, values) as the definition says, with the casts of ml_dtypes."""
    blocks = weight.reshape(len(weight), -1, 16)
    over_all = abs(weight).max() / np.float32(6 * 448)
    scales = (abs(blocks).max(axis=2) / (6 * over_all)).astype(ml_dtypes.float8_e4m3fn)
    step = (scales.astype("f4") * over_all)[..., None]
    codes = np.clip(blocks / step, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    nibbles = codes.view("u1").reshape(len(weight), -1)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return packed, scales.view("u1"), over_all, (codes.astype("f4") * step).reshape(weight.shape)


@pytest.mark.parametrize("scale", [1e-20, 0.02, 1e20])
def test_parts_and_values_are_those_of_the_definition(scale):
    weight = normal(40, 96, scale=scale)
    parts, back = round_trip(weight)
    packed, scales, over_all, values = by_ml_dtypes(weight)
    assert np.array_equal(parts["weight"], packed) and np.array_equal(parts["weight_scale"], scales)
    assert parts["weight_scale_2"] == over_all and np.array_equal(back, values)


def test_the_layout_is_that_of_modelopt():
    parts, _ = round_trip(normal(6, 64))
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == {
        "weight": ((6, 32), "u1"),
        "weight_scale": ((6, 4), "u1"),
        "weight_scale_2": ((), "f4"),
    }


def test_the_largest_weight_comes_back_and_signs_are_kept():
    weight = np.array([[-6, 3, 0.5, -1, 2]], "f4")
    parts, back = round_trip(weight)
    assert parts["weight_scale"].tolist() == [[0x7E]]  # 448
    assert back == pytest.approx(weight, rel=1e-6)


def test_zeros_are_zeros_and_blocks_too_small_for_a_scale_have_the_smallest():
    weight = normal(2, 64)
    weight[0, :16], weight[1, 16:32] = 0, 1e-9
    for one in (weight, np.zeros_like(weight)):
        parts, back = round_trip(one)
        assert parts["weight_scale"][0, 0] == 1 and np.isfinite(back).all() and (back[one == 0] == 0).all()
    assert (round_trip(weight)[1][1, 16:32] == 0).all()


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple) | st.tuples(st.integers(1, 3), st.just(150))


@given(SHAPES, st.sampled_from([1e-30, 0.02, 1e38]), st.integers(0, 99))
def test_any_weight_comes_back_within_a_fifth_of_its_blocks_largest(shape, scale, seed):
    """Half the gap from 4 to 6 is a sixth of the largest; the block's scale adds the rounding of E4M3."""
    weight = np.random.default_rng(seed).uniform(-1, 1, shape).astype("f4") * np.float32(scale)
    back = round_trip(weight)[1]
    largest = np.repeat(abs(rowwise.blocks_of(weight, 16)).max(axis=2), 16, axis=1)[:, : shape[-1]].reshape(shape)
    smallest = abs(weight).max() * np.float32(2**-9 / 448)  # the step of the smallest scale
    assert back.shape == shape and (abs(back - weight) <= largest / 5 + smallest).all()


@given(SHAPES, st.integers(0, 99))
def test_packing_again_changes_no_code(shape, seed):
    once, back = round_trip(normal(*shape, seed=seed))
    twice, _ = round_trip(back)
    assert np.array_equal(once["weight"], twice["weight"])


def test_a_file_may_have_scales_that_are_not_made_here():
    parts = QUANTIZER.pack(np.ones((1, 48), "f4"))
    scales = np.array([[0x7F, 0xFF, parts["weight_scale"][0, 2] | 0x80]], "u1")  # NaN, NaN, less than 0
    back = QUANTIZER.dense(parts | {"weight_scale": scales}, (1, 48), F4)
    assert np.isnan(back[0, :32]).all() and np.array_equal(back[0, 32:], -np.ones(16, "f4"))


def test_the_device_makes_the_same_bits(monkeypatch):
    weight = normal(5, 150)
    here, back = round_trip(weight)
    xp = device.install(monkeypatch)
    with device.capture():
        there = QUANTIZER.pack(xp.asarray(weight))
        again = QUANTIZER.dense(there, weight.shape, F4)
    assert all(np.array_equal(to_host(there[name]), part) for name, part in here.items())
    assert np.array_equal(to_host(again), back)
