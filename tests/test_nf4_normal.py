"""NF4 by mean and deviation: its levels, its rules, and that absmax scaling is better."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import manager
from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.quant import make_quantizer

F4 = np.dtype("f4")
LEVELS = manager.load("nf4_normal").levels_of()


def round_trip(weight, name="nf4_normal", **options):
    quantizer = make_quantizer(name, options)
    parts = quantizer.pack(weight)
    return parts, quantizer.dense(parts, weight.shape, F4)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def error(weight, name):
    return float(np.sqrt(((round_trip(weight, name)[1] - weight) ** 2).mean() / (weight**2).mean()))


def test_the_levels_are_quantiles_that_nf4_scales_to_one():
    nf4 = [-0.6961928, -0.52507305, 0.0, 0.0795803, 0.72295684]
    assert LEVELS[[0, 15]] == pytest.approx([-1.84813, 1.84813], abs=1e-5)
    assert LEVELS[[1, 2, 7, 8, 14]] / LEVELS[15] == pytest.approx(nf4, abs=1e-6)


def test_levels_of_a_block_come_back_around_its_mean():
    weight = np.concatenate([3 + LEVELS * 2] * 4)
    parts, back = round_trip(weight)
    standard = (weight - weight.mean()) / weight.std()
    assert parts["mean"] == pytest.approx([weight.mean()]) and parts["std"] == pytest.approx([weight.std()])
    nearest = LEVELS[abs(standard[:, None] - LEVELS).argmin(axis=1)]
    assert back == pytest.approx(weight.mean() + weight.std() * nearest, abs=1e-5)


@given(st.integers(1, 200), st.integers(0, 99))
def test_a_short_last_block_has_the_mean_and_deviation_of_its_own_weights(count, seed):
    weight = normal(count, seed=seed) + np.float32(0.1)
    parts, back = round_trip(weight)
    for i in range(0, count, 64):
        assert parts["mean"][i // 64] == pytest.approx(weight[i : i + 64].mean(), rel=1e-5)
        assert parts["std"][i // 64] == pytest.approx(weight[i : i + 64].std(), rel=1e-4, abs=1e-8)
    cut = np.abs(weight - parts["mean"].repeat(64)[:count]) > LEVELS[15] * parts["std"].repeat(64)[:count]
    assert (abs(back - weight)[~cut] <= 0.29 * parts["std"].max() + 1e-6).all()


def test_blocks_of_one_value_are_exact():
    weight = np.repeat(np.array([0, 0.3, -7, 0], "f4"), 64)
    assert np.array_equal(round_trip(weight)[1], weight)


def test_absmax_scaling_is_better_wherever_the_tails_count():
    rng = np.random.default_rng(0)
    for weight in (normal(256, 256), rng.standard_t(5, (256, 256)).astype("f4")):
        assert error(weight, "nf4") < 0.7 * error(weight, "nf4_normal")
    assert error(normal(256, 256), "nf4_normal") == pytest.approx(0.147, abs=0.002)


def test_the_device_makes_the_same_bits(monkeypatch):
    quantizer, weight = make_quantizer("nf4_normal"), normal(5, 150)
    here = quantizer.pack(weight)
    xp = device.install(monkeypatch)
    with device.capture():
        there = quantizer.pack(xp.asarray(weight))
        back = quantizer.dense(there, weight.shape, F4)
    assert all(np.array_equal(to_host(there[name]), part) for name, part in here.items())
    assert np.array_equal(to_host(back), quantizer.dense(here, weight.shape, F4))
