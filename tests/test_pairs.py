"""Every method on every quantizer: no code knows of a pair, and a step on packed weights is one on dense values."""

from collections import Counter

import numpy as np
import pytest
import sources
import tiny
from variants import TO_FIT, has_constants

from refpeft import RefpeftError, manager, sites
from refpeft.fused import frozen_linear
from refpeft.quant import Dense, Quantized, Quantizer, make_quantizer
from refpeft.tensor import parameter

LISTED = manager.catalogue()
METHODS = sorted(name for name, listing in LISTED.items() if listing.kind == "method")
OPTIONS = TO_FIT | {"bitfit": {"create": True}, "lora": {"dropout": 0.2, "targets": "all-linear"}}
OPTIONS |= {"adapterfusion": {"size": 5, "adapters": sources.bottlenecks(2, dim=32)}}
OPTIONS |= {"spot": {"tokens": 3, "sources": sources.prompts(1, dim=32)}}


QUANTIZERS = sorted(name for name, listing in LISTED.items() if listing.kind == "quantizer")
ONCE_AND_TWICE = [(name, twice) for name in QUANTIZERS for twice in (False, True)[: 1 + has_constants(name)]]


@pytest.fixture(scope="module", params=ONCE_AND_TWICE, ids=str)
def quantizer(request) -> Quantizer:
    name, double_quant = request.param
    return make_quantizer(name, None, double_quant)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_packed_weights_is_the_step_on_their_dense_values(method, quantizer):
    model = tiny.model("wide", quantizer=quantizer)
    tiny.scramble(sites.attach(model, method, OPTIONS.get(method)))
    model.mode.training = True
    packed = tiny.gradients(model, tiny.batch())
    quantized = [site for site in model.sites.values() if isinstance(site.weight, Quantized)]
    for site in quantized:
        site.weight = Dense(site.weight(), model.dtype)
    dense = tiny.gradients(model, tiny.batch())
    assert len(quantized) == 14 and packed.keys() == dense.keys()
    for name, gradient in packed.items():
        assert np.isfinite(gradient).all() and np.array_equal(gradient, dense[name]), name
    assert any(gradient.any() for gradient in packed.values())


def test_backward_has_the_weight_that_forward_had(quantizer):
    """In bitsandbytes it may be rounded to one dtype for the one and to another for the other."""
    weight = quantizer(np.random.default_rng(0).normal(0, 0.02, (24, 64)).astype("f4"), np.dtype("f4"))
    x = parameter(np.eye(64, dtype="f4"))
    y = frozen_linear(x, weight=weight)  # the weight, transposed
    (y * np.eye(64, 24, dtype="f4")).sum().backward()  # row i of the gradient is row i of the weight
    assert np.array_equal(y.data.T, weight()) and np.array_equal(x.grad[:24], weight())


def test_a_weight_is_unpacked_once_forward_and_once_backward_and_not_kept(quantizer, monkeypatch):
    model = tiny.model("wide", quantizer=quantizer)
    sites.attach(model, "lora", {"targets": "all-linear"})
    kept = {name: dict(vars(site.weight)) for name, site in model.sites.items() if isinstance(site.weight, Quantized)}
    names, asked = {id(model.sites[name].weight): name for name in kept}, Counter()
    unpack = Quantized.__call__
    monkeypatch.setattr(Quantized, "__call__", lambda self: asked.update([names[id(self)]]) or unpack(self))
    loss = model.loss(tiny.batch())
    assert asked == dict.fromkeys(kept, 1)
    loss.backward()
    lowest = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}  # there is nothing to be trained below them
    assert asked == {name: 1 if name in lowest else 2 for name in kept}
    assert all(vars(model.sites[name].weight) == before for name, before in kept.items())


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if not has_constants(name)])
def test_double_quantization_of_nothing_is_refused(name):
    with pytest.raises(RefpeftError, match=f"^w: {name} keeps no arrays of float32 constants.*leave it out$"):
        make_quantizer(name, None, double_quant=True)(np.ones((1, 32), "f4"), np.dtype("f4"), "w")
