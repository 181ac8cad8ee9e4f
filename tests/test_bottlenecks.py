"""Bottlenecks that the data prune, that are drawn at random in training, or that are fused: each one's own points."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sources
import tiny
from test_trainer import examples

from refpeft import adapters, sites
from refpeft.backend import to_host
from refpeft.batches import Batches, split
from refpeft.bottleneck import prune
from refpeft.config import Train as Settings
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.layers import Train
from refpeft.learning import objective
from refpeft.trainer import Trainer

DIM = 24


def trained(method: str, options: dict, steps: int = 3, out=None, model=None, seed: int = 0, **settings) -> Trainer:
    """A run of a few steps, and what it left."""
    model = model or tiny.model()
    sites.attach(model, method, options, seed=seed)
    settings = Settings(steps=steps, batch=4, lr=0.01, **settings)
    run = Trainer(model, Batches(examples(), 4, 32, seed=seed), None, settings, out, seed=seed)
    run.run()
    return run


# ---- pruned ----------------------------------------------------------------------------------------------------------


def weights(adapter: sites.Adapter, mask: bool = False) -> dict[str, np.ndarray]:
    """The weights of all places by name, or their masks."""
    values = adapter.constants if mask else adapter.params
    return {name.removesuffix("_mask"): t.data for name, t in values.items() if name.endswith(("down", "up", "_mask"))}


def kept(adapter: sites.Adapter) -> int:
    return sum(int(mask.astype(int).sum()) for mask in weights(adapter, mask=True).values())


@pytest.mark.parametrize("prune", ["random", "magnitude", "snip", "threshold"])
def test_what_is_pruned_is_zero_and_the_share_is_exact(prune):
    run = trained("sparse_adapter", {"size": 5, "prune": prune, "sparsity": 0.6})
    (adapter,) = run.model.adapters
    masks = weights(adapter, mask=True)
    assert kept(adapter) == round(0.4 * 2 * 2 * 2 * 5 * DIM)
    for name, weight in weights(adapter).items():
        assert np.array_equal(weight != 0, masks[name] == 1), name
    places = {round(float(mask.mean()), 3) for mask in masks.values()}
    assert len(places) > 1  # down and up together, or all places


def test_threshold_prunes_the_smallest_and_only_after_the_last_step():
    prunings = {"prune": "random", "sparsity": 0.0}, {"prune": "threshold", "sparsity": 0.3}
    whole, run = (trained("sparse_adapter", {"size": 5} | pruning) for pruning in prunings)
    before, after = weights(whole.model.adapters[0]), weights(run.model.adapters[0])
    masks = weights(run.model.adapters[0], mask=True)
    every = np.concatenate([abs(weight).ravel() for weight in before.values()])
    limit = np.sort(every)[round(0.3 * every.size)]
    for name, weight in before.items():
        assert np.array_equal(masks[name] == 1, abs(weight) >= limit)
        assert np.array_equal(after[name], weight * masks[name])


def test_the_best_step_comes_back_as_it_was_also_where_it_was_before_pruning(tmp_path):
    model = tiny.model()
    tiny.scramble(sites.attach(model, "sparse_adapter", {"size": 5, "prune": "threshold", "sparsity": 0.9}))
    settings = Settings(steps=4, batch=4, lr=0.01, eval_every=1, best=True)
    rows = Batches(examples(), 4, 32, shuffle=False)
    summary = Trainer(model, Batches(examples(), 4, 32), rows, settings, tmp_path).run()
    assert summary.best_step < 4
    assert mean_loss(model, rows) == summary.after["loss"] == summary.best["loss"]


def test_snip_keeps_the_largest_products_of_weight_and_gradient():
    model = tiny.model()
    adapter = sites.attach(model, "sparse_adapter", {"size": 5, "rows": 3})
    rows = split(Batches(examples(), 4, 32).at(0), 1)[:3]
    scores = {name: 0.0 for name in adapter.params}
    for row in rows:
        for name, gradient in tiny.gradients(model, row).items():
            scores[name] = scores[name] + gradient
    scores = {name: abs(scores[name] * weight) for name, weight in weights(adapter).items()}
    limit = np.quantile(np.concatenate([score.ravel() for score in scores.values()]), 0.4)
    Trainer(model, Batches(examples(), 4, 32), None, Settings(steps=1, batch=4))
    for name, mask in weights(adapter, mask=True).items():
        assert np.array_equal(mask == 1, scores[name] > limit), name


def test_weights_that_are_pruned_at_random_are_not_the_smallest():
    def kept_of_the_larger_half(prune: str) -> float:
        options = {"size": 8, "prune": prune, "sparsity": 0.5}
        model, whole = tiny.model(), tiny.model()
        masks = weights(sites.attach(model, "sparse_adapter", options), mask=True)
        every = weights(sites.attach(whole, "sparse_adapter", options | {"sparsity": 0.0}))
        return np.mean([masks[name][abs(w) > np.median(abs(w))].mean() for name, w in every.items()])

    assert kept_of_the_larger_half("magnitude") > 0.95
    assert 0.4 < kept_of_the_larger_half("random") < 0.6


def test_large_sparse_keeps_as_many_weights_as_a_small_dense_one():
    sizes = {"size": 5, "sparsity": 0.0}, {"size": 20, "sparsity": 0.75}
    small, large = (sites.attach(tiny.model(), "sparse_adapter", size | {"prune": "magnitude"}) for size in sizes)
    assert kept(small) == kept(large)


def test_pruning_reads_nothing_and_is_the_hosts(monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {"down": rng.normal(size=(3, 8)), "up": rng.normal(size=(8, 3))}
    arrays |= {f"{name}_mask": np.ones(array.shape, "i1") for name, array in arrays.items()}
    xp = device.install(monkeypatch)
    here, there = ({name: module.array(array) for name, array in arrays.items()} for module in (np, xp))
    prune([SimpleNamespace(**here)], 0.25)
    with device.capture():
        prune([SimpleNamespace(**there)], 0.25)
    for name, array in here.items():
        assert np.array_equal(to_host(there[name]), array)
    assert (here["down"] == 0).sum() + (here["up"] == 0).sum() == 12


def test_masks_of_other_numbers_are_an_error(tmp_path):
    model = tiny.model()
    adapter = sites.attach(model, "sparse_adapter", {"size": 5, "prune": "random"})
    adapter.constants["model.layers.1.mlp_out.up_mask"].data[0, 0] = 2
    adapters.save(tmp_path, model)
    with pytest.raises(RefpeftError, match=r"masks of model.layers.1.mlp_out have other numbers than 0 and 1"):
        adapters.load(tiny.model(), tmp_path)


def test_rows_to_look_at_without_snip_are_an_error():
    with pytest.raises(RefpeftError, match=r"rows.*prune"):
        sites.attach(tiny.model(), "sparse_adapter", {"prune": "random", "rows": 8})


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"rows": 0}])
def test_a_sparse_adapter_that_cannot_be_is_an_error(options):
    with pytest.raises(RefpeftError, match="expected sparsity from 0 to less than 1"):
        sites.attach(tiny.model(), "sparse_adapter", options)


# ---- drawn at random -------------------------------------------------------------------------------------------------


def draws_of(run: Callable[[], object], monkeypatch) -> list[int]:
    """What methods drew while `run` ran."""
    seen: list[int] = []
    draw = Train.draw

    def noted(self: Train, n: int, apart: bool = False) -> int:
        seen.append(draw(self, n, apart))
        return seen[-1]

    with monkeypatch.context() as patched:
        patched.setattr(Train, "draw", noted)
        run()
    return seen


def test_a_step_of_adamix_makes_two_passes_through_other_modules_and_the_seed_decides(monkeypatch):
    options = {"size": 5, "share": "none", "modules": 7}

    def steps(seed: int) -> list[int]:
        return draws_of(lambda: trained("adamix", options, 2, seed=seed), monkeypatch)

    drawn = steps(0)
    assert len(drawn) == 2 * 2 * 2 * 2  # steps, passes, layers, down and up
    steps_and_passes = {tuple(drawn[at : at + 4]) for at in range(0, 16, 4)}
    assert len(steps_and_passes) == 4 and set(drawn) <= set(range(7))
    assert steps(0) == drawn and steps(1) != drawn
    assert set(draws_of(lambda: trained("adamix", options, 8), monkeypatch)) == set(range(7))  # none is left out


def test_a_step_of_adamix_without_consistency_is_one_pass_and_its_loss_the_modules(monkeypatch):
    options = {"size": 5, "consistency": 0.0}
    assert len(draws_of(lambda: trained("adamix", options, 1), monkeypatch)) == 2 * 2
    model = tiny.model()
    tiny.scramble(sites.attach(model, "adamix", options))
    model.mode.training = True
    batch = tiny.batch()
    assert np.allclose(objective(model, batch, batch.supervised).data, model.loss(batch).data, rtol=1e-14)


def test_the_objective_of_adamix_is_the_loss_and_half_of_both_divergences():
    model = tiny.model()
    tiny.scramble(sites.attach(model, "adamix", {"size": 5, "consistency": 3.0}))
    model.mode.training = True
    batch, passes = tiny.batch(), []
    rows = batch.targets >= 0
    for model.mode.again in (0, 1):
        z = model(batch.ids).data[rows]
        passes.append(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))
    model.mode.again = 0
    p, q = passes
    far = ((np.exp(p) - np.exp(q)) * (p - q)).sum(axis=-1).mean()
    expected = -np.take_along_axis(p, batch.targets[rows][:, None], 1).mean() + 1.5 * far
    assert far > 1e-6
    assert float(objective(model, batch, batch.supervised).data) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_after_training_adamix_is_one_bottleneck_the_average_of_its_modules(share):
    model = trained("adamix", {"size": 5, "share": share}).model
    merged = tiny.model()
    options = {"size": 5, "activation": "gelu", "targets": ["@mlp_out"]}
    one = sites.attach(merged, "pfeiffer", options)
    for name, tensor in one.params.items():
        tensor.data[...] = model.adapters[0].params[name].data.mean(axis=0)
    assert np.allclose(model(tiny.ids()).data, merged(tiny.ids()).data, rtol=0, atol=1e-13)


def test_adamix_with_recomputed_activations_is_an_error():
    with pytest.raises(RefpeftError, match="adamix hands on what one of them computed, or compares passes"):
        trained("adamix", {"size": 5}, checkpoint_activations=True)


@pytest.mark.parametrize("options", [{"modules": 0}, {"consistency": -1.0}])
def test_an_adamix_that_cannot_be_is_an_error(options):
    with pytest.raises(RefpeftError, match="expected 1 or more modules and a consistency of 0 or more"):
        sites.attach(tiny.model(), "adamix", options)


# ---- fused -----------------------------------------------------------------------------------------------------------

FUSED = {"size": 5, "adapters": sources.bottlenecks(2)}


def test_a_fusion_of_one_adapter_twice_is_at_first_that_adapter(tmp_path):
    alone = tiny.model()
    one = sites.attach(alone, "pfeiffer", {"size": 5})
    tiny.scramble(one)
    adapters.save(tmp_path, alone)
    model = tiny.model()
    fusion = sites.attach(model, "adapterfusion", {"size": 5, "adapters": [str(tmp_path)] * 2})
    assert np.allclose(model(tiny.ids()).data, alone(tiny.ids()).data, atol=1e-3)
    for name, tensor in fusion.params.items():
        if name.endswith(".value"):
            tensor.data[...] = np.eye(DIM)
    assert np.allclose(model(tiny.ids()).data, alone(tiny.ids()).data, atol=1e-12)


def test_a_fusion_is_kept_without_its_adapters_and_leaves_them_as_they_were(tmp_path):
    one = tmp_path / "one"
    shutil.copytree(FUSED["adapters"][0], one)
    run = trained("adapterfusion", FUSED | {"adapters": [str(one), FUSED["adapters"][1]]})
    (fusion,) = run.model.adapters
    for number, directory in enumerate(FUSED["adapters"]):
        _, _, values = adapters.own_values(directory)
        for name, tensor in fusion.constants.items():
            assert np.array_equal(tensor.data[number], values[name].astype("f8")), name
    adapters.save(tmp_path / "fusion", run.model)
    shutil.rmtree(one)
    model = tiny.model()
    adapters.load(model, tmp_path / "fusion")
    assert np.allclose(model(tiny.ids()).data, run.model(tiny.ids()).data, rtol=1e-5, atol=1e-6)


def test_the_penalty_draws_values_to_the_identity():
    far = []
    for penalty in (0.0, 1.0):
        model = tiny.model()
        fusion = sites.attach(model, "adapterfusion", FUSED | {"penalty": penalty})
        tiny.scramble(fusion)
        Trainer(model, Batches(examples(), 4, 32), None, Settings(steps=10, batch=4, lr=0.01)).run()
        values = [tensor.data for name, tensor in fusion.params.items() if name.endswith(".value")]
        far.append(sum(float(((value - np.eye(DIM)) ** 2).sum()) for value in values))
    assert far[1] < 0.5 * far[0]


def refusals(folder: Path) -> dict[str, tuple[dict, str]]:
    """Options that cannot be, and what is said of them."""
    random = np.random.default_rng(0).normal
    here = "model.layers.0.block_out"
    values = {f"{here}.down": random(size=(5, DIM)), f"{here}.down_bias": random(size=5)}
    values |= {f"{here}.up": random(size=(DIM, 5)), f"{here}.up_bias": random(size=DIM)}
    one = FUSED["adapters"][0]
    others = {
        "half": sources.write_bottlenecks(folder / "half", values),
        "tanh": sources.write_bottlenecks(folder / "tanh", values, activation="tanh"),
        "norms": sources.write_bottlenecks(folder / "norms", values, "houlsby", norms=True),
        "ia3": sources.write_bottlenecks(folder / "ia3", values, "ia3"),
    }
    lora = tiny.model()
    sites.attach(lora, "lora")
    adapters.save(folder / "lora", lora)
    with_one = {name: {"size": 5, "adapters": [one, other]} for name, other in others.items()}
    return {
        "one": ({"adapters": [one]}, "adapterfusion.adapters: name two or more directories"),
        "size": (
            {"adapters": FUSED["adapters"]},
            r"down in .* has shape \(5, 24\): expected \(64, 24\), for size = 64",
        ),
        "half": (with_one["half"], "has no bottleneck at model.layers.1.block_out, but at model.layers.0.block_out"),
        "activation": (with_one["tanh"], "has activation = 'tanh', and activation is 'relu'"),
        "norms": (with_one["norms"], "holds houlsby with .*: expected pfeiffer"),
        "ia3": (with_one["ia3"], "holds ia3 with .*: expected pfeiffer"),
        "lora": (
            {"size": 5, "adapters": [one, str(folder / "lora")]},
            "of peft_type 'LORA': expected one in refpeft's own form",
        ),
        "places": (FUSED | {"targets": ["@mlp_out"]}, "has no bottleneck at model.layers.0.mlp_out, but at model.lay"),
        "nothing": ({"size": 5, "adapters": [one, str(folder / "no")]}, "holds no adapter"),
    }


@pytest.mark.parametrize("case", ["one", "size", "half", "activation", "norms", "ia3", "lora", "places", "nothing"])
def test_adapters_that_cannot_be_fused_are_an_error(case, tmp_path):
    options, message = refusals(tmp_path)[case]
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), "adapterfusion", options)
