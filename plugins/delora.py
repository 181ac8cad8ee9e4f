"""DeLoRA: W' = W + (lambda / r) B N A diag(w), N diagonal with 1 / (|b_i| |a_i|): angles apart from strength.

Bini et al., 2025, arXiv:2503.18225, section 3. b_i are the columns of B and a_i the rows of A, so that the norm of
(lambda / r) B N A is at most lambda; w are the norms of W's columns (one for each input), as in PEFT, which has the
method from its authors. Norms of b_i and a_i count as 1e-4 where they are less.

First values, which leave the model as it is: A uniform in +-1 / sqrt(in), B zero, lambda `lambda_initial`.
Trained: A (r, in), B (out, r) and lambda, called strength here: r (in + out) + 1 numbers a target. Constant: w (in,).
"""

from dataclasses import dataclass, field

import numpy as np

from refpeft import hookimpl, ops
from refpeft.backend import xp_of
from refpeft.lowrank import Ranked, kaiming
from refpeft.targets import patterned
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"

LEAST = 1e-4  # that a norm counts as


@dataclass(frozen=True)
class Config(Ranked):
    r: int = 8
    lambda_initial: float = 15.0
    dropout: float = 0.0  # rate, of what A reads, in training
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    lambda_pattern: dict[str, float] = field(default_factory=dict)  # lambda_initial, likewise
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        super().__post_init__()
        if 0 in (self.lambda_initial, *self.lambda_pattern.values()):
            raise ValueError("expected lambda_initial other than 0: nothing would be learned")


@hookimpl
def peft_params(site, cfg, rng, weight):
    r, (out, width) = cfg.rank(site), site.shape
    return {
        "A": kaiming(rng, r, width),
        "B": np.zeros((out, r)),
        "strength": np.full(1, patterned(cfg.lambda_pattern, site, cfg.lambda_initial)),
        "w": Tensor(xp_of(weight).sqrt((weight * weight).sum(axis=0))),
    }


@hookimpl
def peft_linear(x, base, p, cfg, train):
    dropped = train.dropout(x, cfg.dropout) if train else x
    inner = _norms(p.B, 0) * _norms(p.A, 1) * p.A.shape[0]
    return base(x) + ops.linear(p.strength / inner * ops.linear(dropped * p.w, p.A), p.B)


@hookimpl
def peft_merge(weight, p):
    xp = xp_of(weight)
    b, a = (xp.maximum(xp.sqrt((v * v).sum(axis=axis)), LEAST) for v, axis in ((p.B, 0), (p.A, 1)))
    return weight + p.B * (p.strength / (b * a * len(a))) @ p.A * p.w


def _norms(vectors, axis):
    return ops.sqrt(ops.maximum(ops.sum(vectors**2, axis=axis), LEAST**2))
