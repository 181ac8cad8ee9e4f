"""FP4 in bitsandbytes' form: its levels in the order of their bits, and the rules."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refpeft import blockwise, manager
from refpeft.quant import make_quantizer

fp4 = manager.load("fp4")
F4 = np.dtype("f4")


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def test_the_levels_are_a_sign_and_a_magnitude():
    levels = fp4.book(np).levels
    assert levels[:8].tolist() == [
        0,
        np.float32(0.0052083335),
        np.float32(2 / 3),
        1,
        *np.float32([1 / 3, 1 / 2, 1 / 6, 1 / 4]),
    ]
    assert np.array_equal(levels[8:], -levels[:8])


def test_levels_come_back_as_they_are_and_the_second_zero_is_not_used():
    weight = np.tile(fp4.book(np).levels * 3, 8)
    kept = make_quantizer("fp4")(weight, F4)
    assert np.array_equal(kept(), weight)
    assert set(blockwise.unpack_nibbles(kept.parts["packed"], 128).tolist()) == {*range(8), *range(9, 16)}


def test_the_first_of_two_codes_is_the_high_half_and_an_unused_half_is_0():
    assert make_quantizer("fp4")(np.float32([1, -1, 0.5]), F4).parts["packed"].tolist() == [0x3B, 0x50]


def test_a_block_of_zeros_is_zero():
    weight = normal(3, 64)
    weight[1] = 0
    kept = make_quantizer("fp4")(weight, F4)
    assert not kept.parts["packed"][32:64].any() and not kept()[1].any() and not np.signbit(kept()[1]).any()


@given(st.integers(1, 300), st.sampled_from([32, 64, 4096]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_every_value_is_that_of_the_nearest_level(count, block, scale):
    weight = normal(count, seed=count, scale=1) * np.float32(scale)
    values = make_quantizer("fp4", {"block": block})(weight, F4)()
    largest = np.repeat([abs(weight[i : i + block]).max() for i in range(0, count, block)], block)[:count]
    distances = abs(fp4.book(np).levels[:, None] * largest - weight).min(axis=0)
    assert (abs(values - weight) <= distances + 1e-6 * largest).all()


@given(st.integers(1, 400), st.sampled_from([32, 64, 256]), st.sampled_from(["none", "bnb-cpu", "bnb-cuda"]))
def test_quantizing_twice_changes_no_value(count, block, rules):
    quantizer = make_quantizer("fp4", {"block": block, "compat": rules})
    once = quantizer(normal(count, seed=count), F4)
    again = quantizer(once(), F4)
    assert np.array_equal(again(), once())
    assert rules != "none" or np.array_equal(again.parts["packed"], once.parts["packed"])
