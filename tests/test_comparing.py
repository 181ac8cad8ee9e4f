"""Comparing methods: each with its own options, in its own process and directory, and one table of all."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from click.testing import CliRunner
from test_cli import METHOD

import refpeft
from refpeft import adapters, comparing, manager, plan
from refpeft.cli import main
from refpeft.config import Resolved
from refpeft.errors import RefpeftError

OUT = Path("out")
METHODS = [name for name, listing in manager.catalogue().items() if listing.kind == "method"]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs `refpeft compare` on a tiny model and twelve rows; gives click's result."""
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")
    files = ("--model", "./model", "--data", "rows.jsonl", "--eval-data", "rows.jsonl")
    return lambda *arguments: CliRunner().invoke(main, ["compare", *arguments, *files, "--steps", "3", "--out", "out"])


def test_each_method_is_trained_in_its_own_directory_and_has_a_row(compare, tmp_path):
    result = compare("--methods", "lora,ia3", "--set", "lora.r=2", "--lr", "0.01", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == ["lora", "ia3"]
    for name, row in rows.items():
        file = tmp_path / "out" / name / "adapter_model.safetensors"
        assert row["adapter_bytes"] == file.stat().st_size
        assert row["lr"] == 0.01 and row["error"] is None and row["exact_match"] is None
        assert row["loss_after"] < row["loss_before"]
        assert row["step_ms"] > 0 and row["peak_bytes"] > 2**20
        model = refpeft.load("model", tmp_path / "out" / name)
        assert row["trained"] == sum(adapter.size for adapter in model.adapters)
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == list(rows.values())
    assert (tmp_path / "out" / "compare.md").read_text().splitlines()[3].startswith("| ia3 |")
    assert re.findall(r"^\d/2 (\w+), in", result.stderr, re.M) == ["lora", "ia3"]


def test_what_fails_is_a_row_and_what_is_finished_is_not_trained_again(compare, tmp_path):
    failed = compare("--methods", "trainable_tokens,ia3")
    assert failed.exit_code == 1
    assert "trainable_tokens: trainable_tokens.token_indices is empty" in failed.stdout
    file = tmp_path / "out" / "ia3" / "adapter_model.safetensors"
    written = file.stat().st_mtime_ns
    assert compare("--methods", "ia3").exit_code == 2  # the directory is taken
    again = compare("--methods", "bitfit,ia3", "--set", "bitfit.create=true", "--resume")
    assert again.exit_code == 0
    assert "2/2 ia3, before: held-out loss" in again.stderr
    assert file.stat().st_mtime_ns == written
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [row["method"] for row in stored] == ["bitfit", "ia3", "trainable_tokens"]
    other = compare("--methods", "ia3", "--lr", "0.5", "--resume")
    assert other.exit_code == 2
    assert "out/ia3 is of a run with other options" in other.stderr
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == stored


def test_plugins_of_one_s_own_are_compared(compare, tmp_path):
    (tmp_path / "gain.py").write_text(METHOD + 'from refpeft.errors import warn\n\nwarn("read me")\n')
    result = compare("--methods", "gain", "-p", "gain.py", "--lr", "0.1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"][0]["trained"] > 0
    assert "gain: warning: read me" in result.stderr


def resolve(asked=None, file=None, flags=(), sets=()) -> dict:
    return comparing.resolve(asked, file, flags, sets, OUT)


def test_a_file_gives_all_methods_some_options_and_each_its_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nsteps = 5\n[methods]\nia3 = {lr = 0.5}\nlora = {r = 3, quantizer = "int8"}\n')
    found = resolve(file=file, sets=["lora.alpha=7", "train.batch=2"])
    assert list(found) == ["ia3", "lora"]
    assert all(one.run.train.steps == 5 and one.run.train.batch == 2 for one in found.values())
    assert found["ia3"].run.train.lr == 0.5 and found["ia3"].run.quantizer is None
    assert found["ia3"].origins["train.lr"] == f"{file}:4"
    assert found["lora"].run.quantizer == "int8" and found["lora"].run.out == "out/lora"
    assert (found["lora"].options["lora"].r, found["lora"].options["lora"].alpha) == (3, 7.0)
    assert resolve("lora", file, [("--lr", "train.lr", 0.25)])["lora"].run.train.lr == 0.25


def test_methods_that_start_from_others_come_last_and_find_them(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[methods]\nby_type = {types = ["{out}/lora"]}\nlora = {}\n')
    with pytest.raises(RefpeftError, match="out/lora"):
        resolve("by_type", file)
    assert list(resolve(file=file)) == ["lora", "by_type"]


def test_mistakes_are_told(tmp_path):
    with pytest.raises(RefpeftError, match="name the methods"):
        resolve(flags=[("--model", "model", "model")])
    with pytest.raises(RefpeftError, match="name the methods"):
        resolve("")
    with pytest.raises(RefpeftError, match="no method is named 'lroa'; did you mean 'lora'"):
        resolve("ia3,lroa")
    with pytest.raises(RefpeftError, match="plugin 'dora' is not chosen"):
        resolve("lora", sets=["dora.r=2"])
    (tmp_path / "mine.toml").write_text("[methods]\nlora = 5\n")
    with pytest.raises(RefpeftError, match=r"mine.toml:2: lora is 5: expected \{lr = 1e-3\}"):
        resolve(file=tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text("[methods]\nlora = {rank = 5}\nia3 = {}\n")
    assert "mine.toml:2: unknown key 'lora.rank'" in str(resolve(file=tmp_path / "mine.toml")["lora"])


def test_every_method_has_a_line_for_the_embedded_run():
    named = set(comparing._read(comparing.EMBEDDED, OUT)[1])
    assert named == set(METHODS), "a line for each method in refpeft/embedded/compare.toml: its learning rate, options"


@pytest.mark.parametrize("method", METHODS)
def test_the_embedded_model_takes_every_method(method, tmp_path):
    """With what compare.toml gives it; what methods start from is made without being trained."""
    found = comparing.resolve(method, None, (), (), tmp_path)[method]
    assert isinstance(found, Resolved), found
    for other in re.findall(rf"{tmp_path}/(\w+)", str(found.options[method])):
        if not (tmp_path / other).exists():
            model = refpeft.load("embedded")
            refpeft.attach(model, other, comparing.resolve(other, None, (), (), tmp_path)[other].options[other])
            adapters.save(tmp_path / other, model)
    with np.errstate(all="ignore"):  # of weights that are not there
        assert plan.plan(found).trained > 0
