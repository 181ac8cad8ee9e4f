"""Arrays in blocks of rows: a chain of ufuncs over a block finds it in the core's cache, not in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import arena

BLOCK = 2**15
"""Elements of a block, about: 128 KiB of float32, so that the four to six arrays of a chain fit into 1 MiB."""

SHORT_CHAIN = 2 * BLOCK
"""The same where a chain has two or three arrays."""


def blocks(*arrays: np.ndarray | None, scratch: int = 0) -> Iterator[tuple[np.ndarray | None, ...]]:
    """The same rows of all `arrays`, block after block, each as (rows, its last axis); None where there is no array.

    The arrays have at least one axis and the same ones but for the last; the first is there, and not empty. After them
    come `scratch` arrays of the first one's rows, with whatever values. What is written into must be contiguous.
    """
    matrices = [None if a is None else a.reshape(-1, a.shape[-1]) for a in arrays]
    rows, width = matrices[0].shape
    step = max(1, min(rows, BLOCK // width))
    spare = [arena.empty((step, width), matrices[0].dtype) for _ in range(scratch)]
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield *(None if m is None else m[start:stop] for m in matrices), *(s[: stop - start] for s in spare)


def sum_of_rows(matrix: np.ndarray) -> np.ndarray:
    """The sum over the first axis of (rows, width): a product with ones, which is faster than `sum`."""
    return np.ones(len(matrix), matrix.dtype) @ matrix
