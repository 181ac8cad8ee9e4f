"""`refpeft quantize`, training on what it wrote, a GGUF file's own blocks, and the memory that all of it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import test_gguf
import tiny
import tiny_files
from click.testing import CliRunner

import refpeft
from refpeft import api, files, manager, memory
from refpeft.cli import main
from refpeft.errors import RefpeftError
from refpeft.models import saving
from refpeft.models.checkpoint import Checkpoint, expected_tensors, open_checkpoint
from refpeft.models.config import from_hf
from refpeft.quant import Quantized, make_quantizer

gguf = pytest.importorskip("gguf")

IDS = np.arange(12)[None]


def run(*arguments):
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_files.write_model(tmp_path / "model")


# The command


def test_it_says_what_it_made(model, tmp_path):
    result = run(model, tmp_path / "out", "--quantizer", "nf4", "--double-quant", "--set", "nf4.block=32")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith(f"{model} as nf4 (block = 32") and first.endswith(
        f"with double quantization, in {tmp_path / 'out'}:"
    )
    assert "bits a quantized weight, relative RMSE 0.0" in second and second.endswith("KiB after")
    assert result.stderr.splitlines()[-1] == "20/20 model.norm.weight"
    found = refpeft.load(tmp_path / "out")
    assert found.frozen["model.layers.0.mlp.up_proj.weight"].quantizer.cfg.block == 32
    assert found.tokenizer.encode("yes") == refpeft.load(model).tokenizer.encode("yes")
    again = json.loads(run(model, tmp_path / "two", "--quantizer", "affine", "--json").stdout)
    assert again["bytes_before"] == (model / "model.safetensors").stat().st_size
    assert again["bytes_after"] == (tmp_path / "two" / "model.safetensors").stat().st_size
    assert 4 < again["bits"] < 6 and 0 < again["relative_rmse"] < 0.1


def test_compat_is_an_option_of_the_quantizer(model, tmp_path):
    source = {name: np.array(array) for name, array in files.read_safetensors(model / "model.safetensors").items()}
    source["model.layers.0.mlp.up_proj.weight"][:] = 0
    files.write_safetensors(model / "model.safetensors", source)
    for compat, byte in (("bnb-cpu", 0x77), ("bnb-cuda", 0)):
        assert run(model, tmp_path / compat, "--quantizer", "nf4", "--compat", compat).exit_code == 0
        stored = files.read_safetensors(tmp_path / compat / "model.safetensors")
        assert (stored["model.layers.0.mlp.up_proj.weight"] == byte).all()


def test_the_embedded_model_and_gguf_files_are_taken(tmp_path):
    assert run("embedded", tmp_path / "embedded", "--quantizer", "nf4").exit_code == 0
    assert refpeft.load(tmp_path / "embedded").checkpoint.quantized
    config = test_gguf.CONFIGS["llama"]
    test_gguf.write(tmp_path / "x.gguf", config, test_gguf.weights(config), gguf.GGMLQuantizationType.Q8_0)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    checkpoint.files = lambda: {"config.json": json.dumps(checkpoint.config.raw).encode()}  # it has no tokenizer
    saving.quantize(checkpoint, tmp_path / "of_gguf", make_quantizer("int8"))
    found, expected = open_checkpoint(tmp_path / "of_gguf"), open_checkpoint(tmp_path / "x.gguf")
    assert all(np.allclose(found.tensor(name), expected.tensor(name), atol=0.02) for name in expected.names)


def test_mistakes_are_one_line_and_leave_nothing(model, tmp_path):
    (tmp_path / "there").mkdir()
    mistakes = {
        (model, tmp_path / "there", "--quantizer", "nf4"): "exists: models are not written over anything",
        (model, tmp_path / "out", "--quantizer", "nf5"): "did you mean 'nf4'?",
        (model, tmp_path / "out", "--quantizer", "nf4", "--set", "nf4.block=100"): "nf4.block is 100",
        (model, tmp_path / "out", "--quantizer", "nf4", "--set", "lora.r=2"): "expected an option of the quantizer",
        (model, tmp_path / "out", "--quantizer", "affine", "--compat", "bnb-cpu"): "affine.compat",
        (model, "/dev/null/out", "--quantizer", "nf4"): "/dev/null/out: Not a directory",
        (model, tmp_path / "out", "--quantizer", "int8", "--double-quant"): "no double quantization of int8",
        (tmp_path / "nowhere", tmp_path / "out", "--quantizer", "nf4"): "there is no such directory",
    }
    for arguments, message in mistakes.items():
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there"]


def test_options_of_no_quantizer_are_refused(model):
    for options in ({"double_quant": True}, {"options": {"block": 128}}):
        with pytest.raises(RefpeftError, match=r"quantizer.* but (no quantizer|none) is given"):
            refpeft.load(model, **options)


def test_double_quantization_without_constants_is_refused(model, tmp_path):
    result = run(model, tmp_path / "out", "--quantizer", "mxfp4", "--double-quant")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "mxfp4 keeps no arrays of float32 constants, which double_quant is for" in result.stderr


def test_a_weight_that_is_not_finite_leaves_nothing_half_written(model, tmp_path):
    tensors = {name: np.array(array) for name, array in files.read_safetensors(model / "model.safetensors").items()}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    files.write_safetensors(model / "model.safetensors", tensors)
    result = run(model, tmp_path / "out", "--quantizer", "nf4")
    assert result.exit_code == 2
    assert "model.layers.1.mlp.down_proj.weight holds nan at [3, 5]" in result.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_numbers_beyond_float16_are_not_made_infinite(model, tmp_path):
    tensors = {name: np.array(array) for name, array in files.read_safetensors(model / "model.safetensors").items()}
    tensors["model.norm.weight"][7] = 1e5
    files.write_safetensors(model / "model.safetensors", tensors)
    result = run(model, tmp_path / "out", "--quantizer", "nf4", "--dtype", "float16")
    assert result.exit_code == 2 and "model.norm.weight holds numbers that are too large for float16" in result.stderr
    assert run(model, tmp_path / "out", "--quantizer", "nf4", "--dtype", "bfloat16").exit_code == 0


def test_a_model_that_is_quantized_already_is_trained_evaluated_and_merged(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_files.write_rows(tmp_path / "rows.jsonl")
    assert run(model, "quantized", "--quantizer", "nf4", "--double-quant").exit_code == 0
    before = (tmp_path / "quantized" / "model.safetensors").read_bytes()
    quantizer = ["--quantizer", "nf4", "--double-quant"]
    verbs = (
        ["train", "--model", "quantized", "--data", "rows.jsonl", "--steps", "2", "--out", "run"],
        ["train", "--model", "model", "--data", "rows.jsonl", "--steps", "2", "--out", "two", *quantizer],
        ["eval", "--adapter", "run", "--data", "rows.jsonl", "--json"],
        ["eval", "--adapter", "two", "--data", "rows.jsonl", "--json"],
        ["merge", "--adapter", "run", "--data", "rows.jsonl", "--out", "merged"],
    )
    results = [CliRunner().invoke(main, verb) for verb in verbs]
    assert [result.exit_code for result in results] == [0] * 5, [result.output for result in results]
    assert json.loads(results[2].stdout) == json.loads(results[3].stdout)
    assert not open_checkpoint("merged").quantized
    assert (tmp_path / "quantized" / "model.safetensors").read_bytes() == before


def test_the_plan_counts_weights_that_are_quantized_already(model, tmp_path):
    saving.quantize(open_checkpoint(model), tmp_path / "out", make_quantizer("nf4", None, True))
    checkpoint = open_checkpoint(tmp_path / "out")
    planned = memory.frozen_parts(memory.skeleton(checkpoint), checkpoint, "float32", None)
    assert sum(part["bytes"] for part in planned.values()) == refpeft.load(tmp_path / "out").nbytes


# A GGUF file's own blocks


def gguf_file(path: Path, name: str, kind: str) -> Checkpoint:
    config = test_gguf.CONFIGS[name]
    test_gguf.write(path, config, test_gguf.weights(config), gguf.GGMLQuantizationType[kind])
    checkpoint = open_checkpoint(path)
    checkpoint.tokenizer = lambda: None  # it has none
    return checkpoint


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_linear_weights_of_a_gguf_file_stay_in_its_blocks(tmp_path, name, kind):
    checkpoint = gguf_file(tmp_path / "x.gguf", name, kind)
    dense = api.build(checkpoint, "float32")
    kept = api.build(checkpoint, "float32", quantizer=make_quantizer("gguf"))
    quantized = {name for name, weight in kept.frozen.items() if isinstance(weight, Quantized)}
    assert quantized == kept.quantizable
    assert {kept.frozen[name].quantizer.cfg.type for name in quantized} == {kind}
    assert all(np.array_equal(weight(), dense.frozen[name]()) for name, weight in kept.frozen.items())
    other = api.build(checkpoint, "float32", quantizer=make_quantizer("nf4"))
    assert {other.frozen[name].quantizer.name for name in quantized} == {"nf4"}


def test_floats_of_a_gguf_file_are_quantized_to_the_type_that_is_asked_for(tmp_path):
    checkpoint = gguf_file(tmp_path / "x.gguf", "llama", "F16")
    kept = api.build(checkpoint, "float32", quantizer=make_quantizer("gguf", {"type": "Q4_1"}))
    types = {weight.quantizer.cfg.type for weight in kept.frozen.values() if isinstance(weight, Quantized)}
    assert types == {"Q4_1"}


def test_blocks_of_a_type_that_the_quantizer_lacks_are_refused_by_name(tmp_path):
    checkpoint = gguf_file(tmp_path / "x.gguf", "llama", "Q5_0")
    with pytest.raises(
        RefpeftError, match=r"x.gguf: tensor 'model.layers.0.*weight' is of type Q5_0.*leave the quanti"
    ):
        api.build(checkpoint, "float32", quantizer=make_quantizer("gguf"))


# Memory


SHAPES = {  # three of 32 MiB in float32, and little else
    "llama": tiny.TIED_LLAMA | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1},
    "gpt2": tiny.GPT2_SMALL | {"n_embd": 1024, "n_inner": 8192, "n_layer": 1},
}
QUANTIZERS = [name for name, listing in manager.catalogue().items() if listing.kind == "quantizer"]
LARGEST = 1024 * 8192 * 4
MEASURE = """
import sys
import numpy as np
from refpeft import api
from refpeft.models import saving
from refpeft.models.checkpoint import open_checkpoint
from refpeft.quant import make_quantizer

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

what, model, out, name, double = sys.argv[1:]
quantizer = make_quantizer(name, None, double == "True")
quantizer(np.ones((4, 64), "f4"), np.dtype("f4"))()  # what is imported or made once is not counted
checkpoint = open_checkpoint(model)
checkpoint.tokenizer = lambda: None
before = memory("VmRSS")
if what == "quantize":
    saving.quantize(checkpoint, out, quantizer)
    kept = 0
else:
    kept = api.build(checkpoint, "float32", quantizer=quantizer).nbytes
print(memory("VmHWM") - before, memory("VmRSS") - before, kept)
"""


def measured(*arguments) -> list[int]:
    """Bytes beyond the start: at the peak, at the end, and those of the model."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # or malloc keeps freed arrays for later
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture(scope="module", params=[(f, d) for f in SHAPES for d in ("float32", "bfloat16")], ids="-".join)
def large(request, tmp_path_factory) -> Path:
    """A model whose largest tensors are nearly all of it."""
    family, dtype = request.param
    directory, random = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    files.write_json(directory / "config.json", SHAPES[family])
    with files.safetensors_writer(directory / "model.safetensors") as write:
        for name, shape in expected_tensors(from_hf(SHAPES[family])).items():
            write(name, random.standard_normal(shape, "f4").astype(getattr(ml_dtypes, dtype, np.float32)))
    return directory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("quantizer, double", [("nf4", True), *((name, False) for name in QUANTIZERS)])
def test_quantizing_takes_less_than_three_times_the_largest_tensor(large, tmp_path, quantizer, double):
    peak, _, _ = measured("quantize", large, tmp_path / "out", quantizer, double)
    assert peak < 3 * LARGEST


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_quantizing_while_loading_keeps_no_dense_copy(large, tmp_path):
    peak, end, kept = measured("load", large, tmp_path, "nf4", True)
    assert peak < 3 * LARGEST and kept < end < kept + LARGEST // 2
