"""Recomputation in the backward pass: the same bits, and only the inputs kept."""

import dataclasses

import numpy as np
import pytest
import test_encoder
import test_t5
import tiny
from variants import TO_FIT, needed_quantizer

from refpeft import manager, ops, sites
from refpeft.errors import RefpeftError
from refpeft.learning import refuse_recomputation
from refpeft.models import heads
from refpeft.tensor import Tensor, checkpoint, no_grad, parameter

METHODS = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "method")
KINDS = {name: test_encoder.CONFIGS[name] for name in ("bert", "deberta-v3")} | {"t5": test_t5.CONFIGS["flan"]}
OPTIONS = TO_FIT | {"lora": {"dropout": 0.3}, "bitfit": {"create": True}}


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def network(w, b):
    """A function of one tensor, with parameters inside, that uses its input twice."""
    return lambda x: ops.tanh(ops.linear(x, w, b)) * x + x


def gradients(run, *leaves):
    for leaf in leaves:
        leaf.node.grad = None
    out = run()
    out.backward(normal(out.shape, 5))
    return out.data, *(leaf.grad for leaf in leaves)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# ---- one function ----------------------------------------------------------------------------------------------------


def test_values_and_gradients_are_the_same_bits():
    x, w, b = parameter(normal((3, 4))), parameter(normal((4, 4), 1)), parameter(normal(4, 2))
    fn = network(w, b)
    assert same(gradients(lambda: fn(x), x, w, b), gradients(lambda: checkpoint(fn, x), x, w, b))


def test_nested_they_are_the_same_bits():
    x, w, b = parameter(normal((3, 4))), parameter(normal((4, 4), 1)), parameter(normal(4, 2))
    fn = network(w, b)
    plain = gradients(lambda: fn(fn(fn(x))), x, w, b)
    assert same(plain, gradients(lambda: checkpoint(lambda h: fn(checkpoint(fn, checkpoint(fn, h))), x), x, w, b))


def test_it_runs_again_once_and_keeps_its_inputs_alone():
    runs = []

    def fn(a, b):
        runs.append(1)
        return ops.exp(a * b) * b

    a, b = parameter(normal((3, 4))), Tensor(normal((3, 4), 1))
    out = checkpoint(fn, a, b)
    arrays = out.node.saved[1]
    assert arrays[0] is a.data and arrays[1] is b.data and len(arrays) == 2
    assert len(runs) == 1
    out.backward()
    assert len(runs) == 2 and b.grad is None


def test_constants_with_a_parameter_inside_are_recorded():
    w = parameter(normal((4, 4)))
    x = Tensor(normal((3, 4), 1))
    checkpoint(lambda x: ops.linear(x, w), x).backward(np.ones((3, 4)))
    assert np.array_equal(w.grad, np.ones((4, 3)) @ x.data)


def test_its_inputs_may_be_put_away_and_come_back_when_they_are_needed():
    happened, places = [], []

    def put_away(array):
        places.append(array.copy())
        happened.append("away")
        return lambda: happened.append("back") or places.pop()

    def fn(x):
        happened.append("computed")
        return ops.exp(x) * w

    x, w = parameter(normal((3, 4))), parameter(normal((3, 4), 1))
    plain = gradients(lambda: fn(x), x, w)
    happened.clear()
    out = checkpoint(fn, x, put_away=put_away)
    assert happened == ["computed", "away"] and not any(part is x.data for part in out.node.saved[1])
    x.node.grad = w.node.grad = None
    out.backward(normal(out.shape, 5))
    assert happened == ["computed", "away", "back", "computed"] and not places
    assert same(plain, (out.data, x.grad, w.grad))
    checkpoint(ops.exp, Tensor(x.data), put_away=put_away)
    assert not places  # nothing is trained in there


def test_nothing_trained_inside_is_a_constant():
    x = Tensor(normal((3, 4)))
    assert checkpoint(ops.exp, x).node is None
    with no_grad():
        assert checkpoint(ops.exp, parameter(x.data)).node is None


def test_something_trained_before_or_after_is_not_something_trained_inside():
    x, w = Tensor(normal(4)), parameter(normal(4))

    def outer(x):
        before = x * w
        inner = checkpoint(ops.exp, x)
        assert inner.node is None
        return before + inner

    out = checkpoint(outer, x)
    assert out.node is not None
    out.backward()
    assert np.array_equal(w.grad, x.data)


def test_an_input_that_is_not_used_gets_no_gradient():
    a, b, leaf = parameter(normal(3)), parameter(normal(3, 1)), parameter(normal(3, 2))
    out = checkpoint(lambda a, b, c: ops.exp(a), a, b, leaf * 2)
    out.backward()
    assert np.array_equal(a.grad, np.exp(a.data)) and b.grad is None and leaf.grad is None


def test_an_output_that_is_detached_gives_no_gradient():
    a = parameter(normal(3))
    (checkpoint(lambda a: ops.detach(ops.exp(a)), a) + a).backward()
    assert np.array_equal(a.grad, np.ones(3))


def test_an_input_that_is_returned_gets_the_gradient():
    a = parameter(normal(3))
    (checkpoint(lambda a: a, a * 2) + 1).backward()
    assert np.array_equal(a.grad, [2, 2, 2])


def test_recording_is_back_after_an_error_inside():
    a = parameter(normal(3))
    with pytest.raises(ZeroDivisionError):
        checkpoint(lambda a: 1 / 0, a)
    assert (a * 2).node is not None


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_dropout_has_the_same_gradients_bit_for_bit(name, method):
    model = tiny.model(name, "float32", needed_quantizer(method))
    sites.attach(model, method, OPTIONS.get(method))
    tiny.scramble(model.adapters[0])
    if any(layer.remembers for layer in model.adapters[0].layers):
        with pytest.raises(RefpeftError, match=f"{method} hands on what one of them computed"):
            refuse_recomputation(model)
        return
    model.mode.training = True
    plain = tiny.gradients(model, tiny.batch())
    model.checkpointing = True
    again = tiny.gradients(model, tiny.batch())
    assert plain.keys() == again.keys()
    assert [key for key in plain if not np.array_equal(plain[key], again[key])] == []


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_all_layers_read_has_its_gradient_too(kind, method):
    """An encoder's states, relative positions: gradients of several layers go there."""
    model = tiny.of(KINDS[kind])
    if kind != "t5":
        heads.put_on(model, "mlm", (), 0, {}.get)
    tiny.scramble(sites.attach(model, method, {"targets": "all-linear"} if method == "lora" else None))
    batch = tiny.batch()
    batch = dataclasses.replace(batch, said=batch.ids if kind == "t5" else None)
    plain = tiny.gradients(model, batch)
    model.checkpointing = True
    again = tiny.gradients(model, batch)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert np.allclose(again[name], gradient, rtol=0, atol=1e-12 * abs(gradient).max()), name


def test_dropout_differs_from_step_to_step_and_not_within_one():
    model = tiny.model()
    sites.attach(model, "lora", {"dropout": 0.3})
    tiny.scramble(model.adapters[0])
    model.mode.training = True
    first, again = tiny.gradients(model, tiny.batch()), tiny.gradients(model, tiny.batch())
    model.mode.step = 1
    later = tiny.gradients(model, tiny.batch())
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not any(np.array_equal(first[key], later[key]) for key in first)


def test_two_methods_at_once_have_the_same_gradients_bit_for_bit():
    model = tiny.model()
    for method in ("lora", "prefix_tuning", "prompt_tuning"):
        sites.attach(model, method)
        tiny.scramble(model.adapters[-1])
    plain = tiny.gradients(model, tiny.batch())
    model.checkpointing = True
    assert all(np.array_equal(plain[key], value) for key, value in tiny.gradients(model, tiny.batch()).items())
