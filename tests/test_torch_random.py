"""What torch's generator on CPUs draws, here without torch."""

import numpy as np
import pytest

from refpeft.torch_random import torch_choice

CHOICES = {777: [35, 32, 9, 50, 19, 47, 33, 44], 2**40 + 5: [3453411, 6996838, 9767515, 526959]}


def test_a_choice_is_that_of_torch():
    """torch.randperm(60, generator=torch.Generator().manual_seed(777))[:8], torch 2.13, and of another seed."""
    assert torch_choice(777, 60, 8).tolist() == CHOICES[777]
    assert torch_choice(2**40 + 5, 10**7, 4).tolist() == CHOICES[2**40 + 5]


def test_a_choice_has_no_place_twice():
    assert sorted(torch_choice(3, 50, 50)) == list(range(50))


@pytest.mark.real
@pytest.mark.parametrize("seed, size, count", [(0, 1000, 1000), (777, 4096 * 64, 1000), (2**31 + 7, 5, 5)])
def test_choices_are_those_of_the_installed_torch(seed, size, count):
    torch = pytest.importorskip("torch")
    want = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    assert np.array_equal(torch_choice(seed, size, count), want.numpy())


def test_sizes_that_torch_permutes_in_another_way_are_refused():
    with pytest.raises(ValueError, match="is drawn in another way"):
        torch_choice(0, 2**28, 3)
