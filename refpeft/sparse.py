"""Numbers of a weight that are trained alone: where they are, what they add, and which ones have the largest scores.

A site has `values` (k,), the differences from the frozen numbers, and `indices` (2, k), their rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import fused
from .backend import Array, to_host, xp_of
from .errors import RefpeftError
from .tensor import Tensor

if TYPE_CHECKING:
    from .sites import Site


def at(places: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Values, zero, at places that are counted row by row through a matrix with rows of `width` numbers."""
    ordered = np.sort(places, kind="stable")  # takes no time where they are in order, as most are
    return {"values": np.zeros(len(places)), "indices": np.stack(np.divmod(ordered, width)).astype(np.int32)}


def constant_at(places: np.ndarray, width: int) -> dict[str, Any]:
    """The same as a method's first values: the indices are not trained."""
    found = at(places, width)
    return found | {"indices": Tensor(found["indices"])}


def spread(site: Site, sites: Sequence[Site], share: float) -> dict[str, Any]:
    """First values of a site until data decide: evenly over all sites, `how_many` of them together.

    Raises RefpeftError where that is none.
    """
    if not how_many(sites, share):
        raise RefpeftError(f"share is {share:g}, less than one of the targets' {how_many(sites, 1):,} numbers")
    before = sites[: sites.index(site)]
    count = how_many([*before, site], share) - how_many(before, share)
    out, width = site.shape
    return constant_at(np.arange(count) * (out * width) // max(count, 1), width)


def how_many(sites: Sequence[Site], share: float) -> int:
    """A share of all numbers of these sites."""
    return round(share * sum(out * width for out, width in (site.shape for site in sites)))


def largest(scores: dict[str, Array], count: int, keep: bool = False) -> dict[str, dict[str, np.ndarray] | None]:
    """Values at the places of the `count` largest |scores| of all matrices (out, in) together; None where none is.

    The names of `scores` are those of sites: this is what the hook peft_survey gives. Values are zero, or with `keep`
    the scores themselves.
    """
    xp = xp_of(next(iter(scores.values())))
    every = abs(xp.concatenate([matrix.reshape(-1) for matrix in scores.values()]))
    chosen = np.sort(to_host(xp.argpartition(every, every.size - count)[every.size - count :]))
    found: dict[str, dict[str, np.ndarray] | None] = {}
    start = 0
    for name, matrix in scores.items():
        low, high = np.searchsorted(chosen, (start, start + matrix.size))
        places = chosen[low:high] - start
        found[name] = at(places, matrix.shape[1]) if len(places) else None
        if keep and len(places):
            found[name]["values"] = to_host(matrix)[tuple(found[name]["indices"])]
        start += matrix.size
    return found


def check_rows(site: Site, rows: Array) -> None:
    """Raises RefpeftError where numbers of rows from a file are not those of a weight, or one is there twice."""
    numbers, out = to_host(rows), site.shape[0]
    if (len(numbers) and (numbers.min() < 0 or numbers.max() >= out)) or len(np.unique(numbers)) < len(numbers):
        raise RefpeftError(f"rows of {site.name} are outside of 0 to {out - 1}, or there twice")


def check(site: Site, p: Any) -> None:
    """Raises RefpeftError where indices from a file name no places of the weight, or one twice."""
    (rows, columns), (out, width) = to_host(p.indices).astype(np.int64), site.shape
    if len(p.values) != len(rows):
        raise RefpeftError(f"{site.name} has {len(p.values)} values and {len(rows)} indices")
    places = np.unique(rows * width + columns)
    inside = not len(rows) or (min(rows.min(), columns.min()) >= 0 and rows.max() < out and columns.max() < width)
    if not inside or len(places) < len(rows):
        raise RefpeftError(f"indices of {site.name} are outside of its weight ({out}, {width}), or there twice")


def added(x: Tensor, p: Any, site: Site) -> Tensor:
    """What the values add to a linear layer's output."""
    rows, columns = p.indices.data[0], p.indices.data[1]
    return fused.sparse_linear(x, p.values, rows=rows, columns=columns, out=site.shape[0])


def merged(weight: Array, p: Any) -> Array:
    """The weight with the values added."""
    folded = xp_of(weight).array(weight)
    folded[p.indices[0], p.indices[1]] += p.values
    return folded


def added_rows(array: Array, rows: Array, change: Array) -> Array:
    """The array with a change of these rows added."""
    folded = xp_of(array).array(array)
    folded[rows] += change
    return folded
