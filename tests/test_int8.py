"""int8: a scale for each row, as the weights of LLM.int8()."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import manager
from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.quant import make_quantizer

int8 = manager.load("int8")
F4 = np.dtype("f4")


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def test_codes_are_127ths_of_the_largest_of_a_row_and_ties_are_even():
    kept = make_quantizer("int8")(np.float32([[127, 0.5, 1.5, -2.5, -126.4], [0.5, -1, 0.25, 0, 0]]), F4)
    assert kept.parts["scale"].tolist() == [127, 1]
    assert kept.parts["codes"].tolist() == [[127, 0, 2, -2, -126], [64, -127, 32, 0, 0]]
    assert kept.parts["codes"].dtype == np.int8 and kept.parts["scale"].dtype == np.float32


@pytest.mark.parametrize("shape, of_scales", [((3, 5), (3,)), ((2, 3, 5), (2, 3)), ((5,), ())])
def test_rows_run_along_the_last_axis(shape, of_scales):
    weight = normal(*shape)
    kept = make_quantizer("int8")(weight, F4)
    assert kept.parts["codes"].shape == shape and kept.parts["scale"].shape == of_scales
    assert np.array_equal(kept.parts["scale"], abs(weight).max(axis=-1)) and kept().shape == shape


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([1e-30, 1.0, 1e35]))
def test_a_value_is_at_most_half_a_step_away(rows, columns, scale):
    weight = normal(rows, columns, seed=rows * 100 + columns, scale=1) * np.float32(scale)
    kept = make_quantizer("int8")(weight, F4)
    largest = abs(weight).max(axis=1, keepdims=True)
    assert (abs(kept() - weight) <= largest * (0.5 / 127 + 1e-6)).all()


@pytest.mark.parametrize("magnitude", [0, 1e-45, 3.9e-37])
@pytest.mark.parametrize("compat", ["none", "bnb-cpu"])
def test_a_row_of_zeros_or_of_next_to_nothing_is_zeros(magnitude, compat):
    weight = normal(3, 64)
    weight[1] = magnitude
    kept = make_quantizer("int8", {"compat": compat})(weight, F4)
    assert not kept()[1].any() and kept()[0].any() and kept()[2].any()


@given(st.integers(1, 9), st.integers(1, 70))
def test_quantizing_twice_changes_no_code(rows, columns):
    once = make_quantizer("int8")(normal(rows, columns, seed=rows * 100 + columns), F4)
    assert np.array_equal(make_quantizer("int8")(once(), F4).parts["codes"], once.parts["codes"])


def test_scales_can_be_quantized_themselves():
    weight = normal(300, 64)
    kept = make_quantizer("int8", double_quant=True)(weight, F4)
    assert kept.parts["scale.codes"].shape == (300,) and kept.nbytes == 300 * 64 + 300 + 4 * 2 + 4
    assert abs(kept() - weight).max() < 0.01 * abs(weight).max()


def test_pieces_and_the_device_do_not_change_a_bit(monkeypatch):
    weight = normal(37, 50)
    whole = make_quantizer("int8")(weight, F4)
    monkeypatch.setattr(int8, "CHUNK", 120)
    xp = device.install(monkeypatch)
    for array in weight, xp.asarray(weight):
        kept = make_quantizer("int8")(array, F4)
        assert all(np.array_equal(to_host(part), whole.parts[name]) for name, part in kept.parts.items())
        assert np.array_equal(to_host(kept()), whole())
