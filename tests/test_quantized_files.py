"""Quantized models as files: bitsandbytes' layouts and refpeft's own, and how such a file can be wrong."""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
import tiny_files
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import has_constants

import refpeft
from refpeft import api, files, manager, tensor
from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.models import saving
from refpeft.models.checkpoint import linear_weights, open_checkpoint
from refpeft.models.config import from_hf
from refpeft.quant import Quantized, make_quantizer

IDS = np.arange(12)[None]
QUANTIZERS = [name for name, listing in manager.catalogue().items() if listing.kind == "quantizer"]
TWICE = [name for name in QUANTIZERS if name != "int8" and has_constants(name)]  # bitsandbytes has no such int8
UP = "model.layers.0.mlp.up_proj"  # (32, 32): 16 blocks of 64
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def written(directory: Path, quantizer: str = "nf4", double_quant: bool = False, name: str = "tied") -> Path:
    """A tiny model quantized by refpeft."""
    size = {"n_embd": 32} if name == "gpt2" else {"hidden_size": 32, "intermediate_size": 32}
    source = tiny_files.write_model(directory / "source", name, **size)
    chosen = make_quantizer(quantizer, None, double_quant)
    saving.quantize(open_checkpoint(source), directory / "quantized", chosen)
    return directory / "quantized"


def change(directory: Path, tensors: dict | None = None, scheme: dict | None = None) -> None:
    """Puts other tensors into the file (None: takes one out), and other values into its quantization_config."""
    path = directory / "model.safetensors"
    found = {name: np.array(array) for name, array in files.read_safetensors(path).items()} | (tensors or {})
    files.write_safetensors(path, {name: array for name, array in found.items() if array is not None})
    config = files.read_json(directory / "config.json")
    config["quantization_config"] |= scheme or {}
    files.write_json(directory / "config.json", config)


def stored(directory: Path, name: str) -> np.ndarray:
    return np.array(files.read_safetensors(directory / "model.safetensors")[name])


def text(value) -> np.ndarray:
    return np.frombuffer((value if isinstance(value, str) else json.dumps(value)).encode(), np.uint8)


# What is written is read back


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "gpt2"])
def test_the_weights_that_may_be_quantized_are_those_of_the_model(name):
    model = tiny.model(name)
    found = linear_weights(from_hf(tiny.CONFIGS[name]))
    assert found == {weight: model.frozen[weight].shape for weight in model.quantizable}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_a_model_written_in_any_quantizer_s_format_is_the_one_quantized_while_loading(
    tmp_path, name, quantizer, double_quant
):
    if double_quant and quantizer not in TWICE:
        pytest.skip("there is no such form")
    path = written(tmp_path, quantizer, double_quant, name)
    model = refpeft.load(path)
    expected = refpeft.load(tmp_path / "source", quantizer=quantizer, double_quant=double_quant)
    assert np.array_equal(model(IDS).data, expected(IDS).data)
    assert model.nbytes == expected.nbytes
    again = refpeft.load(path, quantizer=quantizer, double_quant=double_quant)
    assert np.array_equal(again(IDS).data, expected(IDS).data)
    saving.save(model, tmp_path / "saved")
    first, second = (files.read_safetensors(p / "model.safetensors") for p in (path, tmp_path / "saved"))
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_a_file_has_quantized_goes_to_a_device_and_back_to_a_file(tmp_path, monkeypatch, quantizer):
    path = written(tmp_path, quantizer, double_quant=quantizer in TWICE)
    expected, xp = refpeft.load(path), device.install(monkeypatch)
    checkpoint = open_checkpoint(path)
    model = api.build(checkpoint, "float32", xp)
    with tensor.plain():  # a device has no other pairs
        assert np.array_equal(to_host(model(IDS).data), expected(IDS).data)
    saving.save(model, tmp_path / "saved")
    first, second = (files.read_safetensors(p / "model.safetensors") for p in (path, tmp_path / "saved"))
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_weights_are_made_the_dtype_that_is_asked_for_before_they_are_quantized(tmp_path, dtype):
    source = tiny_files.write_model(tmp_path / "source")
    summary = saving.quantize(open_checkpoint(source), tmp_path / "out", make_quantizer("nf4"), dtype)
    config = files.read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == (dtype or "float32")
    assert json.loads(stored(tmp_path / "out", STATE).tobytes())["dtype"] == (dtype or "float32")
    norm = stored(tmp_path / "out", "model.norm.weight")
    assert norm.dtype == {None: np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    weight = stored(source, f"{UP}.weight").astype(norm.dtype).astype("f4")
    packed = make_quantizer("nf4")(weight, np.dtype("f4")).parts["packed"]
    assert np.array_equal(stored(tmp_path / "out", f"{UP}.weight")[:, 0], packed)
    assert 4.5 <= summary.bits < 4.7 and 0.08 < summary.error < 0.1


def test_of_what_bitsandbytes_brings_only_what_is_needed_is_kept(tmp_path):
    """4 bits and the constants: the code books, which are the built-in ones, take no memory."""
    model = refpeft.load(written(tmp_path, double_quant=True))
    weight = model.frozen[f"{UP}.weight"]
    assert set(weight.parts) == {"packed", "absmax.codes", "absmax.absmax", "absmax.offset"}
    quantizers = {w.quantizer for w in model.frozen.values() if isinstance(w, Quantized)}
    assert len(quantizers) == 1


@pytest.mark.parametrize("part", ["quant_map", "nested_quant_map"])
def test_weights_are_decoded_by_the_map_in_the_file(tmp_path, part):
    """The 8-bit map that bitsandbytes before 0.50 wrote on the CPU, for one, has another first level."""
    path = written(tmp_path, double_quant=True)
    plain = refpeft.load(path).frozen[f"{UP}.weight"]()
    levels = stored(path, f"{UP}.weight.{part}")
    first = stored(path, f"{UP}.weight")[0, 0] >> 4 if part == "quant_map" else stored(path, f"{UP}.weight.absmax")[0]
    levels[first] += 0.125
    change(path, {f"{UP}.weight.{part}": levels})
    model = refpeft.load(path)
    changed = model.frozen[f"{UP}.weight"]()
    assert changed[0, 0] != plain[0, 0] and np.mean(changed == plain) > 0.5
    saving.save(model, tmp_path / "saved")
    assert np.array_equal(stored(tmp_path / "saved", f"{UP}.weight.{part}"), levels)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_codes_may_lie_in_floats(tmp_path, dtype):
    """bnb_4bit_quant_storage, for FSDP: the same bytes under another name."""
    path = written(tmp_path)
    expected = refpeft.load(path)(IDS).data
    change(path, {f"{UP}.weight": stored(path, f"{UP}.weight").reshape(-1).view(dtype)[:, None]})
    assert np.array_equal(refpeft.load(path)(IDS).data, expected)


def test_weights_that_are_dense_in_a_quantized_file_stay_dense(tmp_path):
    path = written(tmp_path)
    names = [name for name in files.read_safetensors(path / "model.safetensors") if name.startswith(UP)]
    dense = stored(tmp_path / "source", f"{UP}.weight")
    change(path, dict.fromkeys(names) | {f"{UP}.weight": dense}, {"llm_int8_skip_modules": [UP, "lm_head"]})
    for quantizer in (None, "nf4"):
        model = refpeft.load(path, quantizer=quantizer)
        assert np.array_equal(model.frozen[f"{UP}.weight"](), dense)
        assert isinstance(model.frozen["model.layers.1.mlp.up_proj.weight"], Quantized)
    saving.save(model, tmp_path / "saved")
    scheme = files.read_json(tmp_path / "saved" / "config.json")["quantization_config"]
    assert scheme["llm_int8_skip_modules"] == [UP, "lm_head"]
    assert np.array_equal(refpeft.load(tmp_path / "saved")(IDS).data, model(IDS).data)


def test_a_quantized_model_that_became_dense_is_saved_as_such(tmp_path):
    model = refpeft.load(written(tmp_path))
    expected = model(IDS).data
    for name, weight in model.frozen.items():
        model.frozen[name] = refpeft.quant.Dense(weight(), model.dtype)
    saving.save(model, tmp_path / "saved")
    assert "quantization_config" not in files.read_json(tmp_path / "saved" / "config.json")
    assert np.array_equal(refpeft.load(tmp_path / "saved")(IDS).data, expected)


def test_weights_quantized_in_different_ways_are_not_saved(tmp_path):
    model = refpeft.load(tiny_files.write_model(tmp_path / "source"), quantizer="nf4")
    other = refpeft.load(tmp_path / "source", quantizer="nf4", options={"block": 32})
    model.frozen[f"{UP}.weight"] = other.frozen[f"{UP}.weight"]
    with pytest.raises(RefpeftError, match=r"in different ways, nf4 \(block = 64.* and nf4 \(block = 32"):
        saving.save(model, tmp_path / "saved")


# What is asked for and what is there


@pytest.mark.parametrize(
    "asked",
    [
        {"quantizer": "affine"},
        {"quantizer": "nf4", "options": {"block": 128}},
        {"quantizer": "nf4", "double_quant": True},
    ],
    ids=str,
)
def test_another_format_than_the_file_s_is_refused_with_what_to_do(tmp_path, asked):
    path = written(tmp_path)
    with pytest.raises(RefpeftError, match=r"is quantized already, as nf4 \(block = 64.*leave the quantizer out"):
        refpeft.load(path, **asked)


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    path = written(tmp_path)
    with pytest.raises(RefpeftError, match="is quantized already: take the original weights"):
        saving.quantize(open_checkpoint(path), tmp_path / "again", make_quantizer("nf4"))


def test_int8_has_no_double_quantization_in_bitsandbytes(tmp_path):
    source = tiny_files.write_model(tmp_path / "source")
    with pytest.raises(RefpeftError, match="no double quantization of int8"):
        saving.quantize(open_checkpoint(source), tmp_path / "out", make_quantizer("int8", None, True))
    assert not (tmp_path / "out").exists()


def test_a_stranger_s_type_runs_no_file_either(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    path, kind = written(tmp_path), str(tmp_path / "evil.py")
    change(path, {STATE: None, STATE[:-3] + kind: stored(path, STATE)}, {"bnb_4bit_quant_type": kind})
    with pytest.raises(RefpeftError, match=r"evil\.py': expected nf4 or fp4"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["nf4_normal", "af4", 4, ["nf4"], None])
def test_another_type_of_bitsandbytes_is_refused(tmp_path, kind):
    path = written(tmp_path)
    change(path, scheme={"bnb_4bit_quant_type": kind})
    with pytest.raises(RefpeftError, match="expected nf4 or fp4"):
        open_checkpoint(path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", None, 3])
def test_other_ways_of_quantizing_are_refused_by_name(tmp_path, method):
    path = written(tmp_path)
    change(path, scheme={"quant_method": method})
    with pytest.raises(RefpeftError, match=f"quant_method {method!r}.*take the original weights"):
        open_checkpoint(path)


def test_a_scheme_of_before_quant_method_is_bitsandbytes(tmp_path):
    path = written(tmp_path)
    config = files.read_json(path / "config.json")
    del config["quantization_config"]["quant_method"]
    files.write_json(path / "config.json", config)
    assert open_checkpoint(path).quantized


def test_a_stranger_s_config_runs_no_file(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    path = written(tmp_path, "affine")
    change(path, scheme={"quantizer": str(tmp_path / "evil.py")})
    with pytest.raises(RefpeftError, match="expected a quantizer's name"):
        open_checkpoint(path)


# Wrong files


NESTED = f"{UP}.weight.nested_absmax"
WRONG = {  # (what is changed in the tensors, what the message says besides file and tensor)
    "absmax cut short": (lambda t: {f"{UP}.weight.absmax": t[f"{UP}.weight.absmax"][:-1]}, r"expected uint8 \[16\]"),
    "absmax not quantized": (
        lambda t: {f"{UP}.weight.absmax": np.ones(16, "f4")},
        r"is float32 \[16\], expected uint8",
    ),
    "no absmax": (lambda t: {f"{UP}.weight.absmax": None}, "is missing"),
    "no nested_absmax": (lambda t: {NESTED: None}, "is missing"),
    "nested_absmax too long": (lambda t: {NESTED: np.ones(2, "f4")}, r"expected float32 \[1\]"),
    "no nested map": (lambda t: {f"{UP}.weight.nested_quant_map": None}, "is missing"),
    "15 levels": (lambda t: {f"{UP}.weight.quant_map": np.ones(15, "f4")}, r"expected float32 \[16\]"),
    "a level that is no number": (lambda t: {f"{UP}.weight.quant_map": np.full(16, np.nan, "f4")}, "not finite"),
    "codes cut short": (lambda t: {f"{UP}.weight": t[f"{UP}.weight"][:-1]}, "511 bytes of uint8, expected 512"),
    "codes of another dtype": (lambda t: {f"{UP}.weight": np.zeros(64, "i8")}, "512 bytes of int64"),
    "no codes": (lambda t: {f"{UP}.weight": None}, "is missing"),
    "no state": (lambda t: {STATE: None}, "has no quant_state"),
    "JSON garbage": (lambda t: {STATE: text("{nonsense")}, "is not valid JSON"),
    "JSON of another kind": (lambda t: {STATE: text("[1]")}, "is a JSON list"),
    "JSON too deep": (lambda t: {STATE: text("[" * 4000)}, "is not valid JSON"),
    "JSON too long": (lambda t: {STATE: text(" " * 5000)}, "expected the bytes of a short JSON text"),
    "JSON not in bytes": (lambda t: {STATE: np.zeros(4, "f4")}, "expected the bytes of a short JSON text"),
    "another type": (lambda t: {STATE: None, STATE[:-3] + "fp4": t[STATE]}, "is fp4; the config says .* nf4"),
    "two types": (lambda t: {STATE[:-3] + "fp4": t[STATE]}, "is fp4 and nf4; the config says"),
    "an unknown tensor": (lambda t: {f"{UP}.weight.zeros": np.zeros(1, "u1")}, "is not part of this format"),
}
STATES = {  # what is changed in the JSON
    "blocksize": ({"blocksize": 100}, "block size that refpeft has not: nf4.block is 100"),
    "another blocksize": ({"blocksize": 32}, r"expected uint8 \[32\]"),
    "no blocksize": ({"blocksize": None}, "has block sizes None and 256"),
    "nested_blocksize": ({"nested_blocksize": [1]}, r"has block sizes 64 and \[1\]"),
    "nested_offset": ({"nested_offset": "0.1"}, "has nested_offset '0.1', expected a float32 number"),
    "an offset beyond float32": ({"nested_offset": 1e300}, "has nested_offset 1e.300"),
    "an endless offset": ({"nested_offset": float("inf")}, "has nested_offset inf"),
    "shape": ({"shape": [1, 1024]}, r"says that the weight is nf4 \[1, 1024\]; the config says nf4 \[32, 32\]"),
    "shape of no numbers": ({"shape": None}, "says that the weight is nf4 None"),
    "quant_type": ({"quant_type": "fp4"}, "says that the weight is fp4"),
}


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("nested"), double_quant=True)


def fails(path: Path, tensor: str, message: str) -> None:
    with pytest.raises(RefpeftError, match=message) as error:
        api.build(open_checkpoint(path), "float32")
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value) and tensor in str(error.value)


def copy(nested: Path, directory: Path) -> Path:
    directory.mkdir()
    for file in nested.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tensor_is_one_line_that_names_it(tmp_path, nested, name):
    changes, message = WRONG[name]
    path = copy(nested, tmp_path / "x")
    change(path, changes(files.read_safetensors(path / "model.safetensors")))
    fails(path, f"{UP}.weight", message)


@pytest.mark.parametrize("name", STATES)
def test_a_wrong_state_is_one_line_that_names_it(tmp_path, nested, name):
    changes, message = STATES[name]
    path = copy(nested, tmp_path / "x")
    change(path, {STATE: text(json.loads(stored(path, STATE).tobytes()) | changes)})
    fails(path, f"{UP}.weight", message)


@pytest.mark.parametrize("name", ["lm_head.weight.absmax", "lm_head.SCB", "model.embed_tokens.weight.absmax"])
def test_quantized_heads_and_embeddings_are_refused_as_such(tmp_path, name):
    path = written(tmp_path)
    change(path, {name: np.ones(32, "f4")})
    fails(path, name, "of a quantized head or embedding, and these are not supported")


@pytest.mark.parametrize(
    "name, value, message",
    [
        (f"{UP}.SCB", np.ones(31, "f4"), r"expected float32 \[32\]"),
        (f"{UP}.SCB", None, "is missing"),
        (f"{UP}.weight", np.ones((32, 32), "u1"), r"is uint8 \[32, 32\], expected int8"),
        (f"{UP}.weight_format", np.array(2, "u1"), "is not 0"),
        (f"{UP}.weight.absmax", np.ones(1, "f4"), "is not part of this format"),
    ],
)
def test_wrong_tensors_of_int8_are_one_line(tmp_path, name, value, message):
    path = written(tmp_path, "int8")
    change(path, {name: value})
    fails(path, name, message)


@pytest.mark.parametrize(
    "name, value, message",
    [
        (f"{UP}.weight.packed", np.ones(511, "u1"), r"is uint8 \[511\], expected uint8 \[512\]"),
        (f"{UP}.weight.packed", None, "is missing"),
        (f"{UP}.weight.scale", np.ones((32, 1), "f2"), "is float16"),
        (f"{UP}.weight.levels", np.ones(16, "f4"), "is not part of this format"),
        (f"{UP}.weight", np.ones((32, 32), "u1"), "is not part of this format"),
    ],
)
def test_wrong_tensors_of_refpeft_s_own_form_are_one_line(tmp_path, name, value, message):
    path = written(tmp_path, "affine")
    change(path, {name: value})
    fails(path, f"{UP}.weight", message)


@pytest.mark.parametrize(
    "scheme, message",
    [
        ({"quantizer": "nf5"}, "no quantizer is named 'nf5'"),
        ({"quantizer": 5}, "expected a quantizer's name"),
        ({"options": {"gruop": 3}}, "gruop"),
        ({"options": {"group": "many"}}, "group"),
        ({"options": None}, "expected a quantizer's name, its options"),
        ({"double_quant": 1}, "expected a quantizer's name, its options, true or false"),
    ],
)
def test_a_wrong_scheme_of_refpeft_s_own_is_one_line(tmp_path, scheme, message):
    path = written(tmp_path, "affine")
    change(path, scheme=scheme)
    with pytest.raises(RefpeftError, match=message) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_a_shape_that_the_file_cannot_hold_makes_no_array(tmp_path):
    path = written(tmp_path, "affine")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 10**8}))
    with pytest.raises(RefpeftError, match=r"too few for the \[100000000, 32\] that the config says"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_a_model_or_an_error_of_ours(nested, data):
    where = data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    content = bytearray((nested / where).read_bytes())
    state = content.find(b'{"quant_type"')  # most bits are weights: half of the flips go where something can go wrong
    starts = st.integers(0, len(content) - 1)
    places = starts if state < 0 else starts | st.integers(8, 9000) | st.integers(state, state + 200)
    for at in data.draw(st.lists(places.filter(lambda at: at < len(content)), min_size=1, max_size=4)):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        path = copy(nested, Path(folder) / "x")
        (path / where).write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.tokenizer = lambda: None
            assert api.build(checkpoint, "float32")(IDS).shape[1] == IDS.shape[1]
        except RefpeftError as error:
            assert str(path) in str(error) or "config" in str(error)
