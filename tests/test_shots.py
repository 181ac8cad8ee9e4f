"""In-context learning: which examples are shown, that none is a row's own answer, its scores, and what is refused."""

import json

import numpy as np
import pytest
import tiny
import tiny_files
from click.testing import CliRunner
from test_t5 import CONFIGS as T5S

import refpeft
from refpeft import shots
from refpeft.batches import Batches
from refpeft.cli import main
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.items import Chat, Labelled, Plain
from refpeft.tasks.causal_lm import CausalLM

POOL = [Plain(f"q{n}", f" a{n}\n") for n in range(9)]


def test_shots_are_drawn_by_the_seed_and_are_the_same_for_all_rows():
    rows = [Plain(f"other {n}", " x") for n in range(5)]
    found = shots.with_shots(rows, POOL, 3, seed=1)
    fronts = {row.prompt.removesuffix(own.prompt) for row, own in zip(found, rows, strict=True)}
    (front,) = fronts
    shown = front.split(shots.BETWEEN)
    assert shown.pop() == "" and len(set(shown)) == 3
    assert {one.partition(" ")[0].replace("q", " a") == " " + one.partition(" ")[2] for one in shown} == {True}
    assert [row.completion for row in found] == [" x"] * 5
    assert found == shots.with_shots(rows, POOL, 3, seed=1) != shots.with_shots(rows, POOL, 3, seed=2)
    fewer = shots.with_shots(rows, POOL, 2, seed=1)[0].prompt.removesuffix(rows[0].prompt)
    assert front.startswith(fewer)  # more shots are further ones
    assert shots.with_shots(rows, [], 0, seed=1) == rows


def test_no_row_is_shown_its_own_answer():
    for row, own in zip(shots.with_shots(POOL, POOL, 8, seed=0), POOL, strict=True):
        *shown, asked = row.prompt.split(shots.BETWEEN)
        assert asked == own.prompt and len(shown) == 8
        assert not any(one.startswith(own.prompt) for one in shown)
    with pytest.raises(RefpeftError, match="9 shots are asked for, but only 8 rows have another prompt"):
        shots.with_shots(POOL, POOL, 9, seed=0)


def test_rows_become_prompts():
    assert shots.as_prompt(POOL[0]) is POOL[0]
    assert shots.as_prompt(Labelled("fine", label="good")) == Plain("fine\n", "good")
    assert shots.as_prompt(Labelled("a", "b", label=1)) == Plain("a\nb\n", "1")
    for item in (Plain("", "a text"), Labelled("to be predicted"), Chat([])):
        with pytest.raises(RefpeftError, match="shots are for rows of prompt and completion, or of text and label"):
            shots.as_prompt(item)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model", max_position_embeddings=256)
    tiny_files.write_rows(tmp_path / "train.jsonl")
    tiny_files.write_rows(tmp_path / "test.jsonl", 5)
    for name, labels in (("labels", "no yes yes"), ("more", "yes no perhaps")):
        lines = [json.dumps({"text": f"text {n}", "label": label}) for n, label in enumerate(labels.split())]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def run(*arguments, exit_code=0, model="./model"):
        result = CliRunner().invoke(main, ["eval", "--model", model, "--json", *arguments])
        assert result.exit_code == exit_code, result.output
        return json.loads(result.stdout) if not exit_code else result.stderr

    return run


SHOWN = ("--data", "test.jsonl", "--shots-from", "train.jsonl")


def test_the_loss_is_that_of_the_answers_behind_the_examples(evaluate):
    found = {count: evaluate(*SHOWN, "--shots", count, "--metric", "exact_match") for count in "024"}
    assert len({one["eval_loss"] for one in found.values()}) == 3
    assert found["0"]["eval_loss"] == evaluate("--data", "test.jsonl")["eval_loss"]
    assert found["2"]["exact_match"] == 0 and found["2"]["rows"] == 5
    model = refpeft.load("model")
    task = CausalLM(model.tokenizer)
    plain = [Plain(f"is {n} even?", " no" if n % 2 else " yes") for n in range(12)]
    rows = shots.with_shots(plain[:5], plain, 2, 3)
    examples = [task.encode(row, 1)[0] for row in rows]
    expected = mean_loss(model, Batches(examples, 2, 256, shuffle=False))
    assert evaluate(*SHOWN, "--shots", "2", "--seed", "3")["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluate(*SHOWN, "--shots", "2", "--rows", "3")["rows"] == 3


@pytest.mark.parametrize("count", ["0", "2"])
def test_of_labels_the_likeliest_name_is_predicted(count, evaluate):
    found = evaluate("--data", "labels.jsonl", "--shots-from", "more.jsonl", "--shots", count, "--metric", "f1_macro")
    model = refpeft.load("model")
    task = CausalLM(model.tokenizer)
    own, pool = ([Plain(f"text {n}\n", label) for n, label in enumerate(labels.split())] for labels in
                 ("no yes yes", "yes no perhaps"))  # fmt: skip
    right = 0
    for row in shots.with_shots(own, pool, int(count), 0):
        likelihood = {}
        for label in ("no", "perhaps", "yes"):
            ids = task.encode(Plain(row.prompt, label), 1)[0].ids
            start = len(model.tokenizer.encode(row.prompt, specials=True))
            logits = model(ids[None]).data[0].astype("f8")
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            likelihood[label] = sum(log_p[t - 1, ids[t]] for t in range(start, len(ids) - 1))
        right += max(likelihood, key=likelihood.get) == row.completion
    assert found["accuracy"] == pytest.approx(right / 3) and 0 <= found["f1_macro"] <= 1


def test_the_likeliest_name_is_told_without_the_end_token(evaluate):
    model = refpeft.load("model")
    task, labels = CausalLM(model.tokenizer), ("aa", "bb", "cc", "dd")
    prompts = [Plain(f"text {n}\n", "aa") for n in range(24)]
    expected = []
    for row in prompts:
        start = len(model.tokenizer.encode(row.prompt, specials=True))
        likelihood = []
        for label in labels:
            ids = task.encode(Plain(row.prompt, label), 1)[0].ids
            logits = model(ids[None]).data[0].astype("f8")
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            likelihood.append([log_p[t - 1, ids[t]] for t in range(start, len(ids))])
        expected.append([sum(said[:-1]) for said in likelihood])
    found = shots.likeliest(model, task, prompts, labels, 5)
    assert found.tolist() == np.argmax(expected, axis=1).tolist() and len(set(found.tolist())) > 1


def test_an_answer_is_compared_up_to_the_next_example(evaluate, monkeypatch):
    said = refpeft.load("model").tokenizer.encode(" yes\n\nis 7 even? no")
    monkeypatch.setattr("refpeft.tasks.texts.generate", lambda model, prompts, *more, **how: [said] * len(prompts))
    assert evaluate(*SHOWN, "--shots", "1", "--metric", "exact_match")["exact_match"] == 0.6  # of 0 ... 4


def test_answers_end_where_another_example_would_begin(monkeypatch):
    monkeypatch.setattr("refpeft.tasks.texts.generate", lambda *a, **k: [[0]])
    task = CausalLM.__new__(CausalLM)
    task.decoding, task.tokenizer = (
        {},
        type("Tokenizer", (), {"eos_ids": [], "decode": lambda self, ids: "\n a b\n\nc"})(),
    )
    for task.until, said in ((None, "\n a b\n\nc"), (shots.BETWEEN, "a b")):
        assert task.answers(None, [np.zeros(1, int)], 3) == [said]


def test_an_encoder_decoder_is_shown_examples_too():
    model = tiny.of(next(iter(T5S.values())))
    assert model.task == "seq2seq" and shots.with_shots([Plain("a", "b")], [Plain("c", "d")], 1, 0) == [
        Plain("cd\n\na", "b")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "test.jsonl", "--shots", "2"), "shots are rows of a training file: give --shots-from FILE"),
        ((*SHOWN,), "say what --shots shows"),
        (("--shots", "0"), "there is no data: give --data FILE"),
        ((*SHOWN, "--shots", "40"), "40 shots are asked for, but only 11 rows have another prompt"),
        ((*SHOWN, "--shots", "4", "--length", "40"), "with 4 shots: fewer of them are shorter"),
        ((*SHOWN, "--shots", "2", "--metric", "accuracy"), "accuracy is a metric of labels, not of texts"),
        ((*SHOWN, "--shots", "-1"), "-1"),
        ((*SHOWN, "--shots", "1", "--task", "regress"), "shots are for models that write text, and the task of this"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, message, evaluate):
    assert message in evaluate(*arguments, exit_code=2)
