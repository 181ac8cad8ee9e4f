"""Numbers of a weight that are trained alone: which ones are chosen, and files that say how many there are."""

import json

import numpy as np
import pytest
import tiny
from test_trainer import examples
from variants import quantizer

from refpeft import adapters, gates, learning, sites, sparse
from refpeft.batches import Batches, split
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.survey import Survey
from refpeft.tensor import Tensor
from refpeft.trainer import Trainer

TARGETS = ["@q", "@v", "@down"]
METHODS = {
    "fish_mask": {"share": 0.01, "samples": 6, "targets": TARGETS},
    "diff_pruning": {"share": 0.01, "gated_steps": 3, "gated_lr": 0.01, "gate_rate": 30.0, "targets": TARGETS},
    "lt_sft": {"share": 0.01, "full_steps": 3, "full_lr": 0.01, "l1": 50.0, "targets": TARGETS},
}
BATCHES = Batches(examples(), 4, 32)


def trained(method: str, packer=None, **options):
    """A model with a method on it that has chosen its places and made two steps."""
    model = tiny.model("llama", quantizer=packer)
    adapter = sites.attach(model, method, METHODS[method] | options)
    Trainer(model, BATCHES, settings=Train(steps=2, lr=0.01)).run()
    return model, adapter


def places(adapter) -> dict[str, set[tuple[int, int]]]:
    return {layer.site.name: set(zip(*layer.p.indices.data.tolist(), strict=True)) for layer in adapter.layers}


@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_largest_of_all_matrices_together_are_chosen(count):
    rng = np.random.default_rng(0)
    scores = {"a": rng.random((4, 5)), "b": rng.random((2, 3)) * 3, "c": rng.random((3, 2)) / 100}
    found = sparse.largest(scores, count)
    chosen = {name: scores[name][tuple(one["indices"])] for name, one in found.items() if one is not None}
    least = np.sort(np.concatenate([matrix.ravel() for matrix in scores.values()]))[-count]
    assert {name: len(values) for name, values in chosen.items()} == {
        name: (matrix >= least).sum() for name, matrix in scores.items() if (matrix >= least).any()
    }
    assert all((values >= least).all() for values in chosen.values())


def test_fish_mask_chooses_by_the_mean_of_squared_gradients_of_rows():
    _, adapter = trained("fish_mask")
    plain = tiny.model("llama")
    full = sites.attach(plain, "full", {"targets": TARGETS})
    information = {name: 0 for name in full.params}
    for row in [row for step in range(2) for row in split(BATCHES.at(step), 1)][:6]:
        for name, gradient in tiny.gradients(plain, row).items():
            information[name] = information[name] + gradient**2
    assert_largest(adapter, information)


@pytest.mark.parametrize(("method", "option"), [("fish_mask", "samples"), ("sparse_adapter", "rows")])
def test_no_row_is_looked_at_twice(method, option):
    """Eight rows are there: to ask for twelve is to ask for these, not for four of them once more."""
    found = []
    for count in (8, 12):
        model = tiny.model("llama")
        adapter = sites.attach(model, method, {option: count})
        Trainer(model, BATCHES, settings=Train(steps=1, lr=0.01))
        found.append({name: value.data for name, value in adapter.constants.items()})
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_lt_sft_chooses_what_full_fine_tuning_changes_most_and_starts_from_the_old_weights():
    model = tiny.model("llama")
    adapter = sites.attach(model, "lt_sft", METHODS["lt_sft"])
    trainer = Trainer(
        model, BATCHES, settings=Train(steps=1, lr=0.05)
    )  # the first phase has a learning rate of its own
    assert not trainer.flat.values.any()
    changed = {l1: changes_in_full(l1) for l1 in (0.0, 50.0)}
    assert_largest(adapter, changed[50.0])
    assert np.mean([matrix.mean() for matrix in changed[50.0].values()]) < 0.9 * np.mean(
        [matrix.mean() for matrix in changed[0.0].values()]
    )


def changes_in_full(l1: float, family: str = "llama", targets=TARGETS) -> dict[str, np.ndarray]:
    """By how much three steps of training in full change each number."""
    model = tiny.model(family)
    full = sites.attach(model, "full", {"targets": targets, "l1": l1})
    before = {name: value.data.copy() for name, value in full.params.items()}
    Trainer(model, BATCHES, settings=Train(steps=3, lr=0.01, schedule="constant", warmup=0)).run()
    return {name: abs(value.data - before[name]) for name, value in full.params.items()}


def assert_largest(adapter, scores: dict[str, np.ndarray]) -> None:
    """What the adapter trains is 1 % of all numbers, those with the largest scores."""
    every = np.sort(np.concatenate([matrix.ravel() for matrix in scores.values()]))
    count = round(0.01 * len(every))
    assert adapter.size == count
    found = places(adapter)
    for name, matrix in scores.items():
        expected = set(zip(*(axis.tolist() for axis in np.nonzero(matrix >= every[-count])), strict=True))
        assert found.get(name.removesuffix(".weight"), set()) == expected


def test_far_lets_the_nodes_learn_that_priming_changes_most():
    model = tiny.model("gpt2")
    options = {"share": 0.28, "priming": 0.5, "priming_lr": 0.01, "targets": ["@down", "@up"]}
    adapter = sites.attach(model, "far", options)
    trainer = Trainer(model, BATCHES, settings=Train(steps=6, lr=0.05))
    assert not trainer.flat.values.any()
    changes = changes_in_full(0.0, "gpt2", options["targets"])
    for layer in adapter.layers:
        sizes = changes[f"{layer.site.name}.weight"].sum(axis=1)
        count = round(0.28 * len(sizes))
        assert layer.p.change.shape == (count, layer.site.shape[1]) and layer.p.shift.shape == (count,)
        assert set(layer.p.rows.data.tolist()) == set(np.argsort(-sizes)[:count].tolist())
    trainer.run()
    assert all((layer.p.change.data != 0).all() for layer in adapter.layers)


def test_diff_pruning_keeps_the_largest_gated_differences_and_starts_from_them():
    model, gated = tiny.model("llama"), tiny.model("llama")
    adapter = sites.attach(model, "diff_pruning", METHODS["diff_pruning"])
    Trainer(model, BATCHES, settings=Train(steps=1, lr=0.05), seed=3)
    alone = {"prune": False, "gate_rate": 30.0, "targets": TARGETS}
    layers = sites.attach(gated, "diff_pruning", alone).layers
    settings = Train(steps=3, lr=0.01, schedule="constant", warmup=0)
    Trainer(gated, BATCHES, settings=settings, seed=3).run()
    changes = {layer.site.name: gates.difference(layer.arrays) for layer in layers}
    assert_largest(adapter, {f"{name}.weight": abs(change) for name, change in changes.items()})
    for layer in adapter.layers:
        assert np.array_equal(layer.p.values.data, changes[layer.site.name][tuple(layer.p.indices.data)])


def test_what_gates_are_drawn_from_is_not_nearer_to_0_or_1_than_a_ten_thousandth():
    log_alpha = Tensor(np.array([9.9, -8.5]))
    near, limit, inside = (gates.hard_concrete(log_alpha, u=np.array([u, 1 - u])).data for u in (1e-9, 1e-4, 2e-4))
    assert np.array_equal(near, limit) and (abs(near - 0.5) < 0.1).all() and (abs(inside - near) > 0.1).all()


def test_gates_are_drawn_in_training_alone_and_close_under_the_penalty():
    model = tiny.model("llama")
    adapter = sites.attach(model, "diff_pruning", {"prune": False, "alpha": 0.3, "l0": 1.0, "gate_rate": 10.0})
    tiny.scramble(adapter)
    evaluated = model(tiny.ids()).data
    assert np.array_equal(model(tiny.ids()).data, evaluated)
    model.mode.training = True
    drawn = model(tiny.ids()).data
    assert abs(drawn - evaluated).max() > 1e-3 and np.array_equal(model(tiny.ids()).data, drawn)
    model.mode.step = 1
    assert abs(model(tiny.ids()).data - drawn).max() > 1e-3
    model.mode.training = False
    Trainer(model, BATCHES, settings=Train(steps=12, lr=0.01)).run()
    closed = {layer.site.name: gates.difference(layer.arrays) for layer in adapter.layers}
    assert not any(change.any() for change in closed.values())
    assert np.array_equal(model(tiny.ids()).data, tiny.model("llama")(tiny.ids()).data)


def test_without_a_number_of_its_own_the_first_phase_is_as_long_as_the_run(monkeypatch):
    asked = []
    changes = Survey.changes
    monkeypatch.setattr(Survey, "changes", lambda *args, **more: asked.append(args[2]) or changes(*args, **more))
    trained("lt_sft", full_steps=None)
    assert asked == [2]


def test_the_penalty_of_full_fine_tuning_is_of_the_mean_change():
    model = tiny.model("llama")
    full = sites.attach(model, "full", {"targets": TARGETS, "l1": 0.3})
    before = {name: value.data.copy() for name, value in full.params.items()}
    tiny.scramble(full)
    changes = [full.params[name].data - before[name] for name in before]
    numbers = sum(change.size for change in changes)
    terms = list(learning.penalties(model))
    assert sum(term.data for term in terms) == pytest.approx(0.3 * sum(abs(c).sum() for c in changes) / numbers)
    for term in terms:
        term.backward()
    for value, change in zip(full.params.values(), changes, strict=True):
        assert np.allclose(value.grad, 0.3 * np.sign(change) / numbers)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packer", [None, quantizer("nf4", double_quant=False)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_brings_its_own_places_and_as_many_as_it_has(method, packer, tmp_path):
    model, adapter = trained(method)
    first = tiny.model("llama")
    counts = {layer.site.name: layer.p.values.data.size for layer in adapter.layers}
    before = sites.attach(first, method, METHODS[method]).layers
    assert counts != {layer.site.name: layer.p.values.data.size for layer in before}
    adapters.save(tmp_path, model, quantizer=packer)
    other = tiny.model("llama")
    (loaded,) = adapters.load(other, tmp_path)
    assert places(loaded) == places(adapter) and loaded.settled
    if packer:
        adapters.quantize(model, packer)
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)
    Trainer(other, BATCHES, settings=Train(steps=1)).run()
    assert places(loaded) == places(adapter)


def test_a_target_of_which_nothing_was_chosen_is_left_alone(tmp_path):
    model, adapter = trained("fish_mask", share=0.0005)
    assert 1 <= len(adapter.layers) < 6 and len(adapter.params) == len(adapter.constants) == len(adapter.layers)
    adapters.save(tmp_path, model)
    other = tiny.model("llama")
    (loaded,) = adapters.load(other, tmp_path)
    assert loaded.params.keys() == adapter.params.keys()
    assert sum(bool(site.layers) for site in other.sites.values()) == len(adapter.layers)


VALUES = "model.layers.0.self_attn.q_proj.values"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, "expected 'shapes', which the training data had decided"),
        ({}, "expected 'shapes', which the training data had decided"),
        ({"other": [1]}, "shapes has 'other' as"),
        ({VALUES: [2, 1]}, r"shapes has '.*values' as \[2, 1\], which this method has not"),
        ({VALUES: [-1]}, r"as \[-1\], which"),
        ({VALUES: [10**12]}, r"as \[1000000000000\], which"),
        ({VALUES: "1"}, "as 1, which"),
        ({VALUES: [1]}, "is not expected"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shapes, message, tmp_path):
    model, _ = trained("fish_mask")
    adapters.save(tmp_path, model)
    file = tmp_path / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shapes": shapes}))
    other = tiny.model("llama")
    with pytest.raises(RefpeftError, match=message):
        adapters.load(other, tmp_path)
    assert not any(site.layers for site in other.sites.values())


def test_values_and_indices_of_different_numbers_are_refused(tmp_path):
    model, adapter = trained("fish_mask")
    value = next(iter(adapter.params.values()))
    value.data = value.data[:-1]
    adapters.save(tmp_path, model)
    with pytest.raises(RefpeftError, match=rf"has {value.data.size} values and {value.data.size + 1} indices"):
        adapters.load(tiny.model("llama"), tmp_path)


def test_a_share_of_less_than_one_number_is_an_error():
    with pytest.raises(RefpeftError, match="share is 1e-05, less than one of the targets' 8,064 numbers"):
        sites.attach(tiny.model("llama"), "fish_mask", {"share": 1e-5})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fish_mask", {"share": 0.0}, "share to be more than 0 and at most 1"),
        ("fish_mask", {"samples": 0}, "samples to be 1 or more"),
        ("lt_sft", {"l1": -1.0}, "l1 to be 0 or more"),
        ("lt_sft", {"full_steps": 0}, "full_steps to be 1 or more"),
        ("diff_pruning", {"gated_steps": 0}, "gated_steps of 1 or more"),
        ("diff_pruning", {"prune": False, "share": 0.5}, "share has an effect only with prune = true"),
        ("far", {"priming": 0.0}, "priming and its lr to be more than 0"),
        ("full", {"l1": -1.0}, "l1 is -1: expected 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(method, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model("llama"), method, options)
