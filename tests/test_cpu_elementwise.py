"""The faster activations, sums and products: what the plain ones say in float64, whatever the shapes and the blocks."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_cpu_linear import EPS, LAYOUTS, agree, normal, strided, used

from refpeft import RefpeftError, fused, ops, tensor
from refpeft.cpu import blocks, elementwise
from refpeft.rng import Stream
from refpeft.tensor import Tensor, parameter


def gelu_tanh(x):
    return fused.gelu(x, approximate=True)


def gelu(x):
    return fused.gelu(x, approximate=False)


ACTIVATIONS = [gelu_tanh, gelu, ops.silu, ops.relu]
SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=9)
BLOCKS = st.sampled_from([1, 7, 40, blocks.BLOCK])
SCALES = st.sampled_from([0.01, 1, 4, 30])


def agree_in_blocks(block, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        agree(*args, **options)


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(SHAPES, LAYOUTS, SCALES, st.booleans(), BLOCKS)
def test_an_activation_is_the_plain_one(activation, shape, layout, scale, need, block):
    x = strided(normal(shape) * np.float32(scale), layout)
    agree_in_blocks(block, activation, (x,), (need,), normal(shape, 1))


@given(SHAPES, LAYOUTS, LAYOUTS, SCALES, st.tuples(st.booleans(), st.booleans()), BLOCKS)
def test_silu_mul_is_the_plain_one(shape, of_gate, of_up, scale, needs, block):
    gate, up = strided(normal(shape) * np.float32(scale), of_gate), strided(normal(shape, 1), of_up)
    agree_in_blocks(block, fused.silu_mul, (gate, up), needs, normal(shape, 2))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, lambda x: fused.silu_mul(x, x)])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,), (70_000,), (2, 70_000)])
def test_shapes_at_the_edge_are_as_any(activation, shape):
    agree(activation, (normal(shape),), (True,), normal(shape, 1))


def at(activation, x):
    """The values and the derivatives."""
    leaf = parameter(x)
    y = activation(leaf)
    y.backward()
    return y.data.astype("f8"), leaf.grad.astype("f8")


GRID = np.concatenate([np.linspace(-14, 14, 200_001), np.geomspace(1e-30, 1, 2000), -np.geomspace(1e-30, 1, 2000)])


def exact_gelu(x):
    below = np.array([math.erfc(-a / math.sqrt(2)) / 2 for a in x])
    return x * below, below + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def test_the_exact_gelu_is_within_an_eps_and_in_proportion_where_it_is_small():
    x = GRID.astype("f4")
    (y, slope), (exact_y, exact_slope) = at(gelu, x), exact_gelu(x.astype("f8"))
    assert np.abs(y - exact_y).max() <= EPS * 14 / 2  # half a place at 14
    assert (np.abs(y - exact_y) <= 1.5 * EPS * np.abs(x)).all()
    assert np.abs(slope - exact_slope).max() <= 2 * EPS
    tail = (x > -5.5) & (x < 0)
    assert (np.abs(y - exact_y)[tail] <= 1e-3 * np.abs(exact_y[tail])).all()
    assert np.array_equal(y[x < -14], np.zeros_like(y[x < -14]))


def test_the_exact_gelu_at_zero_is_exact():
    y, slope = at(gelu, np.array([0, -0.0, 1e-40, -1e-40], "f4"))
    assert np.array_equal(slope, [0.5] * 4)
    assert np.array_equal(y, np.array([0, 0, 0.5e-40, -0.5e-40], "f4"))


def test_the_polynomial_of_mills_ratio_is_as_close_as_it_says():
    a = np.linspace(0, 12, 20_001)
    density = np.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    ratio = np.array([math.erfc(x / math.sqrt(2)) / 2 for x in a]) / density
    found = np.polyval(elementwise._MILLS, a / (a + elementwise._SHIFT))
    assert np.abs((found - ratio) * density).max() <= 1.5e-8


@pytest.mark.parametrize("activation", [gelu_tanh, ops.silu])
def test_sigmoids_keep_their_proportion_far_below_zero(activation):
    x = np.linspace(-8, -0.1, 10_001)
    with tensor.plain():
        _, exact_slope = at(activation, x)
    # x e**z / (1 + e**z), as 1 + tanh loses the small ones in float64 too
    z = x if activation is ops.silu else 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    exact = x * np.exp(z) / (1 + np.exp(z))
    y, slope = at(activation, x.astype("f4"))
    assert (np.abs(y - exact) <= 1e-5 * np.abs(exact)).all()
    assert np.abs(slope - exact_slope).max() <= 2 * EPS


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_no_number_stays_so_and_huge_ones_are_as_in_the_plain_pair(activation):
    x = np.array([np.nan, 1e18, -1e18, 1e20, -1e20, 1e38, -1e38], "f4")
    with np.errstate(all="ignore"):
        y, _ = at(activation, x)
        with tensor.plain():
            plain, _ = at(activation, x)
    assert np.isnan(y[0]) and np.array_equal(y[1:], plain[1:])


def test_no_number_of_a_model_makes_a_warning():
    x = np.linspace(-1000, 1000, 4001, dtype="f4")
    for activation in (*ACTIVATIONS, lambda x: fused.silu_mul(x, x)):  # warnings are errors here
        at(activation, x)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@given(SHAPES, LAYOUTS, st.booleans(), BLOCKS, st.floats(0, 0.95), st.integers(0, 9))
def test_dropout_is_the_plain_one_to_the_bit(shape, layout, need, block, rate, skipped):
    x, g, found = strided(normal(shape), layout), normal(shape, 1), []
    for plain in (contextlib.nullcontext, tensor.plain):
        leaf = (parameter if need else Tensor)(x)
        with plain(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "BLOCK", block)
            out = fused.dropout(leaf, rate=rate, stream=Stream(4, "d").skip(skipped))
            if need:
                out.backward(g)
        found.append((out.data, leaf.grad))
    (ours, dx), (exact, plain_dx) = found
    assert np.array_equal(ours, exact) and (not need or np.array_equal(dx, plain_dx))


# ---- sums and products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [ops.add, ops.mul])
@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4), st.tuples(st.booleans(), st.booleans()))
def test_sums_and_products_are_the_plain_ones_however_they_broadcast(op, shapes, needs):
    a, b = map(normal, shapes.input_shapes)
    agree(op, (a, b), needs, normal(shapes.result_shape, 2))


@pytest.mark.parametrize("op", [ops.add, ops.mul])
@pytest.mark.parametrize("shape", [(300,), (1, 300), (40, 300), (2, 40, 300), (2, 1, 300), (2, 40, 1), (1,), ()])
def test_biases_gains_and_positions_are_summed_as_the_plain_ones_are(op, shape):
    x, other, g = normal((2, 40, 300)), normal(shape, 1), normal((2, 40, 300), 2)
    agree(op, (x, other), (True, True), g)
    agree(op, (other, x), (True, True), g)
    agree(op, (strided(x, "turned"), other), (False, True), strided(g, "turned"))


@pytest.mark.parametrize("number", [2, 0.5, np.float64(3)])
def test_numbers_stand_on_either_side(number):
    x = parameter(normal((3, 4)))
    assert np.array_equal((x * number).data, x.data * np.float32(number))
    assert np.array_equal((number + x).data, x.data + np.float32(number))
    (number * x + number).backward()
    assert np.array_equal(x.grad, np.full((3, 4), number, "f4"))


# ---- what all promise ------------------------------------------------------------------------------------------------

X, Y, GAIN = normal((20, 30)), normal((20, 30), 1), normal(30, 2)
CALLS = {
    "gelu by tanh": (gelu_tanh, (X,)),
    "gelu": (gelu, (X,)),
    "silu": (ops.silu, (X,)),
    "relu": (ops.relu, (X,)),
    "silu_mul": (fused.silu_mul, (X, Y)),
    "dropout": (lambda x: fused.dropout(x, rate=0.1, stream=Stream(0)), (X,)),
    "add": (ops.add, (X, Y)),
    "add a bias": (ops.add, (X, GAIN)),
    "mul": (ops.mul, (X, Y)),
    "mul by a gain": (ops.mul, (X, GAIN)),
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
        assert bytes_kept(out.node) <= bytes_kept(plain.node)
        out.backward(g)
        assert np.array_equal(g, g_before)
        assert all(map(np.array_equal, arrays, before))


def test_the_faster_pairs_are_taken():
    x = parameter(X)
    assert used(ops.add, x, Y) and used(ops.mul, x, Y) and used(fused.silu_mul, x, Y)
    assert used(ops.silu, x) and used(ops.relu, x) and used(fused.dropout, x, rate=0.1, stream=Stream(0))
    assert used(fused.gelu, x, approximate=True) and used(fused.gelu, x, approximate=False)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + Tensor(normal((4,))),
        lambda x: x * Tensor(normal((4,))),
        lambda x: ops.add(x, None),
        lambda x: ops.add(None, x),
        lambda x: ops.mul(x, None),
        lambda x: fused.silu_mul(x, Tensor(normal((3,)))),
        lambda x: fused.silu_mul(x, None),
        lambda x: fused.silu_mul(None, x),
        lambda x: fused.silu_mul(2.0, x),
        lambda x: fused.dropout(x, rate=1, stream=Stream(0)),
    ],
)
def test_wrong_inputs_are_the_errors_that_they_are_of_the_plain_ones(wrong):
    x = parameter(normal((2, 3)))
    with tensor.plain(), pytest.raises(RefpeftError) as plain:
        wrong(x)
    with pytest.raises(RefpeftError) as found:
        wrong(x)
    assert str(found.value) == str(plain.value)
