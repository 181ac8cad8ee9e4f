"""What methods of low rank have in common, for their authors: ranks, scales, the nearest matrix of a rank."""

from __future__ import annotations

import numpy as np

from .backend import Array, xp_of
from .rng import Stream
from .targets import patterned


class Scaled:
    """For a Config with `r`, `alpha`, `rank_pattern` and `alpha_pattern`, and `rslora`, `dropout` where it has them."""

    rslora = False
    dropout = 0.0

    def __post_init__(self):
        if min((self.r, *self.rank_pattern.values())) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("expected r of at least 1, and dropout of at least 0 and less than 1")

    def rank(self, site) -> int:
        """The rank at this site."""
        return patterned(self.rank_pattern, site, self.r)

    def scale(self, site) -> float:
        """alpha / r at this site; alpha / sqrt(r) with rslora (arXiv:2312.03732)."""
        return patterned(self.alpha_pattern, site, self.alpha) / self.rank(site) ** (0.5 if self.rslora else 1)


def kaiming(rng: Stream, r: int, width: int) -> Array:
    """First values (r, width), uniform in +-1 / sqrt(width): kaiming_uniform(a=sqrt(5)), as in loralib and PEFT."""
    bound = width**-0.5
    return rng.uniform(-bound, bound, (r, width))


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
