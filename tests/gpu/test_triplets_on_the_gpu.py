"""AdaLoRA's step by kernels for all sites at once, beside array code on the host."""

import cupy
import numpy as np
import pytest
import tiny

from refpeft import learning, sites, triplets
from refpeft.backend import to_host
from refpeft.cuda import triplets as by_kernels
from refpeft.optim import Flat

OPTIONS = {"init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 2, "delta_t": 2, "targets": "all-linear"}
TOTAL = 9


class Trained:
    """A model's AdaLoRA in training: random values, averages, and gradients that can be drawn again."""

    def __init__(self, xp, dtype="float32", **options):
        self.model = tiny.model("llama", dtype, xp=xp)
        self.adapter = sites.attach(self.model, "adalora", OPTIONS | options)
        self.flat = Flat(self.model.trained())
        self.kept = learning.states(self.model)
        self.cfg, self.layers = self.adapter.cfg, self.adapter.layers
        for seed, array in enumerate([self.flat.values, *self.kept.values()]):
            drawn = np.random.default_rng(seed).standard_normal(array.shape)
            array[...] = xp.asarray(drawn if seed == 0 else abs(drawn)).astype(dtype)
        self.draw(0)

    def draw(self, seed: int) -> None:
        drawn = np.random.default_rng(100 + seed).standard_normal(self.flat.grads.shape)
        self.flat.grads[...] = self.model.xp.asarray(drawn).astype(self.flat.grads.dtype)

    def update(self) -> None:
        self.flat.values -= np.float32(0.1) * self.flat.grads
        self.flat.grads.fill(0)

    @property
    def gradients(self) -> list[dict]:
        return [vars(layer.grads) for layer in self.layers]


@pytest.fixture
def counted(monkeypatch):
    """How often each kernel is started."""
    found, source = [], by_kernels._source
    monkeypatch.setattr(by_kernels, "_source", lambda name, dtype: found.append(name) or source(name, dtype))
    return found


def test_averages_are_those_of_the_host_to_the_bit(counted):
    there, here = Trained(cupy), Trained(np)
    for site in (there, here):
        triplets._of_all(triplets.note, site.layers, site.gradients, 0.85, 0.7)
    assert counted == ["note"]
    for name, array in here.kept.items():
        assert np.array_equal(to_host(there.kept[name]), array), name


def test_importances_are_those_of_the_host_to_rounding(counted):
    there, here = Trained(cupy), Trained(np, "float64")
    for name, array in here.kept.items():
        array[...] = to_host(there.kept[name])
    found = by_kernels.importances(*by_kernels.sites(there.layers))
    expected = np.concatenate([triplets.importance(layer) for layer in here.layers])
    assert counted == ["importances"] and found.dtype == np.float32
    assert np.allclose(to_host(found), expected, rtol=1e-6, atol=0)


def test_triplets_that_are_not_chosen_are_set_to_0_and_no_others(counted):
    there, here = Trained(cupy), Trained(np)
    chosen = np.random.default_rng(1).random(sum(layer.p.E.data.size for layer in here.layers)) < 0.5
    by_kernels.prune(*by_kernels.sites(there.layers), cupy.asarray(chosen))
    parts = np.split(chosen, np.cumsum([layer.p.E.data.size for layer in here.layers])[:-1])
    for layer, part in zip(here.layers, parts, strict=True):
        layer.p.E.data *= part
    assert counted == ["prune"]
    assert np.array_equal(to_host(there.flat.values), here.flat.values)


@pytest.mark.parametrize("compat", ["none", "official"])
def test_steps_prune_what_those_of_the_host_do(compat: str, counted):
    there, here = Trained(cupy, compat=compat), Trained(np, compat=compat)
    for number in range(TOTAL):
        for site in (there, here):
            site.draw(number)
            learning.step(site.model, site.update, number, TOTAL)
        assert np.array_equal(to_host(there.flat.values) == 0, here.flat.values == 0), number
    assert {"note", "importances", "prune"} == set(counted)
    assert np.allclose(to_host(there.flat.values), here.flat.values, rtol=1e-5, atol=1e-6)
    assert sum(int((layer.p.E.data != 0).sum()) for layer in there.layers) == 2 * len(there.layers)


def test_float64_is_array_code(counted):
    there, here = Trained(cupy, "float64"), Trained(np, "float64")
    for site in (there, here):
        learning.step(site.model, site.update, 2, TOTAL)
    assert not counted
    assert np.allclose(to_host(there.flat.values), here.flat.values, rtol=1e-12, atol=1e-14)


def test_sites_that_are_gone_are_in_no_table():
    site = Trained(cupy)
    before = [layer.p.E.data.copy() for layer in site.layers]
    some = site.layers[1::2]
    by_kernels.prune(*by_kernels.sites(some), cupy.zeros(sum(layer.p.E.data.size for layer in some), bool))
    for number, (layer, E) in enumerate(zip(site.layers, before, strict=True)):
        assert (layer.p.E.data == (0 if number % 2 else E)).all()
