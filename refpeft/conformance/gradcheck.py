"""Gradients against central differences, by random projection: for the project's tests and for authors of plugins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refpeft.backend import Array, xp_of
from refpeft.errors import RefpeftError
from refpeft.rng import Stream
from refpeft.tensor import Tensor, parameter

STEP = 1e-5
"""Central differences in float64 are then right to about 1e-10 of the values at hand."""


def gradcheck(fn: Callable[..., Tensor], *arrays: Array, seed: int = 0) -> float:
    """The worst relative error of the gradients of `fn(*tensors)`, which gives one Tensor of any shape.

    For a random g of the output's shape, and for each of the float64 `arrays` a random direction d: the central
    difference of <fn(x + h d), g> against <gradient, d>. The error is relative to the larger of the difference and the
    gradient's norm, about 1e-9 where the gradients are right; `fn` must be smooth near `arrays`.
    Raises RefpeftError for arrays that are not float64, and where the output depends on none of them.
    """
    if any(array.dtype != "f8" for array in arrays):
        raise RefpeftError(f"gradcheck: the arrays are {', '.join(str(a.dtype) for a in arrays)}: expected float64")
    rng = Stream(seed, "gradcheck", xp=xp_of(*arrays))
    leaves = [parameter(array) for array in arrays]
    out = fn(*leaves)
    g = rng.standard_normal(out.shape)
    out.backward(g)

    def error(i: int) -> float:
        direction = rng.standard_normal(arrays[i].shape)

        def value(step: float) -> float:
            moved = (Tensor(a + step * direction if j == i else a) for j, a in enumerate(arrays))
            return float((fn(*moved).data * g).sum())

        difference = (value(STEP) - value(-STEP)) / (2 * STEP)
        grad = leaves[i].grad
        slope, norm = (0.0, 0.0) if grad is None else (float((grad * direction).sum()), float((grad**2).sum() ** 0.5))
        scale = max(abs(difference), norm)
        return abs(difference - slope) / scale if scale else 0.0

    return float(np.max([error(i) for i in range(len(arrays))]))  # NaN where one is, which Python's max may lose
