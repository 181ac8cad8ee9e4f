"""Systems of equations on the GPU: NumPy's answers in float64, and their gradients."""

import cupy
import numpy as np
import pytest

from refpeft import ops
from refpeft.backend import to_host
from refpeft.tensor import parameter

EPS = 2.0**-23


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((1, 1), (1, 1)),
        ((3, 3), (3, 100)),
        ((5, 8, 8), (5, 8, 8)),
        ((2, 1, 33, 33), (4, 33, 7)),
        ((64, 64), (2, 64, 33)),
    ],
)
def test_it_is_numpys_answer_and_so_are_the_gradients(a_shape, b_shape):
    draw = np.random.default_rng(a_shape[-1])
    a, b = (draw.standard_normal(shape).astype("f4") for shape in (a_shape, b_shape))
    a += 2 * a_shape[-1] ** 0.5 * np.eye(a_shape[-1], dtype="f4")[::-1]  # pivots are not on the diagonal
    here = [parameter(array.astype("f8")) for array in (a, b)]
    there = [parameter(cupy.asarray(array)) for array in (a, b)]
    expected, found = ops.solve(*here), ops.solve(*there)
    assert found.node.op.stands_in
    g = draw.standard_normal(expected.shape).astype("f4")
    expected.backward(g.astype("f8"))
    found.backward(cupy.asarray(g))
    for one, other in ((expected.data, found.data), *((x.grad, y.grad) for x, y in zip(here, there, strict=True))):
        assert other.dtype == np.float32
        assert np.abs(to_host(other) - one).max() <= 256 * EPS * np.abs(one).max()


def test_large_matrices_are_left_to_cusolver():
    a, b = cupy.eye(65, dtype="f4"), cupy.ones((65, 2), "f4")
    assert ops.solve(parameter(a), b).node.op is ops.solve
