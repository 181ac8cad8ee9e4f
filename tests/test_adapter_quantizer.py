"""Adapters in 4 bits: saved by a quantizer, loaded into the values that they stand for, measured beside the dense."""

import json

import numpy as np
import pytest
import tiny
import tiny_files
from click.testing import CliRunner
from variants import attached, bare, quantizer

import refpeft
from refpeft import adapters, files, sites
from refpeft.cli import main
from refpeft.errors import RefpeftError

PACKER = quantizer("nf4", double_quant=False)
METHODS = ["lora", "lora-saved", "loftq", "ia3", "ln_tuning", "houlsby", "prompt_tuning", "prefix_tuning"]


def refused(folder, message: str) -> None:
    model = tiny.model()
    with pytest.raises(RefpeftError, match=message) as caught:
        adapters.load(model, folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not model.adapters and not any(site.layers for site in model.sites.values())


@pytest.mark.parametrize("packer", [PACKER, quantizer("int4", False), quantizer("affine", False)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_what_comes_back_is_what_the_quantizer_keeps(name, packer, tmp_path):
    model, adapter = attached("llama", name)
    trained = {key: value.data.copy() for key, value in adapter.params.items()}
    adapters.save(tmp_path / "dense", model)
    adapters.save(tmp_path / "packed", model, quantizer=packer)
    other = bare("llama", name)
    (loaded,) = adapters.load(other, tmp_path / "packed")
    for key, value in loaded.params.items():
        kept = packer(trained[key], value.dtype)()
        assert value.data.shape == trained[key].shape and np.array_equal(value.data, kept), key
    for key, value in loaded.constants.items():
        assert np.array_equal(value.data, adapter.constants[key].data), key
    error = adapters.quantize(model, packer)
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)
    difference = sum(np.square(value.data - trained[key]).sum() for key, value in adapter.params.items())
    assert error == pytest.approx((difference / sum(np.square(value).sum() for value in trained.values())) ** 0.5)
    assert 0.005 < error < 0.2


def test_the_file_is_small_and_no_other_program_takes_it_for_a_dense_one(tmp_path):
    model = tiny.model()
    sites.attach(model, "lora", {"targets": "all-linear", "r": 12})
    adapters.save(tmp_path / "dense", model)
    adapters.save(tmp_path / "packed", model, quantizer=PACKER)
    config = files.read_json(tmp_path / "packed" / adapters.CONFIG)
    assert config["peft_type"] == "REFPEFT" and config["method"] == "lora"
    assert config["quantizer"]["quantizer"] == "nf4" and config["quantizer"]["double_quant"] is False
    dense, packed = (files.read_safetensors(tmp_path / name / adapters.TENSORS) for name in ("dense", "packed"))
    assert sum(a.nbytes for a in packed.values()) < 0.15 * sum(a.astype("f4").nbytes for a in dense.values())
    assert {name.rpartition(".")[2] for name in packed} == {"packed", "absmax"}


def test_peft_refuses_it(tmp_path):
    peft = pytest.importorskip("peft")
    adapters.save(tmp_path, attached("llama", "lora")[0], quantizer=PACKER)
    with pytest.raises((ValueError, KeyError), match="REFPEFT"):
        peft.PeftConfig.from_pretrained(str(tmp_path))


def test_several_adapters_are_each_packed(tmp_path):
    model, _ = attached("llama", "lora")
    tiny.scramble(sites.attach(model, "ia3"))
    adapters.save(tmp_path, model, quantizer=PACKER)
    other = tiny.model()
    assert [adapter.name for adapter in adapters.load(other, tmp_path)] == ["lora", "ia3"]
    adapters.quantize(model, PACKER)
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    adapters.save(tmp_path, attached("llama", "lora")[0], quantizer=PACKER)
    return tmp_path


A0 = "base_model.model.model.layers.0.self_attn.q_proj.A"


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (f"{A0}.packed", None, rf"tensor '{A0}.packed' is missing"),
        (f"{A0}.absmax", None, rf"tensor '{A0}.absmax' is missing"),
        (f"{A0}.levels", np.zeros(16, "f4"), rf"tensor '{A0}.levels' is not expected"),
        (f"{A0}.packed", np.zeros(35, "u1"), rf"tensor '{A0}.packed' is uint8 \[35\]: expected uint8 \[36\]"),
        (f"{A0}.packed", np.zeros(36, "i1"), rf"tensor '{A0}.packed' is int8 \[36\]: expected uint8 \[36\]"),
        (f"{A0}.absmax", np.zeros(2, "f8"), rf"tensor '{A0}.absmax' is float64 \[2\]: expected float32 \[2\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(saved, name, array, message):
    tensors = {key: value.copy() for key, value in files.read_safetensors(saved / adapters.TENSORS).items()}
    tensors.pop(name, None)
    files.write_safetensors(saved / adapters.TENSORS, tensors | ({} if array is None else {name: array}))
    refused(saved, message)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "config key quantizer says quantizer None"),
        ("nf4", "config key quantizer says quantizer None"),
        ({"quantizer": "nf4"}, "options None"),
        ({"quantizer": "../evil.py", "options": {}, "double_quant": False}, "quantizer '../evil.py'"),
        ({"quantizer": "evil", "options": {}, "double_quant": False}, "no quantizer is named 'evil'"),
        ({"quantizer": "lora", "options": {}, "double_quant": False}, "'lora' is not a quantizer"),
        ({"quantizer": "nf4", "options": {"block": 63}, "double_quant": False}, "nf4.block is 63"),
        ({"quantizer": "nf4", "options": {"block": 32}, "double_quant": False}, r"absmax' is float32 \[2\]: expected"),
    ],
)
def test_a_quantizer_that_is_not_understood_is_refused(saved, said, message):
    config = files.read_json(saved / adapters.CONFIG)
    files.write_json(saved / adapters.CONFIG, config | {"quantizer": said})
    refused(saved, message)


def test_in_pefts_form_there_is_no_quantizer(tmp_path):
    adapters.save(tmp_path, attached("llama", "lora")[0])
    config = files.read_json(tmp_path / adapters.CONFIG)
    files.write_json(tmp_path / adapters.CONFIG, config | {"quantizer": {"quantizer": "nf4", "options": {}}})
    refused(tmp_path, "quantizer = .* is not something that refpeft computes for LORA")


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")

    def invoke(*arguments: str, code: int = 0):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == code, result.output
        return result

    return invoke


TRAIN = ["train", "--model", "./model", "--data", "rows.jsonl", "--steps", "6", "--lr", "0.01", "--batch", "4"]
EVAL = ["--eval-data", "rows.jsonl"]


def test_a_run_saves_it_says_what_it_costs_and_its_adapter_is_used(run, tmp_path):
    options = ["--adapter-quantizer", "nf4", "--set", "nf4.block=32"]
    told = run(*TRAIN, *EVAL, *options, "--out", "packed").stdout
    run(*TRAIN, *EVAL, "--out", "dense")
    found = json.loads(run(*TRAIN, *EVAL, *options, "--out", "again", "--json").stdout)
    assert f"the adapter is saved in nf4, {found['adapter']['error']:.2%} (RMS) off the trained one" in told
    before, after = found["scores"]["held-out loss"]
    assert found["scores"]["with the adapter in nf4"] == ["", f"{found['adapter']['loss']:.4f}"]
    assert "with the adapter in nf4" in told and f"{float(after):.4f}" in told and float(after) < float(before)
    losses = [json.loads(run("eval", "--adapter", name, "--json").stdout)["eval_loss"] for name in ("packed", "dense")]
    assert losses[0] == pytest.approx(found["adapter"]["loss"], rel=1e-5)
    assert f"{losses[1]:.4f}" == after
    sizes = [(tmp_path / name / adapters.TENSORS).stat().st_size for name in ("packed", "dense")]
    assert sizes[0] < sizes[1] / 2
    checkpoint = files.read_safetensors(next((tmp_path / "packed" / "checkpoints").glob("*")) / "state.safetensors")
    assert checkpoint["values"].dtype == np.float32  # they are dense, and resuming knows nothing of 4 bits
    run("generate", "--adapter", "packed", "is 3 even?", "--max-tokens", "4")
    run("merge", "--adapter", "packed", "--out", "merged")
    model, merged = refpeft.load("model", "packed"), refpeft.load("merged")
    assert abs(model(tiny.ids()).data - merged(tiny.ids()).data).max() < 1e-4


def test_base_and_adapter_may_both_be_in_4_bits(run):
    run(*TRAIN, *EVAL, "--quantizer", "nf4", "--double-quant", "--method", "loftq", "--adapter-quantizer", "int4")
    loss = json.loads(run("eval", "--adapter", "runs/model-loftq", "--json").stdout)["eval_loss"]
    assert np.isfinite(loss)


def test_without_held_out_rows_the_error_is_said(run):
    assert "saved in nf4" in run(*TRAIN, "--adapter-quantizer", "nf4").stdout


def test_what_cannot_be_kept_is_said_before_the_first_step(run, tmp_path):
    result = run(*TRAIN, "--adapter-quantizer", "gguf", code=2)
    assert "model.layers.0.self_attn.q_proj.A" in result.output and "32" in result.output
    assert not (tmp_path / "runs").exists()
