"""Tasks from files to predictions on tiny models: what is read, learned, measured and written."""

import json

import numpy as np
import pytest
import tiny
import tiny_files
import tiny_tokenizers

import refpeft
from refpeft import config, files, inputs, merging, run, tasks
from refpeft.batches import Batches, split
from refpeft.data import examples_of
from refpeft.errors import RefpeftError
from refpeft.formats import read_items
from refpeft.models.config import from_hf
from refpeft.tasks.classify import number_of
from refpeft.tokenizer import Tokenizer

WORDS = ["good", "bad", "film", "a", "the", "is", "it", "was", "not", "very", "hides", "##s"]
_BERT = {
    "model_type": "bert",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_T5 = {
    "model_type": "t5",
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
LABELLED = [
    {"text": f"{'the film ' * (n % 3)}{'was good' if n % 2 else 'is very bad'}", "label": "up" if n % 2 else "down"}
    for n in range(16)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with models "bert", "llama" and "t5"."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizers.words(WORDS)
    for name, shape in (("bert", _BERT), ("t5", _T5)):
        (tmp_path / name).mkdir()
        shape = shape | {"vocab_size": tokenizer.get_vocab_size()}
        files.write_json(tmp_path / name / "config.json", shape)
        drawn = {key: array.astype("f4") for key, array in tiny.drawn(shape).items()}
        files.write_safetensors(tmp_path / name / "model.safetensors", drawn)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        files.write_json(tmp_path / name / "tokenizer_config.json", {"eos_token": "[SEP]", "mask_token": "[MASK]"})
    tiny_files.write_model(tmp_path / "llama")
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(file, model, name=None, **how):
    """(task, its data) of a file."""
    shape = from_hf(json.loads((files.expanded(model) / "config.json").read_text()))
    items = read_items(file)
    task = tasks.make(tasks.name_of(name, items, shape), Tokenizer.load(model), shape, items.items, **how)
    return task, examples_of(items, task, str(file))


def trained(folder, resume=False, **flags):
    """The outcome of a short run."""
    common = {"model": "bert", "train.steps": 12, "train.lr": 0.02, "train.batch": 4, "method": ["full"]}
    flags = [("", key.replace("__", "."), value) for key, value in (common | flags).items()]
    return run.train(config.resolve(None, flags), folder / "out", resume, say=lambda line: None)


# -- which task --------------------------------------------------------------------------------------------------------

CASES = [
    ("bert", {"text": "a film", "label": "x"}, "classify"),
    ("llama", {"text": "a film", "label": 1}, "classify"),
    ("bert", {"text_a": "a", "text_b": "the", "label": 0.5}, "regress"),
    ("bert", {"text_a": "a", "text_b": "the"}, "embed"),
    ("bert", {"words": ["a"], "tags": ["O"]}, "tag"),
    ("bert", {"text": "a film"}, "mlm"),
    ("llama", {"text": "a film"}, "causal-lm"),
    ("llama", {"prompt": "a", "completion": "film"}, "causal-lm"),
    ("t5", {"prompt": "a", "completion": "film"}, "seq2seq"),
]


@pytest.mark.parametrize("model, row, expected", CASES)
def test_rows_and_model_tell_the_task(folder, model, row, expected):
    shape = from_hf(json.loads((folder / model / "config.json").read_text()))
    assert tasks.name_of(None, read_items(write(folder / "rows.jsonl", [row])), shape) == expected


@pytest.mark.parametrize(
    "model, row, asked, message",
    [
        ("t5", {"text": "a", "label": "x"}, None, "rows of the format 'label' are for classify, regress, embed"),
        ("bert", {"prompt": "a", "completion": "x"}, None, "a model of bert does classify, regress, tag, mlm, embed"),
        ("bert", {"text": "a", "label": "x"}, "seq2seq", "task 'seq2seq' is none for bert, which is made for classify"),
        ("llama", {"words": ["a"], "tags": ["O"]}, None, "rows of the format 'tags' are for tag"),
    ],
)
def test_rows_that_a_model_cannot_learn_are_refused(folder, model, row, asked, message):
    shape = from_hf(json.loads((folder / model / "config.json").read_text()))
    with pytest.raises(RefpeftError, match=message):
        tasks.name_of(asked, read_items(write(folder / "rows.jsonl", [row])), shape)


# -- examples ----------------------------------------------------------------------------------------------------------


def test_an_encoder_reads_the_first_token_and_a_decoder_the_last(folder):
    file = write(folder / "rows.jsonl", LABELLED)
    task, data = read(file, "bert")
    assert task.labels == ("down", "up") and task.tokenizer.decode(data.examples[1].ids) == "the film was good"
    assert data.examples[1].at.tolist() == [0] and data.examples[1].values.tolist() == [1]
    _, data = read(file, "llama")
    assert data.examples[1].at.tolist() == [len(data.examples[1]) - 1]


def test_a_pair_has_types_and_loses_the_end_of_its_longer_text(folder):
    file = write(folder / "rows.jsonl", [{"text_a": "a film is good", "text_b": "bad", "label": n} for n in range(2)])
    task, data = read(file, "bert")
    decode = task.tokenizer.backend.id_to_token
    assert list(map(decode, data.examples[0].ids)) == ["[CLS]", "a", "film", "is", "good", "[SEP]", "bad", "[SEP]"]
    assert data.examples[0].types.tolist() == [0] * 6 + [1] * 2
    short = task.cut(read_items(file).items[0], data.examples[0], 6)
    assert list(map(decode, short.ids)) == ["[CLS]", "a", "film", "[SEP]", "bad", "[SEP]"]


def test_a_tag_is_asked_for_at_the_first_token_of_its_word(folder):
    file = write(folder / "rows.jsonl", [{"words": ["films", "is", "goods"], "tags": ["B", "O", "B"]}])
    task, data = read(file, "bert")
    tokens = list(map(task.tokenizer.backend.id_to_token, data.examples[0].ids))
    assert tokens == ["[CLS]", "film", "##s", "is", "good", "##s", "[SEP]"]
    assert data.examples[0].at.tolist() == [1, 3, 4] and data.examples[0].values.tolist() == [0, 1, 0]
    cut = task.cut(read_items(file).items[0], data.examples[0], 5)
    assert cut.at.tolist() == [1, 3] and cut.values.tolist() == [0, 1]


def test_hidden_tokens_are_other_ones_each_time_and_the_same_at_the_same_step(folder):
    file = write(folder / "rows.jsonl", [{"text": "the film is very good it was not a bad film " * 2}] * 4)
    _, data = read(file, "bert")
    batches = Batches(data.examples, 4, 32)
    first, again, other = batches.at(0), batches.at(0), batches.at(1)
    assert np.array_equal(first.ids, again.ids) and not np.array_equal(first.targets, other.targets)
    assert first.supervised == sum(example.targets for example in data.examples) == 4 * 3
    original = data.examples[0].ids[np.where(first.targets[0] >= 0)]
    assert np.array_equal(first.targets[0][first.targets[0] >= 0], original)
    assert (first.targets[:, 0] < 0).all()  # special tokens stay


def test_long_texts_are_split_with_special_tokens_around_each_part(folder):
    file = write(folder / "rows.jsonl", [{"text": "the film is very good it was not"}])
    task, data = read(file, "bert")
    parts = list(task.windows(data.examples[0], 5))
    shown = [" ".join(map(task.tokenizer.backend.id_to_token, part.ids)) for part in parts]
    assert shown == ["[CLS] the film is [SEP]", "[CLS] very good it [SEP]", "[CLS] was not [SEP]"]
    assert all(part.free.tolist() == list(range(1, len(part) - 1)) for part in parts)


def test_a_length_without_room_for_a_token_between_the_special_ones_is_refused(folder):
    task, data = read(write(folder / "rows.jsonl", [{"text": "the film is good"}]), "bert")
    with pytest.raises(RefpeftError, match="2 special tokens stand around each part: set a larger length"):
        list(task.windows(data.examples[0], 2))


def test_a_length_without_room_for_a_pair_is_refused_and_a_text_without_tokens_to_hide(folder):
    pairs = write(folder / "pairs.jsonl", [{"text_a": "a film", "text_b": "bad", "label": n} for n in (0, 1)])
    with pytest.raises(RefpeftError, match="length is 2: the special tokens around a text take as many"):
        read(pairs, "bert")[0].tokenizer.encode_pair("a film", "bad", 2)
    texts = write(folder / "texts.jsonl", [{"text": "a film"}, {"text": ""}])
    with pytest.raises(RefpeftError, match="1 row with nothing to learn, at line 2"):
        read(texts, "bert")


def test_a_decoder_says_the_answer_after_its_start_token(folder):
    file = write(
        folder / "rows.jsonl", [{"prompt": "is it good", "completion": "it is"}, {"prompt": "a", "completion": "a"}]
    )
    task, data = read(file, "t5")
    batch = Batches(data.examples, 2, 32, shuffle=False).at(0)
    names = [[task.tokenizer.backend.id_to_token(token) for token in row] for row in batch.said]
    assert names == [["[PAD]", "it", "is"], ["[PAD]", "a", "[PAD]"]]
    assert task.tokenizer.decode(batch.targets[0]) == "it is" and batch.targets[1].tolist()[2] == -100
    parts = split(batch, 1)
    assert [part.said.shape for part in parts] == [(1, 3), (1, 2)] and [p.supervised for p in parts] == [3, 2]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a", "label": "x"}] * 3, "there is nothing to tell apart: of labels the rows have only 'x'"),
        ([{"text": "a", "label": "x"}, {"text": "", "label": "y"}], None),
    ],
)
def test_labels_must_differ_and_texts_may_be_empty(folder, rows, message):
    file = write(folder / "rows.jsonl", rows)
    if message:
        with pytest.raises(RefpeftError, match=message):
            read(file, "bert")
    else:
        assert len(read(file, "bert")[1].examples[1]) == 2  # [CLS] and [SEP]


def test_a_number_between_the_labels_is_unknown_and_not_the_label_at_that_place():
    assert [number_of(label, ("0", "2")) for label in (0, 2, "2")] == [0, 1, 1]
    assert [number_of(label, ("down", "up")) for label in (0, 1, "up")] == [0, 1, 1]
    with pytest.raises(RefpeftError, match="label '1' is unknown"):
        number_of(1, ("0", "2"))


def test_labels_of_several_files_may_be_numbers_in_one_and_names_in_another(folder):
    write(folder / "numbers.jsonl", [{"text": "a", "label": n % 2} for n in range(4)])
    write(folder / "names.jsonl", [{"text": "a", "label": label} for label in ("1", "up", "down")])
    assert trained(folder, **{"data.file": ["numbers.jsonl", "names.jsonl"]}).model.labels == ("0", "1", "down", "up")


def test_a_batch_whose_labels_all_weigh_nothing_changes_nothing(folder):
    write(folder / "rows.jsonl", LABELLED)
    outcome = trained(folder, **{"data.file": "rows.jsonl", "train.class_weights": [0.0, 1.0], "train.batch": 1})
    assert 0.0 in outcome.summary.train_losses and np.isfinite(outcome.summary.train_losses).all()


def test_class_weights_are_balanced_or_given(folder):
    file = write(folder / "rows.jsonl", [{"text": "a", "label": label} for label in ("x", "y", "y", "y")])
    task, data = read(file, "bert", class_weights="balanced")
    assert task.weights.tolist() == pytest.approx([2, 2 / 3])
    batch = Batches(data.examples, 4, 32, shuffle=False).at(0)
    assert batch.denominator == pytest.approx(4) and batch.supervised == 4
    assert read(file, "bert", class_weights=[1.0, 0.5])[0].weights.tolist() == [1, 0.5]
    with pytest.raises(RefpeftError, match=r"class_weights has 3 numbers, .* labels,? x, y"):
        read(file, "bert", class_weights=[1, 2, 3])


def test_the_loss_with_class_weights_is_their_weighted_mean(folder):
    file = write(folder / "rows.jsonl", LABELLED)
    task, data = read(file, "bert", class_weights=[1.0, 3.0])
    model = refpeft.load("bert", dtype="float64", task="classify", labels=task.labels)
    batch = Batches(data.examples, 16, 32, shuffle=False).at(0)
    logits = model(batch.ids, segments=batch.segments).data
    labels = batch.targets[:, 0]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    weights = np.where(labels == 1, 3.0, 1.0)
    expected = -(weights * np.log(p[np.arange(16), labels])).sum() / weights.sum()
    assert float(model.loss(batch).data) == pytest.approx(expected, rel=1e-12)
    parts = [float(model.loss(part, batch.denominator).data) for part in split(batch, 5)]
    assert sum(parts) == pytest.approx(expected, rel=1e-12)


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, rows",
    [
        ("bert", LABELLED),
        ("llama", LABELLED),
        ("bert", [{"text_a": "a film " * (n % 3 + 1), "text_b": "good", "label": float(n) / 7} for n in range(6)]),
        ("bert", [{"text_a": "a film " * (n % 3 + 1), "text_b": "good"} for n in range(6)]),
        ("bert", [{"words": ["a", "film"] * (n % 3 + 1), "tags": ["O", "B"] * (n % 3 + 1)} for n in range(6)]),
        ("t5", [{"prompt": "a film " * (n % 3 + 1), "completion": "good " * (n % 2 + 1)} for n in range(6)]),
    ],
)
def test_padding_never_changes_a_prediction(folder, model, rows):
    task, data = read(write(folder / "rows.jsonl", rows), model)
    loaded = refpeft.load(model, dtype="float64", task=task.name, labels=task.labels)
    together = dict(task.predict(loaded, Batches(data.examples, len(rows), 64, shuffle=False)))
    alone = dict(task.predict(loaded, Batches(data.examples, 1, 64, shuffle=False)))
    assert together.keys() == alone.keys() == set(range(1, len(rows) + 1))
    for line, found in together.items():
        for ours, theirs in zip(_flat(found), _flat(alone[line]), strict=True):
            assert ours == (theirs if isinstance(theirs, str) else pytest.approx(theirs, rel=1e-9))


def _flat(value):
    """All that a prediction says, in one list."""
    if isinstance(value, dict):
        return [part for one in value.values() for part in _flat(one)]
    return [part for one in value for part in _flat(one)] if isinstance(value, list) else [value]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_classifier_learns_names_its_labels_and_predicts_them(folder, model):
    write(folder / "rows.jsonl", LABELLED)
    flags = {
        "data.file": "rows.jsonl",
        "data.eval_file": "rows.jsonl",
        "model": model,
        "train.steps": 40,
        "train.lr": 0.004,
    }
    outcome = trained(folder, **flags, **{"train.eval_every": 10, "train.best": True})
    assert outcome.summary.after["accuracy"] == 1.0 and outcome.summary.before["accuracy"] < 1.0
    assert config.written("out")["task"] == "classify" and config.written("out")["labels"] == ["down", "up"]
    loaded = refpeft.load(model, "out")
    assert (loaded.task, loaded.labels) == ("classify", ("down", "up"))
    task = tasks.make(loaded.task, loaded.tokenizer, loaded.config, labels=loaded.labels)
    items, rows = inputs.to_predict(
        write(folder / "new.jsonl", [{"text": "it is bad"}]), task, loaded.config, None, {}, None
    )
    ((line, found),) = task.predict(loaded, Batches(rows.examples, 1, 64, shuffle=False))
    assert line == items.rows[0].line == 1 and found["predicted"] in ("down", "up")
    assert sum(found["probabilities"].values()) == pytest.approx(1)


ROWS = {
    "regress": [{"text": "good " * n, "label": n + 0.5} for n in range(1, 9)],
    "tag": [{"words": ["a", "film"], "tags": ["O", "B"]}, {"words": ["the", "film", "is"], "tags": ["O", "B", "O"]}]
    * 4,
    "mlm": [{"text": "the film is good"}] * 8,
    "embed": [{"text_a": "a film", "text_b": "the film", "score": 0.9}, {"text_a": "a", "text_b": "bad", "score": 0.1}]
    * 4,
    "seq2seq": [{"prompt": "is it good", "completion": "it is"}, {"prompt": "is it bad", "completion": "not"}] * 4,
}
DECIDED_BY = {"regress": "pearson", "tag": "tag_accuracy", "mlm": "perplexity", "embed": "pearson", "seq2seq": "loss"}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_task_learns_and_is_measured_again_from_its_files(folder, name, method):
    write(folder / "rows.jsonl", ROWS[name])
    model = "t5" if name == "seq2seq" else "bert"
    flags = {"data.file": "rows.jsonl", "data.eval_file": "rows.jsonl", "model": model, "train.steps": 30, "task": name}
    outcome = trained(folder, method=[method], **flags)
    before, after = outcome.summary.before, outcome.summary.after
    assert after["loss"] < before["loss"] and DECIDED_BY[name] in after
    loaded = refpeft.load(model, "out")
    assert loaded.task == name
    task = tasks.make(name, loaded.tokenizer, loaded.config, read_items("rows.jsonl").items, labels=loaded.labels)
    data = examples_of(read_items("rows.jsonl"), task, "rows.jsonl")
    again = task.measure(loaded, Batches(data.examples, 4, 32, shuffle=False), task.metrics)
    assert again == pytest.approx(after, rel=1e-4)


def test_texts_are_measured_by_their_answers_to_distinct_prompts(folder):
    rows = [{"prompt": "is it good", "completion": "it is"}, {"prompt": "is it good", "completion": "not"}]
    write(folder / "rows.jsonl", rows)
    flags = {"data.file": "rows.jsonl", "data.eval_file": "rows.jsonl", "model": "t5", "train.steps": 60}
    outcome = trained(folder, **flags, **{"train.metric": "exact_match", "train.eval_every": 20})
    assert outcome.summary.after["exact_match"] == 1.0  # either of the two answers is right
    assert "exact_match" in outcome.report.text()


def test_the_metric_decides_which_evaluation_is_the_best(folder):
    write(folder / "rows.jsonl", LABELLED)
    flags = {"data.file": "rows.jsonl", "data.eval_file": "rows.jsonl", "train.eval_every": 2, "train.best": True}
    outcome = trained(folder, **flags)
    found = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    measured = {record["step"]: record["accuracy"] for record in found if "accuracy" in record}
    best = max(value for step, value in measured.items() if step)
    assert outcome.summary.best["accuracy"] == best == outcome.summary.after["accuracy"]
    assert outcome.summary.best_step == min(step for step, value in measured.items() if step and value == best)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train.metric": "bleu"}, "bleu is a metric of texts, not of labels"),
        ({"train.metric": "acuracy"}, "there is no metric 'acuracy'; did you mean 'accuracy'"),
        ({"data.pack": True}, "the task 'classify' has one: leave it out"),
        ({"data.overlong": "split", "data.length": 4}, "cannot be split, at lines .* overlong split is for texts"),
        ({"labels": ["up", "sideways"]}, "label 'down' is unknown"),
        ({"labels": ["up", "up", "down"]}, "labels names one twice: up, up, down"),
        ({"task": "embed"}, "the label is 'down': expected two texts, and perhaps a score that is a number"),
        ({"task": "tag"}, "is not for the task 'tag', but for classify"),
        (
            {"train.metric": "bits_per_byte"},
            "bits_per_byte is of texts that are said, and the task 'classify' says none",
        ),
        ({"method": ["adamix"], "task": "regress"}, "the label is 'down': expected a text and a number"),
    ],
)
def test_what_a_classification_cannot_have_is_refused(folder, flags, message):
    write(folder / "rows.jsonl", LABELLED)
    with pytest.raises(RefpeftError, match=message):
        trained(folder, **{"data.file": "rows.jsonl", "data.eval_file": "rows.jsonl"} | flags)


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([{"text": "a", "label": 1.5}], {"task": "classify"}, "nothing to tell apart: values from 1.5 to 1.5"),
        (
            [{"text": "a", "label": n} for n in range(30)],
            {"labels": ["x", "y"]},
            "label '2' is unknown; there are x, y",
        ),
        ([{"text": "a", "label": f"{n}!"} for n in range(3)], {"labels": [f"l{n}" for n in range(1000)]}, "980 more$"),
        ([{"text": "a film"}], {"labels": ["a", "b"]}, "labels has no effect: the task 'mlm' has none"),
        ([{"text_a": "a", "text_b": "the"}] * 2, {"train.batch": 1}, "compared with one another: set a larger batch"),
    ],
)
def test_rows_that_do_not_fit_what_is_asked_of_them_are_refused(folder, rows, flags, message):
    write(folder / "rows.jsonl", rows)
    with pytest.raises(RefpeftError, match=message):
        trained(folder, **{"data.file": "rows.jsonl"} | flags)


def test_empty_texts_are_counted(folder):
    for rows in ([*LABELLED, {"text": " ", "label": "up"}], [{"text_a": "a", "text_b": ""}]):
        assert "1 rows have an empty text" in read(write(folder / "rows.jsonl", rows), "bert")[1].summary.notes


@pytest.mark.parametrize("flags", [{"train.metric": "accuracy"}, {"train.metrics": ["f1_macro"]}])
def test_a_metric_without_held_out_rows_is_refused(folder, flags):
    write(folder / "rows.jsonl", LABELLED)
    with pytest.raises(RefpeftError, match=f"{next(iter(flags))} needs held-out rows: data.eval_file or data.eval_sha"):
        trained(folder, **{"data.file": "rows.jsonl"} | flags)


def test_a_highest_score_is_for_pairs_to_embed(folder):
    rows = [{"text_a": "a film", "text_b": "the film", "score": score} for score in (5, 2)]
    file = write(folder / "rows.jsonl", rows)
    assert [example.score for example in read(file, "bert", "embed", highest_score=10)[1].examples] == [0.5, 0.2]
    trained(folder, **{"data.file": "rows.jsonl", "task": "embed"})
    assert config.written("out")["data"]["highest_score"] == 5
    with pytest.raises(RefpeftError, match="highest_score has no effect: the task 'regress' compares no vectors"):
        read(file, "bert", "regress", highest_score=10)


def test_a_resumed_run_may_measure_more_but_not_decide_by_another_metric(folder):
    write(folder / "rows.jsonl", LABELLED)
    flags = {"data.file": "rows.jsonl", "data.eval_file": "rows.jsonl", "train.eval_every": 4}
    trained(folder, **flags)
    again = trained(folder, resume=True, **flags, **{"train.metrics": ["f1"]}).report
    before = {name: value for name, value, _ in again.scores}
    assert list(before) == ["held-out loss", "accuracy", "f1"] and before["f1"] == "-" != before["accuracy"]
    with pytest.raises(RefpeftError, match="is of another run: metric was accuracy, now matthews"):
        trained(folder, resume=True, **flags, **{"train.metric": "matthews"})


def test_texts_of_a_batch_that_are_compared_are_not_computed_in_parts(folder):
    write(
        folder / "rows.jsonl", [{"text_a": "a film", "text_b": "the film"}, {"text_a": "bad", "text_b": "not good"}] * 4
    )
    with pytest.raises(RefpeftError, match="compared with one another: leave micro_batch out"):
        trained(folder, **{"data.file": "rows.jsonl", "train.micro_batch": 2, "task": "embed"})


@pytest.mark.parametrize("name", [*ROWS, "classify"])
def test_a_merged_model_knows_its_task_and_predicts_what_the_run_does(folder, name):
    rows = LABELLED if name == "classify" else ROWS[name]
    file = write(folder / "rows.jsonl", rows)
    model = "t5" if name == "seq2seq" else "bert"
    outcome = trained(
        folder, method=["lora"], **{"data.file": "rows.jsonl", "model": model, "task": name, "train.steps": 6}
    )
    merged = merging.merge(outcome.directory, folder / "merged", model=model)
    assert not merged.changed and merged.measured.difference < 1e-4
    task, data = read(file, model, name)
    found = []
    for loaded in (refpeft.load(model, "out"), refpeft.load("merged", task=name)):
        assert (loaded.task, loaded.labels) == (name, task.labels)
        if name == "mlm":
            found.append([task.measure(loaded, Batches(data.examples, 4, 64, shuffle=False))])
        else:
            found.append([told for _, told in task.predict(loaded, Batches(data.examples, 4, 64, shuffle=False))])
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(_flat(ours), _flat(theirs), strict=True):
            assert a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-3, abs=1e-4))


def test_labels_that_the_model_s_own_head_knows_keep_its_order(folder):
    write(folder / "rows.jsonl", LABELLED)
    first = trained(folder, labels=["up", "down"], **{"data.file": "rows.jsonl", "train.steps": 3})
    merging.merge(first.directory, folder / "merged", model="bert")
    numbers = [row | {"label": int(row["label"] == "down")} for row in LABELLED]
    for rows, labels in (
        (LABELLED, ("up", "down")),
        (numbers, ("up", "down")),
        ([row | {"label": row["label"] + "!"} for row in LABELLED], ("down!", "up!")),
    ):
        file = write(folder / "rows.jsonl", rows)
        run_of = config.resolve(None, [("", "model", "merged"), ("", "data.file", str(file))]).run
        found = inputs.read(run_of, from_hf(files.read_json(folder / "merged/config.json")), Tokenizer.load("merged"))
        assert found.task.labels == labels


def test_a_run_is_merged_whose_held_out_rows_lack_a_label_of_balanced_weights(folder):
    write(folder / "rows.jsonl", LABELLED)
    write(folder / "held_out.jsonl", LABELLED[:1])
    flags = {"data.file": "rows.jsonl", "data.eval_file": "held_out.jsonl", "train.class_weights": "balanced"}
    outcome = trained(folder, method=["lora"], **flags)
    assert not merging.merge(outcome.directory, folder / "merged", model="bert").changed
