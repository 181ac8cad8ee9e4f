"""Tables of runs: columns of metrics, means over seeds, and the untrained model beside what was trained."""

import json
import statistics

import pytest
import tiny_files
from click.testing import CliRunner

from refpeft import outcomes
from refpeft.cli import main
from refpeft.outcomes import Row

ONE = Row("a", trained=5, loss_before=2.0, loss_after=1.0, step_ms=3, lr=0.1, scores={"accuracy": 0.5, "f1": 0.25})
OTHER = Row("b", trained=5, loss_before=2.0, loss_after=1.5, step_ms=5, lr=0.1, scores={"accuracy": 0.7})


def test_metrics_that_some_runs_have_are_columns():
    head, one, other, failed = [
        line.split() for line in outcomes.text([ONE, OTHER, Row("c", error="no")]).splitlines()[:4]
    ]
    assert head[:8] == ["run", "trained", "learning", "rate", "loss", "before", "after", "accuracy"]
    assert one[:7] == ["a", "5", "0.1", "2.0000", "1.0000", "0.5000", "0.2500"]
    assert other[5:7] == ["0.7000", "-"] and set(failed[1:]) == {"-"}
    assert "exact match" not in outcomes.text([ONE]) and "exact match" in outcomes.text([Row("d", exact_match=0.5)])
    assert outcomes.text([Row("c", error="no")]).endswith("\nc: no\n")
    lines = outcomes.markdown([ONE, OTHER]).splitlines()
    assert lines[1].startswith("| --- | ---: |") and len({line.count("|") for line in lines}) == 1


def test_means_have_the_standard_deviation_of_a_sample():
    mean = outcomes.averaged("both", [ONE, OTHER])
    assert (mean.method, mean.trained, mean.lr, mean.step_ms) == ("both", 5, 0.1, 4.0)
    assert mean.loss_after == 1.25 and mean.scores == {"accuracy": pytest.approx(0.6)}  # of what both have
    assert mean.deviations == {
        "loss_before": 0.0,
        "loss_after": pytest.approx(0.125**0.5),
        "accuracy": pytest.approx(statistics.stdev([0.5, 0.7])),
    }
    assert "1.2500 ± 0.3536" in outcomes.text([mean]) and " 5 " in outcomes.text([mean])
    assert outcomes.averaged("x", [ONE, Row("b", error="no")]).error == "1 of 2 seeds failed: no"


def test_what_is_written_is_read_again(tmp_path):
    outcomes.write(tmp_path, [ONE, OTHER], outcomes.averaged("mean", [ONE, OTHER]))
    assert outcomes.stored(tmp_path) == {"a": ONE, "b": OTHER}
    assert json.loads((tmp_path / "compare.json").read_text())["mean"]["loss_after"] == 1.25
    assert len((tmp_path / "compare.md").read_text().splitlines()) == 5


@pytest.fixture
def refpeft(tmp_path, monkeypatch):
    """A command line on a tiny model and twelve rows; gives click's result."""
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")
    tiny_files.write_rows(tmp_path / "held.jsonl", 5)
    files = ("--model", "./model", "--data", "rows.jsonl", "--eval-data", "held.jsonl", "--steps", "2", "--lr", "0.01")

    def run(*arguments, exit_code=0):
        result = CliRunner().invoke(main, [arguments[0], *files, *arguments[1:]])
        assert result.exit_code == exit_code, result.output
        return result

    return run


def test_a_run_of_seeds_has_a_directory_for_each_and_their_mean(refpeft, tmp_path):
    result = refpeft("train", "--seeds", "2", "--seed", "3", "--metric", "exact_match", "--out", "out", "--json")
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["rows"]] == ["seed-3", "seed-4"]
    after = [row["loss_after"] for row in found["rows"]]
    assert after[0] != after[1] and found["mean"]["loss_after"] == pytest.approx(statistics.mean(after))
    assert found["mean"]["deviations"]["loss_after"] == pytest.approx(statistics.stdev(after))
    assert found["mean"]["exact_match"] == 0.0
    alone = json.loads(refpeft("train", "--seed", "4", "--metric", "exact_match", "--out", "alone", "--json").stdout)
    assert alone["after"]["loss"] == after[1]
    written = (tmp_path / "out" / "seed-3" / "adapter_model.safetensors").stat().st_mtime_ns
    again = refpeft("train", "--seeds", "3", "--seed", "3", "--metric", "exact_match", "--out", "out", "--resume")
    assert "2/3 seed-4, before" in again.stderr and "3/3 seed-5, in" in again.stderr
    assert again.stdout.splitlines()[4].startswith("mean") and " ± " in again.stdout.splitlines()[4]
    assert (tmp_path / "out" / "seed-3" / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_prompting_and_training_stand_in_one_table_over_seeds(refpeft, tmp_path):
    options = ("--methods", "lora,full", "--shots", "0,2", "--seeds", "2", "--out", "out", "--json")
    rows = {row["method"]: row for row in json.loads(refpeft("compare", *options).stdout)["rows"]}
    assert list(rows) == ["base (0 shots)", "base (2 shots)", "lora", "full"]
    base = rows["base (0 shots)"]
    assert base["loss_after"] == pytest.approx(rows["lora"]["loss_before"], rel=1e-5) and base["trained"] == 0
    assert base["deviations"]["loss_after"] == 0 < rows["base (2 shots)"]["deviations"]["loss_after"]
    assert rows["lora"]["deviations"]["loss_after"] > 0
    assert (tmp_path / "out" / "seed-1" / "full" / "run.toml").is_file()
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| base (2 shots) | 0 | - | - | " in table and " ± " in table
    again = refpeft("compare", *options[:-1], "--resume")
    assert again.stderr.count("before: held-out loss") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--methods", "lora", "--shots", "0,x"), "--shots is '0,x': expected numbers of examples"),
        (("compare", "--methods", "lora", "--shots", "1,1"), "each once"),
        (("compare", "--methods", "lora", "--shots", "2", "--data", "held.jsonl", "--eval-data", "rows.jsonl"),
         "shots need one file to be drawn from and one to be asked"),
        (("train", "--seeds", "1"), "--seeds"),
    ],
)  # fmt: skip
def test_mistakes_are_told(arguments, message, refpeft):
    assert message in refpeft(*arguments, exit_code=2).stderr


def test_a_base_is_asked_the_rows_of_the_runs_and_again_where_these_are_others(refpeft, tmp_path):
    tiny_files.write_rows(tmp_path / "earlier.jsonl", 4)
    for count, method in ((2, "lora"), (3, "ia3")):
        options = (
            "--methods",
            method,
            "--set",
            f"data.eval_rows={count}",
            "--shots",
            "0",
            "--earlier",
            "earlier.jsonl",
        )
        result = refpeft("compare", *options, "--out", "out", "--resume", "--json")
        base, row = json.loads(result.stdout)["rows"]
        assert json.loads((tmp_path / "out" / "base-0-shots.json").read_text())["scores"]["rows"] == count
        assert base["loss_after"] == pytest.approx(row["loss_before"], rel=1e-5)
        assert "loss of the earlier task" in row["scores"]


def test_a_base_that_cannot_be_asked_is_a_row_with_the_reason(refpeft):
    result = refpeft("compare", "--methods", "lora", "--shots", "40", exit_code=1)
    assert "base (40 shots): 40 shots are asked for, but only 11 rows have another prompt" in result.stdout
    assert "2/2 lora, in" in result.stderr
