"""Bottlenecks that the data prune, that are drawn at random in training, or that are fused: each one's own points."""

from types import SimpleNamespace

import device
import numpy as np
import pytest
import tiny
from test_trainer import examples

from refpeft import adapters, sites
from refpeft.backend import to_host
from refpeft.batches import Batches, split
from refpeft.bottleneck import prune
from refpeft.config import Train as Settings
from refpeft.errors import RefpeftError
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


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"rows": 0}, {"init_std": 0.0}])
def test_a_sparse_adapter_that_cannot_be_is_an_error(options):
    with pytest.raises(RefpeftError, match="expected sparsity from 0 to less than 1"):
        sites.attach(tiny.model(), "sparse_adapter", options)
