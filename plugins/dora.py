"""DoRA: y = (m / |V|) V x + b, V = W + s B A, |V| the norm of each row (one for each output), s = alpha / r.

Liu et al., 2024, arXiv:2402.09353, section 4.1; |V| counts as a constant in the backward pass (section 4.3). Dropout is
of all that the difference to W x reads: W x + b + (m / |V|) V dropout(x) - W dropout(x), as in the authors' code.

First values, which leave the model as it is: A uniform in +-1 / sqrt(in), B zero, m the norms of W's rows.
Trained: A (r, in), B (out, r) and m (out,), r (in + out) + out numbers a target.
"""

from dataclasses import dataclass, field

import numpy as np

from refpeft import fused, hookimpl, lowrank, ops
from refpeft.backend import xp_of
from refpeft.lowrank import Scaled, kaiming

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Scaled):
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # rate, in training
    rslora: bool = False  # scale by alpha / sqrt(r)
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha, likewise
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_params(site, cfg, rng, weight):
    r, (out, width) = cfg.rank(site), site.shape
    A = kaiming(rng, r, width)
    in_order = weight.copy()  # so that squares are added up in the order of `peft_linear`
    return {"A": A, "B": np.zeros((out, r)), "m": _row_norms(in_order)}


@hookimpl
def peft_linear(x, base, p, cfg, site, train):
    alpha, dropped = cfg.scale(site), train.dropout(x, cfg.dropout) if train else x
    gains = lowrank.row_gains(p.m, ops.detach(p.B), ops.detach(p.A), weight=site.weight, alpha=alpha)
    frozen = base.frozen(dropped)
    direction = fused.addmm(frozen, ops.linear(dropped, p.A), p.B, alpha=alpha)
    scaled = gains * direction
    if dropped is x and base.is_frozen:
        return scaled if base.bias is None else scaled + base.bias
    return base(x) + (scaled - frozen)  # the difference first: it is 0 at the start


@hookimpl
def peft_merge(weight, frozen, p, cfg, site):
    direction = frozen + cfg.scale(site) * (p.B @ p.A)
    return weight + ((p.m / _row_norms(direction))[:, None] * direction - frozen)


def _row_norms(weight):
    return xp_of(weight).sqrt((weight * weight).sum(axis=1))
