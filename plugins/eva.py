"""EVA: LoRA that begins with the directions in which a layer's inputs vary most: y = W x + b + s B A dropout(x).

Paischer et al., 2024, arXiv:2410.07170, section 3. An incremental SVD goes through batches of what each target reads
(less its mean, as in the authors' code) until the right singular vectors turn no more: cosines of at least `tau`. Those
of all targets that explain the largest shares of variance are taken, r times the targets: a target gets up to rho r, or
none and is left out. s = alpha / r, whatever the rank then is (with `rslora` alpha sqrt(rank) / r), or alpha / rank
(alpha / sqrt(rank)) without `adjust_scaling`. All tokens count, as in PEFT where it is given no labels.

First values, which leave the model as it is: A those vectors (until data are there, as LoRA's), B zero.
Trained: A (r, in) and B (out, r), r (in + out) numbers a target, r on average.
"""

from dataclasses import dataclass, field

import numpy as np

from refpeft import directions, fused, hookimpl, ops
from refpeft.lowrank import Scaled, kaiming
from refpeft.targets import patterned

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Scaled):
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # rate, of what A reads, in training
    rslora: bool = False
    rho: float = 2.0  # the highest rank of a target is rho times r; 1 leaves the ranks as they are
    tau: float = 0.99  # cosine from which a vector counts as found
    batches: int = 200  # that are looked at, at most
    adjust_scaling: bool = True  # alpha grows with the rank that a target has got
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha, likewise
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        super().__post_init__()
        if self.rho < 1 or not 0 < self.tau <= 1 or self.batches < 1:
            raise ValueError("expected rho of at least 1, tau above 0 and at most 1, and batches of at least 1")

    def alpha_of(self, site, rank):
        return patterned(self.alpha_pattern, site, self.alpha) * (rank / self.rank(site) if self.adjust_scaling else 1)

    def scale_of(self, site, rank):
        return self.alpha_of(site, rank) / rank ** (0.5 if self.rslora else 1)


@hookimpl
def peft_params(site, cfg, rng):
    r, (out, width) = cfg.rank(site), site.shape
    return {"A": kaiming(rng, r, width), "B": np.zeros((out, r))}


@hookimpl
def peft_survey(layers, cfg, survey):
    ranks = {layer.site.name: cfg.rank(layer.site) for layer in layers}
    batches = survey.inputs([layer.site for layer in layers], cfg.batches)
    found = directions.explore(batches, ranks, cfg.rho, cfg.tau)
    outs = {layer.site.name: layer.site.shape[0] for layer in layers}
    return {name: {"A": A, "B": np.zeros((outs[name], len(A)))} if len(A) else None for name, A in found.items()}


@hookimpl
def peft_linear(x, base, p, cfg, site, train):
    dropped = train.dropout(x, cfg.dropout) if train else x
    return fused.addmm(base(x), ops.linear(dropped, p.A), p.B, alpha=cfg.scale_of(site, p.A.shape[0]))


@hookimpl
def peft_merge(weight, p, cfg, site):
    return weight + cfg.scale_of(site, len(p.A)) * (p.B @ p.A)
