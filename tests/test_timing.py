"""Timing methods beside LoRA: `refpeft compare --bench`."""

import json

import pytest
import tiny_files
from click.testing import CliRunner
from test_cli import METHOD

from refpeft import shapes, timing
from refpeft.api import build
from refpeft.backend import bfloat16
from refpeft.cli import main

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs `refpeft compare --bench` on random weights of a tiny shape; gives click's result and the rows by name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    small = ("--bench", "--model", "tiny.json", "--batch", "2", "--length", "12", "--steps", "2", "--out", "out")

    def run(*arguments: str):
        result = CliRunner().invoke(main, ["compare", *small, *arguments])
        file = tmp_path / "out" / timing.JSON
        return result, json.loads(file.read_text())["rows"] if file.is_file() else []

    return run


def test_methods_are_timed_beside_lora_which_comes_first_and_last(bench, tmp_path):
    (tmp_path / "mine.toml").write_text(
        '[methods]\nspot = {tokens = 3, sources = ["{out}/prompt_tuning"]}\nia3 = {}\nlora = {r = 2}\n'
        'prompt_tuning = {tokens = 3}\nqdora = {r = 2, quantizer = "nf4"}\nrows = {targets = "@nothing"}\n'
    )
    result, rows = bench("mine.toml")
    assert result.exit_code == 1
    assert [row["method"] for row in rows] == ["lora", "ia3", "prompt_tuning", "qdora", "rows", "spot", "lora"]
    done = {row["method"]: row for row in rows if not row["error"]}
    assert done["lora"]["trained"] == 2 * 2 * 2 * (32 + 32)
    assert done["spot"]["trained"] == done["prompt_tuning"]["trained"] == 3 * 32
    for row in done.values():
        assert 0 < row["least_ms"] <= row["step_ms"] and row["began"] > 0 and row["peak_bytes"] > 2**20
        assert row["captured"] is None and row["refused"] == ""
    assert [row["method"] for row in rows if row["error"]] == ["rows"]
    table = result.stdout.splitlines()
    assert table[0].split("  ")[0] == "method" and table[1].split()[:4:3] == ["lora", "1.00"]
    assert "rows: " in table[-1] and "@nothing" in table[-1]
    assert "7/7 lora: " in result.stderr and " x LoRA's, " in result.stderr


@pytest.mark.parametrize(
    "what, said",
    [
        pytest.param("time.sleep(600)", "it took longer than 15 s", marks=pytest.mark.slow),
        ("os._exit(3)", "its process ended with exit code 3"),
        ("time.gone", "has no attribute 'gone'"),
    ],
)
def test_a_method_that_hangs_or_ends_the_process_does_not_keep_the_others_from_being_timed(bench, tmp_path, what, said):
    text = METHOD.replace("import numpy as np", "import os, time\nimport numpy as np").replace("base(x) * p.g", what)
    (tmp_path / "broken.py").write_text(text)
    result, rows = bench("-p", "broken.py", "--methods", "broken,ia3", "--limit", "15")
    assert result.exit_code == 1
    assert [row["method"] for row in rows if row["error"] is None] == ["lora", "ia3", "lora"]
    assert said in rows[1]["error"] and f"broken: {rows[1]['error']}" in result.stdout


def test_a_models_own_files_are_timed_as_well_and_json_has_the_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    arguments = ["--methods", "lora", "--model", "./model", "--length", "8", "--steps", "1", "--out", "out", "--json"]
    result = CliRunner().invoke(main, ["compare", "--bench", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["directory"] == "out" and [row["method"] for row in found["rows"]] == ["lora"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--bench", "--seeds", "2"), "leave out --shots, --seeds and --resume"),
        (("--bench", "--resume"), "leave out --shots, --seeds and --resume"),
        (("--limit", "3"), "--limit is of --bench"),
        (("--bench", "--methods", "lora", "--model", "bert-base", "--steps", "1"), "this one is without a head"),
        (("--bench", "--methods", "lora", "--model", "gpt2", "--length", "5000"), "length is 5,000"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exit_code in (1, 2) and said in result.output + str(result.exception), result.output


def test_a_filled_checkpoint_has_the_weights_of_its_shape():
    checkpoint = shapes.Filled(CONFIG)
    model = build(checkpoint, "bfloat16")
    assert model.parameters() == 2 * 96 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    q, k = (checkpoint.tensor(f"model.layers.0.self_attn.{name}_proj.weight") for name in "qk")
    assert q.dtype == bfloat16 and (q != k).any() and 0.015 < q.astype("f4").std() < 0.025
    assert (checkpoint.tensor("model.norm.weight") == 1).all()
    assert (checkpoint.tensor("model.norm.weight") == shapes.Filled(CONFIG).tensor("model.norm.weight")).all()
