"""The last layer goes on from its attention with the rows that are asked for alone: everything is as with all rows."""

from dataclasses import replace

import numpy as np
import pytest
import test_every_model
import tiny
import tiny_tasks
from variants import FAMILIES, VARIANTS, attached

from refpeft import learning, sites
from refpeft.batches import IGNORE, Batch
from refpeft.cost import tape_bytes
from refpeft.models.block import Block
from refpeft.tensor import no_grad

CLOSE = 1e-12


def padded(rows: int = 3, time: int = 8) -> Batch:
    """Rows of different lengths, of which every third token is learned."""
    batch, lengths = tiny.batch(rows, time), time - np.arange(rows)
    real = np.arange(time) < lengths[:, None]
    learned = real & (np.arange(time) % 3 == 1)
    return Batch(batch.ids, np.where(learned, batch.ids[:, ::-1], IGNORE), segments=np.where(real, 0, -1))


@pytest.fixture
def picked(monkeypatch):
    """With how many rows each last layer went on, in the order of passes; None: with all."""
    seen, alone = [], Block._alone

    def noted(self, rows):
        seen.append(len(rows[0]) if alone(self, rows) else None)
        return seen[-1] is not None

    monkeypatch.setattr(Block, "_alone", noted)
    return seen


@pytest.fixture
def same(monkeypatch):
    """A function that compares the loss and all gradients with those of a last layer that computes all rows."""

    def compare(model, batch):
        found = {"loss": model.loss(batch).data} | tiny.gradients(model, batch)
        with monkeypatch.context() as patch:
            patch.setattr(Block, "_alone", lambda self, rows: False)
            expected = {"loss": model.loss(batch).data} | tiny.gradients(model, batch)
        largest = max(abs(array).max() for array in expected.values())
        assert found.keys() == expected.keys()
        assert max(abs(found[name] - expected[name]).max() for name in found) <= CLOSE * largest

    return compare


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora-everywhere", "full", "ia3", "ln_tuning", "prompt_tuning", "houlsby"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_decoder(family, name, checkpointing, same):
    model, _ = attached(family, name)
    model.checkpointing = checkpointing
    same(model, padded())


@pytest.mark.parametrize(("family", "name"), [("qwen2", name) for name in VARIANTS])
def test_with_every_method(family, name, same):
    same(attached(family, name)[0], padded())


@pytest.mark.parametrize(("family", "task"), tiny_tasks.CASES)
@pytest.mark.parametrize(("method", "options"), [("lora", {"targets": "all-linear"}), ("prompt_tuning", {"tokens": 2})])
def test_of_every_model_with_every_task(family, task, method, options, same):
    model = tiny_tasks.model(family, task)
    tiny.scramble(sites.attach(model, method, options))
    same(model, tiny_tasks.batch(family, task))


def test_where_the_head_reads_the_prompt(same, picked):
    model = tiny_tasks.model("bert", "classify")
    tiny.scramble(sites.attach(model, "prompt_tuning", {"tokens": 2, "head_reads": "prompt"}))
    same(model, tiny_tasks.batch("bert", "classify"))
    assert picked == [3, 3]


@pytest.mark.parametrize("name", ["lora", "lora-everywhere", "full", "boft", "prefix_tuning", "bitfit-created"])
def test_beside_what_merges_into_weights_only_rows_with_a_target_go_on(name, picked):
    batch = padded()
    attached("llama", name)[0].loss(batch)
    assert picked == [batch.supervised] and batch.supervised < batch.tokens


@pytest.mark.parametrize("name", ["houlsby", "parallel", "pfeiffer", "unipelt", "ladder_side", "adamix"])
def test_beside_what_may_look_at_rows_together_all_go_on(name, picked):
    model, _ = attached("llama", name)
    learning.objective(model, padded(), 1.0)
    assert set(picked) == {None}


def test_what_stands_in_earlier_layers_does_not_matter(picked):
    model = tiny.model()
    sites.attach(model, "houlsby", {"layers": [0]})
    model.loss(padded())
    assert picked == [padded().supervised]


def test_all_rows_are_not_picked_and_none_are_not_either(picked):
    model, batch = tiny.model(), padded()
    model.states(batch, np.arange(batch.ids.size))
    assert picked == []
    model.states(batch, np.arange(0))
    assert picked == [None]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_logits_of_a_prompt_are_those_of_a_whole_pass(family, picked):
    model, _ = attached(family, "lora-everywhere")
    ids = tiny.ids(2, 6)
    with no_grad():
        found = model(ids, last=True).data
        np.testing.assert_allclose(found, model(ids).data[:, -1:], rtol=1e-11)
    assert found.shape == (2, 1, 40) and picked == [2]


def test_the_tape_keeps_less_where_fewer_rows_are_learned():
    model, _ = attached("llama", "lora-everywhere")
    few = padded()
    most = replace(few, targets=np.where(few.segments >= 0, few.ids, IGNORE))
    assert tape_bytes(model, few) < tape_bytes(model, most)


def test_t5_decodes_rows_with_a_target_alone(picked):
    model, _ = test_every_model.attached("flan", "lora-everywhere")
    batch = tiny_tasks.batch("t5", "seq2seq")
    model.loss(batch)
    assert picked == [batch.supervised]
