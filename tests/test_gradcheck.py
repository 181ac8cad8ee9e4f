"""The gradient check itself: small for right gradients, large for wrong ones."""

import numpy as np
import pytest

from refpeft import ops
from refpeft.conformance.gradcheck import gradcheck
from refpeft.errors import RefpeftError
from refpeft.tensor import op

X, Y = np.linspace(-1, 2, 12).reshape(3, 4), np.linspace(1, 2, 4)


def cube(wrong: float):
    @op
    def power_of_three(needs, x):
        return x**3, (x,)

    @power_of_three.backward
    def _(g, x):
        return (wrong * 3 * x**2 * g,)

    return power_of_three


def test_right_gradients_are_right_to_about_a_billionth():
    assert gradcheck(cube(1.0), X) < 1e-8
    assert gradcheck(lambda x, y: ops.tanh(x * y) / y, X, Y) < 1e-8


def test_a_gradient_that_is_wrong_by_a_thousandth_is_seen():
    assert gradcheck(cube(1.001), X) > 1e-4
    assert gradcheck(cube(0.0), X) > 0.1


def test_one_wrong_element_is_seen():
    @op
    def careless(needs, x):
        return x * 1.0, ()

    @careless.backward
    def _(g):
        dx = g.copy()
        dx[0, 0] = 0
        return (dx,)

    assert gradcheck(careless, X) > 1e-2


def test_a_gradient_that_is_missing_is_seen():
    assert gradcheck(lambda x, y: ops.detach(x) * y, X, Y) > 0.1


def test_a_gradient_that_is_no_number_is_no_small_error():
    @op
    def broken(needs, x, y):
        return x * y, ()

    @broken.backward
    def _(g):
        return g * Y, np.full(4, np.nan)

    assert not gradcheck(broken, X, Y) < 1


def test_an_input_that_is_not_used_has_no_error():
    assert gradcheck(lambda x, y: ops.exp(y), X, Y) < 1e-8


def test_the_seed_chooses_the_projection():
    errors = {gradcheck(cube(1.001), X, seed=seed) for seed in range(4)}
    assert len(errors) == 4 and min(errors) > 1e-6


def test_single_precision_is_refused():
    with pytest.raises(RefpeftError, match=r"^gradcheck: the arrays are float32: expected float64"):
        gradcheck(ops.exp, X.astype("f4"))


def test_an_output_that_depends_on_nothing_is_an_error():
    with pytest.raises(RefpeftError, match=r"^backward\(\) of a constant"):
        gradcheck(ops.detach, X)
