"""The golden vectors on the GPU: in float32 and float64 within the limits that hold on the host, and in bfloat16.

In bfloat16 hidden states, their gradients and matrices are that, and values, statistics and losses float32, as in
training. The cases' own limits are in units of eps(bfloat16) * max|expected|, and were measured without a line of
refpeft: twice the worst of eight times that all results were rounded at random (golden/README.md). Of 4,851 outputs of
730 cases half use less than an eighth of their limit, and all but one case stay below two thirds: gradients of
bert-classifies, which all come from one row of three logits, use 0.97. What a GPU adds up in another order may be
rounded to the other side, for which there is ROOM.
"""

import numpy as np
import pytest

from refpeft.conformance.compare import compare, compare_output
from refpeft.conformance.drivers import Refpeft
from refpeft.conformance.vectors import cases


@pytest.fixture(scope="module")
def on_the_device() -> Refpeft:
    return Refpeft(device="cuda")


ROOM = 1.25
NOT_IN_BFLOAT16 = {
    "optimizer": "state and steps are float32",
    "schedule": "of the host",
    "template": "of the host",
    "random": "bits, and numbers that are made of them in float32",
    "quantizer": "defined in float32; what is decoded to bfloat16 is equal to the bit in test_quantizers_on_the_gpu",
    "train": "several steps: what is off in one is off more in the next",
    "steps": "what a method decides around steps of float32",
    "save": "copies, equal to the bit",
}
"""Kinds, and places of methods, that have no limits in bfloat16."""
SENSITIVE = [
    case
    for case in cases()
    if "bfloat16" not in case.dtypes
    and case.name not in ("targets", "positions", "answers")
    and not {case.kind, case.at} & NOT_IN_BFLOAT16.keys()
]
"""Others without: roundings move one of their outputs, nearly always a gradient, by half of its largest number. Sums
that cancel, and bends on whose other side a few numbers of a tiny model fall."""
DECIDED = {"loftq": "codes of what the factors leave: of a quantizer's two nearest levels either may be taken"}


@pytest.mark.parametrize("dtype", Refpeft.dtypes)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(on_the_device, case, dtype):
    try:
        answer = on_the_device.run(case, case.given(dtype), dtype)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert not [result.problem for result in compare(case, answer, dtype) if result.problem]


@pytest.mark.parametrize("case", [case for case in cases() if "bfloat16" in case.dtypes], ids=str)
def test_case_in_bfloat16(on_the_device, case):
    answer = on_the_device.run(case, case.given("bfloat16"), "bfloat16")
    results = compare(case, answer, "bfloat16")
    assert not [(result.output, result.error, result.limit) for result in results if result.share > ROOM]


@pytest.mark.parametrize("case", [case for case in SENSITIVE if case.name not in DECIDED], ids=str)
def test_what_a_sensitive_case_gives_before_its_gradients_in_bfloat16(on_the_device, case):
    """Within 16 eps(bfloat16) * max|expected|; on the way to the logits of two layers 9 are used at most."""
    answer, expected = on_the_device.run(case, case.given("bfloat16"), "bfloat16"), case.expected()
    for name in case.checks:
        result = compare_output(name, answer.get(name), expected[name], {"bfloat16": 16}, "bfloat16")
        assert "grad." in name or result.problem is None
        assert np.isfinite(result.error)


def test_few_cases_are_sensitive():
    assert len(SENSITIVE) < 60
