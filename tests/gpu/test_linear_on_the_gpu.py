"""Products by cuBLAS, and linear layers and low-rank factors in bfloat16."""

import cupy
import numpy as np
import pytest

from refpeft import fused, ops, tensor
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import blas
from refpeft.quant import Dense
from refpeft.tensor import Tensor, parameter

EPS = {"bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Random numbers that are exact in bfloat16."""
    return np.random.default_rng(seed).standard_normal(shape).astype(bfloat16).astype("f8")


def close(got, expected: np.ndarray, eps: float, times: float = 1) -> None:
    """Within `times` eps of the largest expected value."""
    got = to_host(got).astype("f8")
    assert got.shape == expected.shape
    assert np.abs(got - expected).max(initial=0) <= times * eps * max(np.abs(expected).max(initial=0), 1e-30)


# ---- cuBLAS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("m, k, n", [(5, 7, 3), (64, 128, 16), (1, 8, 1), (3, 1, 4)])
def test_a_product_of_any_two_layouts(dtype: str, turned: tuple[bool, bool], m: int, k: int, n: int):
    a, b = drawn(m, k), drawn(k, n, seed=1)
    there = [cupy.asarray(x.T if t else x).astype(dtype) for x, t in zip((a, b), turned, strict=True)]
    there = [x.T if t else x for x, t in zip(there, turned, strict=True)]
    got = blas.product(*there)
    assert got.dtype == np.dtype(bfloat16 if dtype == "bfloat16" else dtype)
    close(got, a @ b, EPS[dtype], 4 if dtype != "bfloat16" else 0.6)
    wide = blas.product(*there, dtype=np.dtype("f8" if dtype == "float64" else "f4"), alpha=0.5)
    close(wide, 0.5 * (a @ b), EPS["float32"] if dtype == "bfloat16" else EPS[dtype], 8)


def test_a_product_is_added_to_what_is_there_in_any_rows():
    a, b = drawn(6, 32), drawn(32, 8, seed=1)
    room = cupy.ones((6, 24), "f4")
    out = room[:, 8:16]
    blas.product(cupy.asarray(a).astype(bfloat16), cupy.asarray(b).astype(bfloat16), out=out, alpha=2.0, add=True)
    close(out, 1 + 2 * (a @ b), EPS["float32"], 8)
    assert (room[:, :8] == 1).all() and (room[:, 16:] == 1).all()
    columns = cupy.zeros((8, 6), "f4").T
    blas.product(cupy.asarray(a).astype("f4"), cupy.asarray(b).astype("f4"), out=columns)
    close(columns, a @ b, EPS["float32"], 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_batches_of_products_broadcast_and_may_be_views(dtype: str):
    a, b = drawn(2, 3, 4, 8), drawn(3, 8, 5, seed=1)
    x, y = cupy.asarray(a).astype(dtype), cupy.asarray(b).astype(dtype)
    close(blas.product(x, y), a @ b, EPS[dtype], 4)
    heads = cupy.asarray(a).astype(dtype).transpose(0, 2, 1, 3)  # (2, 4, 3, 8), not evenly apart
    close(blas.product(heads, heads.swapaxes(-1, -2)), a.transpose(0, 2, 1, 3) @ a.transpose(0, 2, 3, 1), EPS[dtype], 4)
    close(blas.product(x[:, :1], y), a[:, :1] @ b, EPS[dtype], 4)


@pytest.mark.parametrize("dtype, eps", [("complex64", EPS["float32"]), ("complex128", EPS["float64"])])
def test_products_of_complex_numbers(dtype: str, eps: float):
    """Of any two layouts, single ones and batches, scaled and added up."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape) for shape in ((3, 6, 8), (3, 8, 5)))
    x, y = cupy.asarray(a).astype(dtype), cupy.asarray(b).astype(dtype)
    turned = cupy.asarray(b.swapaxes(1, 2).copy()).astype(dtype).swapaxes(1, 2)
    apart = cupy.asarray(a.transpose(1, 2, 0).copy()).astype(dtype).transpose(2, 0, 1)  # no unit stride in a matrix
    out = cupy.ones((3, 6, 5), dtype)
    blas.product(x, y, out=out, alpha=-0.5, add=True)
    for got, expected in [
        (blas.product(x, y), a @ b),
        (blas.product(apart, turned), a @ b),
        (blas.product(x[0], turned[0]), a[0] @ b[0]),
        (blas.product(x[1], y[2]), a[1] @ b[2]),
        (out, 1 - 0.5 * (a @ b)),
    ]:
        assert got.dtype == dtype and got.shape == expected.shape
        assert np.abs(to_host(got) - expected).max() <= 8 * eps * np.abs(expected).max()


def test_nothing_is_added_up_where_there_is_nothing():
    empty = blas.product(cupy.zeros((3, 0), bfloat16), cupy.zeros((0, 2), bfloat16))
    assert empty.shape == (3, 2) and not to_host(empty).any()
    assert blas.product(cupy.zeros((0, 4), "f4"), cupy.zeros((4, 2), "f4")).shape == (0, 2)


def test_a_product_can_be_captured_and_gives_the_same_bits():
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:  # which waits for nothing on the default stream
        a, b = (cupy.asarray(drawn(64, 64, seed=i)).astype(bfloat16) for i in (0, 1))
        out = cupy.zeros((64, 64), "f4")
        eager = blas.product(a, b, dtype=np.dtype("f4"))
        stream.begin_capture()
        blas.product(a, b, out=out)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    assert (out == eager).all()


def test_the_copy_of_lowered_values_has_their_strides():
    values = cupy.asarray(drawn(40)).astype("f4")
    part = values[8:32].reshape(4, 6)
    with blas.lowered(values):
        low = blas.low(part.T)
        assert low.dtype == bfloat16 and low.strides == tuple(s // 2 for s in part.T.strides)
        assert np.array_equal(to_host(low).astype("f4"), to_host(part.T))
        values += 1
        assert np.array_equal(to_host(blas.low(part)).astype("f4"), to_host(part) - 1)
    assert np.array_equal(to_host(blas.low(part)), to_host(part).astype(bfloat16))


# ---- ops -------------------------------------------------------------------------------------------------------------


def gradients(build, arrays: dict[str, np.ndarray], dtypes: dict[str, str], g: np.ndarray) -> dict:
    """The output and all gradients of build(**leaves) on the GPU."""
    leaves = {name: parameter(cupy.asarray(array).astype(dtypes[name])) for name, array in arrays.items()}
    out = build(**leaves)
    assert out.node.op.stands_in
    out.backward(cupy.asarray(g).astype(out.dtype))
    return {"out": out.data} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, width, out", [((2, 5), 24, 16), ((3, 4), 7, 50), ((64,), 128, 8)])
def test_a_frozen_layer(rows: tuple[int, ...], width: int, out: int, bias: bool):
    x, w, b, g = drawn(*rows, width), drawn(out, width, seed=1), drawn(out, seed=2), drawn(*rows, out, seed=3)
    weight = Dense(cupy.asarray(w).astype(bfloat16), np.dtype("f4"))
    arrays = {"x": x} | ({"bias": b} if bias else {})
    found = gradients(
        lambda x, bias=None: fused.frozen_linear(x, bias, weight=weight),
        arrays, {"x": "bfloat16", "bias": "float32"}, g,
    )  # fmt: skip
    close(found["out"], x @ w.T + (b if bias else 0), EPS["bfloat16"], 1.1)
    close(found["x"], g @ w, EPS["bfloat16"], 0.6)
    if bias:
        assert found["bias"].dtype == np.float32
        close(found["bias"], g.reshape(-1, out).sum(axis=0), EPS["float32"], 16)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_of_values(bias: bool):
    x, w, b, g = drawn(2, 5, 24), drawn(16, 24, seed=1), drawn(16, seed=2), drawn(2, 5, 16, seed=3)
    dtypes = {"x": "bfloat16", "w": "float32", "b": "float32"}
    found = gradients(
        lambda x, w, b=None: ops.linear(x, w, b), {"x": x, "w": w} | ({"b": b} if bias else {}), dtypes, g
    )
    close(found["out"], x @ w.T + (b if bias else 0), EPS["bfloat16"], 1.1)
    close(found["x"], g @ w, EPS["bfloat16"], 0.6)
    assert found["w"].dtype == np.float32
    close(found["w"], g.reshape(-1, 16).T @ x.reshape(-1, 24), EPS["float32"], 16)


def test_low_rank_factors_are_added():
    y, u, B, g = drawn(2, 5, 16), drawn(2, 5, 4, seed=1), drawn(16, 4, seed=2), drawn(2, 5, 16, seed=3)
    dtypes = {"y": "bfloat16", "u": "bfloat16", "B": "float32"}
    found = gradients(lambda y, u, B: fused.addmm(y, u, B, alpha=1.5), {"y": y, "u": u, "B": B}, dtypes, g)
    close(found["out"], y + 1.5 * u @ B.T, EPS["bfloat16"], 0.6)
    close(found["y"], g, 0)
    close(found["u"], 1.5 * g @ B, EPS["bfloat16"], 0.6)
    close(found["B"], 1.5 * g.reshape(-1, 16).T @ u.reshape(-1, 4), EPS["float32"], 16)


def test_addmm_takes_over_what_nobody_else_has_and_nothing_else():
    u, B = Tensor(cupy.ones((3, 2), bfloat16)), Tensor(cupy.ones((8, 2), "f4"))
    base = cupy.ones((3, 8), bfloat16)
    held = Tensor(base)
    out = fused.addmm(held, u, B, alpha=1.0)
    assert (to_host(held.data) == 1).all() and (to_host(out.data) == 3).all()
    fused.addmm(Tensor(base), u, B, alpha=1.0)
    assert (to_host(base) == 1).all()
    view = cupy.ones((2, 3, 8), bfloat16)
    fused.addmm(Tensor(view[0]), u, B, alpha=1.0)
    assert (to_host(view) == 1).all()
    addresses = []

    def fresh() -> Tensor:
        array = cupy.ones((3, 8), bfloat16)
        addresses.append(array.data.ptr)
        return Tensor(array)

    made = fused.addmm(fresh(), u, B, alpha=1.0)  # not within an assert, which keeps what is in it
    assert made.data.data.ptr == addresses[0]


@pytest.mark.parametrize(
    "a, b", [((5, 8), (8, 3)), ((2, 5, 8), (8, 3)), ((2, 3, 5, 8), (3, 8, 4)), ((4, 8), (2, 8, 3))]
)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]):
    x, y = drawn(*a), drawn(*b, seed=1)
    g = drawn(*(x @ y).shape, seed=2)
    found = gradients(lambda a, b: ops.matmul(a, b), {"a": x, "b": y}, {"a": "bfloat16", "b": "float32"}, g)
    leaves = [parameter(x), parameter(y)]
    (leaves[0] @ leaves[1]).backward(g)
    close(found["out"], x @ y, EPS["bfloat16"], 0.6)
    assert (found["a"].dtype, found["b"].dtype) == (bfloat16, np.float32)
    close(found["a"], leaves[0].grad, EPS["bfloat16"], 0.6)
    close(found["b"], leaves[1].grad, EPS["float32"], 16)


def test_gradients_are_added_where_they_are():
    """Of values into what is there; of what several layers read, in place."""
    x, w = parameter(cupy.asarray(drawn(4, 8)).astype(bfloat16)), parameter(cupy.asarray(drawn(6, 8)).astype("f4"))
    w.node.grad = cupy.ones((6, 8), "f4")
    kept = w.node.grad
    hidden = x * 1.0
    total = ops.linear(hidden, w) + ops.linear(hidden, w)
    total.backward(cupy.ones((4, 6), bfloat16))
    assert w.grad is kept
    close(kept, 1 + 2 * np.ones((6, 4)) @ drawn(4, 8), EPS["float32"], 32)
    close(x.grad, 2 * np.ones((4, 6)) @ drawn(6, 8), EPS["bfloat16"], 1.1)


def test_plain_pairs_are_left_to_those_who_ask():
    x = parameter(cupy.ones((2, 8), bfloat16))
    with tensor.plain():
        assert not ops.linear(x, Tensor(cupy.ones((3, 8), "f4"))).node.op.stands_in
