"""The nearest matrix of a rank is that of the SVD."""

import numpy as np
import pytest

from refpeft.lowrank import nearest


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)])
def test_it_is_that_of_the_svd_and_balanced(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    for r in range(1, min(shape) + 1):
        left, right = nearest(matrix, r)
        assert left.shape == (shape[0], r) and right.shape == (r, shape[1])
        assert np.allclose(left @ right, (U[:, :r] * S[:r]) @ Vt[:r], rtol=0, atol=1e-12)
        assert np.allclose(np.square(left).sum(axis=0), S[:r]) and np.allclose(np.square(right).sum(axis=1), S[:r])


def test_a_matrix_of_less_rank_is_met():
    rng = np.random.default_rng(1)
    matrix = (rng.standard_normal((8, 2)) @ rng.standard_normal((2, 20))).astype("f4")
    left, right = nearest(matrix, 5)
    assert left.dtype == right.dtype == np.float64
    assert abs(left @ right - matrix).max() < 1e-6
    left, right = nearest(np.zeros((3, 4)), 2)
    assert not (left @ right).any() and np.isfinite(left).all() and np.isfinite(right).all()


def test_more_rank_than_there_is_gives_no_large_numbers():
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((96, 5)) @ rng.standard_normal((5, 96))
    left, right = nearest(matrix, 94)
    assert abs(left @ right - matrix).max() < 1e-10 * abs(matrix).max()
    assert max(abs(left).max(), abs(right).max()) <= np.sqrt(np.linalg.norm(matrix, 2))
