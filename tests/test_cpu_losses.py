"""The faster pairs of the losses: what the plain ones say in float64, whatever the chunks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_linear import agree, normal, results, used

from refpeft import RefpeftError, fused, tensor
from refpeft.backend import bfloat16
from refpeft.cpu import losses
from refpeft.quant import Dense
from refpeft.tensor import Tensor, parameter

ONE = np.ones(())


@st.composite
def cases(draw):
    """(rows, words, the options of a loss)."""
    n, words = draw(st.integers(0, 30)), draw(st.integers(1, 50))
    targets = np.array(draw(st.lists(st.integers(-2, words - 1), min_size=n, max_size=n)), int)
    weights = draw(st.sampled_from([None, abs(normal(n, 5))]))
    return n, words, {"targets": targets, "weights": weights, "denominator": draw(st.sampled_from([1, 7.5]))}


@given(cases(), st.booleans())
def test_cross_entropy_is_the_plain_one(case, need):
    n, words, options = case
    agree(fused.cross_entropy, (normal((n, words)) * 5,), (need,), ONE, **options)


@given(cases(), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(1, 60), st.integers(1, 2000))
def test_linear_cross_entropy_is_the_plain_one(case, width, need, biased, chunk, at_once):
    n, words, options = case
    w, bias = normal((words, width), 1), normal(words, 2) if biased else None
    wide = {"weight": lambda: w.astype("f8"), "bias": bias if bias is None else bias.astype("f8")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "WORDS", chunk)
        patch.setattr(fused, "LOGITS_AT_ONCE", at_once)
        head = {"weight": lambda: w, "bias": bias}
        agree(fused.linear_cross_entropy, (normal((n, width)),), (need,), ONE, 64, wide=wide, **options, **head)


def test_rows_and_words_may_be_more_than_a_block():
    h, w, targets = normal((300, 8)), normal((9000, 8), 1), np.random.default_rng(2).integers(-9, 9000, 300)
    options = {"targets": targets, "denominator": 300}
    wide = {"weight": lambda: w.astype("f8")}
    agree(fused.linear_cross_entropy, (h,), (True,), ONE, wide=wide, weight=lambda: w, **options)
    agree(fused.cross_entropy, (h @ w.T,), (True,), ONE, **options)


def test_the_faster_pairs_are_taken_and_keep_what_the_plain_ones_keep():
    h, w, targets = normal((11, 4)), normal((90, 4), 1), np.zeros(11, int)
    options = {"targets": targets, "denominator": 1}
    for op, x, head in (
        (fused.cross_entropy, normal((11, 90)), {}),
        (fused.linear_cross_entropy, h, {"weight": lambda: w}),
    ):
        assert used(op, parameter(x), **options, **head)
        kept = op(parameter(x), **options, **head).node.saved
        assert sum(a.nbytes for a in kept if isinstance(a, np.ndarray) and a.ndim) == x.nbytes


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_losses_of_huge_logits_are_finite(scale):
    w = np.array([[1.0], [0.0], [-1.0]], "f4")
    options = {"targets": np.array([2, 0]), "denominator": 1}
    for op, x, head in (
        (fused.cross_entropy, np.float32([[1, 0, -1]] * 2), {}),
        (fused.linear_cross_entropy, np.float32([[1]] * 2), {"weight": lambda: w}),
    ):
        loss, dx = results(op, (x * np.float32(scale),), (True,), ONE, "f4", **options, **head)
        assert loss == np.float32(2 * scale)
        assert np.array_equal(dx[0], [1, 0, -1] if not head else [2]) and not dx[1].any()


def test_words_that_are_ruled_out_have_no_share():
    h, w, bias = normal((3, 4)), normal((9, 4), 1), np.float32([-np.inf] * 6 + [0] * 3)
    options = {"targets": np.array([6, 7, 8]), "denominator": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "WORDS", 2)
        got = results(fused.linear_cross_entropy, (h,), (True,), ONE, "f4", weight=lambda: w, bias=bias, **options)
    expected = results(
        fused.linear_cross_entropy, (h,), (True,), ONE, "f4", weight=lambda: w[6:], targets=np.arange(3), denominator=1
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_certain_prediction_costs_nothing():
    h, w = np.float32([[10, -3, 7]]), np.float32([[10, -3, 7], [0, 0, 0], [1, 0, 1]])
    loss = fused.linear_cross_entropy(Tensor(h), weight=lambda: w, targets=np.array([0]), denominator=1)
    assert loss.data == 0


def test_a_head_in_bfloat16_is_the_head_of_its_values():
    h, w = normal((7, 4)), normal((5000, 4), 1).astype(bfloat16)
    options = {"targets": np.array([3, -1, 4999, 0, 4096, 77, 5]), "denominator": 6}
    dense = w.astype("f4")
    narrow = results(fused.linear_cross_entropy, (h,), (True,), ONE, "f4", weight=Dense(w, np.dtype("f4")), **options)
    wide = results(fused.linear_cross_entropy, (h,), (True,), ONE, "f4", weight=lambda: dense, **options)
    for ours, theirs in zip(narrow, wide, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fused.cross_entropy(Tensor(normal((2, 3))), targets=np.zeros(1, int), denominator=1),
        lambda: fused.cross_entropy(Tensor(normal((2, 3))), targets=np.array([0, 3]), denominator=1),
        lambda: _of_head(targets=np.zeros(1, int)),
        lambda: _of_head(targets=np.array([0, 4])),
        lambda: _of_head(targets=np.zeros(2, int), bias=normal(1, 2)[[0, 0]]),
        lambda: _of_head(targets=np.zeros(2, int), weight=lambda: normal((4, 5))),
    ],
)
def test_wrong_inputs_are_the_plain_pairs_to_refuse(call):
    with pytest.raises(RefpeftError) as ours:
        call()
    with tensor.plain(), pytest.raises(RefpeftError) as plain:
        call()
    assert str(ours.value) == str(plain.value)


def _of_head(**options):
    return fused.linear_cross_entropy(
        Tensor(normal((2, 3))), **({"weight": lambda: normal((4, 3)), "denominator": 1} | options)
    )
