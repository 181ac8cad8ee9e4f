"""MiSS: y = W x + b + M^T (sum of the shards of x): one matrix for all runs of r inputs.

Kang and Yin, 2024, arXiv:2409.15371, section 3: the update of W is M^T again and again, so that products are with r
numbers a row; the last shard is filled up with zeros. With `mini_r`, M is (r, mini_r) again and again itself. Not here:
Bat, the paper's other form, whose update is multiplied with W.

First values: M zero, so the model is unchanged. Trained: M (r, out), r out numbers a target, or r mini_r.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, fused, hookimpl, ops
from refpeft.backend import xp_of
from refpeft.structured import OUT, check_divides
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    r: int = 64  # inputs of a shard
    mini_r: int | None = None  # columns of M that are trained; none: all
    dropout: float = 0.0  # rate, of x, in training
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.r < 1 or (self.mini_r is not None and self.mini_r < 1) or not 0 <= self.dropout < 1:
            raise ValueError("expected r and mini_r of at least 1, and dropout of at least 0 and less than 1")


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        if cfg.r > site.shape[1]:
            raise RefpeftError(f"miss: r is {cfg.r}, more than the {site.shape[1]} inputs of {site.name}")
    if cfg.mini_r:
        check_divides("miss: mini_r", cfg.mini_r, sites, OUT)


@hookimpl
def peft_params(site, cfg):
    return {"M": np.zeros((cfg.r, cfg.mini_r or site.shape[0]))}


@hookimpl
def peft_linear(x, base, p, cfg, site, train):
    out, width = site.shape
    y, missing = base(x), -width % cfg.r
    x = train.dropout(x, cfg.dropout) if train else x
    if missing:
        x = ops.concat(x, Tensor(xp_of(x.data).zeros((*x.shape[:-1], missing), x.dtype)), axis=-1)
    shards = x.reshape(*x.shape[:-1], -1, cfg.r).sum(axis=-2)
    again = ops.broadcast_to(p.M.reshape(cfg.r, 1, -1), shape=(cfg.r, out // p.M.shape[1], p.M.shape[1]))
    return fused.addmm(y, shards, again.reshape(cfg.r, out).T, alpha=1.0)


@hookimpl
def peft_merge(weight, p):
    (out, width), (r, columns) = weight.shape, p.M.shape
    return weight + xp_of(weight).tile(p.M.T, (out // columns, -(-width // r)))[:, :width]
