"""What methods add to training: objectives, penalties, rates, state and steps, through the trainer."""

import numpy as np
import pytest
import tiny
from test_trainer import examples

from refpeft import ops, sites
from refpeft.batches import Batches, split
from refpeft.config import Train as Settings
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.learning import objective, penalties
from refpeft.optim import OPTIMIZERS, Flat
from refpeft.tensor import parameter
from refpeft.trainer import Trainer

GAIN = {"peft_params": lambda site: {"s": np.ones(site.shape[0])}, "peft_linear": lambda x, base, p: base(x) * p.s}
PLAIN = {"optimizer": "sgd", "lr": 0.1, "clip": 0, "schedule": "constant", "warmup": 0}


def trainer(plugin, steps: int = 3, out=None, **settings) -> Trainer:
    model = tiny.model()
    sites.attach(model, plugin)
    return Trainer(model, Batches(examples(), 4, 32), None, Settings(steps=steps, batch=4, **settings), out)


def after(plugin, steps: int = 1, **settings) -> Trainer:
    run = trainer(plugin, steps, **settings)
    run.run()
    return run


# ---- penalties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_penalty_is_added_once_a_step_and_evaluation_is_without_it(micro_batch, registered):
    plain = after(registered(**GAIN), micro_batch=micro_batch, **PLAIN)
    weight = 0.25
    run = after(
        registered(**GAIN, peft_penalty=lambda p: weight * ops.sum(p.s * p.s)), micro_batch=micro_batch, **PLAIN
    )
    size = run.flat.values.size
    assert run.summary.train_losses[0] - plain.summary.train_losses[0] == pytest.approx(weight * size)
    assert np.allclose(plain.flat.values - run.flat.values, 0.1 * 2 * weight)  # where s = 1 its gradient is 2 weight
    rows = Batches(examples(4, seed=9), 4, 32, shuffle=False)
    plain.flat.values[...] = run.flat.values
    assert mean_loss(run.model, rows) == mean_loss(plain.model, rows)


def test_a_site_may_have_no_penalty(registered):
    plain = after(registered(**GAIN), **PLAIN)
    run = after(registered(**GAIN, peft_penalty=lambda p, site: None if site.index else ops.sum(p.s)), **PLAIN)
    moved = plain.flat.values - run.flat.values
    assert np.allclose(moved[:24], 0.1) and not moved[24:].any()


def test_a_penalty_is_of_the_methods_own_sites_and_knows_of_training(registered):
    seen = []

    def peft_penalty(p, site, train):
        seen.append((site.name, train is not None))

    model = tiny.model()
    sites.attach(model, registered(**GAIN, peft_penalty=peft_penalty, peft_companions=lambda: {"lora": {}}))
    model.mode.training = True
    assert list(penalties(model)) == []
    assert seen == [(f"model.layers.{n}.self_attn.q_proj", True) for n in range(2)]


# ---- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 1])
def test_an_objective_of_the_plain_loss_has_its_value_and_gradient(rows, registered):
    plugin = registered(**GAIN, peft_objective=lambda logits, loss: loss(logits()))
    own, plain = (tiny.model() for _ in range(2))
    tiny.scramble(sites.attach(own, plugin))
    tiny.scramble(sites.attach(plain, registered(**GAIN)))
    batch = Batches(examples(), 4, 32).at(0)
    losses = [0.0, 0.0]
    for part in split(batch, rows):
        for i, loss in enumerate((objective(own, part, batch.supervised), plain.loss(part, batch.supervised))):
            loss.backward()
            losses[i] += float(loss.data)
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)
    for (_, one), (_, other) in zip(own.trained(), plain.trained(), strict=True):
        assert np.allclose(one.grad, other.grad, rtol=1e-11, atol=1e-14)


def test_every_call_for_logits_is_a_pass_with_draws_of_its_own(registered):
    def peft_linear(x, base, p, train):
        return base(x) * p.s * (1 + (train.draw(1000, apart=True) if train else 0))

    def peft_objective(logits, loss, mean):
        a, b = logits(), logits()
        apart.append(abs(a.data - b.data).max())
        return loss(a) + mean(ops.sum((a - b) * (a - b), axis=-1))

    model, apart = tiny.model(), []
    sites.attach(model, registered(**GAIN | {"peft_linear": peft_linear}, peft_objective=peft_objective))
    batch = Batches(examples(), 4, 32).at(0)
    different = float(objective(model, batch, batch.supervised).data)
    model.mode.training = True
    routed = float(objective(model, batch, batch.supervised).data)
    assert routed == float(objective(model, batch, batch.supervised).data)
    assert different == pytest.approx(float(model_loss(model, batch)), rel=1e-12)  # without routes the two are equal
    assert abs(routed - different) > 1e-3 and model.mode.again == 0
    assert apart[0] == 0 and apart[1] == apart[2] > 1e-3


def model_loss(model, batch):
    model.mode.training = False
    return model.loss(batch, batch.supervised).data


def test_an_objectives_mean_is_over_the_whole_batch_however_it_is_cut(registered):
    plugin = registered(**GAIN, peft_objective=lambda logits, mean: mean(ops.sum(logits() ** 2, axis=-1)))
    model = tiny.model()
    sites.attach(model, plugin)
    batch = Batches(examples(), 4, 32).at(0)
    whole = objective(model, batch, batch.supervised).data
    parts = [objective(model, part, batch.supervised).data for part in split(batch, 1)]
    assert sum(parts) == pytest.approx(whole, rel=1e-12)


def test_an_objective_learns_the_token_0_too(registered):
    model = tiny.model()
    sites.attach(model, registered(**GAIN, peft_objective=lambda logits, loss: loss(logits())))
    batch = tiny.batch()
    batch.targets[:, 3] = 0
    assert objective(model, batch, batch.supervised).data == pytest.approx(model.loss(batch).data, rel=1e-13)


def test_two_objectives_are_an_error(registered):
    model = tiny.model()
    plugin = registered(**GAIN, peft_objective=lambda logits, loss: loss(logits()))
    sites.attach(model, plugin)
    sites.attach(model, plugin)
    with pytest.raises(RefpeftError, match="both have an objective of their own: choose one"):
        objective(model, tiny.batch(), 1)


def test_a_pass_that_is_compared_cannot_be_computed_again(registered):
    plugin = registered(**GAIN, peft_objective=lambda logits, loss: loss(logits()))
    with pytest.raises(RefpeftError, match="compares passes: leave it out"):
        trainer(plugin, checkpoint_activations=True)


# ---- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_multiplies_the_learning_rate_of_its_parameter_alone(name):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 200), "b": (200,), "c": (5, 80)}
    first = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    steps = {}
    for rate in ({}, {"b": 4.0, "c": 0.5}):
        flat = Flat(((key, parameter(array)) for key, array in first.items()), rate)
        optimizer = OPTIMIZERS[name](flat)
        flat.grads[...] = np.random.default_rng(1).standard_normal(flat.grads.size)
        optimizer.step(1e-3)
        steps[len(rate)] = {key: tensor.data - first[key] for key, tensor in flat.params.items()}
    for key, factor in {"a": 1, "b": 4, "c": 0.5}.items():
        assert np.allclose(steps[2][key], factor * steps[0][key], rtol=1e-9), key
        assert steps[0][key].any()


def test_a_methods_rates_reach_the_optimizer(registered):
    plain = after(registered(**GAIN), **PLAIN)
    run = after(registered(**GAIN, peft_rates=lambda site: {"s": 3.0} if site.index else {}), **PLAIN)
    moved, plainly = run.flat.values - 1, plain.flat.values - 1
    assert np.array_equal(moved[:24], plainly[:24]) and np.allclose(moved[24:], 3 * plainly[24:], rtol=1e-12)


def test_a_rate_of_what_is_not_trained_is_an_error(registered):
    with pytest.raises(RefpeftError, match="plugin 'made_here': peft_rates names 'B', which is not trained"):
        trainer(registered(**GAIN, peft_rates=lambda: {"B": 2.0}))


# ---- state and steps -------------------------------------------------------------------------------------------------


def smoothed(update, layers, step, total, cfg):
    """Keeps a mean of squared gradients, and halves the numbers whose mean is largest, every other step."""
    for layer in layers:
        layer.state.mean[...] = 0.9 * layer.state.mean + 0.1 * layer.grads.s**2
    update()
    if step % 2:
        for layer in layers:
            layer.arrays.s[layer.state.mean >= layer.state.mean.max()] *= 0.5


KEEPING = GAIN | {"peft_state": lambda p: {"mean": np.zeros_like(p.s)}, "peft_step": smoothed}


def test_a_step_has_gradients_before_the_update_and_may_change_values_after_it(registered):
    seen = []

    def peft_step(update, layers, step, total):
        before = [layer.arrays.s.copy() for layer in layers]
        grads = [layer.grads.s.copy() for layer in layers]
        update()
        seen.append((step, total))
        for layer, was, grad in zip(layers, before, grads, strict=True):
            assert np.allclose(layer.arrays.s, was - 0.1 * grad, rtol=1e-12) and grad.any()
            layer.arrays.s[...] = 7

    run = after(registered(**GAIN, peft_step=peft_step), 2, **(PLAIN | {"momentum": 0.0}))
    assert seen == [(0, 2), (1, 2)] and (run.flat.values == 7).all()


def test_what_a_method_keeps_is_in_checkpoints_and_a_resumed_run_has_the_same_bits(tmp_path, registered):
    plugin = registered(**KEEPING)
    whole = after(plugin, 6, lr=0.01)
    first = trainer(plugin, 6, tmp_path, lr=0.01, save_every=3)
    calls = iter(range(10))

    def stop(**record):
        if "loss" in record and next(calls) == 3:
            raise KeyboardInterrupt

    first.listeners = (lambda record: stop(**record),)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert [path.name for path in first._all()] == ["step-00000003"]
    again = trainer(plugin, 6, tmp_path, lr=0.01, save_every=3)
    again.run(resume=True)
    assert np.array_equal(again.flat.values, whole.flat.values)
    assert all(np.array_equal(array, whole.kept[name]) and array.any() for name, array in again.kept.items())


def test_two_adapters_of_a_method_keep_each_their_own(registered):
    model, plugin = tiny.model(), registered(**KEEPING)
    sites.attach(model, plugin)
    sites.attach(model, plugin)
    run = Trainer(model, Batches(examples(), 4, 32), None, Settings(steps=2, batch=4))
    run.run()
    assert len(run.kept) == 4 and all(array.any() for array in run.kept.values())


def test_steps_of_several_methods_nest_around_one_update(registered):
    order = []

    def peft_step(update, layers):
        order.append("in")
        update()
        order.append("out")

    plugin = registered(**GAIN, peft_step=peft_step)
    model = tiny.model()
    sites.attach(model, plugin)
    sites.attach(model, plugin)
    Trainer(model, Batches(examples(), 4, 32), None, Settings(steps=1, batch=4)).run()
    assert order == ["in", "in", "out", "out"]
