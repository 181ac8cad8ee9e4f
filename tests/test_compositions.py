"""Every method twice on one model, and inside and outside of others: right gradients, and off again without a trace."""

import re

import numpy as np
import pytest
import tiny
from variants import VARIANTS, bare

from refpeft import manager, ops, sites
from refpeft.errors import RefpeftError

OTHERS = {
    "lora": {"targets": "all-linear", "r": 2},
    "ia3": {},
    "houlsby": {"size": 3, "norms": False},
    "prefix_tuning": {"tokens": 2, "init_std": 0.5},
}
REFUSED = (
    "two methods replace the (weight|bias) of",
    "which .* is on already: attach .* before any other there",
)
"""What may be said of a pair: both would take the place of one frozen weight."""


def both(name: str, inner: tuple[str, dict], outer: tuple[str, dict]):
    """A model with the two attached, with values as after training, and the adapters; None where they are refused."""
    model = bare("llama", name)
    try:
        adapters = [sites.attach(model, *inner), sites.attach(model, *outer, seed=1)]
        for number, adapter in enumerate(adapters):
            tiny.scramble(adapter, number)
        model(tiny.ids())
    except RefpeftError as error:
        assert any(re.search(pattern, str(error)) for pattern in REFUSED), error
        return None
    return model, adapters


def slope(model, direction: dict[str, np.ndarray], step: float = 1e-6) -> float:
    """The derivative of the loss along a direction of all parameters, by finite differences."""
    tensors, losses = dict(model.trained()), []
    here = {name: tensor.data for name, tensor in tensors.items()}
    for sign in (1, -1):
        for name, tensor in tensors.items():
            tensor.data = here[name] + sign * step * direction[name]
        losses.append(float(model.loss(tiny.batch()).data))
    for name, tensor in tensors.items():
        tensor.data = here[name]
    return (losses[0] - losses[1]) / (2 * step)


def check(model, adapters) -> None:
    """One joint direction of both adapters' parameters, merging where both can, and taking them off."""
    gradients = tiny.gradients(model, tiny.batch())
    rng = np.random.default_rng(3)
    direction = {name: rng.standard_normal(gradient.shape) for name, gradient in gradients.items()}
    size = np.sqrt(sum((d * d).sum() for d in direction.values()))
    direction = {name: d / size for name, d in direction.items()}
    expected = sum((gradients[name] * direction[name]).sum() for name in gradients)
    scale = np.sqrt(sum((g * g).sum() for g in gradients.values()))
    assert slope(model, direction) == pytest.approx(expected, rel=1e-5, abs=1e-6 * scale)

    before = model(tiny.ids()).data
    try:
        merge = sites.merge(model)
    except RefpeftError as error:
        assert "cannot be merged" in str(error)
    else:
        assert abs(model(tiny.ids()).data - before).max() < 1e-11
        merge.undo()
    assert model.adapters == adapters and np.array_equal(model(tiny.ids()).data, before)


@pytest.fixture(autouse=True)
def whole_gradients(monkeypatch):
    """What a method counts as a constant in the backward pass is no constant in finite differences."""
    monkeypatch.setattr(ops, "detach", lambda x: x)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_of_one_method(name):
    found = both(name, VARIANTS[name], VARIANTS[name])
    if found is None:
        return
    model, (first, second) = found
    check(model, [first, second])
    with_both = model(tiny.ids()).data
    sites.detach(model, first)
    alone = model(tiny.ids()).data
    assert abs(alone - with_both).max() > 1e-9
    sites.detach(model, second)
    assert np.array_equal(model(tiny.ids()).data, bare("llama", name)(tiny.ids()).data)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_with_another_method_inside_and_outside(name, other):
    pair = (VARIANTS[name], (other, OTHERS[other]))
    found = [both(name, *pair), both(name, *pair[::-1])]
    assert any(found)
    for one in filter(None, found):
        check(*one)


def test_what_may_be_refused_is_what_changes_or_replaces_frozen_weights():
    refused = {VARIANTS[name][0] for name in VARIANTS if both(name, VARIANTS[name], VARIANTS[name]) is None}
    for method in refused:
        hooks = manager.catalogue()[method].hooks
        text = manager.path_of(method).read_text("utf-8")
        assert "peft_base" in hooks or "base(x, " in text or "peft_companions" in hooks, method
