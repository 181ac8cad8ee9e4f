"""AdapterHub's files without AdapterHub: both directions, and what is refused."""

import json

import numpy as np
import pytest
import tiny
import tiny_files
from click.testing import CliRunner

from refpeft import adapterhub, adapters, files, sites
from refpeft.cli import main
from refpeft.errors import RefpeftError

FACTORED = {"size": 6, "n": 2, "rank": 2, "norms": False, "activation": "gelu"}
ADAPTERS = {
    "pfeiffer": ("pfeiffer", {"size": 5}),
    "pfeiffer-inside": ("pfeiffer", {"size": 5, "targets": ["@mlp_out"], "layers": [1]}),
    "houlsby": ("houlsby", {"size": 7, "norms": False, "activation": "silu"}),
    "houlsby-attention": ("houlsby", {"size": 24, "norms": False, "targets": ["@attn_out"]}),
    "compacter": ("compacter", FACTORED),
    "compacter_pp": ("compacter_pp", FACTORED | {"targets": ["@block_out"]}),
}


def written(folder, family="llama", name="houlsby", label="mine"):
    """(a model, its adapter) that were written into `folder`."""
    model = tiny.model(family)
    adapter = sites.attach(model, *ADAPTERS[name])
    tiny.scramble(adapter)
    for tensor in adapter.params.values():
        tensor.data[...] = tensor.data.astype("f4")
    adapterhub.save(folder, model, adapter, label)
    return model, adapter


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_written_is_read_to_the_same_function(family, name, tmp_path):
    model, adapter = written(tmp_path, family, name)
    other = tiny.model(family)
    (loaded,) = adapters.load(other, tmp_path)
    assert loaded.size == adapter.size
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)


@pytest.mark.parametrize("label", ["mine", "adapters", "a.b", "shared_parameters"])
def test_any_name_is_read(label, tmp_path):
    model, _ = written(tmp_path, "gpt2", "compacter", label)
    names = files.read_safetensors(tmp_path / adapterhub.TENSORS)
    assert f"transformer.h.0.output_adapters.adapters.{label}.adapter_down.0.W_left" in names
    assert f"transformer.shared_parameters.{label}.phm_rule" in names
    other = tiny.model("gpt2")
    adapters.load(other, tmp_path)
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_parallel": True}, "is_parallel: it reads the residual stream before its normalization"),
        ({"original_ln_before": True}, "mh_adapter with original_ln_before reads the sum with the residual"),
        ({"original_ln_after": False}, "original_ln_after is False; refpeft computes bottlenecks where it is True"),
        ({"residual_before_ln": False}, "residual_before_ln is False"),
        ({"scaling": 4.0}, "scaling is 4.0; refpeft computes bottlenecks where it is 1.0"),
        ({"use_gating": True}, "use_gating = True is not something that refpeft computes for AdapterHub"),
        ({"ln_before": True}, "ln_before = True is not something"),
        ({"inv_adapter": "nice"}, "inv_adapter = 'nice' is not something"),
        ({"dropout": 0.1}, "dropout = 0.1 is not something"),
        ({"non_linearity": "leakyrelu"}, "non_linearity is 'leakyrelu'; refpeft knows relu, tanh, gelu"),
        ({"reduction_factor": {"default": 16, "1": 8}}, "expected one number for all layers, above 0"),
        ({"leave_out": 3}, "leave_out a list"),
        ({"non_linearity": ["relu"]}, "non_linearity is"),
        ({"reduction_factor": 0}, "reduction_factor is 0: expected one number"),
        ({"reduction_factor": 1e-9}, "no tensor in .* has a side of more than"),
        ({"architecture": "lora"}, "architecture is 'lora': of AdapterHub's adapters bottlenecks are read"),
        ({"mh_adapter": False, "output_adapter": False}, "targets is empty"),
        ({"phm_layer": True, "phm_dim": 2, "phm_rank": 1, "shared_phm_rule": False}, "shared_phm_rule is False"),
        ({"output_adapter": False}, "tensor 'model.layers.0.output_adapters.* is not expected"),
    ],
)
def test_what_computes_something_else_is_refused(changes, message, tmp_path):
    written(tmp_path)
    config = files.read_json(tmp_path / adapterhub.CONFIG)
    config["config"] |= changes
    files.write_json(tmp_path / adapterhub.CONFIG, config)
    model = tiny.model("llama")
    with pytest.raises(RefpeftError, match=message):
        adapters.load(model, tmp_path)
    assert not model.adapters


def test_a_pickle_is_not_read_and_the_message_says_how_to_convert_it(tmp_path):
    written(tmp_path)
    (tmp_path / adapterhub.TENSORS).rename(tmp_path / adapterhub.PICKLE)
    with pytest.raises(
        RefpeftError, match=r"is a pickle, .* by model.save_adapter\(directory, 'mine', use_safetensors"
    ):
        adapters.load(tiny.model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("houlsby", {"size": 5}, "houlsby with ln_tuning has no form in AdapterHub; pfeiffer, and with norms = false"),
        ("lora", {}, "lora has no form in AdapterHub"),
        ("parallel", {"size": 5}, "parallel has no form in AdapterHub"),
        ("pfeiffer", {"size": 5, "targets": ["@block_out", "@attn_out"]}, "at the same places of all layers"),
        ("pfeiffer", {"size": 5, "targets": ["@mlp_out", "model.layers.1.attn_out"]}, "at the same places of all"),
    ],
)
def test_what_has_no_form_there_is_not_written(method, options, message, tmp_path):
    model = tiny.model("llama")
    adapter = sites.attach(model, method, options)
    with pytest.raises(RefpeftError, match=message):
        adapterhub.save(tmp_path / "out", model, adapter)
    assert not (tmp_path / "out").exists()


def test_models_that_it_does_not_have_are_refused(tmp_path):
    model = tiny.model("qwen2")
    adapter = sites.attach(model, "pfeiffer", {"size": 5})
    with pytest.raises(
        RefpeftError, match="models of the family qwen2 are not among AdapterHub's: gpt2, llama, mistral"
    ):
        adapterhub.save(tmp_path, model, adapter)
    written(tmp_path)
    with pytest.raises(RefpeftError, match="are read for gpt2, llama, mistral, not for qwen2"):
        adapters.load(model, tmp_path)


def test_the_command_line_writes_it_and_uses_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")

    def run(*arguments: str, code: int = 0):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == code, result.output
        return result

    train = (
        "train",
        "--model",
        "./model",
        "--data",
        "rows.jsonl",
        "--method",
        "pfeiffer",
        "--steps",
        "2",
        "--out",
        "run",
    )
    run(*train, "--set", "pfeiffer.size=4")
    run("export", "--adapter", "run", "--out", "hub", "--name", "mine")
    assert run("export", "--adapter", "run", "--out", "hub", code=2).stderr.startswith("hub exists")
    ask = ("eval", "--model", "./model", "--data", "rows.jsonl", "--json")
    ours, theirs = (json.loads(run(*ask, "--adapter", name).stdout)["eval_loss"] for name in ("run", "hub"))
    assert ours == theirs
