"""refpeft against the golden vectors, in float64 and float32, without torch."""

import pytest

from refpeft.conformance.compare import compare
from refpeft.conformance.drivers import Refpeft
from refpeft.conformance.vectors import cases


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in cases() for dtype in Refpeft.dtypes if dtype in case.dtypes],
    ids=str,
)
def test_case(case, dtype):
    answer = Refpeft().run(case, case.given(dtype), dtype)
    assert not [result.problem for result in compare(case, answer, dtype) if result.problem]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in cases() if "bfloat16" in case.dtypes], ids=str)
def test_rounding_the_inputs_alone_takes_up_half_of_a_limit_in_bfloat16(case):
    answer = Refpeft().run(case, case.given("bfloat16"), "float32")
    for result in compare(case, answer, "bfloat16"):
        assert result.problem is None
        assert result.error <= result.limit / 2
