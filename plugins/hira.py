"""HiRA: W' = W + W * (B A), an element-wise product with a matrix of low rank, itself of high rank.

Huang et al., ICLR 2025, https://openreview.net/forum?id=TwJrTz9cRS, section 3.2. No scale: W is it.

First values, which leave the model as it is: A uniform in +-1 / sqrt(in), B zero.
Trained: A (r, in) and B (out, r), r (in + out) numbers a target.
"""

from dataclasses import dataclass, field

import numpy as np

from refpeft import fused, hookimpl
from refpeft.lowrank import Ranked, kaiming

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Ranked):
    r: int = 32
    dropout: float = 0.0  # rate, of what W * (B A) reads, in training
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_params(site, cfg, rng):
    r, (out, width) = cfg.rank(site), site.shape
    return {"A": kaiming(rng, r, width), "B": np.zeros((out, r))}


@hookimpl
def peft_linear(x, base, p, cfg, site, train):
    dropped = train.dropout(x, cfg.dropout) if train else x
    return base(x) + fused.hadamard_linear(dropped, p.B, p.A, weight=site.weight)


@hookimpl
def peft_merge(weight, frozen, p):
    return weight + frozen * (p.B @ p.A)
