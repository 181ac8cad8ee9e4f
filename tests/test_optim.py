"""The flat buffer and AdamW. The 20-step traces against torch are golden vectors."""

import numpy as np
import pytest

from refpeft import ops
from refpeft.errors import RefpeftError
from refpeft.optim import AdamW, Flat
from refpeft.tensor import parameter


def two_params(rng):
    return {"a": parameter(rng.standard_normal((2, 3))), "b": parameter(rng.standard_normal(4))}


def test_parameters_become_views_of_one_buffer_and_keep_their_values():
    params = two_params(np.random.default_rng(0))
    before = {name: t.data.copy() for name, t in params.items()}
    flat = Flat(params.items())
    assert flat.values.size == 10
    for name, tensor in params.items():
        assert np.array_equal(tensor.data, before[name])
        assert np.shares_memory(tensor.data, flat.values)
        assert np.shares_memory(tensor.grad, flat.grads)


def test_backward_adds_into_the_flat_gradient_until_the_optimizer_steps():
    params = two_params(np.random.default_rng(0))
    flat = Flat(params.items())
    for _ in range(2):
        ops.sum(params["a"] * 2.0).backward()
    assert np.array_equal(flat.grads, [4.0] * 6 + [0.0] * 4)
    AdamW(flat).step(0.1)
    assert not flat.grads.any()


def test_a_parameter_without_gradient_does_not_move_without_weight_decay():
    params = two_params(np.random.default_rng(0))
    flat = Flat(params.items())
    before = params["b"].data.copy()
    ops.sum(params["a"]).backward()
    AdamW(flat).step(0.1)
    assert np.array_equal(params["b"].data, before)


def test_the_first_step_has_the_length_of_the_learning_rate():
    params = {"a": parameter(np.array([1.0, -2.0]))}
    flat = Flat(params.items())
    ops.sum(params["a"] * np.array([3.0, -5.0])).backward()
    AdamW(flat, eps=0.0).step(0.125)
    assert params["a"].data == pytest.approx([0.875, -1.875])


def test_weight_decay_is_decoupled_from_the_gradient():
    params = {"a": parameter(np.array([2.0]))}
    AdamW(Flat(params.items()), weight_decay=0.5).step(0.1)
    assert params["a"].data == pytest.approx([2.0 * 0.95])


def test_clipping_scales_to_the_limit_and_reports_the_norm_before():
    params = {"a": parameter(np.array([0.0, 0.0]))}
    flat = Flat(params.items())
    ops.sum(params["a"] * np.array([3.0, 4.0])).backward()
    assert float(flat.clip(1.0)) == pytest.approx(5.0)
    assert flat.grads == pytest.approx([0.6, 0.8], rel=1e-6)
    assert float(flat.clip(0.0)) == pytest.approx(1.0, rel=1e-6)
    assert flat.grads == pytest.approx([0.6, 0.8], rel=1e-6)


def test_nothing_to_train_is_an_error():
    with pytest.raises(RefpeftError, match="nothing is trained"):
        Flat([])
