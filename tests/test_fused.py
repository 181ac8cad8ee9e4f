"""What the fused pairs promise beyond values and gradients (test_ops has those): what they keep, and their chunks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refpeft import fused, ops
from refpeft.conformance.gradcheck import gradcheck
from refpeft.rng import Stream
from refpeft.tensor import Tensor, parameter

EPS = float(np.finfo("f8").eps)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def keeps(tensor: Tensor, *arrays) -> bool:
    """Whether the node holds exactly these arrays."""
    return {id(a) for a in tensor.node.saved if isinstance(a, np.ndarray)} == {id(a) for a in arrays}


def close(got, expected, limit=64):
    assert np.abs(got - expected).max() <= limit * EPS * np.abs(expected).max()


# ---- linear ----------------------------------------------------------------------------------------------------------


def test_frozen_linear_keeps_the_callable_and_asks_it_again():
    w, asked = normal((5, 4)), []

    def weight():
        asked.append(1)
        return w

    leaf, bias = parameter(normal((3, 4))), parameter(normal(5))
    out = fused.frozen_linear(leaf, bias, weight=weight)
    assert keeps(out) and len(asked) == 1
    out.backward()
    assert len(asked) == 2
    fused.frozen_linear(Tensor(leaf.data), bias, weight=weight).backward()
    assert len(asked) == 3  # the bias alone needs no weight


def test_frozen_linear_is_linear_without_the_gradient_of_the_weight():
    x, w, b, g = normal((2, 3, 4)), normal((5, 4), 1), normal(5, 2), normal((2, 3, 5), 3)
    ours, plain = parameter(x), parameter(x)
    a, c = fused.frozen_linear(ours, b, weight=lambda: w), ops.linear(plain, w, b)
    a.backward(g), c.backward(g)
    assert np.array_equal(a.data, c.data) and np.array_equal(ours.grad, plain.grad)


def test_addmm_keeps_the_two_small_factors_at_most():
    y, u, B = normal((3, 5)), normal((3, 2), 1), normal((5, 2), 2)
    assert keeps(fused.addmm(parameter(y), Tensor(u), Tensor(B), alpha=2))
    assert keeps(fused.addmm(Tensor(y), parameter(u), Tensor(B), alpha=2), B)
    assert keeps(fused.addmm(Tensor(y), Tensor(u), parameter(B), alpha=2), u)


def test_hadamard_linear_keeps_the_factors_and_nothing_dense():
    w, x, B, A = normal((5, 4)), normal((3, 4), 1), normal((5, 2), 2), normal((2, 4), 3)
    assert keeps(fused.hadamard_linear(parameter(x), parameter(B), parameter(A), weight=lambda: w), x, B, A)


def test_embedding_adds_up_the_rows_of_repeated_ids():
    table = parameter(normal((4, 2)))
    fused.embedding(table, ids=np.array([[1, 1], [3, 1]])).backward()
    assert np.array_equal(table.grad, [[0, 0], [3, 3], [0, 0], [1, 1]])


@given(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))
def test_layers_take_any_leading_axes(lead):
    x, y, w, A, b = normal((*lead, 4)), normal((*lead, 5)), normal((5, 4)), normal((5, 4), 1), normal(5)
    assert gradcheck(lambda x, b: fused.frozen_linear(x, b, weight=lambda: w), x, b) < 1e-7
    assert gradcheck(lambda x, A, b: ops.linear(x, A, b), x, A, b) < 1e-7
    assert gradcheck(lambda y, u, B: fused.addmm(y, u, B, alpha=0.5), y, x, A) < 1e-7
    assert gradcheck(lambda y, b: fused.rms_norm(y, b, eps=1e-5), y, b) < 1e-7
    assert gradcheck(lambda y, w, b: fused.layer_norm(y, w, b, eps=1e-5), y, b + 1, b) < 1e-7


# ---- norms and activations -------------------------------------------------------------------------------------------


def test_norms_keep_one_array_of_the_size_of_their_input_at_most():
    x, w, b = normal((6, 8)), normal(8, 1), normal(8, 2)

    def big(tensor):
        return sum(a.size for a in tensor.node.saved if isinstance(a, np.ndarray)) // x.size

    def rms(*inputs):
        return fused.rms_norm(*inputs, eps=1e-5)

    def layer(*inputs):
        return fused.layer_norm(*inputs, eps=1e-5)

    assert big(rms(parameter(x), parameter(w))) == big(rms(Tensor(x), parameter(w))) == 1
    assert big(layer(parameter(x), parameter(w), parameter(b))) == big(layer(Tensor(x), parameter(w), b)) == 1
    assert big(layer(Tensor(x), w, parameter(b))) == 0


def test_a_norm_of_zeros_is_finite():
    for out in (
        fused.rms_norm(parameter(np.zeros((2, 3))), np.ones(3), eps=1e-6),
        fused.layer_norm(parameter(np.zeros((2, 3))), np.ones(3), np.zeros(3), eps=1e-6),
    ):
        assert np.array_equal(out.data, np.zeros((2, 3)))
        out.backward()


def test_silu_mul_keeps_the_gate_alone_where_only_up_is_trained():
    gate, up = normal((3, 4)), normal((3, 4), 1)
    assert keeps(fused.silu_mul(parameter(gate), parameter(up)), gate, up)
    assert keeps(fused.silu_mul(Tensor(gate), parameter(up)), gate)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_activations_neither_overflow_nor_warn_far_out(dtype):
    far = parameter(np.array([-1e4, -40, 0, 40, 1e4], dtype))
    for activation in (ops.silu, lambda x: fused.gelu(x, approximate=True), lambda x: fused.gelu(x, approximate=False)):
        out = activation(far)
        assert np.array_equal(out.data[[0, 2, 4]], np.array([0, 0, 1e4], dtype))
        out.backward()
    assert np.allclose(far.grad, [0, 0, 1.5, 3, 3], rtol=0, atol=1e-15)  # the slope of SiLU at -40 is -1.7e-16


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_keeps_a_byte_an_element():
    x = normal((50, 4))
    out = fused.dropout(parameter(x), rate=0.5, stream=Stream(0))
    assert sum(a.nbytes for a in out.node.saved if isinstance(a, np.ndarray)) == x.size


@given(st.floats(0, 0.95), st.integers(0, 100))
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate, seed):
    n = 20_000
    leaf = parameter(np.ones(n))
    out = fused.dropout(leaf, rate=rate, stream=Stream(seed, "dropout"))
    assert set(np.unique(out.data)) <= {0.0, 1 / (1 - rate)}
    spread = 5 * math.sqrt(rate * (1 - rate) / n)
    assert abs((out.data == 0).mean() - rate) <= spread
    out.backward()
    assert np.array_equal(leaf.grad, out.data)


def test_dropout_of_nothing_is_nothing():
    x = normal((3, 4))
    assert np.array_equal(fused.dropout(Tensor(x), rate=0.0, stream=Stream(0)).data, x)


def test_dropout_draws_anew_with_each_call_and_is_the_same_in_every_precision():
    stream, x = Stream(1, "a"), np.ones(100)
    first, second = (fused.dropout(Tensor(x), rate=0.5, stream=stream).data for _ in range(2))
    assert not np.array_equal(first, second)
    single = fused.dropout(Tensor(x.astype("f4")), rate=0.5, stream=Stream(1, "a")).data
    assert np.array_equal(single, first)


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_the_fused_loss_is_the_plain_one_for_every_size_of_chunk(monkeypatch):
    h, w, targets = normal((11, 4)), normal((9, 4), 1), np.array([3, -100, 0, 8, 1, -100, -100, 2, 2, 5, 7])
    plain = parameter(h)
    expected = fused.cross_entropy(ops.linear(plain, w), targets=targets, denominator=8)
    (expected * 2).backward()
    for rows in (1, 2, 3, 11, 1000):
        monkeypatch.setattr(fused, "LOGITS_AT_ONCE", rows * 9)
        leaf = parameter(h)
        loss = fused.linear_cross_entropy(leaf, weight=lambda: w, targets=targets, denominator=8)
        (loss * 2).backward()
        close(loss.data, expected.data)
        close(leaf.grad, plain.grad)


def test_the_fused_loss_keeps_as_much_as_its_input():
    h, w = normal((11, 4)), normal((90, 4), 1)
    loss = fused.linear_cross_entropy(parameter(h), weight=lambda: w, targets=np.zeros(11, int), denominator=1)
    assert sum(a.nbytes for a in loss.node.saved if isinstance(a, np.ndarray)) == h.nbytes


def test_rows_without_a_target_get_no_gradient():
    leaf = parameter(normal((3, 4)))
    fused.cross_entropy(leaf, targets=np.array([1, -100, 2]), denominator=1).backward()
    assert not leaf.grad[1].any() and leaf.grad[0].any()


def test_no_supervised_row_is_a_loss_of_zero():
    for loss in (
        fused.cross_entropy(parameter(normal((2, 4))), targets=np.array([-100, -100]), denominator=1),
        fused.linear_cross_entropy(
            parameter(normal((0, 3))), weight=lambda: normal((4, 3)), targets=np.zeros(0, int), denominator=1
        ),
    ):
        assert loss.data == 0
        loss.backward()


def test_losses_of_huge_logits_are_finite():
    leaf = parameter(np.array([[1e4, 0.0, -1e4]]))
    loss = fused.cross_entropy(leaf, targets=np.array([2]), denominator=1)
    loss.backward()
    assert loss.data == 2e4
    assert np.array_equal(leaf.grad, [[1, 0, -1]])


def test_weights_and_bias_of_the_fused_loss_are_those_of_each_row_for_every_size_of_chunk(monkeypatch):
    h, w, bias, counts = normal((7, 4)), normal((9, 4), 1), normal(9, 2), abs(normal(7, 3))
    targets = np.array([3, -100, 0, 8, 1, -100, 2])
    logits = h @ w.T + bias
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -sum(counts[i] * log_p[i, target] for i, target in enumerate(targets) if target >= 0) / 8
    slope = np.exp(log_p) - np.eye(9)[np.maximum(targets, 0)]
    gradient = (slope * (counts * (targets >= 0))[:, None]) @ w / 8
    for rows in (1, 2, 3, 1000):
        monkeypatch.setattr(fused, "LOGITS_AT_ONCE", rows * 9)
        leaf = parameter(h)
        same = {"targets": targets, "weights": counts, "denominator": 8}
        loss = fused.linear_cross_entropy(leaf, weight=lambda: w, bias=bias, **same)
        loss.backward()
        close(loss.data, expected)
        close(leaf.grad, gradient)
        close(fused.cross_entropy(parameter(logits), **same).data, expected)
