"""Matrices made of blocks, and rotations: for authors of methods whose matrices have a structure."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from math import gcd
from types import ModuleType

import numpy as np

from . import ops
from .backend import Array, bfloat16, xp_of
from .errors import RefpeftError
from .tensor import Tensor

OUT, IN = 0, 1
"""The sides of a linear layer, as places in its shape."""


def check_divides(option: str, size: int, sites: Iterable, *sides: int) -> None:
    """Raises RefpeftError, with the nearest size that would do, unless `size` divides these sides of all sites."""
    sites = list(sites)
    common = gcd(*(site.shape[side] for site in sites for side in sides))
    for site in sites:
        for side in sides:
            if site.shape[side] % size:
                fitting = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - size))
                raise RefpeftError(
                    f"{option} is {size}, which does not divide the {site.shape[side]} "
                    f"{'inputs' if side == IN else 'outputs'} of {site.name}; {fitting} fits all targets"
                )


def eye(n: int, like: Tensor) -> Tensor:
    """The identity (n, n), where `like` is and of its dtype."""
    return Tensor(xp_of(like.data).eye(n, dtype=like.dtype))


def skew(above: Tensor, n: int) -> Tensor:
    """Matrices (blocks, n, n) with S^T = -S from what is above their diagonals, row by row: (blocks, n (n - 1) / 2)."""
    xp, up = xp_of(above.data), above.T
    zero = Tensor(xp.zeros((1, above.shape[0]), above.dtype))
    return ops.take(ops.concat(zero, up, -up), indices=_places(xp, n)).transpose(2, 0, 1)


@functools.cache
def _places(xp: ModuleType, n: int) -> Array:
    """Where each element of a skew-symmetric matrix stands among a zero, what is above the diagonal, and its negatives.

    It stays where `xp` has its arrays: a captured step copies nothing from the host.
    """
    count, place = n * (n - 1) // 2, np.zeros((n, n), np.int64)
    rows, columns = np.triu_indices(n, 1)
    place[rows, columns] = 1 + np.arange(count)
    place[columns, rows] = 1 + count + np.arange(count)
    return xp.asarray(place)


def cayley(S: Tensor) -> Tensor:
    """The rotations (I + S) (I - S)^-1 of skew-symmetric S (..., n, n)."""
    identity = eye(S.shape[-1], S)
    return ops.solve(identity - S, identity + S)


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x (..., k n) times the block-diagonal matrix of `blocks`: (k, n, n), or (1, n, n) for k equal ones."""
    parts = x.reshape(-1, x.shape[-1] // blocks.shape[-1], blocks.shape[-1]).transpose(1, 0, 2)
    return (parts @ blocks).transpose(1, 0, 2).reshape(*x.shape)


_DENSE = 2**22
"""Numbers up to which a Kronecker product is made, for bfloat16: tensor cores take less time for it than for products
of so few columns, or such long sums, as those of its factors are, with the copies between."""


def kron_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x @ kron(a, b).T, without that product where it is large: x (..., columns of a times columns of b)."""
    rows, columns = x.shape[:-1], (a.shape[1], b.shape[1])
    if x.dtype == bfloat16 and a.data.size * b.data.size <= _DENSE:
        each = (a.reshape(-1, 1) @ b.reshape(1, -1)).reshape(*a.shape, *b.shape)  # so gradients are products, too
        return ops.linear(x, each.transpose(0, 2, 1, 3).reshape(a.shape[0] * b.shape[0], -1))
    swap = (*range(len(rows)), len(rows) + 1, len(rows))
    x = ops.linear(ops.reshape(x, shape=(*rows, *columns)), b)
    x = ops.linear(ops.transpose(x, axes=swap), a)
    return ops.reshape(ops.transpose(x, axes=swap), shape=(*rows, a.shape[0] * b.shape[0]))
