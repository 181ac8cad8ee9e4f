"""Symmetric int4: the rules of the format, and what holds for any weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.quant import make_quantizer

F4 = np.dtype("f4")


def round_trip(weight, **options):
    quantizer = make_quantizer("int4", options)
    parts = quantizer.pack(weight)
    return parts, quantizer.dense(parts, weight.shape, F4)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def test_codes_are_sevenths_of_the_largest_magnitude_and_the_first_is_the_high_half():
    parts, back = round_trip(np.array([-7, 3, 0, 1, 7], "f4"))
    assert parts["packed"].tolist() == [1 << 4 | 11, 8 << 4 | 9, 15 << 4 | 8] and parts["scale"] == 1
    assert back.tolist() == [-7, 3, 0, 1, 7]


def test_a_tie_takes_the_even_code():
    back = round_trip(np.array([7, 0.5, 1.5, -0.5, -1.5, 2.5], "f4"))[1]
    assert back.tolist() == [7, 0, 2, 0, -2, 2]


def test_groups_end_with_the_row():
    weight = normal(3, 100)
    weight[:, 96:] *= 0.01
    parts, back = round_trip(weight, group=32)
    assert parts["scale"].shape == (3, 4)
    assert np.array_equal(parts["scale"][:, 3], abs(weight[:, 96:]).max(axis=1) / np.float32(7))
    assert (back[:, 96:] != 0).any()


def test_zeros_are_zeros():
    weight = normal(2, 128)
    weight[0, :64] = 0
    for one in (weight, np.zeros_like(weight)):
        back = round_trip(one)[1]
        assert np.isfinite(back).all() and (back[one == 0] == 0).all()


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple) | st.tuples(st.integers(1, 3), st.just(150))


@given(SHAPES, st.integers(1, 70), st.sampled_from([1e-30, 0.02, 1e38]), st.integers(0, 99))
def test_any_weight_comes_back_within_half_a_step(shape, group, scale, seed):
    weight = np.random.default_rng(seed).uniform(-1, 1, shape).astype("f4") * np.float32(scale)
    parts, back = round_trip(weight, group=group)
    assert back.shape == shape
    assert (abs(back - weight) <= parts["scale"].max() * np.float32(0.5 + 1e-6)).all()


@given(st.booleans(), st.integers(0, 99))
def test_packing_again_changes_no_code(double_quant, seed):
    quantizer, weight = make_quantizer("int4", {}, double_quant), normal(8, 200, seed=seed)
    once = quantizer.pack(weight)
    again = quantizer.pack(quantizer.dense(once, weight.shape, F4))
    assert np.array_equal(once["packed"], again["packed"])


def test_the_device_makes_the_same_bits(monkeypatch):
    quantizer, weight = make_quantizer("int4"), normal(5, 150)
    here = quantizer.pack(weight)
    xp = device.install(monkeypatch)
    with device.capture():
        there = quantizer.pack(xp.asarray(weight))
        back = quantizer.dense(there, weight.shape, F4)
    assert all(np.array_equal(to_host(there[name]), part) for name, part in here.items())
    assert np.array_equal(to_host(back), quantizer.dense(here, weight.shape, F4))


def test_a_group_longer_than_the_row_is_the_row():
    weight = normal(3, 50)
    long, row = (make_quantizer("int4", {"group": group}).pack(weight) for group in (10**15, 50))
    assert all(np.array_equal(long[name], part) for name, part in row.items())


def test_a_group_of_nothing_is_refused():
    with pytest.raises(RefpeftError, match="group must be at least 1"):
        make_quantizer("int4", {"group": 0})
