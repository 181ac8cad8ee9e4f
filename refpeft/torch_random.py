"""What torch's generator on CPUs draws: PEFT keeps some constants as nothing but its seed."""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from .backend import Array

LARGEST_CHOICE = (2**32 - 1) // 20 - 1


@functools.cache
def torch_choice(seed: int, size: int, count: int, xp: ModuleType = np) -> Array:
    """torch.randperm(size)[:count] of torch's generator on CPUs with this seed: PEFT keeps such places as a seed.

    An array of `xp`, which stays where it is: a captured step copies nothing from the host.
    Raises ValueError where torch draws in another way: for sizes of 2^32 / 20 and more.
    """
    if size > LARGEST_CHOICE:
        raise ValueError(f"a permutation of {size} numbers is drawn in another way: expected fewer than 2^32 / 20")
    draws = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32).tolist()
    moved: dict[int, int] = {}
    chosen = np.empty(count, np.int64)
    for i, drawn in enumerate(draws):
        j = i + drawn % (size - i)
        chosen[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return xp.asarray(chosen)


def torch_uniform(seed: int, *wanted: tuple[float, tuple[int, ...]]) -> list[np.ndarray]:
    """For each (bound, shape) an array of float32, as torch.empty(shape).uniform_(-bound, bound) draws them in turn."""
    state, drawn = np.random.RandomState(seed % 2**32), []
    for bound, shape in wanted:
        low, high = float(np.float32(-bound)), float(np.float32(bound))
        words = state.randint(0, 2**32, shape, np.uint32) & np.uint32(2**24 - 1)
        drawn.append((words * 2.0**-24 * (high - low) + low).astype("f4"))
    return drawn
