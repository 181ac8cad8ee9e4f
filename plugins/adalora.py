"""AdaLoRA: y = W x + b + s P diag(E) Q dropout(x); the least important triplets (p_i, E_i, q_i) go during training.

Zhang et al., 2023, arXiv:2303.10512, Algorithm 1; s = alpha / (init_r + 1e-5) is the authors'. A number is as important
as the averages of |number * gradient| and of its distance from that average say (eq. 8 to 11), a triplet as E_i and the
means of p_i and q_i (eq. 7). The most important ones of all targets are kept, the others' E_i set to 0: init_r a target
at first, target_r at last (eq. 12). The objective has gamma times the mean of all |P^T P - I| and |Q Q^T - I|, as the
authors' code, or, with `orth = "paper"`, the sum of their squares (eq. 4), of which far less is enough.

First values, which leave the model as it is: P and Q normal of deviation 0.02, E zero.
Trained: P (out, r), E (r,) and Q (r, in), with r = init_r: init_r (in + out + 1) numbers a target.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refpeft import RefpeftError, fused, hookimpl, ops, triplets
from refpeft.targets import patterned

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(triplets.Schedule):
    init_r: int = 12  # triplets of a target at first
    target_r: int = 8  # and in the end, on average
    alpha: float = 12.0  # s is 1, as in the paper
    dropout: float = 0.0  # rate, in training
    gamma: float = 0.1  # weight of the penalty, the authors' for their form of it
    orth: Literal["official", "paper"] = "official"
    tinit: int = 0  # steps before any triplet goes
    tfinal: int = 0  # steps after the last ones went
    delta_t: int = 1  # steps from one choice to the next
    beta1: float = 0.85  # of the averages of sensitivities
    beta2: float = 0.85  # of the averages of distances from these
    compat: Literal["none", "official"] = "none"  # numbers of after the step times its gradient, as authors and PEFT
    rank_pattern: dict[str, int] = field(default_factory=dict)  # triplets left, by names, in a file of a trained one
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_params(site, cfg, rng):
    r, (out, width) = patterned(cfg.rank_pattern, site, cfg.init_r), site.shape
    if r > min(site.shape):
        raise RefpeftError(f"adalora: init_r is {r}, but {site.name} has room for {min(site.shape)} orthogonal vectors")
    P, Q = 0.02 * rng.standard_normal((out, r)), 0.02 * rng.standard_normal((r, width))
    return {"P": P, "E": np.zeros(r), "Q": Q} if r else None


@hookimpl
def peft_linear(x, base, p, cfg, train):
    dropped = train.dropout(x, cfg.dropout) if train else x
    return fused.addmm(base(x), ops.linear(dropped, p.Q) * p.E, p.P, alpha=cfg.scale)


@hookimpl
def peft_merge(weight, p, cfg):
    return weight + cfg.scale * (p.P * p.E) @ p.Q


@hookimpl
def peft_penalty(p, cfg, sites):
    squares = [triplets.distance(p.P.T @ p.P), triplets.distance(p.Q @ p.Q.T)]
    if cfg.orth == "official":
        return sum(map(ops.sqrt, squares)) * (cfg.gamma / (2 * len(sites)))
    return sum(squares) * cfg.gamma


@hookimpl
def peft_state(p):
    return triplets.averages(p)


@hookimpl
def peft_step(update, layers, cfg, step, total):
    triplets.step(update, layers, cfg, step + 1, total)
