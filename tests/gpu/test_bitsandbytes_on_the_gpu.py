"""compat="bnb-cuda" against bitsandbytes' CUDA kernels, which divide approximately: one code in millions may differ."""

import cupy
import numpy as np
import pytest

from refpeft.backend import to_host
from refpeft.quant import make_quantizer

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes").functional

CODES = 1e-6
"""The largest share of bytes or 8-bit codes that may differ by the approximate division."""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype("f4")


def with_zeros() -> np.ndarray:
    weight = normal(8, 256)
    weight[2:5] = 0
    return weight


WEIGHTS = {
    "large": normal(2048, 2048),
    "a short last block": normal(3, 43 * 2),
    "blocks of zeros": with_zeros(),
    "small": normal(64, 64) * np.float32(1e-20),
}


def peer(weight: np.ndarray, name: str, block: int, double_quant: bool):
    tensor = torch.from_numpy(weight).cuda()
    return bnb.quantize_4bit(tensor, quant_type=name, blocksize=block, compress_statistics=double_quant)


@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=list(WEIGHTS))
def test_codes_constants_and_values_are_those_of_the_kernels(weight, name, block):
    packed, state = peer(weight, name, block, double_quant=False)
    quantizer = make_quantizer(name, {"block": block, "compat": "bnb-cuda"})
    ours = quantizer(cupy.asarray(weight), np.dtype("f4"))
    theirs = packed.cpu().numpy().reshape(-1)
    differ = (to_host(ours.parts["packed"]) != theirs).sum()
    assert differ <= CODES * theirs.size
    assert np.array_equal(to_host(ours.parts["absmax"]), state.absmax.cpu().numpy())
    parts = {"packed": cupy.asarray(theirs), "absmax": cupy.asarray(state.absmax.cpu().numpy())}
    values = to_host(quantizer.dense(parts, weight.shape, np.dtype("f4")))
    assert np.array_equal(values, bnb.dequantize_4bit(packed, state).cpu().numpy())


@pytest.mark.parametrize("weight", [WEIGHTS["large"], WEIGHTS["blocks of zeros"]], ids=["large", "blocks of zeros"])
def test_constants_quantized_twice_are_those_of_the_kernels_for_the_same_offset(weight):
    packed, state = peer(weight, "nf4", 64, double_quant=True)
    dynamic8 = make_quantizer("dynamic8", {"compat": "bnb-cuda"})
    _, plain = peer(weight, "nf4", 64, double_quant=False)
    offset = state.offset.cpu().numpy()
    left = cupy.asarray(plain.absmax.cpu().numpy() - offset)
    ours = dynamic8(left, np.dtype("f4"))
    theirs = state.absmax.cpu().numpy()
    differ = (to_host(ours.parts["codes"]) != theirs).sum()
    assert differ <= max(1, CODES * theirs.size)
    assert np.array_equal(to_host(ours.parts["absmax"]), state.state2.absmax.cpu().numpy())
    quantizer = make_quantizer("nf4", {"compat": "bnb-cuda"}, double_quant=True)
    parts = {
        "packed": cupy.asarray(packed.cpu().numpy().reshape(-1)),
        "absmax.codes": cupy.asarray(theirs),
        "absmax.absmax": cupy.asarray(state.state2.absmax.cpu().numpy()),
        "absmax.offset": cupy.asarray(offset),
    }
    values = to_host(quantizer.dense(parts, weight.shape, np.dtype("f4")))
    assert np.array_equal(values, bnb.dequantize_4bit(packed, state).cpu().numpy())


def test_our_mean_of_absmax_is_that_of_the_device_but_for_the_last_bits():
    weight = WEIGHTS["large"]
    _, state = peer(weight, "nf4", 64, double_quant=True)
    ours = make_quantizer("nf4", {"compat": "bnb-cuda"}, double_quant=True)(cupy.asarray(weight), np.dtype("f4"))
    offset = state.offset.cpu().numpy()
    assert abs(to_host(ours.parts["absmax.offset"]) - offset) <= 4 * np.spacing(offset)
