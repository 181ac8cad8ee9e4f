"""Layers given by frequencies: what they are, and that they keep no weight."""

import numpy as np
import pytest

from refpeft import fourier
from refpeft.tensor import Tensor, parameter


def test_waves_keep_their_inputs_and_no_weight():
    x, w = parameter(np.ones((3, 8))), parameter(np.ones((2, 2, 4)))
    saved = fourier.circulant_linear(x, w).node.saved
    assert {id(part) for part in saved if isinstance(part, np.ndarray)} == {id(x.data), id(w.data)}
    c, places = parameter(np.ones(5)), np.arange(5)
    saved = fourier.spectral_linear(x, c, places=places, shape=(6, 8)).node.saved
    assert {id(part) for part in saved if isinstance(part, np.ndarray)} == {id(x.data), id(c.data), id(places)}


def test_all_frequencies_make_any_matrix_that_is_its_own_mirror():
    spectrum = np.random.default_rng(0).standard_normal(20)
    weight = fourier.spectral_weight(spectrum, np.arange(20), (4, 5))
    mirrored = np.roll(weight[::-1, ::-1], (1, 1), (0, 1))
    assert np.allclose(weight, mirrored, atol=1e-15)
    own = spectrum.reshape(4, 5)
    assert np.allclose(np.fft.fft2(weight), (own + np.roll(own[::-1, ::-1], (1, 1), (0, 1))) / 2, atol=1e-13)


def test_a_circulant_block_has_its_numbers_as_first_row_and_turns_by_one():
    block = fourier.circulant_linear(Tensor(np.eye(3)), Tensor(np.array([[[1.0, 2.0, 3.0]]]))).data.T
    assert np.allclose(block, [[1, 2, 3], [3, 1, 2], [2, 3, 1]], atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 64, 128, 2**13])
def test_hadamards_transform_is_its_own_inverse_up_to_its_size(n):
    x = np.random.default_rng(0).standard_normal(n)
    assert np.allclose(fourier.hadamard(fourier.hadamard(x)) / n, x, atol=1e-12)


def test_a_projection_about_keeps_lengths_and_angles_and_has_no_matrix():
    x = np.random.default_rng(0).standard_normal((2, 50))
    one, two = (fourier.fastfood_from_seed(Tensor(row), (300, 40), 0, "a").data for row in x)
    assert one.shape == (300, 40)
    assert np.sqrt((one**2).sum() / (x[0] ** 2).sum()) == pytest.approx(1, abs=0.1)
    assert (one * two).sum() == pytest.approx(x[0] @ x[1], abs=0.1 * np.sqrt((x[0] ** 2).sum() * (x[1] ** 2).sum()))
    other = fourier.fastfood_from_seed(Tensor(x[0]), (300, 40), 0, "b").data
    assert abs((one * other).sum()) < 0.1 * (one**2).sum()


def test_a_vector_longer_than_the_weight_moves_it_with_all_of_its_numbers():
    moves = [fourier.fastfood_from_seed(Tensor(row), (3,), 0, "a").data for row in np.eye(20)]
    assert all(abs(move).max() > 1e-3 for move in moves)
