"""NF4: the rules of the format, alone and with its constants quantized again."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import manager
from refpeft.backend import to_host
from refpeft.blockwise import decode
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.quant import Quantizer, make_quantizer

nf4 = manager.load("nf4")
LEVELS = nf4.book(np).levels
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


def pack(weight, **options):
    return nf4.quant_pack(np.asarray(weight, "f4"), nf4.Config(**options))


def unpack(parts, shape, dtype="f4", **options):
    return decode(nf4.quant_blocks(parts, nf4.Config(**options)), shape, np.dtype(dtype))


def codes(packed: np.ndarray) -> np.ndarray:
    return np.stack((packed >> 4, packed & 15), axis=-1).reshape(-1)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def test_the_levels_are_those_of_the_paper_and_8_is_the_first_above_zero():
    assert LEVELS.dtype == np.float32 and LEVELS[7] == 0 and LEVELS[0] == -1 and LEVELS[15] == 1
    assert LEVELS.view("u4")[[1, 6, 8, 14]].tolist() == [0xBF3239B1, 0xBDBA7871, 0x3DA2FAFF, 0x3F3913B3]


def test_the_first_of_two_codes_is_the_high_half():
    assert pack([[1.0, -1.0]])["packed"].tolist() == [0xF0]


def test_a_value_between_two_levels_takes_the_lower_code():
    above, below = np.nextafter(MIDDLES, np.float32(2)), np.nextafter(MIDDLES, np.float32(-2))
    got = codes(pack(np.concatenate([MIDDLES, above, below, [1.0]]))["packed"])
    assert got[:45].tolist() == [*range(15), *range(1, 16), *range(15)]


def test_levels_come_back_as_they_are():
    weight = np.tile(LEVELS * 3, 8)
    assert np.array_equal(unpack(pack(weight), weight.shape), weight)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_block_of_zeros_is_zero(double_quant):
    weight = normal(3, 64)
    weight[1] = 0
    for array in weight, np.zeros((2, 64), "f4"):
        kept = make_quantizer("nf4", double_quant=double_quant)(array, np.dtype("f4"))
        rows = kept.parts["packed"].reshape(-1, 32)
        assert all((codes == 0x77).all() == (not row.any()) for codes, row in zip(rows, array, strict=True))
        assert (kept()[1] == 0).all() and not np.signbit(kept()[1]).any()


@given(st.integers(1, 300), st.sampled_from([32, 64, 128]), st.booleans(), st.sampled_from([1e-30, 0.02, 1e30]))
def test_any_number_of_elements_comes_back_within_half_a_step(count, block, double_quant, scale):
    weight = normal(count, seed=count, scale=1) * np.float32(scale)
    kept = make_quantizer("nf4", {"block": block}, double_quant)(weight, np.dtype("f4"))
    assert kept.parts["packed"].size == (count + 1) // 2
    largest = np.repeat([abs(weight[i : i + block]).max() for i in range(0, count, block)], block)[:count]
    half_a_step = (LEVELS[1:] - LEVELS[:-1]).max() / 2
    slack = 0.01 * abs(weight).max() if double_quant else 1e-6 * largest
    assert (abs(kept() - weight) <= half_a_step * largest + slack).all()


def test_a_half_of_the_last_byte_that_is_not_used_is_the_code_of_zero():
    assert codes(pack(normal(65))["packed"])[-1] == 7


def test_blocks_run_over_rows():
    weight = normal(6, 32)
    flat = pack(weight.reshape(-1))
    assert all(np.array_equal(flat[key], part) for key, part in pack(weight).items())
    assert flat["absmax"].shape == (3,)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_unpacked_values_are_float32_products_in_the_dtype_that_is_asked_for(dtype):
    weight = normal(10, 64)
    parts = pack(weight)
    expected = LEVELS[codes(parts["packed"])].reshape(10, 64) * parts["absmax"][:, None]
    back = unpack(parts, weight.shape, dtype)
    assert back.dtype == dtype and np.array_equal(back, expected.astype(dtype))


def test_a_code_book_that_a_file_brought_along_wins():
    parts = pack(normal(2, 64))
    assert np.array_equal(unpack(parts | {"levels": LEVELS * 2}, (2, 64)), unpack(parts, (2, 64)) * 2)


@given(st.integers(1, 400), st.sampled_from([32, 64, 256]), st.booleans())
def test_quantizing_twice_changes_no_code(count, block, double_quant):
    quantizer = make_quantizer("nf4", {"block": block}, double_quant)
    once = quantizer(normal(count, seed=count), np.dtype("f4"))
    again = quantizer(once(), np.dtype("f4"))
    assert np.array_equal(again.parts["packed"], once.parts["packed"])
    if not double_quant:
        assert np.array_equal(again(), once())


@pytest.mark.parametrize("double_quant, bits", [(False, 4.5), (True, 4.126983642578125)])
def test_bits_per_parameter_are_4_and_the_constants(double_quant, bits):
    """0.5 bits of constants become 0.12695; and 32 bits of the one offset."""
    kept = make_quantizer("nf4", double_quant=double_quant)(normal(1024, 1024), np.dtype("f4"))
    assert 8 * kept.nbytes / 2**20 == bits


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -(2.0**121)])
def test_nan_and_infinity_and_what_is_nearly_that_are_refused_by_name_and_place(bad):
    weight = normal(2, 64)
    weight[1, 3] = bad
    with pytest.raises(RefpeftError, match=re.escape(f"model.layers.0.mlp.up_proj.weight holds {bad} at [1, 3]")):
        Quantizer(nf4, nf4.Config())(weight, np.dtype("f4"), "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("rules", ["none", "bnb-cpu", "bnb-cuda"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_device_has_the_same_bits(monkeypatch, name, rules, double_quant):
    weight = normal(37, 51)
    weight[8:20] = 0
    quantizer = make_quantizer(name, {"compat": rules, "block": 32}, double_quant)
    kept = quantizer(weight, np.dtype("f4"))
    there = quantizer(device.install(monkeypatch).asarray(weight), np.dtype("f4"))
    assert all(np.array_equal(to_host(part), kept.parts[name]) for name, part in there.parts.items())
    assert np.array_equal(to_host(there()), kept())
