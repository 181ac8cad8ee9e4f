"""Several data sets in one training: shares, epochs, held-out rows of each, replay, and prompts of tasks."""

import json

import numpy as np
import pytest
import tiny
import tiny_files
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import examples

import refpeft
from refpeft import adapters, config, inputs, sites
from refpeft.batches import Batches, split
from refpeft.cli import main
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.evaluation import Evaluation, Several, mean_loss
from refpeft.examples import Example, Pair
from refpeft.mixtures import Mixture
from refpeft.models.checkpoint import open_checkpoint
from refpeft.trainer import Trainer


def rows(count: int, first: int) -> list[Example]:
    """Examples that can be told by their line, numbered from `first`."""
    return [Example(np.array([1, 2, 3], "i4"), np.array([False, True, True]), first + i) for i in range(count)]


def mixture(sizes=(5, 12), weights=(3, 1), batch=4, seed=0, **more) -> Mixture:
    sets = [Batches(rows(size, 100 * n), 1, 8, seed=seed) for n, size in enumerate(sizes)]
    return Mixture(sets, weights, batch, seed, **more)


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=4), st.integers(0, 5))
def test_the_mean_share_of_a_set_is_its_weight(weights, seed):
    mixed = mixture([3] * len(weights), weights, 50, seed)
    count = np.zeros(len(weights))
    for step in range(100):
        count += np.bincount(mixed.at(step).task, minlength=len(weights))
    share = np.array(weights) / sum(weights)
    assert np.abs(count / count.sum() - share).max() < 5 * np.sqrt((share * (1 - share)).max() / count.sum())
    assert mixed.shares == pytest.approx(share)


@given(st.integers(1, 9), st.integers(0, 3), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_a_step_depends_on_seed_and_number_alone(batch, seed, steps):
    def lines(mixed, step):
        return [example.line for example in mixed.examples_at(step)]

    one, other = mixture(batch=batch, seed=seed), mixture(batch=batch, seed=seed)
    in_order = {step: lines(one, step) for step in range(max(steps) + 1)}
    assert all(lines(other, step) == in_order[step] for step in reversed(steps))
    assert all(len(found) == batch for found in in_order.values())


def test_each_set_goes_through_epochs_of_its_own():
    mixed = mixture()
    seen = [example.line for step in range(1500) for example in mixed.examples_at(step)]  # rows of two blocks of draws
    for number, size in enumerate((5, 12)):
        own = [line for line in seen if line // 100 == number]
        whole = [own[at : at + size] for at in range(0, len(own) - size, size)]
        assert all(len(set(epoch)) == size for epoch in whole)
        assert len({tuple(epoch) for epoch in whole}) > 1
    assert mixed.steps_per_epoch == 5 and mixture(epoch=100).steps_per_epoch == 25


def test_the_task_of_a_row_is_the_number_of_its_set_in_parts_of_a_batch_too():
    mixed = mixture()
    batch = mixed.at(3)
    assert batch.task.tolist() == [example.line // 100 for example in mixed.examples_at(3)]
    assert np.concatenate([part.task for part in split(batch, 3)]).tolist() == batch.task.tolist()
    assert next(iter(Batches(rows(3, 0), 2, 8))).task is None


def test_packed_rows_and_pairs_have_one_task_each():
    sets = [Batches(rows(6, 100 * n), 1, 6, pack=True) for n in range(2)]
    mixed = Mixture(sets, (1, 1), 4)
    batch, lines = mixed.at(0), [example.line for example in mixed.examples_at(0)]
    assert batch.task.tolist() == [line // 100 for line in lines[::2]] and batch.positions is not None
    text = np.array([1, 2], "i4")
    pairs = [[Pair(text, text, line, score) for line in range(3)] for score in (None, 0.5)]
    mixed = Mixture([Batches(pairs[0], 1, 8), Batches(pairs[0], 1, 8)], (1, 1), 3)
    assert mixed.at(0).task.shape == (6,) and (mixed.at(0).task[::2] == mixed.at(0).task[1::2]).all()
    with pytest.raises(RefpeftError, match="of others none"):
        Mixture([Batches(one, 1, 8) for one in pairs], (1, 1), 3)


@pytest.mark.parametrize("weights", [(1,), (1, 0)])
def test_weights_that_are_none_are_an_error(weights):
    with pytest.raises(RefpeftError, match="expected one above 0 for each of the 2 sets"):
        mixture(weights=weights)


def test_a_mixture_goes_on_to_the_same_bits(tmp_path):
    def trainer(out):
        model = tiny.model()
        sites.attach(model, "lora", {"dropout": 0.1})
        mixed = Mixture([Batches(examples(seed=seed), 1, 32) for seed in (0, 1)], (2, 1), 4)
        return Trainer(model, mixed, None, Train(steps=6, batch=4, lr=1e-2, warmup=0), out)

    whole, cut, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "cut"), trainer(tmp_path / "cut")
    whole.run()
    for _ in range(3):
        cut._step()
    cut._save()
    resumed.run(resume=True)
    assert np.array_equal(whole.flat.values, resumed.flat.values)
    other = trainer(tmp_path / "cut")
    other.train.shares = (0.5, 0.5)
    with pytest.raises(RefpeftError, match="of another run: shares of data sets was"):
        other.run(resume=True)


# ---- held-out rows of several sets -----------------------------------------------------------------------------------


def test_sets_are_evaluated_each_and_together():
    model = tiny.model()
    sets = [Batches(examples(count, seed), 2, 32, shuffle=False) for count, seed in ((3, 1), (6, 2))]
    found = Several({name: Evaluation(model, one) for name, one in zip("ab", sets, strict=True)})()
    assert list(found) == ["loss", "loss a", "loss b"]
    assert [found["loss a"], found["loss b"]] == [mean_loss(model, one) for one in sets]
    both = Batches(examples(3, 1) + examples(6, 2), 2, 32, shuffle=False)
    assert found["loss"] == pytest.approx(mean_loss(model, both))


def test_the_rows_of_a_set_are_evaluated_as_its_task():
    model = tiny.model()
    tiny.scramble(sites.attach(model, "multitask_prompt", EACH))
    rows = Batches(examples(3, 1), 2, 32, shuffle=False)
    found = Several({name: Evaluation(model, rows) for name in "ab"})()
    for model.mode.task, name in enumerate("ab"):
        assert found[f"loss {name}"] == mean_loss(model, rows)
    assert found["loss a"] != found["loss b"]


# ---- prompts of tasks ------------------------------------------------------------------------------------------------

EACH = {"tokens": 3, "tasks": 2, "each": True}


def test_a_prompt_of_tasks_is_that_of_each_rows_own_data_set():
    model = tiny.model()
    adapter = sites.attach(model, "multitask_prompt", EACH)
    tiny.scramble(adapter)
    assert {name.rpartition(".")[2] for name in adapter.params} == {"prompt", "cols0", "rows0", "cols1", "rows1"}
    ids, alone = tiny.ids(3), []
    for task in range(2):
        model.mode.task = task
        alone.append(model(ids).data)
    model.mode.task = np.array([1, 0, 1], "i4")
    together = model(ids).data
    assert np.allclose(together, np.stack([alone[1][0], alone[0][1], alone[1][2]]), rtol=1e-12, atol=1e-12)
    model.mode.task, model.mode.training = np.array([1, 1], "i4"), True
    batch = tiny.batch()
    tiny.assert_slope(adapter, lambda: model.loss(batch))
    values = {name.rpartition(".")[2]: tensor.grad for name, tensor in adapter.params.items()}
    assert values["cols1"].any() and not values["cols0"].any()
    model.mode.training, model.mode.task = False, 0
    named = model(ids).data
    model.mode.task = None
    assert np.array_equal(model(ids).data, named)  # the one of its options


@pytest.mark.parametrize(("options", "task"), [({"tasks": 2}, [0, 1]), (EACH, [0, 2]), (EACH, None)])
def test_a_prompt_of_one_task_is_not_trained_on_several(options, task):
    model = tiny.model()
    sites.attach(model, "multitask_prompt", options)
    model.mode.training, model.mode.task = True, task and np.array(task, "i4")
    with pytest.raises(RefpeftError, match=r"multitask_prompt\.each = true, and as many tasks"):
        model(tiny.ids())


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def refpeft_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    for name, count in (("a", 12), ("b", 6), ("c", 5), ("d", 4)):
        tiny_files.write_rows(tmp_path / f"{name}.jsonl", count)

    def train(*arguments: str, exit_code: int = 0):
        common = ("train", "--model", "./model", "--steps", "4", "--lr", "0.01", "--batch", "4")
        result = CliRunner().invoke(main, [*common, *arguments])
        assert result.exit_code == exit_code, result.output
        return result

    return train


TWO = ("--data", "a.jsonl", "--data", "b.jsonl", "--eval-data", "b.jsonl", "--eval-data", "c.jsonl")


def test_two_files_are_mixed_and_each_has_scores(refpeft_train, tmp_path):
    result = refpeft_train(*TWO, "--mix", "3,1", "--out", "out", "--json")
    told = json.loads(result.stdout)
    assert {"loss", "loss b.jsonl", "loss c.jsonl"} <= set(told["after"])
    assert "75.0% of a step's rows are of" in result.stderr and "25.0%" in result.stderr
    found = config.resolve(tmp_path / "out" / "run.toml").run
    assert found.data.file == ["a.jsonl", "b.jsonl"] and found.data.mix == (3.0, 1.0) and found.data.format == "prompt"
    result = CliRunner().invoke(main, ["eval", "--adapter", "out", "--json"])
    scores = json.loads(result.stdout)
    assert scores["eval_loss"] == pytest.approx(told["after"]["loss"], rel=1e-5)
    assert scores["loss c.jsonl"] == pytest.approx(told["after"]["loss c.jsonl"], rel=1e-5)
    plan = json.loads(refpeft_train(*TWO, "--dry-run", "--json").stdout)
    assert plan["tokens"] == sum(json.loads(refpeft_train("--data", f, "--dry-run", "--json").stdout)["tokens"]
                                 for f in ("a.jsonl", "b.jsonl"))  # fmt: skip


def batches_of(*sets: str) -> Batches:
    resolved = config.resolve(None, [], ["model=./model", *sets]).run
    checkpoint = open_checkpoint("model")
    found = inputs.read(resolved, checkpoint.config, checkpoint.tokenizer())
    return inputs.make_batches(resolved, found.rows, checkpoint.config)


def test_shares_are_those_of_the_rows_or_as_said_and_replayed_rows_come_beside(refpeft_train):
    both = 'data.file=["a.jsonl", "b.jsonl"]'
    assert batches_of(both).shares == (2 / 3, 1 / 3)
    assert batches_of(both, "data.mix=[1, 4]").shares == (0.2, 0.8)
    replaying = batches_of("data.file=a.jsonl", "data.replay=c.jsonl", "data.replay_share=0.25", "train.batch=1")
    assert replaying.shares == pytest.approx((0.75, 0.25)) and replaying.steps_per_epoch == 16  # 12 are its own
    assert batches_of(both, "data.replay=c.jsonl").shares == pytest.approx((0.6, 0.3, 0.1))
    assert len(batches_of(both, "data.eval_share=0.5").rows) == 9


def test_a_share_of_every_file_is_held_out(refpeft_train):
    told = refpeft_train(*TWO[:4], "--set", "data.eval_share=0.34", "--out", "out", "--json")
    assert set(json.loads(told.stdout)["after"]) >= {"loss a.jsonl", "loss b.jsonl"}


def test_files_of_the_same_name_are_told_by_their_paths(refpeft_train, tmp_path):
    (tmp_path / "other").mkdir()
    tiny_files.write_rows(tmp_path / "other" / "a.jsonl", 4)
    result = refpeft_train("--data", "a.jsonl", "--data", "other/a.jsonl", *TWO[4:6], "--eval-data", "other/a.jsonl",
                           "--set", "train.eval_every=2", "--out", "out", "--json")  # fmt: skip
    assert {"loss b.jsonl", "loss a.jsonl"} <= set(json.loads(result.stdout)["after"])
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert ["loss a.jsonl" in record for record in records if "eval_loss" in record] == [True] * 3


def test_a_run_of_prompts_of_tasks_trains_all_and_is_evaluated_by_each(refpeft_train, tmp_path):
    options = ("--set", "multitask_prompt.tokens=3", "--set", "multitask_prompt.tasks=2")
    each = ("--set", "multitask_prompt.each=true", "--out", "out", "--json")
    told = json.loads(refpeft_train(*TWO, "--method", "multitask_prompt", *options, *each).stdout)
    scores = json.loads(CliRunner().invoke(main, ["eval", "--adapter", "out", "--json"]).stdout)
    assert scores["loss c.jsonl"] == pytest.approx(told["after"]["loss c.jsonl"], rel=1e-5)
    start = tiny_files.write_rows(tmp_path / "d.jsonl", 3)
    refused = refpeft_train(*TWO, "--method", "multitask_prompt", *options, "--out", "other", exit_code=2)
    assert "multitask_prompt.each = true, and as many tasks" in refused.stderr and start.exists()


def test_labels_are_those_of_all_files(tmp_path):
    for name, labels in (("a", "xy"), ("b", "yz")):
        lines = [json.dumps({"text": f"text {label}", "label": label}) for label in labels * 2]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tiny_files.write_model(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    data = {"file": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]}
    found = inputs.read(config.RunConfig(task="classify", data=data), checkpoint.config, checkpoint.tokenizer())
    assert found.task.labels == ("x", "y", "z")
    assert [{int(e.values[0]) for e in one.examples} for one in found.rows.sets] == [{0, 1}, {1, 2}]
    assert "the labels are those of all files together, 3" in found.rows.summary.lines()


def test_what_was_forgotten_is_told(refpeft_train):
    result = refpeft_train(*TWO, "--earlier", "d.jsonl", "--replay", "c.jsonl", "--out", "out", "--json")
    told = json.loads(result.stdout)["forgetting"]
    assert told["file"].endswith("d.jsonl") and told["before"]["loss"] > told["after"]["loss"]
    text = refpeft_train("--data", "a.jsonl", "--earlier", "b.jsonl", "--out", "other").stdout
    assert "forgetting, on b.jsonl: loss " in text and "held-out loss" not in text
    scores = json.loads(CliRunner().invoke(main, ["eval", "--adapter", "other", "--data", "b.jsonl", "--json"]).stdout)
    assert f"-> {scores['eval_loss']:.4f}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "a.jsonl", "--mix", "1,2"), "--mix: data.mix has 2 weights for 1 files"),
        (("--data", "a.jsonl", "--mix", "2"), "--mix: data.mix has no effect: data.file is one file"),
        ((*TWO, "--mix", "1,x"), '--mix: data.mix is [1, "x"]: expected a number'),
        ((*TWO, "--mix", "1,0"), "--mix: data.mix is [1, 0]: expected a value above 0"),
        (TWO[:6], "--eval-data: data.eval_file names 1 files and data.file 2"),
        (("--data", "a.jsonl", "--data", "./a.jsonl"), "--data: data.file names a file twice"),
        (("--data", "a.jsonl", "--data", "no.jsonl"), "--data: data.file no.jsonl does not exist"),
        (("--data", "a.jsonl", "--replay-share", "0.5"), "--replay-share: data.replay_share has no effect"),
        (
            ("--data", "a.jsonl", "--replay", "b.jsonl", "--set", "train.group_by_length=true"),
            "train.group_by_length is for rows of one file",
        ),
        (("--data", "a.jsonl", "--replay", "b.jsonl", "--replay-share", "1"), "expected a value below 1"),
        (("--data", "a.jsonl", "--replay", "./a.jsonl"), "--replay: data.replay is one of data.file"),
        (("--data", "a.jsonl", "--replay", "b.jsonl", "--earlier", "b.jsonl"), "--earlier: data.earlier is trained on"),
        (("--data", "a.jsonl", "--replay", "no.jsonl"), "--replay: data.replay no.jsonl does not exist"),
        (("--data", "a.jsonl", "--earlier", "no.jsonl"), "--earlier: data.earlier no.jsonl does not exist"),
    ],
)
def test_mistakes_are_told_with_their_flag(arguments, message, refpeft_train):
    assert message in refpeft_train(*arguments, exit_code=2).stderr


# ---- adapters of several tasks on one base ---------------------------------------------------------------------------


def test_adapters_of_several_tasks_take_turns_on_one_base(refpeft_train, tmp_path):
    for name, method in (("a", "prompt_tuning"), ("b", "prompt_tuning"), ("c", "lora")):
        refpeft_train("--data", f"{name}.jsonl", "--method", method, "--out", f"runs/{name}")
    model, ids = refpeft.load("model"), tiny.ids()
    before, kept = model(ids).data, {name: weight().copy() for name, weight in model.frozen.items()}
    for name in "abca":
        (adapter,) = adapters.load(model, tmp_path / "runs" / name)
        assert np.array_equal(model(ids).data, refpeft.load("model", f"runs/{name}")(ids).data)
        assert not np.array_equal(model(ids).data[:, -1], before[:, -1])
        refpeft.detach(model, adapter)
        assert np.array_equal(model(ids).data, before)
    assert all(np.array_equal(weight(), kept[name]) for name, weight in model.frozen.items())
