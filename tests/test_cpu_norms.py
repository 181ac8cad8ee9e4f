"""The faster norms: what the plain ones say in float64, whatever is trained, the shapes and the blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_cpu_linear import LAYOUTS, agree, normal, strided, used

from refpeft import RefpeftError, fused, tensor
from refpeft.cpu import blocks
from refpeft.tensor import Tensor, parameter

SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=9)
BLOCKS = st.sampled_from([1, 7, 40, blocks.BLOCK])
NEEDS = st.tuples(*[st.booleans()] * 3)
SCALES = st.sampled_from([0.01, 1, 30])


def agree_in_blocks(block, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        agree(*args, **options)


@given(SHAPES, LAYOUTS, SCALES, NEEDS, BLOCKS)
def test_rms_norm_is_the_plain_one(shape, layout, scale, needs, block):
    x, w, g = strided(normal(shape) * np.float32(scale), layout), normal(shape[-1], 1), normal(shape, 2)
    agree_in_blocks(block, fused.rms_norm, (x, w), needs[:2], g, eps=1e-2)


@given(SHAPES, LAYOUTS, SCALES, NEEDS, BLOCKS)
def test_layer_norm_is_the_plain_one(shape, layout, scale, needs, block):
    x, w, b, g = (
        strided(normal(shape) * np.float32(scale), layout),
        *map(normal, (shape[-1],) * 2, (1, 2)),
        normal(shape, 3),
    )
    agree_in_blocks(block, fused.layer_norm, (x, w, b), needs, g, eps=1e-2)


@pytest.mark.parametrize("shape", [(2, 100, 768), (1, 90, 9, 64), (700, 384), (64,), (3, 70_000)])
def test_norms_of_the_shapes_of_models_are_as_close(shape):
    x, w, b, g = normal(shape), *map(normal, (shape[-1:],) * 2, (1, 2)), normal(shape, 3)
    agree(fused.rms_norm, (x, w), (True, True), g, 64, eps=1e-6)
    agree(fused.layer_norm, (x, w, b), (True, True, True), g, 64, eps=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_a_norm_of_nothing_is_nothing(shape):
    x, w, g = normal(shape), normal(shape[-1:], 1), normal(shape)
    agree(fused.rms_norm, (x, w), (True, True), g, eps=1e-6)
    agree(fused.layer_norm, (x, w, w), (True, True, True), g, eps=1e-6)


def test_a_row_far_from_zero_loses_no_more_than_in_the_plain_norm():
    x = normal((50, 256)) + 1000
    ones, zeros = np.ones(256), np.zeros(256)
    with tensor.plain():
        exact = fused.layer_norm(Tensor(x.astype("f8")), ones, zeros, eps=1e-5).data
        plain = fused.layer_norm(Tensor(x), ones, zeros, eps=1e-5).data
    found = fused.layer_norm(Tensor(x), ones, zeros, eps=1e-5).data
    assert np.abs(found - exact).max() <= 2 * np.abs(plain - exact).max()


def test_a_norm_of_zeros_is_finite():
    x = parameter(np.zeros((2, 3), "f4"))
    for out in (fused.rms_norm(x, np.ones(3), eps=1e-6), fused.layer_norm(x, np.ones(3), np.zeros(3), eps=1e-6)):
        assert np.array_equal(out.data, np.zeros((2, 3)))
        out.backward()
    assert np.isfinite(x.grad).all()


# ---- what both promise -----------------------------------------------------------------------------------------------

X, W, B = normal((20, 30)), normal(30, 1), normal(30, 2)
CALLS = {
    "rms_norm": (lambda *inputs: fused.rms_norm(*inputs, eps=1e-6), (X, W)),
    "layer_norm": (lambda *inputs: fused.layer_norm(*inputs, eps=1e-6), (X, W, B)),
}


def bytes_kept(node):
    return sum(a.nbytes for a in node.saved if isinstance(a, np.ndarray))


@pytest.mark.parametrize("op, arrays", CALLS.values(), ids=CALLS)
def test_it_keeps_no_more_than_the_plain_one_and_writes_into_nothing_of_others(op, arrays):
    before = [a.copy() for a in arrays]
    g, g_before = normal(X.shape, 3), normal(X.shape, 3)
    for needs in np.ndindex(*(2,) * len(arrays)):
        if not any(needs):
            continue
        given = [(parameter if need else Tensor)(a) for a, need in zip(arrays, needs, strict=True)]
        with tensor.plain():
            plain = op(*given)
        out = op(*given)
        result = out.data.copy()
        assert bytes_kept(out.node) <= bytes_kept(plain.node)
        out.backward(g)
        assert np.array_equal(g, g_before) and np.array_equal(out.data, result)
        assert all(map(np.array_equal, arrays, before))


def test_the_faster_pairs_are_taken():
    assert used(fused.rms_norm, parameter(X), W, eps=1e-6) and used(fused.layer_norm, parameter(X), W, B, eps=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: fused.rms_norm(x, normal(2), eps=1e-6),
        lambda x: fused.rms_norm(x, normal((1, 3)), eps=1e-6),
        lambda x: fused.rms_norm(x, None, eps=1e-6),
        lambda x: fused.rms_norm(x, 2.0, eps=1e-6),
        lambda x: fused.layer_norm(x, normal(2), normal(3), eps=1e-6),
        lambda x: fused.layer_norm(x, normal(3), normal(1), eps=1e-6),
        lambda x: fused.layer_norm(x, normal(3), None, eps=1e-6),
    ],
)
def test_wrong_inputs_are_the_errors_that_they_are_of_the_plain_ones(wrong):
    x = parameter(normal((2, 3)))
    with tensor.plain(), pytest.raises(RefpeftError) as plain:
        wrong(x)
    with pytest.raises(RefpeftError) as found:
        wrong(x)
    assert str(found.value) == str(plain.value)
