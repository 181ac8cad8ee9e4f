"""Rows times a gain for each column, both gradients in one pass: beside the plain pair in float64."""

import cupy
import numpy as np
import pytest
from test_rows_on_the_gpu import FLOAT32, VIEWS, agree, bits, close, drawn, on_device

from refpeft import ops
from refpeft.backend import bfloat16
from refpeft.cuda import gains, margins
from refpeft.tensor import Tensor, parameter

SHAPES = [(1, 8), (3, 72), (4, 70, 24), (2, 5, 576), (130, 256), (700, 520), (3, 10), (2, 0, 8)]


@pytest.mark.parametrize("view", VIEWS, ids=["contiguous", "turned", "inside", "shifted"])
@pytest.mark.parametrize("gain_first", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_gradients_of_rows_times_gains(shape: tuple[int, ...], gain_first: bool, view):
    inputs = [(drawn(*shape), bfloat16), (drawn(shape[-1], seed=1), FLOAT32)]
    arrays, dtypes = zip(*(inputs[::-1] if gain_first else inputs), strict=True)
    agree(ops.mul, list(arrays), list(dtypes), (True, True), view=view)


def test_sums_of_many_rows_are_exact_to_rounding_added_to_what_is_there_and_the_same_again():
    g, x, gain, there = drawn(5000, 264), drawn(5000, 264, seed=1), drawn(264, seed=2), drawn(264, seed=3)
    found = []
    for _ in range(2):
        onto, dx = on_device(there, FLOAT32), cupy.empty(x.shape, bfloat16)
        back = gains.backward(on_device(g), on_device(x), on_device(gain, FLOAT32), dx, onto)
        assert back is onto
        found.append((dx, onto))
    close(found[0][0], g * gain, bfloat16, 1.01)
    close(found[0][1], (g * x).sum(axis=0) + there, FLOAT32, 64)
    assert [bits(array) for array in found[0]] == [bits(array) for array in found[1]]


def test_gains_that_are_trained_get_their_gradient_in_place():
    x, gain = on_device(drawn(6, 40)), parameter(on_device(drawn(40, seed=1), FLOAT32))
    gain.node.grad = onto = cupy.ones(40, "f4")
    (gain * parameter(x)).backward(cupy.ones((6, 40), bfloat16))
    assert gain.grad is onto
    close(onto, drawn(6, 40).sum(axis=0) + 1, FLOAT32, 4)


@pytest.mark.parametrize("width", [8, 12])
def test_rows_with_room_behind_them_are_read_and_written_where_they_are(width: int):
    whole = [cupy.full((6, width + margins.MARGIN), np.inf, bfloat16) for _ in range(3)]
    g, x, dx = (array[:, :width] for array in whole)
    g[...], x[...], gain = on_device(drawn(6, width)), on_device(drawn(6, width, seed=1)), cupy.full(width, 2.0, "f4")
    sums = gains.backward(g, x, gain, dx)
    close(dx, 2 * drawn(6, width), bfloat16, 1.01)
    close(sums, (drawn(6, width) * drawn(6, width, seed=1)).sum(axis=0), FLOAT32, 4)
    assert all((array[:, width:] == np.inf).all() for array in whole)


@pytest.mark.parametrize(
    "gain, x",
    [((8,), (8,)), ((2, 8), (2, 8)), ((3, 1), (3, 8)), ((1,), (3, 8))],
    ids=["a vector", "rows", "one for each row", "one for all"],
)
def test_other_products_are_not_gains_for_each_column(gain: tuple[int, ...], x: tuple[int, ...]):
    assert not gains.are(cupy.ones(gain, "f4"), cupy.ones(x, bfloat16))
    assert gains.are(cupy.ones((1, 8), "f4"), cupy.ones((3, 8), bfloat16))
    assert not gains.are(cupy.ones(8, bfloat16), cupy.ones((3, 8), bfloat16))
    both = parameter(cupy.ones(gain, "f4")), Tensor(cupy.ones(x, bfloat16))
    (both[0] * both[1]).backward()
    assert both[0].grad.shape == gain
