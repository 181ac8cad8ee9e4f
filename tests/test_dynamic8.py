"""dynamic8: an index into the dynamic map, with or without the mean taken off before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import manager
from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.quant import make_quantizer

LEVELS = manager.load("dynamic8").book(np).levels
F4 = np.dtype("f4")


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def test_levels_come_back_as_they_are():
    kept = make_quantizer("dynamic8")(LEVELS * 3, F4)
    assert kept.parts["codes"].tolist() == list(range(256)) and kept.parts["absmax"].tolist() == [3]
    assert np.array_equal(kept(), LEVELS * 3)


@given(st.integers(1, 700), st.sampled_from([64, 256, 4096]), st.booleans(), st.sampled_from([1e-30, 1.0, 1e30]))
def test_every_value_is_that_of_the_nearest_level(count, block, offset, scale):
    weight = (normal(count, seed=count, scale=1) + 3) * np.float32(scale)
    kept = make_quantizer("dynamic8", {"block": block, "offset": offset})(weight, F4)
    left = weight - (np.float32(weight.astype("f8").mean()) if offset else 0)
    largest = np.repeat([abs(left[i : i + block]).max() for i in range(0, count, block)], block)[:count]
    distances = abs(LEVELS[:, None] * largest - left).min(axis=0)
    assert (abs(kept() - weight) <= distances + 1e-6 * largest + 1e-6 * abs(weight)).all()


def test_a_block_of_zeros_is_zero_and_equal_values_are_their_offset():
    assert not make_quantizer("dynamic8")(np.zeros(300, "f4"), F4)().any()
    kept = make_quantizer("dynamic8", {"offset": True})(np.full(300, 0.3, "f4"), F4)
    assert kept.parts["offset"] == np.float32(0.3) and (kept() == np.float32(0.3)).all()
    assert not kept.parts["absmax"].any()


def test_codes_have_the_shape_of_the_weight():
    kept = make_quantizer("dynamic8")(normal(3, 100), F4)
    assert kept.parts["codes"].shape == (3, 100) == kept().shape and kept.parts["absmax"].shape == (2,)


@pytest.mark.parametrize(
    "options", [{}, {"offset": True}, {"compat": "bnb-cpu", "offset": True}, {"compat": "bnb-cuda"}]
)
def test_the_device_has_the_same_bits(monkeypatch, options):
    weight = normal(37, 50)
    weight[8:20] = 0
    kept = make_quantizer("dynamic8", options)(weight, F4)
    there = make_quantizer("dynamic8", options)(device.install(monkeypatch).asarray(weight), F4)
    assert all(np.array_equal(to_host(part), kept.parts[name]) for name, part in there.parts.items())
    assert np.array_equal(to_host(there()), kept())
