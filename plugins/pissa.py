"""PiSSA: LoRA of a weight's largest singular values, the rest frozen: y = (W - s B0 A0 + s B A) x + b, s = alpha / r.

Meng et al., 2024, arXiv:2404.02948, section 3. With W = U S V^T first values, also kept as A0 and B0, are
A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s), so that the model is as it was, up to rounding. With a quantizer,
W - s B0 A0 is what is quantized (QPiSSA, section 4), with smaller errors than W's.

Trained: A (r, in) and B (out, r), r (in + out) numbers a target. Constant: A0 and B0, as large.
"""

from dataclasses import dataclass, field

import numpy as np

from refpeft import fused, hookimpl, lowrank, ops
from refpeft.lowrank import Scaled
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Scaled):
    of_the_weight = True
    r: int = 8
    alpha: float = 8.0  # the paper has r: s is 1
    dropout: float = 0.0  # rate, of what A reads, in training
    rslora: bool = False  # scale by alpha / sqrt(r)
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha, likewise
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_params(site, cfg):
    r, (out, width) = cfg.rank(site), site.shape
    A, B = np.zeros((r, width)), np.zeros((out, r))
    return {"A": A, "B": B, "A0": Tensor(A), "B0": Tensor(B)}


@hookimpl
def peft_fit(site, cfg, original):
    B, A = (half / cfg.scale(site) ** 0.5 for half in lowrank.nearest(original, cfg.rank(site)))
    return {"A": A, "B": B, "A0": A, "B0": B}


@hookimpl
def peft_base(site, cfg, p, original):
    return original - cfg.scale(site) * (p.B0.astype("f8") @ p.A0.astype("f8"))


@hookimpl
def peft_linear(x, base, p, cfg, site, train):
    dropped = train.dropout(x, cfg.dropout) if train else x
    return fused.addmm(base(x), ops.linear(dropped, p.A), p.B, alpha=cfg.scale(site))


@hookimpl
def peft_merge(weight, p, cfg, site):
    return weight + cfg.scale(site) * (p.B @ p.A)
