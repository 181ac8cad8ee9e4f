"""Directions in which what layers read varies most, and how many of them each layer gets (EVA)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from .backend import Array, to_host, xp_of
from .errors import RefpeftError
from .lowrank import nearest


class Directions:
    """The first `count` principal directions of rows that come in batches, without keeping the rows.

    An incremental SVD (Ross et al., 2008, doi:10.1007/s11263-007-0075-7): of the first rows less their mean; afterwards
    of the directions so far, as long as their singular values, of new rows less theirs, and of the way between means.

    vectors  (count, width) orthonormal rows, the largest number of each above 0; None before the first batch
    ratios   (count,) the share of the variance of all rows that each explains
    steady   (count,) whether a vector turned by no more than the last `add` was told
    """

    def __init__(self, count: int):
        self.count, self.vectors, self.steady = count, None, np.zeros(count, bool)
        self._rows, self._scatter = 0, 0.0

    def add(self, rows: Array, cosine: float) -> None:
        """Takes rows (at least `count`, width). A vector is steady if its cosine with what it was is at least this."""
        xp, new = xp_of(rows), len(rows)
        rows = rows.astype("f8")
        mean = rows.mean(axis=0)
        rows -= mean
        scatter = (rows * rows).sum()
        if self.vectors is not None:
            both = self._rows + new
            between = (self._rows * new / both) ** 0.5 * (self._mean - mean)
            scatter += self._scatter + (between * between).sum()
            mean += self._rows / both * (self._mean - mean)
            rows = xp.concatenate([self._lengths[:, None] * self.vectors, rows, between[None]])
        before = self.vectors
        _, right = nearest(rows, self.count)
        self._lengths = (right * right).sum(axis=1)  # the singular values: a row is as long as the root of its own
        vectors = right / xp.sqrt(xp.maximum(self._lengths, np.finfo("f8").tiny))[:, None]
        largest = xp.take_along_axis(vectors, abs(vectors).argmax(axis=1)[:, None], axis=1)
        self.vectors = vectors * xp.where(largest < 0, -1.0, 1.0)
        self._rows, self._mean, self._scatter = self._rows + new, mean, scatter
        self.ratios = to_host(self._lengths**2 / scatter)
        if before is not None:
            self.steady = to_host((self.vectors * before).sum(axis=1) >= cosine)


def shared_out(ratios: Mapping[str, Array], budget: int) -> dict[str, int]:
    """How many of its directions each layer gets if the `budget` with the largest ratios of all of them are taken."""
    owners = [name for name, own in ratios.items() for _ in own]
    best = np.argsort(-np.concatenate(list(ratios.values())), kind="stable")[:budget]
    chosen = [owners[at] for at in best]
    return {name: chosen.count(name) for name in ratios}


def explore(
    batches: Iterable[Mapping[str, Array]], ranks: Mapping[str, int], rho: float, tau: float
) -> dict[str, Array]:
    """The directions (rank, width) of each layer from what it reads, (rows, width) in each of `batches`.

    A layer gets up to rho times its rank in `ranks`, all together the sum of these, and perhaps none. Batches are taken
    until what is needed is steady. Layers that read the same array are explored once.
    """
    got = dict(ranks)
    tracks: dict[str, Directions] = {}
    of: dict[str, str] = {}
    for inputs in batches:
        if not tracks:
            first: dict[int, str] = {}
            of = {name: first.setdefault(id(inputs[name]), name) for name in ranks}
            for name in first.values():
                most = max(round(rho * rank) for other, rank in ranks.items() if of[other] == name)
                tracks[name] = Directions(min(most, inputs[name].shape[1]))
            got = {name: tracks[of[name]].count for name in ranks}
        moving = [name for name, track in tracks.items() if not track.steady[: got[name]].all()]
        if not moving:
            break
        for name in moving:
            if len(inputs[name]) >= tracks[name].count:
                tracks[name].add(inputs[name], tau)
        if all(track.vectors is not None for track in tracks.values()):
            got = shared_out({name: tracks[of[name]].ratios for name in ranks}, sum(ranks.values()))
    for name, track in tracks.items():
        if track.vectors is None:
            raise RefpeftError(
                f"{track.count} directions are asked for at {name}, but no batch has as many tokens: take a larger "
                "batch, or a smaller r or rho"
            )
    return {name: tracks[of[name]].vectors[: got[name]] for name in ranks}
