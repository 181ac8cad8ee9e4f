"""AdaLoRA: its budget, which triplets it keeps, its penalty, its files, and runs that go on."""

from unittest import mock

import numpy as np
import pytest
import tiny
from test_trainer import examples

from refpeft import adapters, files, learning, manager, sites
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.optim import SGD, Flat
from refpeft.trainer import Trainer

OPTIONS = {"init_r": 6, "target_r": 2}


def config(**options):
    return manager.load("adalora").Config(**(OPTIONS | options))


def test_the_budget_falls_along_a_cube_between_tinit_and_tfinal_and_then_stays():
    cfg, total = config(tinit=10, tfinal=20, delta_t=5), 100
    kept = {t: cfg.kept(t, total, first=24, targets=4) for t in range(1, total + 1)}
    assert all(kept[t] is None for t in range(1, 11))
    chosen = [t for t in range(11, 80) if kept[t] is not None]
    assert chosen == list(range(15, 80, 5))
    for t in chosen:
        assert kept[t] == int(8 + (24 - 8) * (1 - (t - 10) / (100 - 20 - 10)) ** 3)
    assert all(kept[t] == 8 for t in range(80, 101))


def test_with_the_defaults_the_last_step_reaches_the_target():
    assert [config().kept(t, 4, first=12, targets=2) for t in range(1, 5)] == [7, 5, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_r": 7}, "init_r is 6 and target_r 7: expected 1 <= target_r <= init_r"),
        ({"delta_t": 0}, "delta_t of at least 1"),
        ({"beta2": 1.0}, "beta1 and beta2 between 0 and 1"),
        ({"alpha": 0.0}, "alpha above 0"),
        ({"init_r": 13}, "init_r is 13, but .*v_proj has room for 12 orthogonal vectors"),
    ],
)
def test_options_that_cannot_be_are_errors(options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), "adalora", OPTIONS | options)


def trainer(out=None, steps=6, **options) -> Trainer:
    model = tiny.model("llama", dtype="float32")
    sites.attach(model, "adalora", OPTIONS | options)
    settings = Train(steps=steps, batch=4, save_every=2, lr=0.02)
    return Trainer(model, Batches(examples(), 4, 32), None, settings, out)


def test_a_schedule_that_does_not_fit_the_run_is_an_error():
    with pytest.raises(
        RefpeftError, match=r"tinit is 3 and tfinal 3: expected .* less than the run's 6 steps together"
    ):
        trainer(tinit=3, tfinal=3).run()


@pytest.mark.parametrize("orth", ["paper", "official"])
def test_the_penalty_is_the_distance_of_P_and_Q_from_orthogonal_ones(orth):
    model = tiny.model()
    adapter = sites.attach(model, "adalora", OPTIONS | {"orth": orth, "gamma": 0.3})
    tiny.scramble(adapter)
    norms = []
    for layer in adapter.layers:
        P, Q = layer.arrays.P, layer.arrays.Q
        norms += [np.linalg.norm(gram - np.eye(6)) for gram in (P.T @ P, Q @ Q.T)]
    expected = 0.3 * (np.sum(np.square(norms)) if orth == "paper" else np.mean(norms))
    assert sum(term.data for term in learning.penalties(model)) == pytest.approx(expected, rel=1e-12)


def test_training_leaves_as_many_triplets_as_the_target_says_and_their_file_has_no_others(tmp_path):
    built = trainer()
    built.run()
    (adapter,) = built.model.adapters
    left = {layer.site.name: np.count_nonzero(layer.arrays.E) for layer in adapter.layers}
    assert sum(left.values()) == 2 * 4
    adapters.save(tmp_path / "a", built.model)
    tensors = files.read_safetensors(tmp_path / "a" / "adapter_model.safetensors")
    pattern = files.read_json(tmp_path / "a" / "adapter_config.json")["rank_pattern"]
    for name, count in left.items():
        assert tensors[f"base_model.model.{name}.lora_E"].shape == (count, 1)
        assert pattern[f"{name}.lora_E"] == [True] * count + [False] * (6 - count)
    other = tiny.model("llama", dtype="float32")
    (loaded,) = adapters.load(other, tmp_path / "a")
    assert loaded.size < adapter.size
    want = built.model(tiny.ids()).data
    assert np.allclose(other(tiny.ids()).data, want, rtol=0, atol=1e-5 * abs(want).max())
    adapters.save(tmp_path / "b", other)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_target_that_lost_all_triplets_is_left_out_and_stays_in_the_file(tmp_path):
    model = tiny.model()
    adapter = sites.attach(model, "adalora", OPTIONS)
    tiny.scramble(adapter)
    adapter.layers[1].arrays.E[...] = 0
    adapters.save(tmp_path / "a", model)
    other = tiny.model()
    (loaded,) = adapters.load(other, tmp_path / "a")
    assert [layer.site.name for layer in loaded.layers] == [
        layer.site.name for layer in adapter.layers if layer is not adapter.layers[1]
    ]
    assert np.allclose(other(tiny.ids()).data, model(tiny.ids()).data, rtol=0, atol=1e-12)
    adapters.save(tmp_path / "b", other)
    assert files.read_json(tmp_path / "a" / adapters.CONFIG) == files.read_json(tmp_path / "b" / adapters.CONFIG)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run()
    cut = trainer(tmp_path / "cut")
    for _ in range(3):
        cut._step()
        if cut._due(2):
            cut._save()
    again = trainer(tmp_path / "cut")
    again.run(resume=True)
    assert any("sensitivity_E" in name for name in whole._arrays)
    for name, array in whole._arrays.items():
        assert np.array_equal(array, again._arrays[name]), name


# ---- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compat", ["none", "official"])
def test_the_triplets_that_are_kept_are_those_of_pefts_allocator(compat):
    """PEFT takes the numbers of after the step; with the paper's order its averages are moved before it, by hand."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    total, schedule = 12, {"tinit": 2, "tfinal": 3}
    model = tiny.model()
    adapter = sites.attach(model, "adalora", OPTIONS | schedule | {"compat": compat, "delta_t": 2})
    tiny.scramble(adapter)
    flat = Flat(model.trained())
    optimizer = SGD(flat, momentum=0.0)
    learning.states(model)
    shapes = {layer.site.name.replace(".", "_"): layer.site.shape for layer in adapter.layers}
    peer = torch.nn.ModuleDict({name: torch.nn.Linear(width, out) for name, (out, width) in shapes.items()})
    peer = peft.get_peft_model(
        peer, peft.AdaLoraConfig(**OPTIONS, **schedule, deltaT=2, total_step=total, target_modules=list(shapes))
    ).double()
    theirs = {}
    for layer, name in zip(adapter.layers, shapes, strict=True):
        inner = peer.base_model.model[name]
        for letter, parameters in (("P", inner.lora_B), ("E", inner.lora_E), ("Q", inner.lora_A)):
            theirs[f"{layer.site.name}.{letter}"] = parameters["default"]
    for name, parameter in theirs.items():
        parameter.data.copy_(torch.from_numpy(flat.params[name].data).reshape(parameter.shape))
    allocator, rng, lr = peer.base_model.rankallocator, np.random.default_rng(0), 0.1
    for t in range(1, total + 1):
        flat.grads[...] = rng.standard_normal(flat.grads.size)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(flat.params[name].grad.copy()).reshape(parameter.shape)
        learning.step(model, lambda: optimizer.step(lr), t - 1, total)
        note = allocator.update_ipt
        if compat == "none" and t < total - schedule["tfinal"]:
            note(peer.base_model.model)
        with torch.no_grad():
            for parameter in theirs.values():
                parameter -= lr * parameter.grad
        with mock.patch.object(allocator, "update_ipt", note if compat == "official" else lambda model: None):
            peer.base_model.update_and_allocate(t)
        for name, parameter in theirs.items():
            ours = flat.params[name].data
            assert np.allclose(ours, parameter.detach().numpy().reshape(ours.shape), rtol=1e-12, atol=1e-14), (t, name)
    assert sum(np.count_nonzero(layer.arrays.E) for layer in adapter.layers) == 2 * len(adapter.layers)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_a_pruned_adapter_is_read_in_both_directions(tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from test_peers_peft import IDS, peer, peer_logits

    ours = tiny.model()
    adapter = sites.attach(ours, "adalora", OPTIONS | {"alpha": 9.0})
    tiny.scramble(adapter)
    for tensor in adapter.params.values():
        tensor.data[...] = tensor.data.astype("f4")
    for layer, gone in zip(adapter.layers, ([0, 3], range(6), [5], []), strict=True):
        layer.arrays.E[list(gone)] = 0
    adapters.save(tmp_path / "adapter", ours)
    theirs = peft.PeftModel.from_pretrained(peer("llama", tmp_path), tmp_path / "adapter").double().eval()
    want = ours(IDS).data
    limit = 1e-6 * abs(want).max()  # PEFT has the rank in float32
    assert np.allclose(peer_logits(theirs).detach().numpy(), want, rtol=0, atol=limit)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter += 0.1
    theirs.save_pretrained(tmp_path / "again")
    again = tiny.model()
    adapters.load(again, tmp_path / "again")
    assert np.allclose(again(IDS).data, peer_logits(theirs).detach().numpy(), rtol=0, atol=limit)
