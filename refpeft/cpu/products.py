"""Rows times a weight, for float32 arrays of NumPy: of few rows, as generation has them, and in several threads.

With few rows, memory is what takes time: a weight of 100 MB is read for each token.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

FEW = 32
"""Rows from which BLAS is as fast by itself."""

_BLOCK, _LEAST = 32, 4  # rows of a weight in a block: at most, for more gain nothing; and at least, for calls cost
_OUTPUTS, _PRODUCTS = 1200, 10**6  # of a block: above these OpenBLAS no longer takes it for a small matrix
_WIDE, _NEAR = 512, 3072  # numbers of a row that are worth a call; of all rows that stay in L1 with one of the weight
_MUCH = 2**18  # numbers of a weight from which another thread is worth being woken


class _State(threading.local):
    pool: ThreadPoolExecutor | None = None
    threads = 1


_state = _State()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Within it, this thread shares its larger products with others, `number` in all. BLAS itself is to have one."""
    before = _state.pool, _state.threads
    with ThreadPoolExecutor(max(1, number - 1), "product") as pool:
        _state.pool, _state.threads = pool, number
        try:
            yield
        finally:
            _state.pool, _state.threads = before


def product(rows: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """Writes rows (n, in) @ weight (out, in).T into `out` (n, out), which may be columns of an array."""
    if _state.threads == 1 or weight.size * max(1, len(rows) // FEW) < _MUCH:
        _product(rows, weight, out)
        return
    each = -(-len(weight) // (_BLOCK * _state.threads)) * _BLOCK
    parts = [slice(start, start + each) for start in range(0, len(weight), each)]
    waiting = [_state.pool.submit(_product, rows, weight[part], out[:, part]) for part in parts[1:]]
    _product(rows, weight[parts[0]], out[:, parts[0]])
    for one in waiting:
        one.result()


def _product(rows: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    block = _block(rows, weight)
    whole = len(weight) // block * block if block else 0
    if block == 1:
        out[...] = np.vecdot(weight[:, None], rows).T
    elif block:
        blocks = np.matmul(weight[:whole].reshape(-1, block, weight.shape[1]), rows.T)
        out[:, :whole] = blocks.reshape(whole, len(rows)).T
    if whole < len(weight):
        np.matmul(rows, weight[whole:].T, out=out[:, whole:])


def _block(rows: np.ndarray, weight: np.ndarray) -> int:
    """How many rows of the weight are to be multiplied at once; 0 for all.

    For more than one row BLAS copies the weight into another order, which for a few takes longer than the product. It
    multiplies small matrices as they lie, so the weight is cut into such: at 4 rows twice as fast. And it reads memory
    fastest of all in the product of two vectors: for a single row twice as fast as its product of matrix and vector.
    """
    count, width = rows.shape
    if not 0 < count <= FEW or not weight.flags.c_contiguous:
        return 0
    if width >= _WIDE and (count == 1 or count * width <= _NEAR):
        return 1
    block = min(_BLOCK, _OUTPUTS // count, _PRODUCTS // (count * width))
    return block if count > 1 and block >= _LEAST else 0
