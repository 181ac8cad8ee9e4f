"""What methods of low rank have in common, for their authors: ranks, scales, lengths of rows, the nearest matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from .backend import Array, cast, matmul, xp_of
from .errors import RefpeftError, warn
from .ops import expect
from .rng import Stream
from .targets import patterned
from .tensor import op

if TYPE_CHECKING:
    from .sites import Site


_OF_LINEAR = {"dropout", "init", "freeze_A"}  # options of which embeddings make no use


class Ranked:
    """For a Config with `r`, and with `rank_pattern` and `dropout` where the method has them."""

    rank_pattern = MappingProxyType({})
    dropout = 0.0
    of_the_weight = False  # whether first values are the weight's own, which has no more to give than its rank
    beyond = "a product has no higher rank"  # what is so of ranks above `most`

    def __post_init__(self):
        if min((self.r, *self.rank_pattern.values())) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("expected r of at least 1, and dropout of at least 0 and less than 1")

    def rank(self, site: Site) -> int:
        """The rank at this site."""
        return patterned(self.rank_pattern, site, self.r)

    def most(self, site: Site) -> int:
        """The highest rank that is of use at this site."""
        return min(site.shape)

    def check_sites(self, name: str, sites: Iterable[Site]) -> None:
        """Warns of ranks that are too high for these sites, or raises RefpeftError where first values need them."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        vain = [key for key in _OF_LINEAR & fields.keys() if getattr(self, key) != fields[key]]
        if vain and all(site.kind == "embedding" for site in sites):
            warn(f"{name}: {min(vain)} has no effect at embeddings, and there are no other targets")
        weights = (site for site in sites if site.kind in ("linear", "embedding"))
        above = [site for site in weights if self.rank(site) > self.most(site)]
        if not above:
            return
        site = min(above, key=self.most)
        most, where = self.most(site), f"{site.name}, which is {site.shape}"
        message = f"{name}: r is {self.rank(site)}, but above {most} {self.beyond} at {where}: take {most} or less"
        if self.of_the_weight:
            raise RefpeftError(message)
        warn(message)


class Scaled(Ranked):
    """For a Config with `alpha` beside `r`, and with `alpha_pattern` and `rslora` where the method has them."""

    alpha_pattern = MappingProxyType({})
    rslora = False

    def __post_init__(self):
        super().__post_init__()
        alphas = (self.alpha, *self.alpha_pattern.values())
        if 0 in alphas or (self.of_the_weight and min(alphas) < 0):
            raise ValueError(f"alpha is {min(alphas):g}: expected a number above 0")

    def scale(self, site: Site) -> float:
        """alpha / r at this site; alpha / sqrt(r) with rslora (arXiv:2312.03732)."""
        return patterned(self.alpha_pattern, site, self.alpha) / self.rank(site) ** (0.5 if self.rslora else 1)


def kaiming(rng: Stream, r: int, width: int) -> Array:
    """First values (r, width), uniform in +-1 / sqrt(width): kaiming_uniform(a=sqrt(5)), as in loralib and PEFT."""
    bound = width**-0.5
    return rng.uniform(-bound, bound, (r, width))


@op
def row_gains(needs, m, B, A, *, weight, alpha):
    """m / |V|, |V| the norms of the rows of V = weight() + alpha B @ A: what brings these to the lengths m.

    m (out,), B (out, r), A (r, in), weight() (out, in). Gives (out,). Liu et al., 2024, arXiv:2402.09353, section 4.1.
    """
    changed = _changed(B, A, weight, alpha)
    expect("m", m, len(changed))
    norms = xp_of(changed).sqrt((changed * changed).sum(axis=1))
    return m / norms, (m, B, A, weight, alpha, norms, needs)


@row_gains.backward
def _(g, m, B, A, weight, alpha, norms, needs):
    dm = g / norms if needs[0] else None
    if not (needs[1] or needs[2]):
        return dm, None, None
    slope = (-alpha * g * m / norms**3)[:, None] * _changed(B, A, weight, alpha)  # by B @ A
    return dm, matmul(slope, A.T) if needs[1] else None, matmul(B.T, slope) if needs[2] else None


def _changed(B: Array, A: Array, weight: Callable[[], Array], alpha: float) -> Array:
    changed = matmul(B, A)
    changed *= B.dtype.type(alpha)
    changed += cast(weight(), B.dtype)
    return changed


def nearest(matrix: Array, r: int) -> tuple[Array, Array]:
    """(left (m, r), right (r, n)), float64: left @ right is nearest to a matrix (m, n) among those of rank r.

    A column of `left` is as long as its row of `right`, where the matrix has that rank. They are the SVD's, found as
    eigenvectors of the smaller of M M^T and M^T M: several times faster, and exact to about 1e-8 of the largest
    singular value.
    """
    xp = xp_of(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        left, right = nearest(matrix.T, r)
        return right.T, left.T
    matrix = matrix.astype("f8", copy=False)
    squares, vectors = xp.linalg.eigh(matrix @ matrix.T)  # of singular values, ascending
    finfo = np.finfo("f8")
    least = xp.maximum(finfo.eps * squares[-1], finfo.tiny)  # what is below is rounding; `root` shares out, no more
    vectors, root = vectors[:, : -r - 1 : -1], xp.maximum(squares[: -r - 1 : -1], least) ** 0.25
    return vectors * root, vectors.T @ matrix / root[:, None]
