"""Layers given by frequencies: what they are, and that they keep no weight."""

import numpy as np

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
