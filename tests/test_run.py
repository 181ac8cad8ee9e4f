"""A configured run from end to end on a tiny model: what it writes and says, and that it goes on where it stopped."""

import json
import tomllib

import numpy as np
import pytest
import tiny_files

import refpeft
from refpeft import adapters, config, inputs, run
from refpeft.commands import options
from refpeft.errors import RefpeftError
from refpeft.files import read_safetensors


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """A checked configuration: a tiny model, rows that are held out, ten steps."""
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")
    flags = {"model": "./model", "data.file": "rows.jsonl", "data.eval_file": "rows.jsonl", "train.steps": 10}
    flags |= {"train.lr": 0.01, "train.batch": 4}

    def resolve(*sets: str, **other) -> config.Resolved:
        return config.resolve(None, [("", key, value) for key, value in (flags | other).items()], sets)

    return resolve


def train(resolved: config.Resolved, resume: bool = False) -> run.Outcome:
    return run.train(resolved, run.run_directory(resolved.run, resume), resume, say=lambda line: None)


def test_a_run_directory_holds_what_others_rely_on(resolve, tmp_path):
    outcome = train(resolve("train.eval_every=5", "lora.r=2"))
    directory = tmp_path / "runs" / "model-lora"
    assert outcome.directory.resolve() == directory
    assert {path.name for path in directory.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "run.toml",
    }
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 5, 10]
    speeds = {"tokens_per_second", "supervised_per_second"}
    assert {"step", "loss", "lr", "grad_norm", "seconds", "peak_bytes", *speeds} == records[1].keys()
    assert outcome.summary.after["loss"] < outcome.summary.before["loss"]


def test_the_adapter_gives_the_loss_that_was_reported(resolve):
    outcome = train(resolve())
    model = refpeft.load("model", outcome.directory)
    rows = inputs.read(outcome_run(outcome), model.config, model.tokenizer).rows
    batches = inputs.make_batches(outcome_run(outcome), rows, model.config, shuffle=False)
    assert refpeft.evaluation.mean_loss(model, batches) == pytest.approx(outcome.summary.after["loss"], rel=1e-5)


def test_an_adapter_of_a_run_in_tf32_is_used_in_float32_on_the_host(resolve):
    outcome = train(resolve())
    written = outcome.directory / config.FILE
    written.write_text(written.read_text().replace('dtype = "float32"', 'dtype = "tf32"'))
    assert [run.how_kept(outcome.directory, device=device)["dtype"] for device in ("cpu", "cuda")] == [
        "float32",
        "tf32",
    ]
    model = options.load(None, str(outcome.directory), None, False, None, "cpu")
    assert model.dtype == np.float32 and not model.tf32
    with pytest.raises(RefpeftError, match="'tf32' is for a GPU's tensor cores: choose device 'cuda' with it"):
        refpeft.load("model", dtype="tf32")


def outcome_run(outcome: run.Outcome) -> config.RunConfig:
    """The configuration that a run wrote."""
    return config.resolve(outcome.directory / "run.toml").run


def test_the_written_configuration_states_the_format_and_the_directory(resolve):
    outcome = train(resolve("lora.r=2"))
    written = tomllib.loads((outcome.directory / "run.toml").read_text())
    assert written["data"]["format"] == "prompt"
    assert written["out"] == str(outcome.directory)
    assert written["lora"]["r"] == 2
    assert run.base_model(outcome.directory) == "./model"


def test_the_same_run_gives_the_same_bits(resolve):
    first, second = (train(resolve(f"out={name}", "lora.dropout=0.1")) for name in ("a", "b"))
    ours, theirs = (read_safetensors(o.directory / adapters.TENSORS) for o in (first, second))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["lora", "p_tuning"])  # of p_tuning the adapter's file has not all that is trained
def test_an_interrupted_run_goes_on_to_the_same_bits(method, resolve, monkeypatch):
    whole = train(resolve("out=whole", f"{method}.dropout=0.1", method=method))
    seen = []

    def interrupt(self, record, shown=run.report.Progress.__call__):
        shown(self, record)
        seen.append(record["step"])
        if seen.count(6) == 1 and record["step"] == 6:
            import signal

            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.report.Progress, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(resolve("out=cut", f"{method}.dropout=0.1", method=method))
    resumed = train(resolve("out=cut", f"{method}.dropout=0.1", method=method), resume=True)
    ours, theirs = (read_safetensors(o.directory / adapters.TENSORS) for o in (whole, resumed))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    records = [json.loads(line) for line in (resumed.directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))


def test_the_report_has_losses_a_sample_files_and_commands(resolve):
    outcome = train(resolve())
    text = outcome.report.text()
    assert text.startswith("lora on ./model: 10 steps in ")
    for part in ("held-out loss", "one held-out row\n  prompt  is ", "adapter_model.safetensors", "metrics.jsonl"):
        assert part in text
    assert f"refpeft generate --adapter {outcome.directory} 'is " in text
    assert f"refpeft merge --adapter {outcome.directory} --out merged" in text


def test_the_memory_of_a_run_is_told(resolve):
    outcome = train(resolve(quantizer="nf4"))
    told = outcome.as_dict()
    assert told["frozen_bytes"] == outcome.model.nbytes
    assert told["frozen_bits"] == pytest.approx(4.5, abs=0.05)  # a little more: the last block of a weight is short
    assert 2**20 < told["peak_bytes"] < 2**40
    assert f"{outcome.model.bits:.3f} bits for each number that is quantized; the run took" in outcome.report.text()
    assert train(resolve()).as_dict()["frozen_bits"] is None


def test_two_methods_get_a_folder_each_and_no_advice_to_merge_what_cannot_be(resolve):
    outcome = train(resolve(method=["lora", "prefix_tuning"]))
    assert [path.name for path in adapters.directories(outcome.directory)] == ["1-lora", "2-prefix_tuning"]
    text = outcome.report.text()
    assert "1-lora/adapter_model.safetensors" in text
    assert "refpeft merge" not in text
    model = refpeft.load("model", outcome.directory)
    assert [adapter.name for adapter in model.adapters] == ["lora", "prefix_tuning"]


def test_without_held_out_rows_the_training_loss_is_told(resolve):
    outcome = train(resolve(**{"data.eval_file": None}))
    assert "nothing was held out" in outcome.report.text()
    assert outcome.report.sample is None


def test_rows_of_the_file_are_held_out_whole_and_at_random(resolve):
    resolved = resolve("data.eval_share=0.25", **{"data.eval_file": None})
    tokenizer = refpeft.load("model").tokenizer
    shape = refpeft.load("model").config
    read = inputs.read(resolved.run, shape, tokenizer)
    rows, held_out = read.rows, read.held_out
    lines = [{example.line for example in part.examples} for part in (rows, held_out)]
    assert [len(part) for part in lines] == [9, 3]
    assert not lines[0] & lines[1]
    assert lines[1] != {10, 11, 12}
    assert (rows.summary.rows, held_out.summary.rows) == (9, 3)
    with pytest.raises(RefpeftError, match="leaves none to train on"):
        inputs.read(resolve("data.eval_share=0.99", **{"data.eval_file": None}).run, shape, tokenizer)


def test_a_run_that_the_trainer_refuses_leaves_its_directory_free(resolve, tmp_path):
    refused = resolve("train.checkpoint_activations=true", method=["attention_fusion"])
    with pytest.raises(RefpeftError, match="checkpoint_activations computes"):
        train(refused)
    assert not (tmp_path / "runs").exists()


def test_another_run_is_never_overwritten(resolve):
    assert str(train(resolve()).directory) == "runs/model-lora"
    assert str(train(resolve()).directory) == "runs/model-lora-2"
    assert str(run.run_directory(resolve().run, resume=True)) == "runs/model-lora-2"
    with pytest.raises(RefpeftError, match=r"runs/model-lora already holds a run: go on with it \(--resume\)"):
        run.run_directory(resolve("out=runs/model-lora").run, resume=False)
