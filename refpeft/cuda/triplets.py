"""AdaLoRA's step on all sites at once: a launch each for what is kept of numbers, for importances, and to prune.

Kernels are told where the arrays of each site lie by a table, which is written anew every time: sites may come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from refpeft import triplets
from refpeft.backend import Array
from refpeft.cuda.kernels import Source
from refpeft.cuda.override import or_else
from refpeft.layers import Layer

_source = Source("triplets.cu")
_float32 = np.dtype("f4")
_BLOCK = 256  # threads


@or_else("keeps AdaLoRA's averages")
def note(layers: Sequence[Layer], gradients: Sequence[dict[str, Array]], beta1: float, beta2: float) -> Any:
    """triplets.note."""
    rows = [
        (layer.values[name].data, own[name], *triplets.averages_of(layer, name))
        for layer, own in zip(layers, gradients, strict=True)
        for name in "PEQ"
    ]
    if not _are_plain(rows):
        return NotImplemented
    table = cupy.asarray(np.array([[*map(_address, row), row[0].size] for row in rows], np.int64))
    blocks = -(-max(row[0].size for row in rows) // _BLOCK)
    _source("note", _float32)((blocks, len(rows)), _BLOCK, table, beta1, 1 - beta1, beta2, 1 - beta2)
    return None


@or_else("prunes AdaLoRA's triplets")
def keep(layers: Sequence[Layer], count: int) -> Any:
    """triplets.keep."""
    found = sites(layers)
    if found is None:
        return NotImplemented
    prune(*found, triplets.most(importances(*found), count))
    return None


def sites(layers: Sequence[Layer]) -> tuple[Array, Array] | None:
    """The sites as triplets.cu has them, and the site of each triplet; None where arrays are not what it takes."""
    rows = []
    for layer in layers:
        averages = [each for name in "PEQ" for each in triplets.averages_of(layer, name)]
        rows.append((*averages, layer.p.E.data))
    if not _are_plain(rows):
        return None
    ranks = [E.size for *_, E in rows]
    firsts = np.cumsum([0, *ranks[:-1]])
    sizes = [(*layer.site.shape, rank, first) for layer, rank, first in zip(layers, ranks, firsts, strict=True)]
    table = [
        [*map(_address, row), out, r, width, first] for row, (out, width, r, first) in zip(rows, sizes, strict=True)
    ]
    site_of = np.repeat(np.arange(len(rows), dtype=np.int32), ranks)
    return cupy.asarray(np.array(table, np.int64)), cupy.asarray(site_of)


def importances(table: Array, site_of: Array) -> Array:
    """Those of the triplets of `sites`."""
    scores = cupy.empty(site_of.size, _float32)
    _source("importances", _float32)(site_of.size, _BLOCK, table, site_of, scores)
    return scores


def prune(table: Array, site_of: Array, chosen: Array) -> None:
    """Sets E to 0 but in the triplets of `sites` that are `chosen`, an array of bool."""
    _source("prune", _float32)(-(-site_of.size // _BLOCK), _BLOCK, table, site_of, chosen, site_of.size)


def _are_plain(rows: Sequence[Sequence[Array]]) -> bool:
    """Whether all arrays are float32 in C order."""
    return all(array.dtype == _float32 and array.flags.c_contiguous for row in rows for array in row)


def _address(array: Array) -> int:
    return array.data.ptr


triplets.KERNELS |= {(triplets.note, cupy.ndarray): note, (triplets.keep, cupy.ndarray): keep}
