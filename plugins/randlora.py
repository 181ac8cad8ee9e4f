"""RandLoRA: y = W x + b + s sum_j B_j L_j A G_j x, A and B_j random and frozen, diagonal L_j and G_j trained.

Albert et al., 2025, arXiv:2502.00987, section 4, s = alpha / r: N = smaller side / r terms of rank r make an update of
full rank. For a layer with more inputs than outputs the sum is transposed. A and B are one for all targets, which use
as much of them as they have rows and columns; B_j is columns j, j + N, j + 2N ... of that part of B, as in PEFT. The
sum is as large as W, so it is computed again in the backward pass; A and B, of a weight's size too, are in the
adapter's file.

First values, which leave the model as it is: A and B uniform of deviation 1, L zero, G 1 / its longer side. Trained:
L (r, N) and G (N, smaller side), N (r + smaller side) numbers a target.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, hookimpl, ops
from refpeft.tensor import Tensor, checkpoint

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    r: int = 32  # of a term
    alpha: float = 640.0
    dropout: float = 0.0  # rate, of x, in training
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.r < 1 or not self.alpha or not 0 <= self.dropout < 1:
            raise ValueError("expected r of at least 1, alpha other than 0, and dropout from 0 to less than 1")


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        if cfg.r > min(site.shape):
            most, where = min(min(s.shape) for s in sites), f"{site.name}, which is {site.shape}"
            raise RefpeftError(f"randlora: r is {cfg.r}, more than a side of {where}: take {most} or less")


@hookimpl
def peft_shared(sites, cfg, rng):
    small, large = sorted(max(sides) for sides in zip(*(site.shape for site in sites), strict=True))
    shapes = {"A": (cfg.r, 1, small), "B": (large, -(-small // cfg.r), cfg.r)}
    return {name: Tensor(rng.uniform(-(3**0.5), 3**0.5, shape)) for name, shape in shapes.items()}


@hookimpl
def peft_params(site, cfg):
    small = min(site.shape)
    count = -(-small // cfg.r)
    return {"L": np.zeros((cfg.r, count)), "G": np.full((count, small), 1 / max(count, small))}


@hookimpl
def peft_linear(x, base, p, cfg, site, shared, train):
    def update(x):
        first, second = _factors(p.L, p.G, shared, site)
        return ops.linear(ops.linear(x, first), second)

    dropped = train.dropout(x, cfg.dropout) if train else x
    return base(x) + cfg.alpha / cfg.r * checkpoint(update, dropped)


@hookimpl
def peft_merge(weight, p, cfg, site, shared):
    first, second = _factors(p.L, p.G, shared, site)
    return weight + cfg.alpha / cfg.r * (second @ first)


def _factors(L, G, shared, site):
    """What x meets first (r N, in), and then (out, r N); the one at the smaller side has the diagonals."""
    (count, small), large = G.shape, max(site.shape)
    A, B = shared.A[:, :, :small], shared.B[:large, :count].reshape(large, -1)
    scaled = (L.reshape(*L.shape, 1) * A * G).reshape(-1, small)
    return (scaled, B) if site.shape[1] == small else (B.T, scaled.T)
