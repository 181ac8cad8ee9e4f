"""Bit for bit what bitsandbytes 0.50.2 makes on the CPU, with `compat` set to bnb-cpu."""

import itertools

import numpy as np
import pytest

from refpeft import compat
from refpeft.quant import make_quantizer

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes", minversion="0.50.2").functional

random = np.random.default_rng(0)
MIDDLES = {name: make_quantizer(name).plugin.book(np).bounds for name in ("nf4", "fp4")}
LEVELS = {name: make_quantizer(name).plugin.book(np).levels for name in ("nf4", "fp4")}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def normal(*shape: int, scale: float = 1) -> np.ndarray:
    return (random.standard_normal(shape) * scale).astype("f4")


def some(array: np.ndarray, where, value) -> np.ndarray:
    array[where] = value
    return array


def around(values: np.ndarray) -> np.ndarray:
    """The values, their neighbours in float32, and 1 so that they are not scaled."""
    up, down = (np.nextafter(values, np.float32(to)) for to in (2, -2))
    return np.concatenate((values, up, down, np.array([1, -1, 0], "f4")))


SIZES = (1, 2, 3, 63, 64, 65, 127, 128, 1000, 4096, 4097, 64 * 256, 64 * 257 + 1, 65536 * 3 + 17)
SHAPES = ((128, 256), (17, 31), (5, 64), (300, 96), (1024, 1024), (33, 65), (7, 2, 64))
WEIGHTS = {f"normal {shape}": normal(*shape) for shape in (*((n,) for n in SIZES), *SHAPES)}
WEIGHTS |= {
    "uniform": random.uniform(-1, 1, (256, 512)).astype("f4"),
    "tiny": normal(256, 512, scale=1e-30),
    "subnormal": normal(64, 64, scale=1e-39),
    "outliers": normal(256, 512, scale=0.02) * np.where(random.random((256, 512)) < 1e-3, 500, 1).astype("f4"),
    "zero blocks": some(normal(256, 512), slice(3, 9), 0),
    "all zero": np.zeros((64, 128), "f4"),
    "all zero, odd": np.zeros(33, "f4"),
    "one smallest number": some(some(np.zeros((64, 64), "f4"), (1, 2), 1e-45), (5, 7), -0.0),
    "around nf4's midpoints": around(MIDDLES["nf4"]),
    "around fp4's midpoints": around(MIDDLES["fp4"]),
    "around midpoints, scaled": np.append(around(MIDDLES["nf4"])[:40], np.float32(1)) * np.float32(3.7),
    "grid": np.linspace(-1, 1, 65536, dtype="f4"),
    "large": normal(2048, 1600, scale=0.02),
}


@pytest.fixture(autouse=True)
def one_eager_thread():
    """Compiling its fallback for every shape takes bitsandbytes most of the time; the sum depends on the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def bits(tensor: "torch.Tensor") -> np.ndarray:
    """The bits of a tensor of floats, with one zero; AVX-512 has no subnormal bfloat16 numbers either."""
    tensor = (tensor + 0.0).reshape(-1)
    if tensor.dtype == torch.bfloat16:
        tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


def as_bits(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, "f4").reshape(-1).view("u4")


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_codes_constants_and_values_in_4_bits_are_those_of_bitsandbytes(weight, name):
    blocks = (64,) if WEIGHTS[weight].size > 100_000 else (32, 64, 256, 4096)
    for dtype, block, double_quant in itertools.product(DTYPES.values(), blocks, (False, True)):
        # As one long row: with AVX-512 it decodes rows wrongly within which a block ends (see below).
        tensor = torch.from_numpy(WEIGHTS[weight]).reshape(1, -1).to(dtype)
        packed, state = bnb.quantize_4bit(tensor, None, None, block, double_quant, name)
        quantizer = make_quantizer(name, {"block": block, "compat": "bnb-cpu"}, double_quant)
        kept = quantizer(tensor.float().numpy(), np.dtype("f4"))
        expected = {"packed": packed[:, 0].numpy(), "absmax": state.absmax.numpy()}
        if double_quant:
            expected["absmax.codes"] = expected.pop("absmax")
            expected |= {"absmax.absmax": state.state2.absmax.numpy(), "absmax.offset": state.offset.numpy()}
        assert set(kept.parts) == set(expected)
        for part, array in expected.items():
            same = as_bits if array.dtype == np.float32 else np.asarray
            assert np.array_equal(same(kept.parts[part]), same(array)), (dtype, block, part)
        values = bnb.dequantize_4bit(packed, state)
        assert np.array_equal(bits(torch.from_numpy(kept()).to(dtype)), bits(values)), (dtype, block, double_quant)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 100_000])
def test_codes_in_8_bits_are_those_of_bitsandbytes(count, signed):
    weight = normal(count, scale=0.02) if signed else abs(normal(count))
    levels = bnb.create_dynamic_map(signed)
    codes, state = bnb.quantize_blockwise(torch.from_numpy(weight), levels, blocksize=256)
    book = compat.binned(levels.numpy())
    got_codes, got_absmax = compat.encode(weight, 256, book, "bnb-cpu")
    assert np.array_equal(got_codes, codes.numpy()) and np.array_equal(got_absmax, state.absmax.numpy())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 1000, 32768, 70_001, 600_000])
def test_the_mean_is_that_of_torch_whatever_its_order(count, threads):
    torch.set_num_threads(threads)
    vector = abs(normal(count))
    assert compat.torch_mean(vector, threads) == torch.from_numpy(vector).mean().numpy()


@pytest.mark.parametrize("shape", [(64, 256), (33, 65), (5, 1), (512, 512)])
def test_codes_scales_and_values_of_int8_are_those_of_bitsandbytes(shape):
    weight = some(normal(*shape), slice(2, 4), 0)
    codes, scale, _ = bnb.int8_vectorwise_quant(torch.from_numpy(weight).half())
    kept = make_quantizer("int8", {"compat": "bnb-cpu"})(weight, np.dtype("f4"))
    assert np.array_equal(kept.parts["codes"], codes.numpy()) and np.array_equal(kept.parts["scale"], scale.numpy())
    assert np.array_equal(as_bits(kept()), as_bits(bnb.int8_vectorwise_dequant(codes, scale).numpy()))


def test_a_file_of_bitsandbytes_decodes_to_its_values_whatever_its_constants_are():
    """Its codes are read, not made anew, under our own rules."""
    weight = torch.from_numpy(normal(300, 64))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = {
        "packed": packed[:, 0].numpy(),
        "levels": state.code.numpy(),
        "absmax.codes": state.absmax.numpy(),
        "absmax.absmax": state.state2.absmax.numpy(),
        "absmax.levels": state.state2.code.numpy(),
        "absmax.offset": state.offset.numpy(),
    }
    quantizer = make_quantizer("nf4", double_quant=True)
    values = quantizer.dense(parts, (300, 64), np.dtype("f4"))
    assert np.array_equal(values, bnb.dequantize_4bit(packed, state).numpy())


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="a defect of the AVX-512 kernel")
def test_with_avx512_bitsandbytes_decodes_rows_wrongly_within_which_a_block_ends():
    """It counts blocks from the start of each row, though they run over rows. The same bytes as one row are right."""
    weight = torch.from_numpy(normal(300, 96))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    as_rows = bnb.dequantize_4bit(packed, state)
    state.shape = torch.Size((1, weight.numel()))
    as_one_row = bnb.dequantize_4bit(packed, state).reshape(weight.shape)
    ours = make_quantizer("nf4")(weight.numpy(), np.dtype("f4"))()
    assert np.array_equal(ours, as_one_row.numpy())
    assert (as_rows - weight).std() > 2 * (as_one_row - weight).std()
