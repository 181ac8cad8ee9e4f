"""The command eval on tasks: what it finds is what the run found."""

import json

import pytest
from test_predict import said
from test_tasks import LABELLED, folder, trained, write  # noqa: F401 (a fixture)

# ruff: noqa: F811 (tests take the fixture by its name)


@pytest.mark.parametrize(
    "name, rows",
    [
        ("mlm", [{"text": "the film is good"}, {"text": "it was not very good"}, {"text": "a film"}]),
        ("embed", [{"text_a": "a film", "text_b": "the film", "score": score} for score in (5.0, 1.5)]),
        ("classify", [{"text": text, "label": label} for text, label in (("a", "x"), ("film", "y"), ("is", "y"))]),
    ],
)
@pytest.mark.parametrize("batch", [1, 8])
def test_eval_finds_what_the_run_found_however_large_its_batches(folder, name, rows, batch):
    write(folder / "rows.jsonl", rows * 2)
    write(folder / "held_out.jsonl", [*rows[1:], rows[-1]])  # without the highest score, and with other weights
    flags = {"data.file": "rows.jsonl", "data.eval_file": "held_out.jsonl", "task": name, "seed": 3}
    flags |= {"train.class_weights": "balanced"} if name == "classify" else {}
    after = trained(folder, **flags).summary.after
    output, code = said("eval", "--adapter", "out", "--batch", batch, "--json")
    assert code == 0 and json.loads(output)["eval_loss"] == pytest.approx(after["loss"], rel=1e-5)


def test_adapters_of_a_comparison_know_their_task_and_labels(folder):
    write(folder / "rows.jsonl", LABELLED)
    asked = ["--model", "bert", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", "--steps", "1", "--out", "table"]
    output, code = said("compare", "--methods", "bitfit", *asked)
    assert code == 0, output
    output, code = said("eval", "--adapter", "table/bitfit", "--json")
    assert code == 0 and "accuracy" in json.loads(output)
    output, code = said("compare", "--methods", "bitfit", *asked, "--resume")
    assert code == 0 and "1/1 bitfit, before" in output
