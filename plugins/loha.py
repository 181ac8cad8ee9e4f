"""LoHa: W' = W + s (A1 B1) * (A2 B2), the element-wise product of two matrices of rank r, of rank r^2; s = alpha / r.

Yeh et al., 2023, arXiv:2309.14859, section 3.2, after FedPara (arXiv:2108.06098, whose Proposition 1 is used here: the
product is P Q, with the products of all pairs of columns of A1 and A2 in P, of rows of B1 and B2 in Q).

First values, which leave the model as it is. `init = "lycoris"`, the authors' code: A1 normal of deviation 0.1, B1 and
B2 normal, A2 zero. "kaiming", PEFT's: B2 zero, the others uniform in +-1 / sqrt(columns).
Trained: A1 and A2 (out, r), B1 and B2 (r, in), 2 r (in + out) numbers a target.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refpeft import fused, hookimpl, ops
from refpeft.lowrank import Scaled

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Scaled):
    r: int = 8
    alpha: float = 8.0
    init: Literal["lycoris", "kaiming"] = "lycoris"
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha, likewise
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_params(site, cfg, rng):
    r, (out, width) = cfg.rank(site), site.shape
    shapes = {"A1": (out, r), "B1": (r, width), "A2": (out, r), "B2": (r, width)}
    if cfg.init == "kaiming":
        first = {k: rng.uniform(-(shape[1] ** -0.5), shape[1] ** -0.5, shape) for k, shape in shapes.items()}
        return first | {"B2": np.zeros((r, width))}
    first = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return first | {"A1": 0.1 * first["A1"], "A2": np.zeros((out, r))}


@hookimpl
def peft_linear(x, base, p, cfg, site):
    r, (out, width) = cfg.rank(site), site.shape
    P = ops.reshape(p.A1, shape=(out, r, 1)) * ops.reshape(p.A2, shape=(out, 1, r))
    Q = ops.reshape(p.B1, shape=(r, 1, width)) * ops.reshape(p.B2, shape=(1, r, width))
    P, Q = ops.reshape(P, shape=(out, r * r)), ops.reshape(Q, shape=(r * r, width))
    return fused.addmm(base(x), ops.linear(x, Q), P, alpha=cfg.scale(site))


@hookimpl
def peft_merge(weight, p, cfg, site):
    return weight + cfg.scale(site) * (p.A1 @ p.B1) * (p.A2 @ p.B2)
