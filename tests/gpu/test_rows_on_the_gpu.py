"""Activations, arithmetic, sums and rows on the GPU, beside the plain pairs in float64 on the host."""

import itertools

import cupy
import numpy as np
import pytest

from refpeft import fused, ops, tensor
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import elementwise, gather, maps
from refpeft.tape import ADDED
from refpeft.tensor import Op, Tensor, parameter

FLOAT32 = np.dtype("f4")
EPS = {bfloat16: 2.0**-8, FLOAT32: 2.0**-23}
"""Half the distance from 1 to the next number in bfloat16: what one rounding is off at most; and float32's eps."""


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Random numbers that are exact in bfloat16."""
    return np.random.default_rng(seed).standard_normal(shape).astype(bfloat16).astype("f8")


def on_device(array: np.ndarray, dtype: np.dtype = bfloat16) -> cupy.ndarray:
    return cupy.asarray(array.astype("f4")).astype(dtype)


def close(got: cupy.ndarray, expected: np.ndarray, dtype: np.dtype, times: float) -> None:
    """Of this dtype, and within `times` its eps of the largest expected value."""
    assert isinstance(got, cupy.ndarray) and got.dtype == dtype and got.shape == expected.shape
    limit = times * EPS[np.dtype(dtype)] * np.abs(expected).max(initial=1e-30)
    assert np.abs(to_host(got).astype("f8") - expected).max(initial=0) <= limit


def agree(
    op: Op,
    arrays: list[np.ndarray],
    dtypes: list[np.dtype],
    needs: tuple[bool, ...],
    times: float = 1.01,
    view=lambda array: array,
    **options,
) -> None:
    """The override's output and gradients are the plain pair's in float64; bfloat16 ones are rounded once.

    float32 ones may be 64 `times` their eps off. `view` makes the first input and g of contiguous arrays.
    """

    def limit(dtype):
        return times if dtype == bfloat16 else 64 * times

    arrays = [array.astype(bfloat16).astype("f8") for array in arrays]
    here = [parameter(a) if need else Tensor(a) for a, need in zip(arrays, needs, strict=True)]
    there = []
    for i, (array, dtype, need) in enumerate(zip(arrays, dtypes, needs, strict=True)):
        data = on_device(array, dtype) if i else like(view, array, dtype)
        there.append(parameter(data) if need else Tensor(data))
    with tensor.plain():
        expected = op(*here, **{name: hosts(value) for name, value in options.items()})
    got = op(*there, **options)
    dtype = bfloat16 if bfloat16 in dtypes else FLOAT32
    close(got.data, expected.data, dtype, limit(dtype))
    if not any(needs):
        return
    assert got.node.op is op.overrides[cupy.ndarray, dtype]
    g = drawn(*expected.shape, seed=9)
    expected.backward(g)
    got.backward(like(view, g, dtype))
    for one, other, wanted in zip(here, there, dtypes, strict=True):
        if one.node is not None:
            close(other.grad, one.grad, wanted, limit(wanted))


def hosts(value):
    """An option or a constant as the host takes it."""
    return to_host(value) if isinstance(value, cupy.ndarray) else value


def like(view, array: np.ndarray, dtype: np.dtype) -> cupy.ndarray:
    """The values of `array` in the layout that `view` gives."""
    return view(on_device(array, dtype))


def turned(array: cupy.ndarray) -> cupy.ndarray:
    """The same values with the last two axes the other way round in memory."""
    return cupy.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2) if array.ndim > 1 else array


def inside(array: cupy.ndarray) -> cupy.ndarray:
    """The same values among the columns of a wider array."""
    if not array.ndim:
        return array
    wider = cupy.zeros((*array.shape[:-1], array.shape[-1] + 24), array.dtype)
    wider[..., 8 : 8 + array.shape[-1]] = array
    return wider[..., 8 : 8 + array.shape[-1]]


def shifted(array: cupy.ndarray) -> cupy.ndarray:
    """The same values at an address that is no multiple of 16."""
    room = cupy.zeros(array.size + 1, array.dtype)
    room[1:] = array.reshape(-1)
    return room[1:].reshape(array.shape)


VIEWS = [lambda array: array, turned, inside, shifted]
some = pytest.mark.parametrize("view", VIEWS, ids=["contiguous", "turned", "inside", "shifted"])
both = pytest.mark.parametrize("dtype", [bfloat16, FLOAT32], ids=str)


def all_needs(count: int) -> list[tuple[bool, ...]]:
    return list(itertools.product([True, False], repeat=count))


def bits(array: cupy.ndarray) -> bytes:
    return to_host(array).tobytes()


# ---- activations -----------------------------------------------------------------------------------------------------

ACTIVATIONS = [(op, {}) for op in (ops.relu, ops.tanh, ops.sigmoid, ops.silu)]
ACTIVATIONS += [(fused.gelu, {"approximate": approximate}) for approximate in (False, True)]


@some
@both
@pytest.mark.parametrize("op, options", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (3, 37), (5,), (0, 4)], ids=str)
def test_activations(op: Op, options: dict, shape: tuple[int, ...], dtype: np.dtype, view):
    agree(op, [4 * drawn(*shape)], [dtype], (True,), view=view, **options)


@some
@both
@pytest.mark.parametrize("needs", all_needs(2), ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (3, 37), (2, 1, 8), (700,), (0, 4)], ids=str)
def test_silu_mul(shape: tuple[int, ...], needs: tuple[bool, ...], dtype: np.dtype, view):
    agree(fused.silu_mul, [4 * drawn(*shape), drawn(*shape, seed=1)], [dtype] * 2, needs, view=view)


def test_silu_mul_of_halves_of_rows_and_again():
    whole = on_device(drawn(2, 5, 48))
    pair = fused.silu_mul.overrides[cupy.ndarray, bfloat16]
    halves, copies = [whole[..., :24], whole[..., 24:]], [whole[..., :24].copy(), whole[..., 24:].copy()]
    y, saved = pair.forward((True, True), *halves)
    plain, of_copies = pair.forward((True, True), *copies)
    assert saved[0] is halves[0] and bits(y) == bits(plain) == bits(pair.again(*saved))
    g = on_device(drawn(2, 5, 24, seed=1))
    for one, other in zip(pair.vjp(g, *saved), pair.vjp(g, *of_copies), strict=True):
        assert bits(one) == bits(other)


@some
@both
@pytest.mark.parametrize("needs", [needs for needs in all_needs(2) if any(needs)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (3, 37), (0, 4)], ids=str)
def test_the_way_back_through_silu_mul_makes_its_output_again(shape, needs, dtype: np.dtype, view):
    pair = fused.silu_mul.overrides[cupy.ndarray, np.dtype(dtype)]
    gate, up = (view(on_device(4 * drawn(*shape, seed=seed), dtype)) for seed in range(2))
    g = on_device(drawn(*shape, seed=2), dtype)
    y, saved = pair.forward(needs, gate, up)
    *gradients, again = pair.vjp(g, *saved, again=True)
    assert bits(again) == bits(y)
    for one, other in zip(gradients, pair.vjp(g, *saved), strict=True):
        assert one is other is None or bits(one) == bits(other)


# ---- arithmetic ------------------------------------------------------------------------------------------------------

TWO = [ops.add, ops.sub, ops.mul, ops.div, ops.maximum]
SHAPES = [
    [(3, 5, 16), (3, 5, 16)],
    [(3, 5, 16), (16,)],
    [(2, 150, 24), (24,)],
    [(3, 5, 7), (5, 1)],
    [(1, 7), (3, 5, 1)],
    [(4, 3), ()],
    [(2, 3, 2, 5, 3), (3, 1, 5, 1)],
    [(0, 3), (3,)],
]


def away_from_zero(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 0.25, 0.5, x)


@pytest.mark.parametrize("op", TWO, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [[bfloat16, bfloat16], [bfloat16, FLOAT32], [FLOAT32, bfloat16]], ids=str)
@pytest.mark.parametrize("needs", all_needs(2), ids=str)
def test_arithmetic_of_two(op: Op, shapes: list, dtypes: list, needs: tuple[bool, ...]):
    a, b = drawn(*shapes[0]), away_from_zero(drawn(*shapes[1], seed=1))
    agree(op, [a, b], dtypes, needs)
    agree(op, [b, away_from_zero(a)], dtypes, needs)


@some
@pytest.mark.parametrize("op", TWO, ids=str)
def test_arithmetic_of_views(op: Op, view):
    for shapes in ([(3, 16, 24), (3, 16, 24)], [(3, 16, 24), (24,)], [(2, 7, 9), (9,)]):
        agree(
            op, [drawn(*shapes[0]), away_from_zero(drawn(*shapes[1], seed=1))], [bfloat16] * 2, (True, True), view=view
        )


@pytest.mark.parametrize("op", TWO, ids=str)
def test_arithmetic_with_numbers_and_constants(op: Op):
    x = drawn(3, 8)
    for constant in (2, 2.5, np.float32(2.5), np.full(8, 2.5), cupy.full(8, 2.5)):
        for order in (1, -1):
            there, here = parameter(on_device(x)), parameter(x)
            with tensor.plain():
                expected = op(*(here, hosts(constant))[::order])
            got = op(*(there, constant)[::order])
            close(got.data, expected.data, bfloat16, 1.01)
            assert got.node.op is op.overrides[cupy.ndarray, bfloat16]
            expected.backward(x)
            got.backward(on_device(x))
            close(there.grad, here.grad, bfloat16, 1.01)


@pytest.mark.parametrize("needs", all_needs(2), ids=str)
@pytest.mark.parametrize("shapes", [[(3, 5)] * 3, [(5,), (3, 1), (3, 5)], [(2, 3, 8), (8,), (3, 1)]], ids=str)
def test_where(shapes: list, needs: tuple[bool, ...]):
    a, b = drawn(*shapes[0]), drawn(*shapes[1], seed=1)
    condition = cupy.asarray(drawn(*shapes[2], seed=2) > 0)
    for dtypes in ([bfloat16, bfloat16], [bfloat16, FLOAT32]):
        agree(ops.where, [a, b], dtypes, needs, condition=condition)


ONE = [(op, {}) for op in (ops.neg, ops.exp, ops.log, ops.sqrt, ops.abs)]
ONE += [(ops.power, {"exponent": exponent}) for exponent in (2, 3, 0.5, -1)]


@some
@pytest.mark.parametrize("op, options", ONE, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (3, 37), (), (0, 4)], ids=str)
def test_functions_of_one(op: Op, options: dict, shape: tuple[int, ...], view):
    if shape == () and view is not VIEWS[0]:
        pytest.skip("a number has one layout")
    x = drawn(*shape) if op in (ops.neg, ops.exp, ops.abs) else away_from_zero(np.abs(drawn(*shape)))
    agree(op, [x], [bfloat16], (True,), view=view, **options)


def test_equal_maxima_share_and_what_is_not_a_number_stays():
    a, b = parameter(on_device(np.array([1.0, 2, 3, np.nan]))), parameter(on_device(np.array([1.0, 3, 2, 0])))
    y = ops.maximum(a, b)
    assert np.isnan(to_host(y.data).astype("f4")).tolist() == [False] * 3 + [True]
    y.backward(on_device(np.ones(4)))
    assert to_host(a.grad).tolist() == [0.5, 0, 1, 0] and to_host(b.grad).tolist() == [0.5, 1, 0, 0]
    assert np.isnan(to_host(ops.relu(Tensor(on_device(np.array([np.nan])))).data).astype("f4")).all()


def test_a_total_is_rounded_once_wherever_it_is_put():
    a, b = drawn(7, 40), drawn(7, 40, seed=1) / 256
    for view in VIEWS:
        for place in (None, 0, 1):
            x, y = like(view, a, bfloat16), like(view, b, bfloat16)
            got = elementwise.total(x, y, out=(None, x, y)[1 + place] if place is not None else None)
            assert place is None or got is (x, y)[place]
            assert bits(got) == (a + b).astype(bfloat16).tobytes()


def test_the_gradient_of_a_value_is_added_to_one_that_is_there():
    pair = ops.mul.overrides[cupy.ndarray, bfloat16]
    x, w, g = drawn(3, 70, 16), drawn(16, seed=1), drawn(3, 70, 16, seed=2)
    _, saved = pair.forward((True, True), on_device(x), on_device(w, FLOAT32))
    into = cupy.ones(16, "f4")
    dx, dw = pair.vjp(on_device(g), *saved, into=(None, into))
    assert dw is ADDED
    close(dx, g * w, bfloat16, 1.01)
    close(into, 1 + (g * x).sum((0, 1)), FLOAT32, 64)


# ---- along axes ------------------------------------------------------------------------------------------------------


@some
@both
@pytest.mark.parametrize("op", [ops.softmax, ops.log_softmax], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 16), (3, 37), (2, 2049), (5, 1)], ids=str)
def test_softmax(op: Op, shape: tuple[int, ...], dtype: np.dtype, view):
    agree(op, [3 * drawn(*shape)], [dtype], (True,), view=view)


@some
@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 130, 9), (1, 4, 1), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, 2), (1, 2), ()], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_sums(shape: tuple[int, ...], axis, keepdims: bool, view):
    agree(ops.sum, [drawn(*shape)], [bfloat16], (True,), view=view, axis=axis, keepdims=keepdims)


@pytest.mark.parametrize(
    "shape, axes", [((40_000,), (0,)), ((3, 9000), (1,)), ((9000, 3), (0,)), ((2, 700, 300), (1,))]
)
def test_long_sums_are_made_in_parts_with_the_same_bits(shape: tuple[int, ...], axes: tuple[int, ...]):
    x = drawn(*shape)
    found = [maps.summed("copy", on_device(x), shape=shape, axes=axes) for _ in range(2)]
    close(found[0], x.sum(axes), FLOAT32, 256)
    assert bits(found[0]) == bits(found[1])


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, width", [(FLOAT32, 16), (bfloat16, 16), (FLOAT32, 5), (bfloat16, 264), (bfloat16, None)]
)
@pytest.mark.parametrize("kind", ["i4", "i8"])
@pytest.mark.parametrize("op, name", [(fused.embedding, "ids"), (ops.take, "indices")], ids=str)
def test_rows_are_looked_up_and_their_gradients_added_up(
    op: Op, name: str, dtype: np.dtype, width: int | None, kind: str
):
    table = drawn(30, *([] if width is None else [width]))
    ids = np.random.default_rng(1).integers(-3, 12, (5, 40)).astype(kind)
    ids[0, :20] = 7
    here = parameter(table)
    expected = op(here, **{name: ids})
    g = drawn(*expected.shape, seed=2)
    expected.backward(g)
    found = []
    for _ in range(2):
        there = parameter(on_device(table, dtype))
        got = op(there, **{name: cupy.asarray(ids)})
        assert got.node.op is op.overrides[cupy.ndarray, dtype] and got.dtype == dtype
        assert bits(got.data) == expected.data.astype(dtype).tobytes()
        got.backward(on_device(g, dtype))
        close(there.grad, here.grad, dtype, 1.01 if dtype == bfloat16 else 16)
        found.append(there.grad)
    assert bits(found[0]) == bits(found[1])
    into = on_device(table, dtype)
    pair = op.overrides[cupy.ndarray, dtype]
    _, saved = pair.forward((True,), on_device(table, dtype), **{name: cupy.asarray(ids)})
    assert pair.vjp(on_device(g, dtype), *saved, into=(into,)) == (ADDED,)
    close(into, table + here.grad, dtype, 1.01 if dtype == bfloat16 else 16)


@both
@pytest.mark.parametrize("width", [1, 6])
def test_the_rows_of_very_many_ids_are_added_up_with_the_same_bits(width: int, dtype: np.dtype, monkeypatch):
    ids, g = np.random.default_rng(1).integers(-3, 12, 700), drawn(700, width, seed=2)
    exact = np.zeros((20, width))
    np.add.at(exact, ids, g)
    pair = ops.take.overrides[cupy.ndarray, dtype]
    _, saved = pair.forward((True,), on_device(drawn(20, width), dtype), indices=cupy.asarray(ids))
    (sorted_first,) = pair.vjp(on_device(g, dtype), *saved, into=(None,))
    monkeypatch.setattr(gather, "_MOST_SORTED", 0)
    found = [pair.vjp(on_device(g, dtype), *saved, into=(None,))[0] for _ in range(2)]
    close(found[0], exact, dtype, 1.01)
    close(sorted_first, exact, dtype, 1.01 if dtype == bfloat16 else 16)
    assert bits(found[0]) == bits(found[1])
    into = on_device(np.ones((20, width)), dtype)
    assert pair.vjp(on_device(g, dtype), *saved, into=(into,)) == (ADDED,)
    close(into, 1 + exact, dtype, 1.01)
    for spoiled in (np.nan, np.inf):
        g[5, 0] = spoiled
        assert not np.isfinite(to_host(pair.vjp(on_device(g, dtype), *saved, into=(None,))[0]).astype("f4")).any()
    assert not to_host(pair.vjp(on_device(0 * drawn(700, width), dtype), *saved, into=(None,))[0]).any()


def test_rows_of_views_in_another_dtype_and_of_no_ids():
    table, ids = drawn(6, 24), np.array([[5, 0], [5, -1]])
    for view in VIEWS:
        for dtype, other in itertools.product((bfloat16, FLOAT32), repeat=2):
            got = gather.rows(like(view, table, dtype), cupy.asarray(ids), other)
            assert got.dtype == other and bits(got) == table[ids].astype(other).tobytes()
    assert gather.rows(on_device(table), cupy.zeros((0, 3), "i4")).shape == (0, 3, 24)


@both
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("width", [8, 5])
def test_places_are_picked_and_their_gradients_put_back(order: tuple[int, ...], width: int, dtype: np.dtype):
    x = drawn(3, 4, 6, width)
    where = (np.array([0, 2, 2]), np.array([3, 0, 1]))
    there = parameter(on_device(x, dtype))
    rows = tuple(map(cupy.asarray, where))
    got = fused.pick(there.transpose(*order), rows=rows)
    expected = x.transpose(order)[where]
    assert got.node.op is fused.pick.overrides[cupy.ndarray, dtype]
    assert bits(got.data) == expected.astype(dtype).tobytes()
    g = drawn(*expected.shape, seed=1)
    total = x.transpose(order).copy()
    total[where] += g
    into = on_device(x, dtype).transpose(order)
    gather.put(into, rows, on_device(g, dtype), add=True)
    close(into, total, dtype, 1.01)
    gather.put(into, rows, on_device(g, dtype), add=False)
    total[where] = g
    close(into, total, dtype, 1.01)


def test_parts_are_put_back_by_slices():
    x, g = drawn(4, 10, 16), drawn(4, 16, seed=1)
    for add in (True, False):
        there, expected = on_device(x), x.copy()
        gather.put(there, (slice(None), 3), on_device(g), add=add)
        expected[:, 3] = expected[:, 3] + g if add else g
        close(there, expected, bfloat16, 1.01)


def test_a_graph_of_all_of_it_gives_the_same_bits():
    """Nothing here reads the host, or sends it anything."""
    x, w = on_device(drawn(4, 6, 32)), on_device(drawn(32, seed=1), FLOAT32)
    table, ids = on_device(drawn(9, 32, seed=2), FLOAT32), cupy.asarray(np.arange(24).reshape(4, 6) % 5)

    def step() -> list[cupy.ndarray]:
        values = [parameter(x), parameter(w), parameter(table)]
        hidden = fused.rms_norm(values[0] + fused.embedding(values[2], ids=ids), values[1], eps=1e-5)
        hidden = fused.silu_mul(hidden * values[1], fused.gelu(hidden, approximate=True))
        y = ops.sum(ops.softmax(fused.layer_norm(hidden, values[1], values[1], eps=1e-5)) * 2.0, axis=(0, 1))
        y.backward(w.astype(bfloat16))
        return [y.data, *(value.grad for value in values)]

    cupy.cuda.get_current_stream().synchronize()  # the other stream would not wait for x and the others
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        eager = step()
        stream.begin_capture()
        captured = step()
        graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    assert [bits(array) for array in captured] == [bits(array) for array in eager]
