"""Limits in bfloat16: how far a right answer is off where every operation's result is kept in eight bits.

Inputs and the results of operations are rounded to bfloat16; inside an operation (a matrix product, a sum, a softmax)
float32 is used, as devices do. The order of sums then matters little, but in another right formula each rounding may go
the other way: so the same is computed several times, once with all rounded to the nearest, and then with every result
rounded up or down at random, the likelier the nearer it is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

EPS = torch.finfo(torch.bfloat16).eps
SAMPLES = 8
FACTOR = 2  # why: README, "Limits"
LEAST = 4
MOST = 64  # half of the largest value: above it, an answer without the term that is tested would pass


class Rounded(TorchDispatchMode):
    """Inside, the result of every operation is rounded to bfloat16: sample 0 to the nearest, others at random."""

    def __init__(self, sample: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(sample) if sample else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view of what is rounded already
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.float64):
                tensor.copy_(self.rounded(tensor.float()))
        return result

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Infinities and NaN stay, but nothing becomes infinite: masks are of the dtype's least number."""
        if self.generator is None:
            near = x.bfloat16().float()
        else:
            noise = torch.randint(2**16, x.shape, generator=self.generator, dtype=torch.int32)
            near = (x.contiguous().view(torch.int32) + noise & -(2**16)).view(torch.float32)
        most = torch.finfo(torch.bfloat16).max
        return torch.where(x.isfinite(), near.clamp(-most, most), x)


def nearest(array: np.ndarray) -> np.ndarray:
    """float32 with the values of bfloat16 that are nearest."""
    return torch.from_numpy(array).bfloat16().float().numpy()


def limit_of(worst: float) -> int | None:
    """The limit for a worst error in eps, or None where it would say nothing."""
    if not worst <= MOST / FACTOR:  # also where it is no number
        return None
    return max(LEAST, 2 ** math.ceil(math.log2(FACTOR * worst))) if worst else LEAST
