"""`refpeft check` where there is a device: its line for the GPU is one that passes."""

import pytest

from refpeft.conformance.check import check


@pytest.mark.parametrize("name", ["lora", "dora", "houlsby", "prefix_tuning", "prompt_tuning", "full", "nf4"])
def test_the_line_for_the_gpu_passes(name):
    (finding,) = check(name, only=["gpu"]).findings
    assert finding.outcome == "passed", finding
