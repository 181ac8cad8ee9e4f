"""Learning rates: the shapes that transformers gives them."""

import math

import pytest

from refpeft.schedule import factor, warmup_steps


def test_a_share_of_warmup_is_rounded_up_and_a_number_is_kept():
    assert warmup_steps(0.03, 100) == 3
    assert warmup_steps(0.031, 100) == 4
    assert warmup_steps(7, 100) == 7


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_rises_on_a_line_from_zero_to_the_peak(kind):
    assert [factor(kind, step, 100, 4) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_after_warmup_linear_and_cosine_fall_to_zero_and_constant_stays():
    assert factor("constant", 99, 100, 10) == 1.0
    assert factor("linear", 55, 100, 10) == pytest.approx(0.5)
    assert factor("cosine", 55, 100, 10) == pytest.approx(0.5)
    assert factor("cosine", 40, 100, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert factor("linear", 100, 100, 10) == 0.0
    assert factor("cosine", 250, 100, 10) == pytest.approx(0.0)
