"""The batch of a step as a device computes it: the same losses and gradients, in few shapes, without the host."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_tasks
from hypothesis import given
from hypothesis import strategies as st
from test_no_host_read import METHODS, OPTIONS
from test_shares import BATCH, FAMILIES, LENGTHS, WITH_DROPOUT, assert_same, padded, results
from test_trainer import examples
from variants import VARIANTS, attached, bare, needed_quantizer

from refpeft import layers, learning, placing, sites, survey, towards_base
from refpeft.batches import IGNORE, Batches, split
from refpeft.capturing import NotCapturable, capturing, keep, refuse
from refpeft.config import Train
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.examples import Example
from refpeft.layers import Mode
from refpeft.models.rope import frequencies
from refpeft.optim import AdamW, Flat
from refpeft.placing import Placed, Placing, rounded
from refpeft.tensor import plain


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(placing, "UNIT", 4)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_parts_have_all_tokens_and_targets_and_the_loss_is_of_distinct_positions(lengths, rows, packed):
    batch = padded(lengths, packed)
    parts = Placing(tiny.model("llama"), rows)(batch)
    assert sum(len(part.ids) for part in parts) == len(batch.ids)
    assert np.concatenate([part.ids[part.ids > 0] for part in parts]).tolist() == batch.ids[batch.ids > 0].tolist()
    counted = np.concatenate([part.chosen[part.chosen >= 0] for part in parts])
    assert counted.tolist() == batch.targets.reshape(-1)[batch.asked].tolist()
    for part in parts:
        assert len(np.unique(part.rows)) == len(part.rows) == len(part.chosen)
        assert np.array_equal(part.targets.reshape(-1)[part.rows], part.chosen)
        assert part.ids.shape[1] % placing.UNIT == 0
        assert len(part.rows) >= part.targets.size - 1 or len(part.rows) % placing.UNIT == 0


@given(st.integers(0, 10**6), st.sampled_from([1, 4, 8]))
def test_sizes_are_rounded_to_few_that_are_little_more(n, between):
    found = rounded(n, between)
    assert n <= found <= max(placing.UNIT, n + placing.UNIT, n * (1 + 1 / between))
    assert found % placing.UNIT == 0 and rounded(found, between) == found


def test_batches_of_rows_of_all_lengths_come_in_few_shapes():
    place, draw = Placing(tiny.model("llama"), 8), np.random.default_rng(0)
    place._room = np.inf
    batches = [padded(draw.integers(300, 1000, 8).tolist()) for _ in range(50)]
    shapes = {(part.ids.shape, part.rows.shape) for batch in batches for part in place(batch)}
    assert len({batch.ids.shape for batch in batches}) > 30 and len(shapes) <= 12


def test_parts_of_a_step_are_equally_large_where_that_is_little_more_work():
    place = Placing(tiny.model("llama"), 2)
    alike, apart = padded([9, 8, 12, 11, 10, 10, 9]), padded([12, 2, 3, 2, 2, 2])
    assert {part.ids.shape[1] for part in place(alike)} == {12}
    assert [part.ids.shape[1] for part in place(apart)] == [12, 4, 4]


def test_rows_are_no_longer_than_the_model_has_positions_for(monkeypatch):
    monkeypatch.setattr(placing, "UNIT", 50)
    model = tiny.model("gpt2")  # 64 positions
    sites.attach(model, "prompt_tuning", {"tokens": 10})
    (part,) = Placing(model, 9)(padded([51, 40]))
    assert part.ids.shape[1] == 54
    model.loss(part, 1.0)


def test_padding_is_told_of_only_where_a_model_sees_it():
    assert Placing(tiny.model("llama"), 9)(BATCH)[0].segments is None
    packed = padded([9, 4], packed=True)
    (part,) = Placing(tiny.model("llama"), 9)(packed)
    assert part.segments[:, : packed.ids.shape[1]].tolist() == packed.segments.tolist()
    assert (part.segments[:, packed.ids.shape[1] :] == -1).all()
    encoder = tiny_tasks.model("bert", "classify")
    (part,) = Placing(encoder, 9)(replace(tiny_tasks.batch("bert", "classify"), segments=None))
    assert part.segments.tolist() == [[0] * 9 + [-1] * 3] * 3


def test_angles_that_go_by_the_rows_length_leave_it(monkeypatch):
    scaling = {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    monkeypatch.setitem(tiny.CONFIGS, "dynamic", tiny.LLAMA | scaling)
    assert Placing(tiny.model("dynamic"), 9)(BATCH)[0].ids.shape == BATCH.ids.shape


def test_tokens_that_the_model_does_not_have_are_refused():
    with pytest.raises(RefpeftError, match=r"^token 40 is not among the model's 40"):
        Placing(tiny.model("llama"), 9)(replace(BATCH, ids=np.full_like(BATCH.ids, 40)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_outside_of_training_rows_come_in_few_lengths_too(name, monkeypatch):
    model, shapes, losses = tiny.model(name), set(), []
    sites.attach(model, "prefix_tuning", {"tokens": 2})  # rows are not joined
    texts = [Example(np.arange(n, dtype="i4") % 40, np.arange(n) > n // 2, n) for n in range(5, 63)]
    trunk, rows = model.trunk, Batches(texts, 2, 64, shuffle=False)
    monkeypatch.setattr(model, "trunk", lambda ids, *rest, **more: shapes.add(ids.shape) or trunk(ids, *rest, **more))
    for evaluated in (placing.unpadded, lambda model, batch: Placing(model, 9).whole(batch)):
        monkeypatch.setattr(placing, "evaluated", evaluated)
        shapes.clear()
        losses.append((mean_loss(model, rows), len(shapes)))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
    assert losses[1][1] <= 8 < losses[0][1]


# ---- the same losses and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [9, 2])
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_losses_and_gradients_are_the_batchs_with_every_method(family, name, rows):
    model, _ = attached(family, name)
    for batch in (BATCH, padded([9, 4, 12], packed=True)):
        expected = results(model, [batch], batch.denominator)
        assert_same(results(model, Placing(model, rows)(batch), batch.denominator), expected)


@pytest.mark.parametrize(("family", "task"), tiny_tasks.CASES)
def test_losses_and_gradients_are_the_batchs_in_every_task(family, task):
    model, batch = tiny_tasks.model(family, task), tiny_tasks.batch(family, task)
    expected = results(model, [batch], batch.denominator)
    for rows in (9, 2):
        assert_same(results(model, Placing(model, rows)(batch), batch.denominator), expected)


def test_positions_that_do_not_count_have_no_share_in_what_is_compared():
    model = tiny.model("llama")
    tiny.scramble(sites.attach(model, "lora", {"r": 2}))
    batch = padded([9, 4])
    (part,) = Placing(model, 9)(batch)
    assert (part.chosen == IGNORE).any()
    for strength in (0.0, 3.0):
        found, expected = (towards_base.objective(model, one, 7.0, strength).data for one in (part, batch))
        assert found == pytest.approx(float(expected), rel=1e-12)


# ---- the same masks --------------------------------------------------------------------------------------------------


def assert_same_masks(model, batch, limit: float = 1e-12) -> None:
    """A step with dropout is that of the host, which joins rows where it can, in each of its parts."""
    for rows in (9, 2):
        for part, placed in zip(split(batch, rows), Placing(model, rows)(batch), strict=True):
            expected = results(model, learning.shares(model, part, 2), batch.denominator, training=True)
            assert_same(results(model, [placed], batch.denominator, training=True), expected, limit)


@pytest.mark.parametrize("name", [*WITH_DROPOUT, "lora-everywhere"])
def test_masks_of_dropout_are_the_hosts(name):
    model, (method, options) = bare("qwen2", name), VARIANTS[name]
    tiny.scramble(sites.attach(model, method, options | {"dropout": 0.3}))
    for batch in (BATCH, padded([9, 4, 12], packed=True), padded([3, 5, 4, 7], rows_each=2)):
        assert_same_masks(model, batch)


@pytest.mark.parametrize("targets", ["all-linear", ["@head", "@down"]])
def test_masks_of_dropout_are_those_of_joined_rows(targets):
    model = tiny.model("qwen2", "float32")
    tiny.scramble(sites.attach(model, "lora", {"r": 2, "targets": targets, "dropout": 0.3}))
    assert learning.shares(model, BATCH, 1)[0].ids.shape == (1, BATCH.tokens)
    assert_same_masks(model, BATCH, 1e-5)
    assert_same_masks(model, padded([9, 4, 12], packed=True), 1e-5)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("lengths", [[12, 12, 12], [12, 9, 12, 11], [12, 3, 2, 2]])
def test_masks_of_dropout_are_the_hosts_where_all_targets_count(lengths, missing):
    """Then the host computes all rows of the last layer, and otherwise those with a target."""
    model, batch = tiny.model("qwen2", "float32"), padded(lengths)
    tiny.scramble(sites.attach(model, "lora", {"r": 2, "targets": ["all-linear", "@head"], "dropout": 0.3}))
    targets = np.where(batch.segments < 0, IGNORE, batch.ids)
    targets[:missing] = np.where(np.arange(12) % 6, targets[:missing], IGNORE)
    assert_same_masks(model, replace(batch, targets=targets), 1e-5)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_masks_of_dropout_beside_virtual_tokens_are_the_hosts(method):
    model = tiny.model("qwen2", "float32")
    tiny.scramble(sites.attach(model, method, {"tokens": 3}))
    tiny.scramble(sites.attach(model, "lora", {"r": 2, "targets": ["all-linear", "@head"], "dropout": 0.3}))
    assert_same_masks(model, BATCH, 1e-5)
    for lengths in ([5, 5, 5], [5, 4, 2]):  # rows of 8
        batch = padded(lengths)
        assert_same_masks(model, replace(batch, targets=np.where(batch.segments < 0, IGNORE, batch.ids)), 1e-5)


@pytest.mark.parametrize(("family", "task"), tiny_tasks.CASES)
def test_masks_of_dropout_are_the_hosts_in_every_task(family, task):
    model, batch = tiny_tasks.model(family, task), tiny_tasks.batch(family, task)
    tiny.scramble(sites.attach(model, "lora", {"r": 2, "targets": "all-linear", "dropout": 0.3}))
    assert_same_masks(model, batch)


# ---- what a captured step must not do --------------------------------------------------------------------------------


def on_device(part: Placed, xp) -> Placed:
    return replace(part, **{name: xp.asarray(array) for name, array in part.arrays.items()})


HOSTS_WORK = {
    "adalora": "adalora acts around the optimizer's step",
    "sparse_adapter": "sparse_adapter acts around the optimizer's step",
    "adapterdrop": "adapterdrop draws a number on the host",
    "adamix": "adamix draws a number on the host",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_a_placed_batch_brings_nothing_from_the_host_or_says_why(method, monkeypatch):
    with plain():
        xp = device.install(monkeypatch)
        model = tiny.model("llama", "float32", needed_quantizer(method), xp=xp)
        sites.attach(model, method, OPTIONS.get(method))
        survey.settle(model, Batches(examples(), 4, 32), Train(batch=4), 0)
        flat = Flat(model.trained(), learning.rates(model))
        learning.states(model)
        (part,) = (on_device(part, xp) for part in Placing(model, 9)(BATCH))
        denominator, optimizer = xp.asarray(np.array(6, "f4")), AdamW(flat, weight_decay=0.1)

        def gradients() -> None:
            learning.objective(model, part, denominator).backward()
            for penalty in learning.penalties(model):
                penalty.backward()
            flat.clip(0.1)

        def step() -> None:
            gradients()
            learning.step(model, optimizer.apply, 0, 4)

        model.mode.training = True
        optimizer.prepare(1e-2)
        step()
        if learning.acts_around_steps(model):  # what comes before is captured alone
            with device.capture(uploads=False), capturing():
                gradients()
        if method in HOSTS_WORK:
            with pytest.raises(NotCapturable, match=HOSTS_WORK[method]), capturing():
                step()
        else:
            with device.capture(uploads=False), capturing():
                step()


def test_a_hook_that_goes_by_the_step_is_not_captured():
    train = layers.Train(Mode(training=True, step=3), ("adapter", "method", "site"))
    assert train.step == 3
    with pytest.raises(NotCapturable, match=r"^method goes by the number of the step$"), capturing():
        assert train.step


def test_only_what_is_being_captured_is_refused():
    refuse("anything")
    with pytest.raises(NotCapturable, match=r"^anything$"), capturing():
        refuse("anything")
    refuse("anything")


def test_what_lies_in_caches_is_held_by_the_graph_that_reads_it():
    model = tiny.model("llama")
    with capturing() as held:
        model(tiny.ids())
    assert any(array is frequencies(np, model.config.rope, model.config.head_dim, 9)[0] for array in held)
    before = len(held)
    assert keep("elsewhere") == "elsewhere" and len(held) == before
