"""The faster pairs of linear layers: what the plain ones say in float64, from weights of every kind."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refpeft.cpu  # noqa: F401  (registers them)
from refpeft import RefpeftError, fused, manager, ops, tensor
from refpeft.backend import bfloat16
from refpeft.quant import PANEL, Dense, make_quantizer
from refpeft.tensor import Tensor, parameter

EPS = float(np.finfo("f4").eps)
SIZES = st.integers(1, 40)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def results(op, inputs, needs, grad, dtype, **options):
    """The output of an op and the gradients of what is needed; an input may be None."""
    given = [
        x if x is None else (parameter if need else Tensor)(x.astype(dtype))
        for x, need in zip(inputs, needs, strict=True)
    ]
    out = op(*given, **options)
    if any(needs):
        out.backward(grad.astype(dtype))
    return [out.data, *(x.grad for x, need in zip(given, needs, strict=True) if need)]


def agree(op, inputs, needs, grad, limit=16, wide=None, **options):
    """That the pair for float32 says what the plain one says in float64, to `limit` roundings of the largest number."""
    with tensor.plain():
        expected = results(op, inputs, needs, grad, "f8", **(options | (wide or {})))
    got = results(op, inputs, needs, grad, "f4", **options)
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == np.float32 and ours.shape == exact.shape
        assert np.abs(ours - exact).max(initial=0) <= limit * EPS * max(1, np.abs(exact).max(initial=0))


def test_of_no_rows_there_is_a_gradient_of_none():
    """As of a share in which nothing is learned."""
    x, weight = parameter(np.zeros((0, 8), "f4")), normal((4, 8))
    fused.frozen_linear(x, weight=lambda: weight).backward()
    assert x.grad.shape == (0, 8)


def used(op, *inputs, **options) -> bool:
    """Whether another pair than the op's own was taken."""
    return op(*inputs, **options).node.op is not op


def strided(array: np.ndarray, kind: str) -> np.ndarray:
    """The same values in another layout."""
    if kind == "apart":
        return np.repeat(array, 2, axis=-2)[..., ::2, :]
    return np.asfortranarray(array) if kind == "turned" else array


LAYOUTS = st.sampled_from(["plain", "apart", "turned"])
NEEDS = st.tuples(*[st.booleans()] * 3)


@given(st.lists(SIZES, min_size=1, max_size=2), SIZES, SIZES, NEEDS, LAYOUTS, LAYOUTS, st.booleans())
def test_frozen_linear_is_the_plain_one(batch, width, out, needs, of_x, of_w, biased):
    x, w, b, g = normal((*batch, width)), normal((out, width), 1), normal(out, 2), normal((*batch, out), 3)
    x, w = strided(x, of_x), strided(w, of_w)
    wide = {"weight": lambda: w.astype("f8")}
    agree(fused.frozen_linear, (x, b)[: 1 + biased], needs[: 1 + biased], g, wide=wide, weight=lambda: w)


@given(st.lists(SIZES, min_size=1, max_size=2), SIZES, SIZES, NEEDS, LAYOUTS, st.booleans())
def test_linear_is_the_plain_one(batch, width, out, needs, layout, biased):
    x, w, b, g = normal((*batch, width)), normal((out, width), 1), normal(out, 2), normal((*batch, out), 3)
    agree(ops.linear, (strided(x, layout), w, b)[: 2 + biased], needs[: 2 + biased], g)


@given(st.lists(SIZES, min_size=1, max_size=2), SIZES, st.integers(1, 9), NEEDS, LAYOUTS, st.sampled_from([0.3, -2.0]))
def test_addmm_is_the_plain_one(batch, out, r, needs, layout, alpha):
    y, u, B, g = normal((*batch, out)), normal((*batch, r), 1), normal((out, r), 2), normal((*batch, out), 3)
    agree(fused.addmm, (strided(y, layout), u, B), needs, g, alpha=alpha)


def test_addmm_takes_more_rows_than_a_block():
    y, u, B, g = normal((400, 700)), normal((400, 3), 1), normal((700, 3), 2), normal((400, 700), 3)
    agree(fused.addmm, (y, u, B), (True, True, True), g, limit=64, alpha=2.0)


def test_the_faster_pairs_are_taken():
    x, w, u = parameter(normal((3, 4))), normal((5, 4), 1), normal((3, 2), 2)
    assert used(fused.frozen_linear, x, weight=lambda: w) and used(ops.linear, x, w)
    assert used(fused.addmm, parameter(normal((3, 5))), u, normal((5, 2)), alpha=1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fused.frozen_linear(Tensor(normal((2, 3))), weight=lambda: normal((4, 2))),
        lambda: fused.frozen_linear(Tensor(normal((2, 3))), normal(1), weight=lambda: normal((4, 3))),
        lambda: fused.frozen_linear(Tensor(normal((2, 3))), weight=lambda: normal((4, 3)).astype("f8")),
        lambda: ops.linear(Tensor(normal((2, 3))), normal((4, 2))),
        lambda: ops.linear(Tensor(normal((2, 3))), normal((4, 3)), normal(1)),
        lambda: fused.addmm(Tensor(normal((2, 3))), normal((2, 2)), normal((4, 2)), alpha=1.0),
        lambda: fused.addmm(Tensor(normal((1, 3))), normal((2, 2)), normal((3, 2)), alpha=1.0),
    ],
)
def test_wrong_inputs_are_the_plain_pairs_to_refuse(call):
    with pytest.raises(RefpeftError) as ours:
        call()
    with tensor.plain(), pytest.raises(RefpeftError) as plain:
        call()
    assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("layout", ["plain", "turned"])
@pytest.mark.parametrize("shape", [(2060, 8), (4200, 3), (7, 5)])
def test_a_bfloat16_weight_comes_in_panels_that_make_up_the_whole(shape, layout):
    array = strided(normal(shape), layout)
    weight = Dense(array.astype(bfloat16), np.dtype("f4"))
    whole = array.astype(bfloat16).astype("f4")
    panels = list(weight.panels())
    assert np.array_equal(np.concatenate([dense for _, dense in panels]), whole) and np.array_equal(weight(), whole)
    assert [part.start for part, _ in panels[1:]] == [part.stop for part, _ in panels[:-1]]
    assert max(len(dense) for _, dense in panels) <= PANEL and {len(d) % 64 for _, d in panels[:-1]} <= {0}
    x, g = normal((6, shape[1]), 1), normal((6, shape[0]), 2)
    wide = {"weight": lambda: whole.astype("f8")}
    agree(fused.frozen_linear, (x,), (True,), g, limit=64, wide=wide, weight=weight)


def test_a_weight_in_float32_is_not_copied():
    array = normal((3000, 4))
    (part, dense), *others = Dense(array, array.dtype).panels()
    assert not others and (part.start, part.stop) == (0, 3000) and np.shares_memory(dense, array)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 4096))
def test_panels_are_as_few_as_can_be(count, rows):
    array = np.zeros((count, 1), "f4")
    parts = [part for part, _ in Dense(array, array.dtype).panels(rows)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert len(parts) == -(-count // rows)


# ---- quantized weights -----------------------------------------------------------------------------------------------

LISTED = manager.catalogue()
QUANTIZERS = [name for name, listing in LISTED.items() if listing.kind == "quantizer"]
BY_ROWS = [name for name in QUANTIZERS if make_quantizer(name).by_rows]
OPTIONS = {
    "affine": [{"bits": bits, "per": per} for bits in (4, 8) for per in ("group", "row", "tensor")],
    "gguf": [{"type": kind} for kind in ("Q4_0", "Q4_1", "Q8_0")],
    "nf4": [{"block": 64}, {"block": 4096}],
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("name", "options"), [(name, each) for name in BY_ROWS for each in OPTIONS.get(name, [{}])])
@pytest.mark.parametrize("shape", [(1030, 96), (200, 37), (65, 1)])
def test_panels_of_a_quantized_weight_have_the_bits_of_the_whole(name, options, double, shape):
    try:
        weight = make_quantizer(name, options, double)(normal(shape), np.dtype("f4"))
    except RefpeftError as error:
        pytest.skip(str(error))
    for step in (64, 1024):
        panels = list(weight.panels(step))
        assert len(panels) == -(-shape[0] // step) and max(len(dense) for _, dense in panels) <= step
        assert np.array_equal(np.concatenate([dense for _, dense in panels]), weight())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_product_with_a_quantized_weight_is_that_with_its_values(name):
    weight = make_quantizer(name)(normal((2100, 64)), np.dtype("f4"))
    dense = weight().astype("f8")
    x, g = normal((2, 3, 64), 1), normal((2, 3, 2100), 2)
    agree(fused.frozen_linear, (x,), (True,), g, limit=64, wide={"weight": lambda: dense}, weight=weight)


def test_of_a_quantized_weight_no_more_than_a_panel_is_dense():
    weight = make_quantizer("nf4", None, double_quant=True)(normal((16 * PANEL, 64)), np.dtype("f4"))
    x, whole = parameter(normal((4, 64), 1)), 16 * PANEL * 64 * 4
    tracemalloc.start()
    try:
        fused.frozen_linear(x, weight=weight).backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < whole / 3
