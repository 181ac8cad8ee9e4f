"""The error function is right to the last places of both precisions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft.special import erf


def exact(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in x.astype("f8")])


@pytest.mark.parametrize("dtype, limit", [("f8", 2.5), ("f4", 3.5)])
def test_erf_is_the_librarys_everywhere(dtype, limit):
    x = np.concatenate((np.linspace(-7, 7, 20_001), np.logspace(-300, 1, 2_001), [0.46875, 4.0, -0.46875, -4.0]))
    x = x.astype(dtype)
    got = erf(x)
    assert got.dtype == dtype
    assert (np.abs(got - exact(x)) <= limit * np.finfo(dtype).eps * np.abs(exact(x)) + np.finfo(dtype).tiny).all()


@given(st.floats(allow_nan=False))
def test_erf_of_any_number(x):
    assert abs(erf(np.array([x]))[0] - math.erf(x)) <= 2.5 * np.finfo("f8").eps * abs(math.erf(x))


@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_erf_at_the_ends(dtype):
    assert np.array_equal(erf(np.array([-np.inf, -10.0, 0.0, 10.0, np.inf], dtype)), [-1, -1, 0, 1, 1])
    assert np.isnan(erf(np.array([np.nan], dtype))[0])
    assert np.abs(erf(np.linspace(3.5, 4.5, 10_001).astype(dtype))).max() <= 1
