"""Layers whose weights methods make anew in every pass: bfloat16 beside the plain pairs in float64."""

import cupy
import numpy as np
import pytest
from test_linear_on_the_gpu import EPS, close, drawn

from refpeft import fourier, fused, lowrank, tensor
from refpeft.backend import bfloat16
from refpeft.quant import Dense
from refpeft.tensor import Tensor, parameter

OUT, IN, ROWS = 24, 40, 6
PLACES = np.random.default_rng(3).permutation(OUT * IN)[:37]
DOWN, ACROSS = (part.astype(np.int32) for part in np.divmod(PLACES, IN))
WEIGHT = drawn(OUT, IN, seed=4)


def hadamard(xp, x, B, A):
    weight = WEIGHT if xp is np else Dense(cupy.asarray(WEIGHT).astype(bfloat16), np.dtype("f4"))
    return fused.hadamard_linear(x, B, A, weight=(lambda: weight) if xp is np else weight)


def sparse(xp, x, values):
    return fused.sparse_linear(x, values, rows=xp.asarray(DOWN), columns=xp.asarray(ACROSS), out=OUT)


def columns(xp, y, z):
    return fused.add_columns(y, z, columns=xp.asarray(np.array([39, 0, 7], np.int32)))


def spectral(xp, x, c):
    return fourier.spectral_linear(x, c, places=xp.asarray(PLACES), shape=(OUT, IN))


def circulant(xp, x, w):
    return fourier.circulant_linear(x, w)


CASES = {
    "hadamard": (hadamard, [(2, ROWS, IN), (OUT, 3), (3, IN)], (2, ROWS, OUT)),
    "sparse": (sparse, [(2, ROWS, IN), (37,)], (2, ROWS, OUT)),
    "columns": (columns, [(2, ROWS, IN), (2, ROWS, 3)], (2, ROWS, IN)),
    "spectral": (spectral, [(2, ROWS, IN), (37,)], (2, ROWS, OUT)),
    "circulant": (circulant, [(2, ROWS, IN), (3, 5, 8)], (2, ROWS, OUT)),
    "circulant of an odd size": (circulant, [(ROWS, 9), (2, 3, 3)], (ROWS, 6)),
}
VALUES = {"columns": "bfloat16"}  # the dtype of what is not x: it is of activations there


@pytest.mark.parametrize("needed", ["all", "x alone", "values alone"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_plain_pair_in_float64_rounded(name, needed):
    call, shapes, shape = CASES[name]
    host = [drawn(*each, seed=number) for number, each in enumerate(shapes)]
    g = drawn(*shape, seed=9)
    trains = [needed != "values alone"] + [needed != "x alone"] * (len(host) - 1)
    dtypes = ["bfloat16"] + [VALUES.get(name, "float32")] * (len(host) - 1)

    def leaves(arrays):
        return [parameter(array) if train else Tensor(array) for array, train in zip(arrays, trains, strict=True)]

    plain = leaves(host)
    expected = call(np, *plain)
    expected.backward(g)
    there = leaves([cupy.asarray(array).astype(dtype) for array, dtype in zip(host, dtypes, strict=True)])
    found = call(cupy, *there)
    assert found.node.op.stands_in and found.data.dtype == bfloat16
    found.backward(cupy.asarray(g).astype(bfloat16))
    rounded_weight = 0 if name in ("columns", "sparse") else 2  # of the made weight, in every term of a sum
    close(found.data, expected.data, EPS["bfloat16"], 0.6 + rounded_weight)
    for leaf, other, train, dtype in zip(there, plain, trains, dtypes, strict=True):
        if train:
            assert leaf.grad.dtype == np.dtype(bfloat16 if dtype == "bfloat16" else dtype)
            first = leaf is there[0]
            close(leaf.grad, other.grad, EPS[dtype], (0.6 + rounded_weight) if first or dtype == "bfloat16" else 64)


@pytest.mark.parametrize("name", [name for name in CASES if name != "columns"])
def test_gradients_of_what_is_read_are_added_where_they_are(name):
    """Two layers that read the same: the second adds in place."""
    call, shapes, shape = CASES[name]
    host = [drawn(*each, seed=number) for number, each in enumerate(shapes)]
    x, *values = [cupy.asarray(array).astype("bfloat16" if i == 0 else "f4") for i, array in enumerate(host)]
    leaf = parameter(x)
    hidden = leaf * 1.0
    values = [Tensor(each) for each in values]
    (call(cupy, hidden, *values) + call(cupy, hidden, *values)).backward(cupy.ones(shape, bfloat16))
    plain = parameter(host[0])
    (call(np, plain, *map(Tensor, host[1:])) * 2.0).backward(np.ones(shape))
    close(leaf.grad, plain.grad, EPS["bfloat16"], 3)


@pytest.mark.parametrize("there", [None, 3.0])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("out, width, r", [(OUT, IN, 3), (3, 1100, 16), (1, 1, 1), (9, 2048, 130), (300, 576, 8)])
def test_row_gains_are_the_plain_pair_in_float64(out, width, r, stored, there):
    """The gradient of m is also added to one that is there."""
    rounded = cupy.asarray(drawn(out, width, seed=4)).astype(stored)
    m, B, A, g = (drawn(*shape, seed=i) for i, shape in enumerate([(out,), (out, r), (r, width), (out,)]))
    exact_m, host = parameter(m), cupy.asnumpy(rounded.astype("f8"))
    expected = lowrank.row_gains(exact_m, Tensor(B), Tensor(A), weight=lambda: host, alpha=0.7)
    expected.backward(g)
    in_a_room = cupy.full((out, width + 24), np.nan, stored)[:, :width]
    in_a_room[...] = rounded
    for array in (rounded, cupy.asfortranarray(rounded), in_a_room):
        m_there, B_there, A_there = (cupy.asarray(each).astype("f4") for each in (m, B, A))
        leaf, weight = parameter(m_there), Dense(array, np.dtype("f4"))
        leaf.node.grad = onto = None if there is None else cupy.full(out, there, "f4")
        found = lowrank.row_gains(leaf, Tensor(B_there), Tensor(A_there), weight=weight, alpha=0.7)
        assert found.dtype == np.float32 and found.node.op.stands_in
        found.backward(cupy.asarray(g).astype("f4"))
        close(found.data, expected.data, EPS["float32"], 8)
        close(leaf.grad, exact_m.grad + (there or 0), EPS["float32"], 8)
        assert onto is None or leaf.grad is onto


def test_row_gains_with_gradients_of_the_factors_are_left_to_the_plain_pair():
    m, B, A = (parameter(cupy.ones(shape, "f4")) for shape in ((3,), (3, 2), (2, 4)))
    found = lowrank.row_gains(m, B, A, weight=lambda: cupy.ones((3, 4), "f4"), alpha=1.0)
    assert not found.node.op.stands_in
    found.backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in (m, B, A))


def test_plain_pairs_are_left_to_those_who_ask():
    x, values = parameter(cupy.ones((2, IN), bfloat16)), parameter(cupy.ones(37, "f4"))
    with tensor.plain():
        assert not sparse(cupy, x, values).node.op.stands_in
