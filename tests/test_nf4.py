"""NF4: the rules of the format, and bit for bit what bitsandbytes makes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import manager
from refpeft.errors import RefpeftError
from refpeft.quant import Quantizer

nf4 = manager.load("nf4")
LEVELS, _, DYNAMIC = nf4.tables(np)
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


def pack(weight, **options):
    return nf4.quant_pack(np.asarray(weight, "f4"), nf4.Config(**options))


def unpack(parts, shape, dtype="f4", **options):
    return nf4.quant_unpack(parts, nf4.Config(**options), shape, np.dtype(dtype))


def codes(packed: np.ndarray) -> np.ndarray:
    return np.stack((packed >> 4, packed & 15), axis=-1).reshape(-1)


def normal(*shape, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, shape).astype("f4")


def test_the_levels_are_those_of_the_paper_and_8_is_the_first_above_zero():
    assert LEVELS.dtype == np.float32 and LEVELS[7] == 0 and LEVELS[0] == -1 and LEVELS[15] == 1
    assert LEVELS.view("u4")[[1, 6, 8, 14]].tolist() == [0xBF3239B1, 0xBDBA7871, 0x3DA2FAFF, 0x3F3913B3]
    assert len(set(DYNAMIC.tolist())) == 256 and DYNAMIC[127] == 0 and DYNAMIC[255] == 1
    assert DYNAMIC[0] == np.float32(-0.99296874)


def test_the_first_of_two_codes_is_the_high_half():
    parts = pack([[1.0, -1.0]], double_quant=False)
    assert parts["packed"].tolist() == [0xF0]


def test_a_value_between_two_levels_takes_the_lower_code():
    above, below = np.nextafter(MIDDLES, np.float32(2)), np.nextafter(MIDDLES, np.float32(-2))
    weight = np.concatenate([MIDDLES, above, below, [1.0]]).astype("f4")
    got = codes(pack(weight, double_quant=False)["packed"])
    assert got[:45].tolist() == [*range(15), *range(1, 16), *range(15)]


def test_levels_come_back_as_they_are():
    weight = np.tile(LEVELS * 3, 8)
    assert np.array_equal(unpack(pack(weight, double_quant=False), weight.shape, double_quant=False), weight)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_block_of_zeros_is_zero(double_quant):
    weight = normal(3, 64)
    weight[1] = 0
    parts = pack(weight, double_quant=double_quant)
    assert (parts["packed"].reshape(3, 32)[1] == 0x77).all()
    back = unpack(parts, weight.shape, double_quant=double_quant)
    assert (back[1] == 0).all() and not np.signbit(back[1]).any()
    nothing = np.zeros((2, 64), "f4")
    back = unpack(pack(nothing, double_quant=double_quant), nothing.shape, double_quant=double_quant)
    assert np.array_equal(back, nothing)


@given(st.integers(1, 300), st.sampled_from([32, 64, 128]), st.booleans(), st.sampled_from([1e-30, 0.02, 1e30]))
def test_any_number_of_elements_comes_back_within_half_a_step(count, block, double_quant, scale):
    weight = normal(count, seed=count, scale=1).astype("f4") * np.float32(scale)
    options = {"block": block, "double_quant": double_quant}
    parts = pack(weight, **options)
    assert parts["packed"].size == (count + 1) // 2
    back = unpack(parts, (count,), **options)
    largest = np.repeat([abs(weight[i : i + block]).max() for i in range(0, count, block)], block)[:count]
    half_a_step = (LEVELS[1:] - LEVELS[:-1]).max() / 2
    slack = 0.01 * abs(weight).max() if double_quant else 1e-6 * largest
    assert (abs(back - weight) <= half_a_step * largest + slack).all()


def test_a_part_of_the_last_byte_that_is_not_used_is_the_code_of_zero():
    assert codes(pack(normal(65), double_quant=False)["packed"])[-1] == 7


def test_blocks_run_over_rows():
    weight = normal(6, 32)
    flat = pack(weight.reshape(-1), double_quant=False)
    assert all(np.array_equal(flat[key], part) for key, part in pack(weight, double_quant=False).items())
    assert flat["absmax"].shape == (3,)


def test_the_second_quantization_is_nearest_of_what_is_left_after_the_mean():
    absmax = pack(normal(300, 64), double_quant=False)["absmax"]
    parts = pack(normal(300, 64))
    offset = np.float32(absmax.astype("f8").mean())
    assert parts["offset"] == offset and parts["nested_absmax"].shape == (2,)
    for at in (0, 256):
        left = absmax[at : at + 256] - offset
        top = abs(left).max()
        assert parts["nested_absmax"][at // 256] == top
        nearest = abs(DYNAMIC[:, None] * top - left).argmin(axis=0)
        distance = abs(DYNAMIC[parts["nested_codes"][at : at + 256]] * top - left)
        assert (distance <= abs(DYNAMIC[nearest] * top - left) + 1e-7 * top).all()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_unpacked_values_are_float32_products_in_the_dtype_that_is_asked_for(dtype):
    weight = normal(10, 64)
    parts = pack(weight, double_quant=False)
    expected = LEVELS[codes(parts["packed"])].reshape(10, 64) * parts["absmax"][:, None]
    back = unpack(parts, weight.shape, dtype, double_quant=False)
    assert back.dtype == dtype and np.array_equal(back, expected.astype(dtype))


def test_packing_what_was_unpacked_changes_nothing():
    weight = normal(20, 64)
    once = unpack(pack(weight, double_quant=False), weight.shape, double_quant=False)
    assert np.array_equal(unpack(pack(once, double_quant=False), weight.shape, double_quant=False), once)


def test_bytes_kept_are_4_bits_and_the_constants():
    kept = Quantizer(nf4, nf4.Config())(normal(256, 256), np.dtype("f4"))
    assert kept.nbytes == 256 * 256 // 2 + 1024 + 4 * 4 + 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused_by_name(bad):
    weight = normal(2, 64)
    weight[1, 3] = bad
    with pytest.raises(RefpeftError, match=r"model.layers.0.mlp.up_proj.weight holds NaN or infinity"):
        Quantizer(nf4, nf4.Config())(weight, np.dtype("f4"), "model.layers.0.mlp.up_proj.weight")


# ---- the peer --------------------------------------------------------------------------------------------------------


WEIGHTS = {
    "normal": normal(64, 96),
    "one block": normal(1, 64),
    "rows end within blocks": normal(33, 96),
    "uniform": np.random.default_rng(1).uniform(-1, 1, (40, 64)).astype("f4"),
    "outliers": normal(64, 64) * np.where(np.random.default_rng(2).random((64, 64)) < 0.01, 500, 1).astype("f4"),
    "tiny": normal(16, 64) * np.float32(1e-28),
    "zero block": np.concatenate([normal(2, 64), np.zeros((1, 64), "f4")]),
    "large": normal(1024, 768),
}


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_and_absmax_and_values_are_those_of_bitsandbytes(name, block):
    weight = WEIGHTS[name]
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes").functional
    if weight.size % block:
        pytest.skip("bitsandbytes on the CPU divides in a short last block, where full blocks multiply")
    # as one long row: with AVX-512, version 0.50.2 takes the wrong absmax for blocks that run over the end of a row
    packed, state = bnb.quantize_4bit(torch.from_numpy(weight.reshape(1, -1)), quant_type="nf4", blocksize=block)
    parts = pack(weight, block=block, double_quant=False)
    assert np.array_equal(parts["packed"], packed.numpy()[:, 0])
    assert np.array_equal(parts["absmax"], state.absmax.numpy())
    back = bnb.dequantize_4bit(packed.reshape(-1, 1), state).numpy()
    assert np.array_equal(unpack(parts, weight.shape, block=block, double_quant=False), back.reshape(weight.shape))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_what_bitsandbytes_quantized_twice_is_unpacked_to_its_values():
    """Its 8-bit codes are read, not made anew: on the CPU version 0.50 rounds them by a coarser table."""
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes").functional
    weight = normal(300, 64)
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(weight), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    assert np.array_equal(state.state2.code.numpy(), DYNAMIC)
    parts = {
        "packed": packed.numpy()[:, 0],
        "nested_codes": state.absmax.numpy(),
        "nested_absmax": state.state2.absmax.numpy(),
        "offset": np.float32(state.offset),
    }
    assert np.array_equal(unpack(parts, weight.shape), bnb.dequantize_4bit(packed, state).numpy())
    ours = pack(weight)
    assert np.array_equal(ours["packed"], parts["packed"])
    assert abs(ours["offset"] - parts["offset"]) <= np.spacing(parts["offset"]) * 2
    assert np.allclose(ours["nested_absmax"], parts["nested_absmax"], rtol=1e-5)
