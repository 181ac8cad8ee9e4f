"""What the low-rank methods beside LoRA claim, and what they refuse."""

import json

import numpy as np
import pytest
import tiny
from variants import quantizer

from refpeft import adapters, manager, sites, structured
from refpeft.backend import bfloat16
from refpeft.errors import RefpeftError
from refpeft.structured import kron_linear
from refpeft.tensor import parameter
from refpeft.torch_random import torch_uniform


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("olora", {"alpha_pattern": {"q_proj": 0}}, "alpha is 0: expected a number above 0"),
        ("vera", {"r": 0}, "expected r of at least 1"),
        ("loha", {"rank_pattern": {".*": 0}}, "expected r of at least 1"),
        ("lokr", {"factor": 0}, "factor of at least 1, or -1"),
        ("hira", {"dropout": 1.0}, "less than 1"),
        ("delora", {"r": -1}, "expected r of at least 1"),
        ("krona", {"a_in": 7}, "a_in = 7 does not divide the 24 of model.layers.0.self_attn.q_proj; 6 does"),
        ("krona", {"a_out": 24}, "a_out = 24 does not divide the 12 of model.layers.0.self_attn.v_proj; 12 does"),
        ("krona", {"residual": True}, "residual is for parts of layers, as @mlp_out; .*q_proj is a linear layer"),
    ],
)
def test_options_that_do_not_fit_are_refused(method, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), method, options)


def test_a_vera_file_that_holds_a_seed_brings_the_matrices_back(tmp_path):
    model = tiny.model()
    tiny.scramble(sites.attach(model, "vera", {"r": 4, "torch_seed": 5}))
    adapters.save(tmp_path, model)
    config = json.loads((tmp_path / adapters.CONFIG).read_text("utf-8"))
    assert config["save_projection"] is False and config["projection_prng_key"] == 5
    again = tiny.model()
    adapters.load(again, tmp_path)
    assert abs(again(tiny.ids()).data - model(tiny.ids()).data).max() < 1e-5  # the file is float32
    (tmp_path / adapters.CONFIG).write_text(json.dumps(config | {"projection_prng_key": -1}), "utf-8")
    with pytest.raises(RefpeftError, match="expected torch_seed of at least 0"):
        adapters.load(tiny.model(), tmp_path)


def test_what_torch_draws_is_known():
    """The first of torch.empty(3).uniform_(-1, 1) and of the next two, with torch.manual_seed(7), in torch 2.13."""
    first, second = torch_uniform(7, (1.0, (3,)), (0.5, (2,)))
    assert first.dtype == np.float32
    assert np.array_equal(first, np.float32([0.06984508037567139, -0.602393627166748, 0.31842339038848877]))
    assert np.array_equal(second, np.float32([0.15689027309417725, -0.26723843812942505]))


def test_veras_matrices_are_as_large_as_the_largest_target_and_spread_as_kaimings():
    shared = sites.attach(tiny.model(), "vera", {"r": 64, "targets": ["@v", "@down"]}).constants
    assert shared["shared.A"].shape == (64, 32) and shared["shared.B"].shape == (24, 64)
    assert shared["shared.A"].data.std() == pytest.approx((2 / 32) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("options", "side", "parts"),
    [
        ({}, 4096, (64, 64)),
        ({}, 14336, (112, 128)),
        ({}, 127, (1, 127)),
        ({"factor": 8}, 4096, (8, 512)),
        ({"factor": 5}, 4096, (4, 1024)),
        ({"factor": 64}, 128, (64, 2)),
    ],
)
def test_lokr_cuts_sides_as_lycoris_does(options, side, parts):
    assert manager.load("lokr").Config(**options).split(side) == parts


def test_a_product_with_a_kronecker_product_needs_none():
    rng = np.random.default_rng(1)
    a, b, x = (rng.standard_normal(shape) for shape in ((3, 2), (4, 5), (2, 3, 10)))
    tensors = [parameter(array) for array in (x, a, b)]
    assert np.allclose(kron_linear(*tensors).data, x @ np.kron(a, b).T, atol=1e-14)
    assert np.allclose(kron_linear(parameter(x[0, 0]), a, b).data, np.kron(a, b) @ x[0, 0], atol=1e-14)


@pytest.mark.parametrize("most", [0, 2**22])
def test_a_kronecker_product_in_bfloat16_is_made_where_it_is_small(monkeypatch, most):
    monkeypatch.setattr(structured, "_DENSE", most)
    draw = np.random.default_rng(0)
    x, a, b = (draw.standard_normal(shape).astype("f4") for shape in ((2, 5, 12), (2, 3), (5, 4)))
    tensors = parameter(x.astype(bfloat16)), parameter(a), parameter(b)
    y = kron_linear(*tensors)
    y.backward(np.ones((2, 5, 10), bfloat16))
    exact = [parameter(each.astype("f8")) for each in (tensors[0].data, a, b)]
    expected = kron_linear(*exact)
    expected.backward(np.ones((2, 5, 10)))
    assert (y.node.op.name == "linear") == (most > 0) and y.dtype == bfloat16
    assert np.abs(y.data.astype("f8") - expected.data).max() < 2.0**-6 * np.abs(expected.data).max()
    for one, other, dtype in zip(tensors, exact, (bfloat16, "f4", "f4"), strict=True):
        assert one.grad.dtype == dtype
        assert np.abs(one.grad.astype("f8") - other.grad).max() < 2.0**-6 * np.abs(other.grad).max()


def test_a_delora_update_is_no_longer_than_its_strength():
    model = tiny.model()
    adapter = sites.attach(model, "delora", {"lambda_initial": 0.3})
    for scale in (1e-3, 1.0, 1e3):
        tiny.scramble(adapter, scale=scale)
        for layer in adapter.layers:
            p = layer.arrays
            p.strength[...] = 0.3
            update = (layer.merged(layer.site.weight(), None)["weight"] - layer.site.weight()) / p.w
            assert np.linalg.norm(update) <= 0.3 * (1 + 1e-6)


def test_first_values_of_pissa_are_balanced_halves_of_the_svd():
    plain = tiny.model()
    for layer in sites.attach(tiny.model(), "pissa", {"r": 3, "alpha": 6.0}).layers:
        U, S, Vt = np.linalg.svd(plain.sites[layer.site.name].weight())
        assert np.allclose(2.0 * layer.arrays.B @ layer.arrays.A, (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-13)
        assert np.allclose(np.square(layer.arrays.A).sum(axis=1), np.square(layer.arrays.B).sum(axis=0))


def test_first_values_of_olora_are_orthonormal_columns_and_their_rows():
    plain = tiny.model()
    for layer in sites.attach(tiny.model(), "olora", {"r": 3}).layers:
        Q, R = np.linalg.qr(plain.sites[layer.site.name].weight())
        assert np.allclose(layer.arrays.B @ layer.arrays.A, Q[:, :3] @ R[:3], atol=1e-13)
        assert np.allclose(layer.arrays.B.T @ layer.arrays.B, np.eye(3), atol=1e-13)


def test_pissa_loses_less_to_a_quantizer_than_the_weight_does():
    for layer in sites.attach(tiny.model(quantizer=quantizer()), "pissa", {"r": 8}).layers:
        name, p = layer.site.name, layer.arrays
        weight, plain = tiny.model().sites[name].weight(), tiny.model(quantizer=quantizer()).sites[name].weight()
        ours = layer.site.weight() + layer.part.cfg.scale(layer.site) * p.B @ p.A
        assert np.linalg.norm(weight - ours) < np.linalg.norm(weight - plain)


def test_a_pissa_file_of_peft_is_of_dense_weights_and_of_the_whole_svd(tmp_path):
    model = tiny.model()
    sites.attach(model, "lora")
    adapters.save(tmp_path, model)
    config = json.loads((tmp_path / adapters.CONFIG).read_text("utf-8"))
    (tmp_path / adapters.CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa"}), "utf-8")
    adapters.load(tiny.model(), tmp_path)
    with pytest.raises(RefpeftError, match="fitted to weights that were dense, and these are nf4"):
        adapters.load(tiny.model(quantizer=quantizer()), tmp_path)
    (tmp_path / adapters.CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}), "utf-8")
    with pytest.raises(RefpeftError, match="init_lora_weights = 'pissa_niter_4' changes frozen weights too"):
        adapters.load(tiny.model(), tmp_path)
