"""The command predict: what it reads, what it refuses, and before what."""

import json

import pytest
import tiny_files
import tiny_tokenizers
from click.testing import CliRunner
from test_tasks import LABELLED, folder, trained, write  # noqa: F401 (a fixture)

import refpeft
from refpeft.cli import main
from refpeft.errors import RefpeftError

# ruff: noqa: F811 (tests take the fixture by its name)


def said(*arguments):
    """What the command line says, and its exit code."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.output + result.stderr, result.exit_code


def test_predict_reads_columns_as_the_run_did_and_is_what_the_report_names_next(folder):
    rows = write(folder / "rows.jsonl", [{"review": row["text"], "stars": row["label"]} for row in LABELLED])
    outcome = trained(folder, **{"data.file": str(rows), "data.fields": {"text": "review", "label": "stars"}})
    (command,) = outcome.report.next_commands
    assert command == f"refpeft predict FILE --adapter {folder / 'out'}"
    new = write(folder / "new.jsonl", [{"review": "the film was good"}])
    output, code = said(*command.replace("FILE", str(new)).split()[1:])
    assert code == 0 and '"predicted": "up"' in output


def test_hidden_tokens_are_told_only_where_there_are_some(folder):
    rows = write(folder / "rows.jsonl", [{"text": "a film"}, {"text": "a [MASK] film"}, {"text": "it is"}])
    output, code = said("predict", rows, "--model", "bert", "--task", "mlm")
    assert code == 2 and "rows without [MASK]: 2, the first at line 1: write it where" in output


def test_pairs_without_scores_are_measured_by_their_loss_alone(folder):
    write(folder / "rows.jsonl", [{"text_a": "a film", "text_b": "the film"}, {"text_a": "bad", "text_b": "not"}] * 4)
    flags = {"data.file": "rows.jsonl", "data.eval_file": "rows.jsonl", "train.eval_every": 4, "train.best": True}
    assert set(trained(folder, **flags).summary.best) == {"loss"}
    assert said("eval", "--adapter", "out")[1] == 0
    output, code = said("eval", "--adapter", "out", "--metric", "pearson")
    assert code == 2 and "the rows have none: leave the metric out" in output


def test_predict_needs_no_answers_and_minds_no_labels(folder):
    rows = write(folder / "rows.jsonl", [{"source": "is it good"}])
    output, code = said("predict", rows, "--model", "t5")
    assert code == 0 and set(json.loads(output)) == {"line", "source", "predicted"}
    trained(folder, **{"data.file": str(write(folder / "labelled.jsonl", LABELLED)), "train.steps": 1})
    output, code = said("predict", write(folder / "new.jsonl", [{"text": "a film", "label": "-"}]), "--adapter", "out")
    assert code == 0 and '"label": "-"' in output


@pytest.mark.parametrize(
    "out, message",
    [
        ("nowhere/out.jsonl", "cannot be written: there is no directory nowhere"),
        ("bert", "--out bert is a directory"),
        ("rows.jsonl", "--out rows.jsonl is the file of the rows: give another one"),
    ],
)
def test_where_predictions_cannot_go_is_said_before_a_model_is_read(folder, out, message):
    rows = write(folder / "rows.jsonl", [{"source": "is it good"}])
    before = rows.read_bytes()
    output, code = said("predict", "rows.jsonl", "--model", "there-is-none", "--out", out)
    assert code == 2 and message in output and rows.read_bytes() == before


def test_a_line_is_that_of_the_file_also_where_its_rows_tell_another(folder):
    rows = write(folder / "rows.jsonl", [{"line": 7, "source": "is it good", "predicted": "then"}])
    found = json.loads(said("predict", rows, "--model", "t5")[0])
    assert found["line"] == 1 and found["predicted"] != "then"


# -- before a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, row, expected",
    [
        ("t5", {"source": "is it", "target": "good"}, ["3 tokens in 1 examples with 2 targets", "completion: good"]),
        ("bert", {"text": "is it"}, ["4 tokens in 1 examples with 1 target", "completion: is it"]),
    ],
)
def test_data_tells_what_a_model_that_is_no_decoder_learns(folder, model, row, expected):
    output, code = said("data", write(folder / "rows.jsonl", [row]), "--model", model)
    assert code == 0 and all(line in output for line in expected) and "[learned]" not in output


def test_a_plan_refuses_the_metrics_that_a_run_would(folder):
    write(folder / "rows.jsonl", LABELLED)
    flags = ["--model", "bert", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", "--metric", "acuracy"]
    output, code = said("train", "--dry-run", *flags)
    assert code == 2 and "did you mean 'accuracy'" in output


def test_it_is_said_how_many_rows_are_cut(folder):
    rows = write(folder / "rows.jsonl", [{"text": "a film " * 40}, {"text": "a"}])
    output, code = said("predict", rows, "--model", "bert", "--task", "embed")
    assert code == 0 and "1 rows have more than 32 tokens: the rest is cut" in output


def test_an_adapter_is_not_for_another_task_or_without_its_model(folder):
    trained(folder, model="./bert", **{"data.file": str(write(folder / "rows.jsonl", LABELLED)), "train.steps": 1})
    output, code = said("predict", "rows.jsonl", "--adapter", "out", "--task", "tag")
    assert code == 2 and "out was trained, with its head, for the task 'classify': leave --task out" in output
    (folder / "bert").rename(folder / "moved")
    output, code = said("predict", "rows.jsonl", "--adapter", "out")
    assert code == 2 and "it is the model of out: give --model if it has moved" in output
    assert said("predict", "rows.jsonl", "--adapter", "out", "--model", "moved")[1] == 0


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_predicted_answer_is_no_longer_or_shorter_by_what_its_row_answers(folder):
    rows = [{"source": "is it good", "target": text} for text in ("", "it is", "it is not very good " * 4)]
    found = said("predict", write(folder / "rows.jsonl", [rows[0], *rows]), "--model", "t5")[0].splitlines()
    assert len({json.loads(line)["predicted"] for line in found}) == 1
    alone = json.loads(said("predict", write(folder / "one.jsonl", [{"source": "is it good"}]), "--model", "t5")[0])
    assert alone["predicted"] == json.loads(found[0])["predicted"]


def test_the_last_answer_of_a_conversation_is_predicted_and_may_be_missing(folder):
    tiny_files.write_model(folder / "chat", template=tiny_tokenizers.CHATML)
    first, second = ({"role": "user", "content": text} for text in ("hello", "is it?"))
    told = {"role": "assistant", "content": "no"}
    rows = [[first], [first, told], [first, told, second], [first, told, second, told]]
    rows = write(folder / "rows.jsonl", [{"messages": messages} for messages in rows])
    found = [json.loads(line)["predicted"] for line in said("predict", rows, "--model", "chat")[0].splitlines()]
    assert found[0] == found[1] != found[2] == found[3]


# -- behind a run ------------------------------------------------------------------------------------------------------


def test_eval_gives_the_metrics_of_the_run_and_those_asked_for(folder):
    write(folder / "rows.jsonl", LABELLED)
    flags = {"data.file": "rows.jsonl", "data.eval_file": "rows.jsonl", "train.metric": "f1_macro"}
    trained(folder, **flags, **{"train.metrics": ["f1_micro"], "train.steps": 1})
    output, code = said("eval", "--adapter", "out", "--metric", "matthews", "--json")
    assert code == 0 and {"accuracy", "f1_macro", "f1_micro", "matthews"} <= set(json.loads(output))


def test_labels_that_neither_adapter_nor_model_names_are_told(folder):
    write(folder / "rows.jsonl", LABELLED)
    trained(folder, **{"data.file": "rows.jsonl"})
    (folder / "out" / "run.toml").unlink()  # an adapter as PEFT's are
    assert refpeft.load("bert", "out").labels == ("LABEL_0", "LABEL_1")
    assert refpeft.load("bert", "out", labels=["no", "yes"]).labels == ("no", "yes")
    options = ["--model", "bert", "--adapter", "out", "--labels", "no,yes"]
    said = CliRunner().invoke(main, ["predict", "rows.jsonl", *options])
    assert {json.loads(line)["predicted"] for line in said.stdout.splitlines()} <= {"no", "yes"}


@pytest.mark.parametrize(
    "labels, task, message",
    [
        ("no,yes", None, "labels is 'no,yes': expected a list of names"),
        (["a", "b"], "embed", "labels are of a task that tells some apart, and the model is for embed"),
        (["a", "b"], None, "labels are of a task that tells some apart, and the model is for none"),
    ],
)
def test_labels_without_a_task_for_them_are_refused(folder, labels, task, message):
    with pytest.raises(RefpeftError, match=message):
        refpeft.load("bert", labels=labels, task=task)
