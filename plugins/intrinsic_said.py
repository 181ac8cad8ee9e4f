"""Intrinsic dimension, SAID: all weights move with one short vector: W_i = W0_i + s_i P_i theta.

Aghajanyan et al., 2020, arXiv:2012.13255, section 3; without `said` no s_i: DID of Li et al., 2018, arXiv:1804.08838.
Biases, norms and embeddings are such W_i too. P_i is the Fastfood projection, refpeft.fourier.fastfood, as in the
authors' code: one block as large as W_i, or as theta where that is longer (they cut it off there, and their gradients
miss a factor). What is random in it is made of `projection_seed` and W_i's name for each product, and in no file.

First values, which leave the model as it is: theta zero, s_i one. Trained: `d` numbers in all, an s_i for each of m
weights and biases, and theta (d - m,); without `said` theta (d,).
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from refpeft import RefpeftError, fourier, hookimpl, ops
from refpeft.tensor import Tensor, checkpoint

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    d: int = 10_000
    said: bool = True  # a trained scale for every weight
    projection_seed: int = 0
    targets: tuple[str, ...] | str = ("*",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_shared(sites, cfg):
    scales = cfg.said * sum(owner == site.name for site in sites for _, owner in _parts(site).values())
    most = sum(prod(site.shape) for site in sites)
    if not scales < cfg.d <= most:
        raise RefpeftError(f"intrinsic_said: d is {cfg.d}: expected {scales + 1} to {most} for these targets")
    return {"theta": np.zeros(cfg.d - scales)}


@hookimpl
def peft_params(site, cfg):
    owners = {part: owner for part, (_, owner) in _parts(site).items()} if cfg.said else {}
    return {f"{a}_scale": np.ones(1) if one == site.name else f"{one}.{a}_scale" for a, one in owners.items()}


@hookimpl
def peft_linear(x, base, p, cfg, site, shared):
    return base(x) + checkpoint(lambda x: ops.linear(x, *_moves(p, cfg, site, shared.theta).values()), x)


@hookimpl
def peft_embedding(ids, base, p, cfg, site, shared):
    return base(ids) + checkpoint(lambda: ops.take(*_moves(p, cfg, site, shared.theta).values(), indices=ids))


@hookimpl
def peft_norm(x, base, p, cfg, site, shared):
    return base(x, **{part: getattr(base, part) + move for part, move in _moves(p, cfg, site, shared.theta).items()})


@hookimpl
def peft_merge(weight, bias, p, cfg, site, shared):
    moves = _moves(p, cfg, site, Tensor(shared.theta))
    return {part: {"weight": weight, "bias": bias}[part] + move.data for part, move in moves.items()}


def _parts(site):
    """The shape of the weight and of the bias, and the name of the site that each belongs to."""
    weight = {"weight": (site.shape, site.tied or site.name)}
    return weight | ({} if site.bias is None else {"bias": (site.bias.shape, site.name)})


def _moves(p, cfg, site, theta):
    return {
        part: fourier.fastfood_from_seed(theta, shape, cfg.projection_seed, f"{owner}.{part}")
        * vars(p).get(f"{part}_scale", 1)
        for part, (shape, owner) in _parts(site).items()
    }
