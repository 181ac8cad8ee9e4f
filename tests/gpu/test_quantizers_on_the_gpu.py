"""Every quantizer has the same codes and values on the GPU and on the host, in a captured step too."""

import json
import re

import cupy
import numpy as np
import pytest
import tiny
import tiny_files
from variants import has_constants

import refpeft
from refpeft import blockwise, compat, files, manager
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import kernels
from refpeft.errors import RefpeftError
from refpeft.quant import make_quantizer

NAMES = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "quantizer")
VARIANTS = [(name, {}) for name in NAMES] + [
    ("affine", {"bits": 8, "per": "row"}),
    ("affine", {"per": "tensor"}),
    ("affine", {"nested": True}),
    ("gguf", {"type": "Q4_0"}),
    ("gguf", {"type": "Q4_1"}),
]
EVERY = [(*v, False) for v in VARIANTS] + [(*v, True) for v in VARIANTS if has_constants(*v)]
BLOCKS = [  # of a kernel
    *(
        (name, {"block": block}, double)
        for name in ("nf4", "fp4")
        for block in (32, 64, 512)
        for double in (False, True)
    ),
    ("dynamic8", {}, False),
    ("dynamic8", {"block": 64, "offset": True}, False),
]
SHAPES = [(1, 1), (1,), (3, 5), (7, 37), (2, 3, 96), (64, 256), (4099,), (130, 1030)]


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 0.02, (300, 96)).astype("f4")
    outliers = np.where(rng.random(normal.shape) < 0.01, 300, 1).astype("f4")
    return {
        "normal": normal,
        "outliers": normal * outliers,
        "zeros": normal * (np.arange(300) % 3 > 0).astype("f4")[:, None] + np.float32(0),  # + 0 makes -0 to 0
        "nothing": np.zeros_like(normal),
        "few values, many ties": (rng.integers(-4, 5, (300, 96)) / 8).astype("f4"),
        "tiny": normal * np.float32(1e-28),
    }


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(0, 0.02, shape).astype("f4")


def on_the_gpu(parts: dict[str, np.ndarray]) -> dict[str, cupy.ndarray]:
    return {name: cupy.asarray(part) for name, part in parts.items()}


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels of ours that were started, by name."""
    started, find = [], kernels.Source.__call__

    def found(source, kernel, dtype=bfloat16):
        launch = find(source, kernel, dtype)
        return lambda *arguments, **options: (started.append(kernel), launch(*arguments, **options))

    monkeypatch.setattr(kernels.Source, "__call__", found)
    return started


@pytest.mark.parametrize("name, options, double_quant", EVERY, ids=str)
def test_a_quantizer_has_the_codes_and_values_of_the_host(name: str, options: dict, double_quant: bool):
    quantizer = make_quantizer(name, options, double_quant)
    for kind, weight in weights().items():
        here, there = (quantizer(xp.asarray(weight), np.dtype("f4")) for xp in (np, cupy))
        assert here.parts.keys() == there.parts.keys()
        for key, part in here.parts.items():
            assert isinstance(there.parts[key], cupy.ndarray) and there.parts[key].dtype == part.dtype
            differ = (to_host(there.parts[key]) != part).sum()
            assert differ <= 1e-5 * part.size, (kind, key, differ)
        again = quantizer.dense({key: cupy.asarray(part) for key, part in here.parts.items()}, weight.shape, "f4")
        assert np.array_equal(to_host(again), here()), kind


@pytest.mark.parametrize("name, options, double_quant", EVERY, ids=str)
def test_a_weight_in_bfloat16_is_that_in_float32_rounded(name: str, options: dict, double_quant: bool):
    quantizer = make_quantizer(name, options, double_quant)
    for shape in ((6, 96), (4, 32), (7, 37)) if name != "gguf" else ((6, 96), (4, 32)):
        parts = quantizer.pack(normal(*shape))
        found = quantizer.dense(on_the_gpu(parts), shape, bfloat16)
        expected = quantizer.dense(parts, shape, np.dtype("f4")).astype(bfloat16)
        assert found.dtype == bfloat16 and to_host(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(64,), (7, 128), (64, 256), (3, 2, 192), (5, 1344)], ids=str)
@pytest.mark.parametrize("name, kernel", [("int8", "decode_8_bits"), ("int4", "decode_4_bits")])
def test_rows_of_whole_units_are_decoded_in_one_launch(
    name: str, kernel: str, shape: tuple[int, ...], launches: list[str]
):
    quantizer = make_quantizer(name)
    parts = quantizer.pack(normal(*shape))
    for dtype in (np.dtype("f4"), bfloat16):
        launches.clear()
        found = quantizer.dense(on_the_gpu(parts), shape, dtype)
        assert launches == [kernel] and found.dtype == dtype
        assert to_host(found).tobytes() == quantizer.dense(parts, shape, dtype).tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, options, double_quant", BLOCKS, ids=str)
def test_codes_in_blocks_are_decoded_in_one_launch(
    name: str, options: dict, double_quant: bool, shape: tuple[int, ...], launches: list[str]
):
    quantizer = make_quantizer(name, options, double_quant)
    parts = quantizer.pack(normal(*shape))
    there, kernel = on_the_gpu(parts), "decode_8_bits" if name == "dynamic8" else "decode_4_bits"
    for dtype in (np.dtype("f4"), bfloat16, np.dtype("f8")):
        launches.clear()
        found = quantizer.dense(there, shape, dtype)
        assert launches == [kernel]
        assert found.dtype == dtype and found.shape == shape
        assert to_host(found).tobytes() == quantizer.dense(parts, shape, dtype).tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, options, double_quant", BLOCKS, ids=str)
def test_codes_in_blocks_are_encoded_in_one_launch_for_each_level(
    name: str, options: dict, double_quant: bool, shape: tuple[int, ...], launches: list[str]
):
    quantizer, weight = make_quantizer(name, options, double_quant), normal(*shape)
    weight.reshape(-1)[64:130] = 0
    parts = quantizer.pack(cupy.asarray(weight))
    bits = "encode_8_bits" if name == "dynamic8" else "encode_4_bits"
    assert launches == [bits, "encode_8_bits"][: 1 + double_quant]
    for key, part in quantizer.pack(weight).items():
        assert parts[key].dtype == part.dtype and np.array_equal(to_host(parts[key]), part), key


@pytest.mark.parametrize("book", ["nf4", "fp4", "fp4 of bitsandbytes", "signed map", "unsigned map"])
def test_a_value_beside_a_midpoint_gets_the_code_of_the_host(book: str):
    make = {
        "nf4": lambda: manager.load("nf4").book(np),
        "fp4": lambda: manager.load("fp4").book(np),
        "fp4 of bitsandbytes": lambda: compat.cut_decimals(manager.load("fp4").LEVELS),
        "signed map": lambda: blockwise.nearest(blockwise.dynamic_map()),
        "unsigned map": lambda: blockwise.nearest(blockwise.dynamic_map(signed=False)),
    }[book]()
    values = np.concatenate(
        [make.bounds, *(np.nextafter(make.bounds, np.float32(to)) for to in (-2, 2)), [0, -0.0, 1e-42]]
    )
    weight = np.pad(values.astype("f4")[:, None], ((0, 0), (1, 30)))
    weight[:, 0] = 1  # keeps the value as it is
    there = blockwise.Book(*map(cupy.asarray, make))
    found = blockwise.encode(cupy.asarray(weight), 32, there)
    for ours, expected in zip(found, blockwise.encode(weight, 32, make), strict=True):
        assert np.array_equal(to_host(ours), expected)


def test_some_rows_are_those_of_the_whole():
    quantizer, shape = make_quantizer("nf4", double_quant=True), (130, 1030)
    parts = on_the_gpu(quantizer.pack(normal(*shape)))
    whole = to_host(quantizer.dense(parts, shape, bfloat16))
    for rows, panel in quantizer.panels(parts, shape, bfloat16, 64):
        assert to_host(panel).tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("name, options, double_quant", EVERY, ids=str)
def test_a_captured_step_makes_a_weight_dense_again(name: str, options: dict, double_quant: bool):
    quantizer, shape = make_quantizer(name, options, double_quant), (12, 96)
    kept = quantizer(cupy.asarray(normal(*shape)), bfloat16)
    expected, stream = (
        to_host(kept()),
        cupy.cuda.Stream(non_blocking=True),
    )  # tables are on the device after the first time
    with stream:
        stream.begin_capture()
        found = kept()
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
    assert to_host(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f2"), bfloat16], ids=str)
@pytest.mark.parametrize("family", ["tied", "gpt2"])
def test_a_file_of_any_dtype_is_quantized_to_the_codes_of_the_host(tmp_path, family: str, dtype: np.dtype):
    directory = tiny_files.write_model(tmp_path, family)
    config = json.loads((directory / "config.json").read_text())
    tensors = {name: array.astype(dtype) for name, array in tiny.arrays(config).items()}
    files.write_safetensors(directory / "model.safetensors", tensors)
    here, there = (refpeft.load(directory, quantizer="nf4", double_quant=True, device=d) for d in ("cpu", "cuda"))
    quantized = [name for name, weight in here.frozen.items() if weight.quantized]
    assert quantized
    for name in quantized:
        for key, part in here.frozen[name].parts.items():
            assert np.array_equal(to_host(there.frozen[name].parts[key]), part), (name, key)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -(2.0**121)])
def test_what_has_no_code_is_refused_by_its_place(bad: float):
    weight = normal(2, 64)
    weight[1, 3] = bad
    with pytest.raises(RefpeftError, match=re.escape(f"holds {np.float32(bad)} at [1, 3]")):
        make_quantizer("nf4")(cupy.asarray(weight), bfloat16)
