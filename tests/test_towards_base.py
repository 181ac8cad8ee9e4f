"""What holds training near the base: L2-SP and KL by their definitions, exact in parts, and what they refuse."""

import numpy as np
import pytest
import tiny
from test_heads import asked, headed
from test_trainer import examples

from refpeft import fused, sites, towards_base
from refpeft.backend import to_host
from refpeft.batches import Batches, split
from refpeft.config import Train
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.tensor import no_grad, plain
from refpeft.trainer import Trainer

PLAIN = {"optimizer": "sgd", "lr": 0.1, "clip": 0, "schedule": "constant", "warmup": 0}
SPEAKING = [("llama", "causal-lm"), ("bert", "classify"), ("bert", "tag"), ("deberta-v3", "mlm"), ("gpt2", "classify")]


def of(family: str, task: str):
    """A model whose head is its own, and a batch with weights where the task has some."""
    if task == "causal-lm":
        return tiny.model(family), tiny.batch()
    model = headed(family, task)
    model.new_head = ()
    return model, asked(family, task, weighted=True)


def attached(model, method: str = "lora", options: dict | None = None) -> sites.Adapter:
    adapter = sites.attach(model, method, options)
    tiny.scramble(adapter)
    return adapter


def trainer(model, **settings) -> Trainer:
    return Trainer(model, Batches(examples(), 8, 32), None, Train(**{"batch": 8, "steps": 1} | PLAIN | settings))


# ---- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "task"), SPEAKING)
def test_kl_is_its_formula_over_the_targets(family, task):
    model, batch = of(family, task)
    with no_grad():
        base = model.head(model.states(batch, batch.asked)).data
    attached(model)
    with no_grad():
        said = model.head(model.states(batch, batch.asked)).data
    p, q = (np.exp(z - z.max(-1, keepdims=True)) for z in (base, said))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    weights = np.ones(len(p)) if batch.weights is None else batch.weights.reshape(-1)[batch.asked]
    expected = (weights * (p * np.log(p / q)).sum(-1)).sum() / batch.denominator
    found = towards_base.objective(model, batch, batch.denominator, 0.7).data
    assert found == pytest.approx(model.loss(batch).data + 0.7 * expected, rel=1e-10) and expected > 1e-4


@pytest.mark.parametrize(("family", "task"), SPEAKING)
@pytest.mark.parametrize("at_once", [2**22, 64])
def test_the_gradient_of_kl_is_its_slope(family, task, at_once, monkeypatch):
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", at_once)
    model, batch = of(family, task)
    adapter = attached(model)
    tiny.assert_slope(adapter, lambda: towards_base.objective(model, batch, batch.denominator, 2.0))


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning", "pissa", "full", "bitfit"])
def test_kl_of_any_method_is_exact_in_parts_and_leaves_all_in_place(method):
    model = tiny.model("qwen2")
    adapter = attached(model, method)
    batch = Batches(examples(), 8, 32).at(0)
    before = {site.name: list(site.layers) for site in model.sites.values()}
    found = []
    for parts in ([batch], split(batch, 3)):
        for tensor in adapter.params.values():
            tensor.node.grad = None
        losses = [towards_base.objective(model, part, batch.denominator, 0.5) for part in parts]
        for loss in losses:
            loss.backward()
        found.append(
            (sum(loss.data for loss in losses), [t.grad for t in adapter.params.values() if t.grad is not None])
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for whole, parts in zip(found[0][1], found[1][1], strict=True):
        assert np.abs(whole - parts).max() <= 1e-11 * max(np.abs(whole).max(), 1e-3)
    assert {site.name: list(site.layers) for site in model.sites.values()} == before


def test_kl_is_nothing_where_training_begins_and_holds_it_there_after():
    def run(**settings):
        model = tiny.model()
        sites.attach(model, "lora")
        built = trainer(model, **settings | {"steps": 20, "lr": 0.5})
        built.run()
        batch = built.train.at(0)
        kl = towards_base.objective(model, batch, batch.denominator, 1.0).data - model.loss(batch).data
        return built.summary.train_losses, kl

    (free, far), (held, near) = run(), run(kl=4.0)
    assert held[0] == pytest.approx(free[0], rel=1e-12) and near < far / 2


def test_recomputed_layers_have_the_same_kl():
    model, batch = of("llama", "causal-lm")
    adapter, grads = attached(model), []
    for model.checkpointing in (False, True):
        for tensor in adapter.params.values():
            tensor.node.grad = None
        towards_base.objective(model, batch, batch.denominator, 1.0).backward()
        grads.append({name: tensor.grad for name, tensor in adapter.params.items()})
    assert all(np.array_equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_step_with_both_reads_nothing_and_is_the_hosts(monkeypatch):
    there, found = device.install(monkeypatch), []
    for xp in (there, np):
        model = tiny.model("qwen2", "float32", xp=xp)
        adapter, batch = sites.attach(model, "lora", {"dropout": 0.1}), tiny.batch()
        model.mode.training = True
        first = towards_base.FirstValues(model, 0.1)
        with plain(), device.capture():  # the host too, to the same bits
            loss = towards_base.objective(model, batch, batch.denominator, 0.5)
            loss.backward()
            for term in first.penalties():
                term.backward()
        found.append([to_host(loss.data), *(to_host(tensor.grad) for tensor in adapter.params.values())])
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("family", "task", "method", "message"),
    [
        ("bert", "regress", "lora", "compares probabilities, and the task 'regress' has none"),
        ("bert", "embed", "lora", "compares probabilities, and the task 'embed' has none"),
        ("bert", "classify", "lora", r"it has no head for 'classify' \(bert.pooler.dense.weight is not in its files\)"),
        ("llama", "causal-lm", "adamix", "train.kl and adamix, which has an objective of its own, exclude one another"),
    ],
)
def test_kl_is_refused_where_the_base_says_nothing_to_compare_with(family, task, method, message):
    model = tiny.model(family) if task == "causal-lm" else headed(family, task)
    sites.attach(model, method)
    with pytest.raises(RefpeftError, match=message):
        trainer(model, kl=0.1)


# ---- L2-SP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "pissa"])
def test_l2_sp_is_half_the_squared_distance_from_where_a_run_began(method):
    model = tiny.model()
    adapter = sites.attach(model, method)
    first = towards_base.FirstValues(model, 0.3)
    start = {name: tensor.data.copy() for name, tensor in adapter.params.items()}
    assert sum(term.data for term in first.penalties()) == 0
    tiny.scramble(adapter)
    distance = sum(((tensor.data - start[name]) ** 2).sum() for name, tensor in adapter.params.items())
    assert sum(term.data for term in first.penalties()) == pytest.approx(0.15 * distance, rel=1e-12)

    def value():
        terms = list(first.penalties())
        return sum(terms[1:], terms[0])

    tiny.assert_slope(adapter, value)


def test_of_full_fine_tuning_first_values_are_the_base():
    model = tiny.model()
    sites.attach(model, "full")
    held = {id(value): first.data for value, first in towards_base.FirstValues(model, 1.0).held}
    for name, value in model.trained():
        site, _, what = name.rpartition(".")
        frozen = model.sites[site].weight() if what == "weight" else model.sites[site].bias
        assert np.array_equal(held[id(value)], frozen)


def test_what_is_trained_of_the_head_is_left_out():
    model = headed("bert", "classify")
    sites.attach(model, "lora")
    held = {id(value) for value, _ in towards_base.FirstValues(model, 1.0).held}
    out = [name for name, value in model.trained() if id(value) not in held]
    assert out and all(name.startswith(model.trained_head) for name in out) and len(held) > 4
    sites.detach(model)
    sites.attach(model, "full", {"targets": list(model.trained_head)})
    with pytest.raises(RefpeftError, match=r"train\.l2_sp holds nothing"):
        towards_base.FirstValues(model, 1.0)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_l2_sp_is_added_once_a_step_and_evaluation_is_without_it(micro_batch):
    values, losses = [], []
    for strength in (0.0, 0.5):
        model = tiny.model()
        sites.attach(model, "lora")
        built = trainer(model, l2_sp=strength, micro_batch=micro_batch)
        start = built.flat.values.copy()
        tiny.scramble(model.adapters[0], scale=0.05)
        moved = built.flat.values.copy() - start
        built.run()
        values.append(built.flat.values)
        losses.append(built.summary.train_losses[0])
    assert losses[1] - losses[0] == pytest.approx(0.25 * (moved**2).sum())
    assert np.allclose(values[0] - values[1], 0.1 * 0.5 * moved, atol=1e-12)
    assert mean_loss(model, built.train) == mean_loss(model, built.train)


def test_a_run_with_both_goes_on_to_the_same_bits_and_not_with_others(tmp_path):
    def built(out, **changes):
        model = tiny.model()
        sites.attach(model, "lora")
        settings = Train(batch=4, steps=6, lr=1e-2, warmup=0, **({"l2_sp": 0.1, "kl": 0.2} | changes))
        return Trainer(model, Batches(examples(), 4, 32), None, settings, out)

    whole, cut, resumed = built(tmp_path / "whole"), built(tmp_path / "cut"), built(tmp_path / "cut")
    whole.run()
    for _ in range(3):
        cut._step()
    cut._save()
    with pytest.raises(RefpeftError, match=r"of another run: l2_sp was 0\.1, now 0\.3"):
        built(tmp_path / "cut", l2_sp=0.3).run(resume=True)
    resumed.run(resume=True)
    assert np.array_equal(whole.flat.values, resumed.flat.values)
