"""The golden vectors on the GPU: in float32 and float64, within the limits that hold on the host."""

import pytest

from refpeft.conformance.compare import compare
from refpeft.conformance.drivers import Refpeft
from refpeft.conformance.vectors import cases


@pytest.fixture(scope="module")
def on_the_device() -> Refpeft:
    return Refpeft(device="cuda")


@pytest.mark.parametrize("dtype", Refpeft.dtypes)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(on_the_device, case, dtype):
    try:
        answer = on_the_device.run(case, case.given(dtype), dtype)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert not [result.problem for result in compare(case, answer, dtype) if result.problem]
