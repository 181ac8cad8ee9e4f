"""The command line: listings, and mistakes as messages with exit code 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_files
import tiny_tokenizers
from click.testing import CliRunner

import refpeft as refpeft_package
from refpeft import api, files, manager
from refpeft.cli import main

METHOD = '''"""Scales outputs (Someone, 2000): y = g W x."""

from dataclasses import dataclass

import numpy as np
from refpeft import hookimpl


@dataclass(frozen=True)
class Config:
    start: float = 1.0  # first value
    targets: tuple[str, ...] = ("q_proj",)


@hookimpl
def peft_params(site):
    return {"g": np.ones(site.shape[:1])}


@hookimpl
def peft_linear(x, base, p):
    return base(x) * p.g
'''


@pytest.fixture
def refpeft(monkeypatch, tmp_path):
    """Runs a command line in an empty directory; gives click's result."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield lambda *arguments, **keywords: CliRunner().invoke(main, list(map(str, arguments)), **keywords)
    for name in set(sys.modules) - before:
        if name.startswith("refpeft_plugins."):
            manager._forget(name)


@pytest.fixture
def method(tmp_path):
    (tmp_path / "gain.py").write_text(METHOD)
    return tmp_path / "gain.py"


def refused(result) -> str:
    """The message of a run that was refused."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_methods_lists_names_and_first_lines(refpeft, method):
    lines = refpeft("methods", "-p", method).stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("gain ")] == [["gain", "Scales", "outputs"]]


def test_methods_are_listed_by_family(refpeft, method):
    blocks = refpeft("methods", "-p", method).stdout.split("\n\n")
    headings = [block.splitlines()[0] for block in blocks]
    assert headings == [f"# {family}" for family in [*manager.FAMILIES, "of no family"] if family in " ".join(headings)]
    assert blocks[-1].startswith("# of no family\ngain ")


def test_a_method_as_a_row_of_the_table(refpeft, method):
    row = refpeft("methods", "gain", "--markdown", "-p", method).stdout.splitlines()[-1]
    assert row == "| `gain` |  | Scales outputs (Someone, 2000): y = g W x | 131,072 | no | no | - |"


def test_one_method_shows_its_options_as_toml(refpeft, method):
    assert refpeft("methods", "gain", "-p", method).stdout == (
        "Scales outputs (Someone, 2000): y = g W x.\n\n"
        "acts on  linear; cannot be merged\n"
        f"file     {method}\n\n"
        "[gain]\n"
        "start = 1.0           # float            first value\n"
        'targets = ["q_proj"]  # tuple[str, ...]\n'
    )
    assert "\nrank_pattern = {} " in refpeft("methods", "lora").stdout


def test_a_listing_as_json(refpeft, method):
    listed = {row["name"]: row for row in json.loads(refpeft("methods", "--json", "-p", method).stdout)}
    assert listed["gain"]["hooks"] == ["peft_params", "peft_linear"]
    assert listed["gain"]["options"][0] == {"name": "start", "type": "float", "default": "1.0", "note": "first value"}


def test_an_unknown_verb_or_method_has_the_nearest_name(refpeft, method):
    assert "no verb is named 'methds'; did you mean 'methods'?" in refused(refpeft("methds"))
    assert refused(refpeft("methods", "gian", "-p", method)) == (
        "no method is named 'gian'; did you mean 'gain'? (`refpeft methods` lists them; -p FILE adds one)\n"
    )
    assert refused(refpeft("quantizers", "gain", "-p", method)).startswith("'gain' is not a quantizer")


def test_a_plugin_that_is_not_there_is_one_line(refpeft):
    assert refused(refpeft("methods", "-p", "nowhere.py")) == "plugin nowhere.py does not exist\n"


def test_a_file_that_is_not_python_is_no_plugin(refpeft, rows):
    assert refused(refpeft("methods", "-p", "rows.jsonl")).startswith("plugin rows.jsonl is not a Python file")


@pytest.fixture
def model(tmp_path):
    return tiny_files.write_model(tmp_path / "model")


@pytest.fixture
def rows(tmp_path):
    return tiny_files.write_rows(tmp_path / "rows.jsonl")


TRAIN = ("train", "--model", "./model", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", "--steps", 4, "--batch", 4)


def test_train_prints_lines_and_a_report(refpeft, model, rows):
    result = refpeft(*TRAIN, "--lr", "1e-2", "--set", "lora.r=2", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "step 4/4" in result.stderr
    assert "held-out loss" in result.stdout
    assert "refpeft generate --adapter out" in result.stdout


def test_a_method_in_a_file_of_one_s_own_trains(refpeft, model, rows, method):
    result = refpeft(*TRAIN, "-p", method, "--method", "gain", "--out", "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(refpeft("eval", "--adapter", "out", "-p", method, "--json").stdout)["rows"] == 12
    manager._added.clear()
    assert "no method is named 'gain'" in refused(refpeft("eval", "--adapter", "out", "--data", "rows.jsonl"))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(13, "Permission denied", "some/file"), 2, "some/file: Permission denied\n"),
        (MemoryError("Unable to allocate 9 TiB"), 2, "out of memory: Unable to allocate 9 TiB; "),
        (MemoryError(), 2, "out of memory; "),
        (OSError(28, "No space left on device"), 2, "No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_goes_wrong_in_a_verb_is_no_traceback(refpeft, monkeypatch, error, code, message):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("refpeft.config.resolve", fail)
    result = refpeft("train")
    assert result.exit_code == code
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.output


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(refpeft, model, rows):
    result = refpeft(*TRAIN, "--method", "full", "--lr", "1e30", "--set", "train.clip=0", "--out", "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("lower the learning rate")
    assert "Warning" not in result.stderr


def test_train_as_json_gives_one_object(refpeft, model, rows):
    found = json.loads(refpeft(*TRAIN, "--out", "out", "--json").stdout)
    assert found["directory"] == "out"
    assert found["steps"] == 4


def test_dry_run_trains_nothing(refpeft, model, rows, tmp_path):
    result = refpeft(*TRAIN, "--dry-run")
    assert result.stdout.startswith("model    ./model: llama, 2 layers of 24")
    assert json.loads(refpeft(*TRAIN, "--dry-run", "--json").stdout)["steps"] == 4
    assert not (tmp_path / "runs").exists()


def test_a_file_s_values_give_way_to_flags_and_those_to_set(refpeft, model, rows, tmp_path):
    (tmp_path / "run.toml").write_text('method = "ia3"\n[train]\nbatch = 2\nlr = 0.5\nsteps = 9\n')
    flags = ("--model", "./model", "--data", "rows.jsonl", "--batch", 3, "--lr", 0.25, "--set", "train.lr=0.125")
    text = refpeft("train", "run.toml", *flags, "--dry-run").stdout
    assert 'method = "ia3"  (run.toml:1)' in text
    assert "train.batch = 3  (--batch)" in text
    assert "train.lr = 0.125  (--set train.lr)" in text
    assert "train.steps = 9  (run.toml:5)" in text


def test_several_mistakes_at_once(refpeft, tmp_path):
    (tmp_path / "run.toml").write_text("[trian]\nlr = 1\n[train]\nbatsh = 3\n")
    flags = (
        "--epochs",
        "two",
        "--data",
        "nowhere.jsonl",
        "--method",
        "lroa",
        "--set",
        "train.betas=0.9",
        "--seed",
        "-1",
    )
    assert refused(refpeft("train", "run.toml", *flags)).splitlines() == [
        "run.toml:2: unknown table [trian]; did you mean 'train'?",
        "run.toml:4: unknown key 'train.batsh'; did you mean 'batch'?",
        "--method: no method is named 'lroa'; did you mean 'lora'? (`refpeft methods` lists them; -p FILE adds one)",
        "--seed: seed is -1: expected a value of at least 0",
        '--epochs: train.epochs is "two": expected a number',
        "--set train.betas: train.betas is 0.9: expected a list",
        "--data: data.file nowhere.jsonl does not exist",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--out", "rows.jsonl"), "--out: out rows.jsonl cannot be written: rows.jsonl is a file"),
        (("--set", "lora.targets=q_prj"), "target 'q_prj' matches no site of this model; did you mean 'q_proj'"),
        (("--length", "4"), "rows.jsonl: 12 of 12 rows are longer than 4 tokens"),
        (("--model", "./modle"), "--model: model ./modle does not exist"),
        (("--set", "data.file=bad.jsonl"), "bad.jsonl:2: this line is not JSON"),
        (("--quantizer", "nf5"), "--quantizer: no quantizer is named 'nf5'; did you mean 'nf4'?"),
        (("--set", f"lora.r={10**20}"), "out of memory"),
        (("--set", f"nf4.block={10**20}", "--quantizer", "nf4"), "expected a smaller integer"),
        (("--set", f"lora.r={'9' * 5000}"), '": expected an integer'),
        (("--quantizer", "lora"), "--quantizer: 'lora' is not a quantizer"),
        (("--set", "nf4.block=32"), "--set nf4.block: plugin 'nf4' is not chosen (this run has lora)"),
        (("--batch", "1.5"), "--batch: train.batch is 1.5: expected an integer"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(refpeft, model, rows, tmp_path, flags, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    for extra in ((), ("--dry-run",)):
        said = refused(refpeft(*TRAIN, *flags, *extra))
        assert message in said
        assert len(said.splitlines()) < 8


def test_a_flag_that_does_not_exist_has_the_nearest(refpeft):
    assert "--epochs" in refused(refpeft("train", "--epoch", "3", "--epochss", "3"))


def test_a_directory_that_may_not_be_written_is_one_line(refpeft, model, rows, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "no permission in" in refused(refpeft(*TRAIN, "--out", "locked/run"))


def test_eval_generate_and_merge_use_what_was_trained(refpeft, model, rows, tmp_path):
    assert refpeft(*TRAIN, "--out", "out", "--lr", "0.01").exit_code == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = json.loads(refpeft("eval", "--adapter", "out", "--json").stdout)
    assert found["eval_loss"] == pytest.approx(records[-1]["eval_loss"], rel=1e-5)
    assert found["rows"] == 12
    asked = refpeft("generate", "--adapter", "out", "is 3 even?", "is 4 even?", "--max-tokens", "3", "--json")
    assert [answer["prompt"] for answer in json.loads(asked.stdout)] == ["is 3 even?", "is 4 even?"]
    assert refpeft("generate", "--adapter", "out", "--max-tokens", "3", input="is 3 even?").stdout.endswith("\n")
    assert refpeft("merge", "--adapter", "out", "--out", "merged").stdout.startswith("./model with out merged, in ")
    merged = json.loads(refpeft("eval", "--model", "merged", "--data", "rows.jsonl", "--json").stdout)
    assert merged["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-4)
    assert refused(refpeft("merge", "--adapter", "out", "--out", "merged")).startswith("merged exists")


def test_a_run_on_quantized_weights_is_evaluated_and_merged_as_it_was_trained(refpeft, model, rows, tmp_path):
    options = ("--quantizer", "nf4", "--length", "8", "--overlong", "truncate", "--set", "data.supervise=all")
    assert refpeft(*TRAIN, "--out", "out", *options).exit_code == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = json.loads(refpeft("eval", "--adapter", "out", "--json").stdout)
    assert found["eval_loss"] == pytest.approx(records[-1]["eval_loss"], rel=1e-5)
    moved = ("eval", "--adapter", "out", "--model", "model", "--json")  # the run's quantizer, wherever its model is
    assert json.loads(refpeft(*moved).stdout) == found
    assert json.loads(refpeft(*moved, "--quantizer", "none").stdout)["eval_loss"] != found["eval_loss"]
    said = refpeft("merge", "--adapter", "out", "--out", "merged").stdout
    assert said.startswith("./model with out merged, in merged: its weights as the run had them, nf4 made dense")
    with_adapter, merged = (api.load(*source) for source in (("model", "out", "nf4"), ("merged",)))
    expected = with_adapter([[1, 2, 3]]).data
    assert abs(merged([[1, 2, 3]]).data - expected).max() < 1e-5 * abs(expected).max()


def test_a_report_for_a_file_is_not_written_to_one_that_is_called_minus(refpeft, tmp_path):
    assert "only --json writes to standard output" in refused(refpeft("conform", "refpeft", "--html", "-"))
    assert not (tmp_path / "-").exists()


def test_a_merge_that_computes_something_else_writes_nothing(refpeft, model, rows, method, tmp_path):
    merge = "\n\n@hookimpl\ndef peft_merge(weight, p):\n    return weight * (2 - p.g[:, None])\n"
    method.write_text(METHOD + merge)
    trained = refpeft(*TRAIN, "-p", method, "--method", "gain", "--lr", "0.1", "--out", "out")
    assert trained.exit_code == 0
    assert f"  refpeft merge -p {Path(method).resolve()} --adapter out --out merged\n" in trained.stdout
    merge = ("merge", "-p", method, "--adapter", "out", "--out", "merged")
    assert "nothing was written" in refused(refpeft(*merge))
    assert "peft_merge is not what its forward pass computes" in refused(refpeft(*merge, "--force"))
    assert not (tmp_path / "merged").exists()


def test_a_run_s_own_file_is_checked_before_an_adapter_is_used(refpeft, model, rows, tmp_path):
    assert refpeft(*TRAIN, "--out", "out").exit_code == 0
    written = (tmp_path / "out" / "run.toml").read_text()
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    for change, message in (
        (("[data]", "data = 3\n[train]\n[data_]"), "data is 3: expected a table [data]"),
        (('eval_file = "rows.jsonl"', "eval_file = 3"), "data.eval_file is 3: expected a string"),
        (('device = "cpu"', 'device = "cpu"\nquantizer = 4'), "quantizer is 4: expected a string"),
        (('device = "cpu"', 'device = "cpu"\nquantizer = "evil.py"'), "no quantizer is named 'evil.py'"),
    ):
        assert change[0] in written
        text = written.replace("[train]", "[train_]", 1) if "[train]" in change[1] else written
        (tmp_path / "out" / "run.toml").write_text(text.replace(*change))
        for verb in (("eval", "--data", "rows.jsonl"), ("generate", "hi")):
            assert message in refused(refpeft(*verb, "--adapter", "out"))


def test_eval_says_what_it_does_with_long_rows(refpeft, model, rows):
    evaluate = ("eval", "--model", "./model", "--data", "rows.jsonl")
    assert refused(refpeft(*evaluate, "--length", 100)).startswith("length is 100, but the model was made for 64")
    assert "2 of 12 rows are longer" in refused(refpeft(*evaluate, "--length", 12))
    assert json.loads(refpeft(*evaluate, "--length", 12, "--overlong", "drop", "--json").stdout)["tokens"] == 120


def test_a_share_that_was_held_out_is_evaluated_again(refpeft, model, rows, tmp_path):
    share = ("train", "--model", "./model", "--data", "rows.jsonl", "--set", "data.eval_share=0.25", "--steps", 2)
    assert refpeft(*share, "--out", "out").exit_code == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = json.loads(refpeft("eval", "--adapter", "out", "--json").stdout)
    assert found["rows"] == 3
    assert found["eval_loss"] == pytest.approx(records[-1]["eval_loss"], rel=1e-5)
    assert "give --data FILE to set length" in refused(refpeft("eval", "--adapter", "out", "--length", 12))
    assert json.loads(refpeft("eval", "--adapter", "out", "--data", "rows.jsonl", "--json").stdout)["rows"] == 12


def test_held_out_rows_are_evaluated_when_the_training_rows_have_gone(refpeft, model, rows):
    Path("held.jsonl").write_text(Path("rows.jsonl").read_text())
    assert refpeft(*TRAIN[:6], "held.jsonl", *TRAIN[7:], "--out", "out").exit_code == 0
    Path("rows.jsonl").unlink()
    assert refpeft("eval", "--adapter", "out").exit_code == 0


def test_a_run_that_held_nothing_out_says_so(refpeft, model, rows):
    assert refpeft("train", "--model", "./model", "--data", "rows.jsonl", "--steps", 2, "--out", "out").exit_code == 0
    assert refused(refpeft("eval", "--adapter", "out")) == "the run held no rows out: give --data FILE\n"


def test_weights_that_are_not_finite_are_said_by_every_verb(refpeft, model, rows):
    weights = dict(files.read_safetensors("model/model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    files.write_safetensors("model/model.safetensors", weights)
    for verb in (("eval", "--data", "rows.jsonl"), ("generate", "hi")):
        assert "adapter, are not finite numbers" in refused(refpeft(*verb, "--model", "./model"))
    for rest, message in (
        (TRAIN[5:], "held-out loss is nan after step 0, before anything was"),
        (TRAIN[7:], "loss is nan at step 1, before anything was"),
    ):
        result = refpeft(*TRAIN[:5], *rest, "--out", message)
        assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(message)


def test_text_that_is_not_unicode_is_one_line(refpeft, model, tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    message = "the text is not valid Unicode: character 1 is '\\ud800'\n"
    assert refused(refpeft("data", "half.jsonl", "--model", "model")) == "half.jsonl:2: " + message
    assert refused(refpeft("generate", "--model", "model", "\ud800")) == message


def test_sampling_needs_numbers_and_a_conversation_no_prompts(refpeft, model):
    generate = ("generate", "--model", "model", "hi")
    assert refused(refpeft(*generate, "--temperature", "nan")).startswith("temperature is nan")
    assert refused(refpeft(*generate, "--temperature", "1", "--top-p", "nan")).startswith("top_p is nan")
    assert refused(refpeft(*generate, "--chat")).startswith("--chat asks for what you say")


def test_resuming_without_a_checkpoint_says_that_it_begins(refpeft, model, rows):
    assert "there is no checkpoint in out: the run begins" in refpeft(*TRAIN, "--resume", "--out", "out").stderr
    assert "the run begins" not in refpeft(*TRAIN, "--resume", "--out", "out").stderr


def test_a_model_must_be_named_and_an_adapter_be_there(refpeft, model):
    assert refused(refpeft("generate", "hello")).startswith("there is no model: give --model")
    assert refused(refpeft("eval", "--model", "./model")) == "there is no data: give --data FILE\n"
    assert refused(refpeft("generate", "--adapter", "model", "hello")).startswith("model holds no adapter")


def test_a_conversation_ends_with_an_empty_line(refpeft, tmp_path):
    tiny_files.write_model(tmp_path / "chat", template=tiny_tokenizers.CHATML)
    result = refpeft("generate", "--model", "chat", "--chat", "--max-tokens", "2", input="hello\nyes\n\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("you>") == 3
    assert len(result.stdout.splitlines()) >= 2


def test_sites_folds_layers(refpeft, model):
    text = refpeft("sites", "model").stdout
    assert "model.layers.{0-1}.self_attn.q_proj" in text
    assert "model.layers.1.self_attn.q_proj" in refpeft("sites", "model", "--all").stdout
    listed = json.loads(refpeft("sites", "model", "--json").stdout)
    assert {"name": "lm_head", "kind": "linear", "shape": [tiny_files.VOCABULARY, 24]}.items() <= listed[-1].items()


def test_data_shows_counts_and_what_is_learned(refpeft, model, rows):
    text = refpeft("data", "rows.jsonl", "--model", "model").stdout
    assert text.startswith("rows.jsonl: 12 rows, format prompt\n")
    assert "is 0 even?[learned] yes<|im_end|>[/learned]" in text
    found = json.loads(refpeft("data", "rows.jsonl", "--model", "model", "--row", 2, "--json").stdout)
    assert found["example"]["runs"][1] == {"text": " no<|im_end|>", "tokens": 2, "learned": True}
    assert refused(refpeft("data", "rows.jsonl", "--model", "model", "--row", "13")).startswith("--row is 13")


def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on(refpeft, model, rows, tmp_path):
    command = [sys.executable, "-m", "refpeft", *map(str, TRAIN), "--steps", "100000", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(refpeft_package.__file__).parents[1])}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count('"loss"') > 3:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "stopped; go on with: refpeft train --resume --out out"
    assert "Traceback" not in said
    assert next((tmp_path / "out" / "checkpoints").glob("step-*"))
