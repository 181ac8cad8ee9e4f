"""Shares of a batch: contiguous groups of its rows, or of rows that were joined, with where they lie in it."""

from dataclasses import fields, replace

import numpy as np
import pytest
import tiny
import tiny_tasks
from hypothesis import given
from hypothesis import strategies as st
from variants import VARIANTS, attached, bare

from refpeft import fused, learning, manager, placing, sites
from refpeft.batches import IGNORE, Batch, Batches, shares
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.examples import Example
from refpeft.layers import Mode, Train
from refpeft.models.deberta import Deberta
from refpeft.placing import Placed
from refpeft.rng import Stream
from refpeft.tensor import Tensor, plain


def padded(lengths: list[int], packed: bool = False, **more) -> Batch:
    """Rows of these lengths, every second token learned; packs of two documents if `packed`."""
    shape = len(lengths), max(lengths)
    real = np.arange(shape[1]) < np.array(lengths)[:, None]
    draw = Stream(len(lengths), "ids")
    ids = np.where(real, draw.uniform(0, 40, shape), 0).astype(np.int32)
    targets = np.where(real & (np.arange(shape[1]) % 2 == 1), (ids * 7) % 40, IGNORE).astype(np.int32)
    cut = np.array(lengths)[:, None] // 2
    second = packed * (np.arange(shape[1]) >= cut)
    segments = np.where(real, second, -1).astype(np.int32)
    positions = np.where(real, np.arange(shape[1]) - second * cut, 0).astype(np.int32) if packed else None
    return Batch(ids, targets, positions, segments, **more)


LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=9)


@given(LENGTHS, st.integers(1, 5), st.booleans(), st.booleans())
def test_shares_are_the_batch_in_its_own_order(lengths, n, packed, joined):
    batch = padded(lengths, packed)
    batch = batch.unpadded() if joined else batch
    found = shares(batch, n)
    assert 1 <= len(found) <= n
    for name in ("ids", "targets", "positions", "segments"):
        parts = [getattr(share, name) for share in found]
        if parts[0] is not None:
            np.testing.assert_array_equal(np.concatenate(parts, axis=int(joined)), getattr(batch, name))
    assert sum(share.denominator for share in found) == batch.denominator
    assert all(share.ids.size for share in found)
    at, asked = 0, 0
    for share in found:
        assert (share.share.here.start, share.share.asked.start) == (at, asked)
        at, asked = share.share.here.stop, share.share.asked.stop
        assert share.share.asked == range(asked - share.supervised, asked)
    assert (at, asked) == (found[0].share.whole, found[0].share.whole_asked)


@given(LENGTHS, st.integers(1, 5))
def test_shares_compute_about_as_much_as_one_another(lengths, n):
    sizes = [share.ids.size for share in shares(padded(lengths).unpadded(), n)]
    assert max(sizes) <= sum(sizes) / n + max(lengths)


def test_rows_that_belong_together_stay_in_one_share():
    batch = padded([4, 3, 5, 2, 6, 6], rows_each=2)
    assert sorted(len(share.ids) for share in shares(batch, 2)) == [2, 4]
    assert [len(share.ids) for share in shares(batch, 6)] == [2, 2, 2]


@given(LENGTHS, st.booleans())
def test_unpadded_has_the_same_tokens_and_documents_in_one_row(lengths, packed):
    batch = padded(lengths, packed)
    one = batch.unpadded()
    real = batch.segments >= 0
    assert one.ids.shape == (1, batch.tokens) == (1, one.tokens)
    np.testing.assert_array_equal(one.ids[0], batch.ids[real])
    np.testing.assert_array_equal(one.targets[0], batch.targets[real])
    documents = [(r, s) for r, s in zip(*np.nonzero(real), strict=True)]
    of_row = [(r, batch.segments[r, t]) for r, t in documents]
    distinct = list(dict.fromkeys(of_row))
    np.testing.assert_array_equal(one.segments[0], [distinct.index(pair) for pair in of_row])
    expected = batch.positions[real] if packed else [t for _, t in documents]
    np.testing.assert_array_equal(one.positions[0], expected)
    np.testing.assert_array_equal(one.starts, np.cumsum([0, *lengths[:-1]]))


def test_what_has_rows_is_not_joined():
    with pytest.raises(ValueError, match="cannot be joined"):
        padded([3, 4], rows_each=2).unpadded()


# ---- the same losses and gradients -----------------------------------------------------------------------------------


def results(model, parts: list[Batch], denominator: float, training: bool = False) -> dict[str, np.ndarray]:
    """The loss and all gradients, summed over the parts of a batch."""
    trained = dict(model.trained())
    for tensor in trained.values():
        tensor.node.grad = None
    mode, loss = model.mode, 0.0
    mode.training = training
    for part in parts:
        mode.share, mode.task, mode.placed = part.share, part.task, part if isinstance(part, Placed) else None
        found = learning.objective(model, part, denominator)
        found.backward()
        loss = loss + found.data
    mode.training, mode.share, mode.task, mode.placed = False, None, None, None
    return {"loss": loss} | {n: t.data * 0 if t.grad is None else t.grad.copy() for n, t in trained.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float = 1e-12) -> None:
    largest = max(abs(array).max() for array in expected.values())
    assert max(abs(found[name] - expected[name]).max() for name in expected) <= limit * largest


BATCH = padded([9, 4, 7, 2, 8])
FAMILIES = [("qwen2", name) for name in VARIANTS] + [("gpt2", name) for name in ("lora", "prefix_tuning", "houlsby")]


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_losses_and_gradients_of_shares_add_up_with_every_method(family, name):
    model, _ = attached(family, name)
    expected = results(model, [BATCH], BATCH.denominator)
    assert_same(results(model, shares(BATCH, 3), BATCH.denominator), expected)
    if by_text(model):
        joined = BATCH.unpadded()
        assert_same(results(model, [joined], BATCH.denominator), expected)
        assert_same(results(model, shares(joined, 3), BATCH.denominator), expected)


def by_text(model) -> bool:
    return all(layer.text_by_text for adapter in model.adapters for layer in adapter.layers)


@pytest.mark.parametrize("name", ["prompt_tuning", "pre_layer", "prefix_tuning", "llama_adapter", "multitask_prompt"])
def test_what_may_put_something_before_rows_keeps_them(name):
    assert not by_text(attached("llama", name)[0])


@pytest.mark.parametrize("name", ["lora-everywhere", "full", "houlsby", "trainable_tokens", "ladder_side", "adamix"])
def test_what_treats_packed_texts_apart_does_without_rows(name):
    assert by_text(attached("llama", name)[0])


WITH_DROPOUT = [
    name
    for name, (method, options) in VARIANTS.items()
    if any(field.name == "dropout" for field in fields(manager.load(method).Config)) and "encoder" not in options
]


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_masks_of_dropout_do_not_depend_on_the_number_of_shares(name):
    model, (method, options) = bare("qwen2", name), VARIANTS[name]
    tiny.scramble(sites.attach(model, method, options | {"dropout": 0.3}))
    for batch in (BATCH, BATCH.unpadded()) if by_text(model) else (BATCH,):
        expected = results(model, [batch], BATCH.denominator, training=True)
        for n in (1, 2, 3, 5):
            assert_same(results(model, shares(batch, n), BATCH.denominator, training=True), expected)


def test_dropout_of_what_all_rows_share_is_the_same_in_all_shares():
    """DeBERTa's distances, which its q and k project too."""
    model, batch = tiny_tasks.model("deberta-v3", "classify"), tiny_tasks.batch("deberta-v3", "classify")
    sites.detach(model)
    tiny.scramble(sites.attach(model, "lora", {"r": 2, "targets": ["@q", "@k"], "dropout": 0.3}))
    expected = results(model, [batch], batch.denominator, training=True)
    for n in (2, 3):
        assert_same(results(model, shares(batch, n), batch.denominator, training=True), expected)


def test_dropout_before_the_head_does_not_depend_on_chunks_or_shares(monkeypatch):
    model = tiny.model("llama")
    tiny.scramble(sites.attach(model, "lora", {"r": 2, "targets": ["@head", "@down"], "dropout": 0.4}))
    found = []
    for size, n in ((2**22, 1), (40 * 3, 1), (40, 3), (2**22, 2)):
        monkeypatch.setattr(fused, "LOGITS_AT_ONCE", size)
        found.append(results(model, shares(BATCH, n), BATCH.denominator, training=True))
    for one in found[1:]:
        assert_same(one, found[0])


def test_numbers_in_the_shape_of_values_are_the_same_in_all_shares():
    train = [Train(Mode(True, share=one.share), ("a", "b", "c"), one.ids.shape) for one in shares(BATCH, 3)]
    drawn = [one.uniform(Tensor(np.ones((4, 4)))).data for one in train]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("family", "task"), tiny_tasks.CASES)
def test_every_task_adds_up_over_shares(family, task):
    model, batch = tiny_tasks.model(family, task), tiny_tasks.batch(family, task)
    expected = results(model, [batch], batch.denominator)
    parts = learning.shares(model, batch, 2)
    assert len(parts) == 2
    assert_same(results(model, parts, batch.denominator), expected)
    if batch.said is None and task != "embed" and type(model) is not Deberta:
        assert_same(results(model, shares(batch.unpadded(), 2), batch.denominator), expected)


def test_texts_that_are_told_from_one_another_stay_together():
    model, batch = tiny_tasks.model("bert", "embed"), tiny_tasks.batch("bert", "embed")
    batch = replace(batch, targets=np.where(np.isnan(batch.targets), IGNORE, 0).astype(np.int32))
    assert learning.shares(model, batch, 3) == [batch]
    apart = results(model, shares(batch, 3), batch.denominator)["loss"]
    assert abs(apart - model.loss(batch).data) > 1e-3


def test_rows_of_several_data_sets_have_their_own_task_in_every_share():
    model = tiny.model("qwen2")
    tiny.scramble(sites.attach(model, "multitask_prompt", {"tokens": 2, "tasks": 3, "task": 0}))
    batch = replace(BATCH, task=np.array([0, 2, 1, 1, 0], np.int32))
    expected = results(model, [batch], batch.denominator)
    assert_same(results(model, shares(batch, 3), batch.denominator), expected)


# ---- when rows are joined --------------------------------------------------------------------------------------------


def single(family: str = "qwen2", method: str = "lora", **options):
    model = tiny.model(family, "float32")
    sites.attach(model, method, options)
    return model


def test_padded_rows_are_joined_where_attention_goes_by_documents():
    assert placing.unpadded(single(), BATCH).ids.shape == (1, BATCH.tokens)
    assert placing.unpadded(tiny.model("qwen2"), BATCH) is BATCH  # of float64, all tokens would meet
    with plain():
        assert placing.unpadded(single(), BATCH) is BATCH


def test_other_batches_stay_as_they_are():
    model = single()
    full, pairs = padded([6, 6]), padded([5, 6], rows_each=2)
    assert placing.unpadded(model, full) is full and placing.unpadded(model, pairs) is pairs
    assert placing.unpadded(single(method="prompt_tuning", tokens=2), BATCH) is BATCH
    t5 = replace(BATCH, said=BATCH.ids)
    assert placing.unpadded(model, t5) is t5


def test_models_to_which_a_rows_length_or_its_places_matter_keep_rows():
    model = single()
    model.config = replace(model.config, windows=(None, 5))
    assert placing.unpadded(model, BATCH) is BATCH
    assert placing.unpadded(model, short := padded([5, 3])) is not short
    model.config = replace(model.config, windows=(None, None), rope=replace(model.config.rope, kind="dynamic"))
    assert placing.unpadded(model, BATCH) is BATCH
    assert not tiny_tasks.model("deberta-v3", "classify").joins(3) and not tiny_tasks.model("t5", "seq2seq").joins(3)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_what_is_learned_is_the_same_in_single_precision(family):
    model = single(family)
    joined = placing.unpadded(model, BATCH)
    found, expected = (results(model, [one], BATCH.denominator) for one in (joined, BATCH))
    assert all(abs(found[name] - expected[name]).max() < 1e-5 for name in found)


def test_joined_rows_may_be_longer_together_than_the_model_has_positions_for():
    model, long = single("gpt2"), padded([60, 40, 50])
    joined = placing.unpadded(model, long)
    assert joined.ids.size > model.config.context
    assert abs(model.loss(joined).data - model.loss(long).data) < 1e-5
    with pytest.raises(RefpeftError, match="65 positions were asked for: this model has 64"):
        model.loss(padded([65, 3]).unpadded())


def test_an_evaluation_is_the_same_with_and_without_padding(monkeypatch):
    lines = [Example(tiny.ids(1, n, seed=n)[0], np.ones(n, bool), n) for n in (9, 4, 7, 2)]
    batches = Batches(lines, 4, 9, shuffle=False)
    found = mean_loss(single(), batches)
    monkeypatch.setattr(placing, "unpadded", lambda model, batch: batch)
    assert abs(found - mean_loss(single(), batches)) < 1e-5
