"""LoftQ: Q + s B A comes nearer to W with iterations and with r, for any alpha and quantizer; files bring Q back."""

import json
import tomllib

import numpy as np
import pytest
import tiny
import tiny_files
from click.testing import CliRunner
from variants import quantizer

import refpeft
from refpeft import adapters, files, sites
from refpeft.cli import main
from refpeft.errors import RefpeftError
from refpeft.quant import Quantized

QUANTIZERS = [("nf4", False), ("nf4", True), ("int4", False), ("affine", True), ("mxfp4", False), ("dynamic8", False)]


def attached(packer, **options) -> tuple:
    model = tiny.model("llama", quantizer=packer)
    return model, sites.attach(model, "loftq", options)


def distance(packer, **options) -> float:
    """|W - Q - s B A|, Frobenius, over all targets."""
    (_, adapter), plain = attached(packer, **options), tiny.model("llama")
    total = 0.0
    for layer in adapter.layers:
        name, p = layer.site.name, layer.arrays
        s = adapter.cfg.scale(layer.site)
        total += np.square(plain.sites[name].weight() - layer.site.weight() - s * p.B @ p.A).sum()
    return total**0.5


def lost(packer) -> float:
    """|W - Q| over LoftQ's default targets, where Q is W quantized."""
    packed, plain = tiny.model("llama", quantizer=packer), tiny.model("llama")
    names = [name for name, site in plain.sites.items() if {"q", "v"} & set(site.roles)]
    errors = [plain.sites[name].weight() - packed.sites[name].weight() for name in names]
    return np.sqrt(sum(np.square(error).sum() for error in errors))


@pytest.mark.parametrize(("name", "double_quant"), QUANTIZERS)
def test_the_distance_falls_with_every_iteration_and_with_the_rank(name, double_quant):
    packer = quantizer(name, double_quant)
    distances = [lost(packer)] + [distance(packer, r=2, iterations=n) for n in (1, 2, 3, 4, 5)]
    assert distances == sorted(distances, reverse=True) and len(set(distances)) == 6
    distances = [lost(packer)] + [distance(packer, r=r) for r in (1, 2, 4, 8, 11)]
    assert distances == sorted(distances, reverse=True) and len(set(distances)) == 6
    assert distances[-1] < distances[0] / 3


def test_more_iterations_never_lead_away_again():
    packer = quantizer("nf4", True)
    distances = [distance(packer, r=8, iterations=n) for n in range(1, 13)]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"alpha": 64.0}, {"rslora": True}])
def test_any_alpha_starts_at_the_same_function(options):
    (model, adapter), (other, scaled) = attached(quantizer()), attached(quantizer(), **options)
    assert adapter.cfg.scale(adapter.sites[0]) != scaled.cfg.scale(scaled.sites[0])
    assert abs(model(tiny.ids()).data - other(tiny.ids()).data).max() < 1e-12
    assert all(
        np.array_equal(a.site.weight(), b.site.weight()) for a, b in zip(adapter.layers, scaled.layers, strict=True)
    )


def test_one_iteration_is_the_best_approximation_of_what_quantizing_lost():
    _, adapter = attached(quantizer(), iterations=1, r=3)
    packed, plain = tiny.model("llama", quantizer=quantizer()), tiny.model("llama")
    for layer in adapter.layers:
        name, p = layer.site.name, layer.arrays
        assert np.array_equal(layer.site.weight(), packed.sites[name].weight())
        error = plain.sites[name].weight() - packed.sites[name].weight()
        U, S, Vt = np.linalg.svd(error)
        assert np.allclose(adapter.cfg.scale(layer.site) * p.B @ p.A, (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-13)
        assert np.allclose(np.square(p.A).sum(axis=1), np.square(p.B).sum(axis=0))  # balanced, as in PEFT


def test_the_frozen_weight_is_in_the_quantizers_format():
    packer = quantizer()
    model, adapter = attached(packer)
    for layer in adapter.layers:
        assert isinstance(layer.site.weight, Quantized) and layer.site.weight.quantizer is packer
        assert "absmax.codes" in layer.site.weight.parts
    assert model.nbytes == tiny.model("llama", quantizer=packer).nbytes


@pytest.mark.parametrize(
    ("packer", "options", "message"),
    [
        (None, {}, r"loftq: model.layers.0.self_attn.q_proj is dense: give a quantizer, such as nf4"),
        (quantizer(), {"targets": ["lm_head"]}, "loftq: lm_head is dense"),
        (quantizer(), {"iterations": 0}, "expected iterations of at least 1"),
        (quantizer(), {"alpha": -1}, "alpha is -1: expected a number above 0"),
    ],
)
def test_what_it_cannot_do_is_said(packer, options, message):
    with pytest.raises(RefpeftError, match=message):
        attached(packer, **options)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """(the model, the directory of its adapter, which was trained a little)."""
    model, adapter = attached(quantizer(), r=3)
    tiny.scramble(adapter)
    adapters.save(tmp_path, model)
    return model, tmp_path


def test_a_file_brings_the_frozen_weights_back_without_a_decomposition(saved, monkeypatch):
    model, folder = saved
    monkeypatch.setattr(np.linalg, "eigh", None)
    other = tiny.model("llama", quantizer=quantizer())
    (adapter,) = adapters.load(other, folder)
    for ours, theirs in zip(adapter.layers, model.adapters[0].layers, strict=True):
        parts = ours.site.weight.parts, theirs.site.weight.parts
        assert all(np.array_equal(parts[0][name], parts[1][name]) for name in parts[1])
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)
    names = set(files.read_safetensors(folder / adapters.TENSORS))
    assert {name.rpartition(".")[2] for name in names} == {"A", "B", "A0", "B0"}


@pytest.mark.parametrize(
    ("packer", "found"),
    [
        (None, r"dense"),
        (quantizer("nf4", False), r"nf4 \(block = 64[^)]*\)"),
        (quantizer("nf4", True, block=128), r"nf4 \(block = 128.*"),
        (quantizer("int4", False), "int4"),
    ],
)
def test_it_belongs_to_the_weights_that_it_was_fitted_to(saved, packer, found):
    model = tiny.model("llama", quantizer=packer)
    message = rf"fitted to weights that were nf4 \(block = 64.*\) with double quantization, and these are {found}"
    with pytest.raises(RefpeftError, match=message):
        adapters.load(model, saved[1])
    assert not model.adapters


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "fitted to weights that were dense, and these are nf4"),
        ("nf4", "config key base says quantizer None"),
        (
            {"quantizer": "../evil.py", "options": {}, "double_quant": True},
            "base says quantizer '../evil.py'",
        ),
        ({"quantizer": "lora", "options": {}, "double_quant": True}, "'lora' is not a quantizer"),
        ({"quantizer": "nf4", "options": {"size": 3}, "double_quant": True}, "unknown key 'nf4.size'"),
    ],
)
def test_a_base_that_is_not_understood_is_refused(saved, base, message):
    file = saved[1] / adapters.CONFIG
    config = files.read_json(file)
    files.write_json(file, config | {"base": base})
    with pytest.raises(RefpeftError, match=message):
        adapters.load(tiny.model("llama", quantizer=quantizer()), saved[1])
    config.pop("base")
    files.write_json(file, config)
    with pytest.raises(RefpeftError, match="expected 'base'"):
        adapters.load(tiny.model("llama", quantizer=quantizer()), saved[1])


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


TRAIN = "train --model ./model --data rows.jsonl --eval-data rows.jsonl --method loftq --quantizer nf4 --double-quant"
OPTIONS = "--set loftq.r=2 --steps 6 --lr 0.01 --batch 4 --set train.save_every=3 --set loftq.dropout=0.1"


def test_a_run_is_resumed_to_the_same_bits_and_its_adapter_is_used_and_merged(run, tmp_path):
    run(*TRAIN.split(), *OPTIONS.split(), "--out", "whole")
    run(*TRAIN.split(), *OPTIONS.split(), "--out", "again")
    for name in (adapters.TENSORS, adapters.CONFIG):
        (tmp_path / "again" / name).unlink()
    files.write_text(tmp_path / "again" / "metrics.jsonl", "")
    (tmp_path / "again" / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    run("train", "--resume", "--out", "again")
    assert (tmp_path / "whole" / adapters.TENSORS).read_bytes() == (tmp_path / "again" / adapters.TENSORS).read_bytes()

    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    found = json.loads(run("eval", "--adapter", "whole", "--json"))
    assert found["eval_loss"] == pytest.approx(records[-1]["eval_loss"], rel=1e-5)
    assert tomllib.loads((tmp_path / "whole" / "run.toml").read_text())["loftq"]["iterations"] == 5
    run("generate", "--adapter", "whole", "is 3 even?", "--max-tokens", "4")
    run("merge", "--adapter", "whole", "--out", "merged")
    model, merged = refpeft.load("model", "whole", "nf4", double_quant=True), refpeft.load("merged")
    assert abs(model(tiny.ids()).data - merged(tiny.ids()).data).max() < 1e-4
    assert "loftq" in run(*TRAIN.split(), *OPTIONS.split(), "--dry-run")


def test_a_plan_without_a_quantizer_is_refused_as_the_run_would_be(run):
    result = CliRunner().invoke(main, [*TRAIN.partition(" --quantizer")[0].split(), "--dry-run"])
    assert result.exit_code == 2
    assert "loftq: model.layers.0.self_attn.q_proj is dense: give a quantizer, such as nf4" in result.stderr
