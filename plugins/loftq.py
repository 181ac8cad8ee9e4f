"""LoftQ: LoRA on quantized weights, with first values that make up for the quantizer's error: W is about Q + s B A.

Li et al., 2023, arXiv:2310.08659, Algorithm 1, `iterations` times: Q = quantized W - s B A, then s B A = the matrix of
rank r nearest to W - Q, by SVD. W is the checkpoint's weight, s = alpha / r as in LoRA (alpha / sqrt(r) with `rslora`),
Q in the run's quantizer's format. Quantizing may lead away from W (a block's scale may grow): the nearest is taken.

Trained: A (r, in) and B (out, r), r (in + out) numbers a target. Constant: A0 and B0 of the round before, that Q is of.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from refpeft import RefpeftError, fused, hookimpl, lowrank, ops
from refpeft.backend import xp_of
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(lowrank.Scaled):
    of_the_weight = True
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # rate, of what A reads, in training
    rslora: bool = False  # scale by alpha / sqrt(r)
    iterations: int = 5
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError("expected iterations of at least 1")


@hookimpl
def peft_check(sites, fit):
    for site in sites:
        if fit and not site.quantized:
            raise RefpeftError(f"loftq: {site.name} is dense: give a quantizer, such as nf4, or other targets")


@hookimpl
def peft_params(site, cfg):
    A, B = np.zeros((cfg.r, site.shape[1])), np.zeros((site.shape[0], cfg.r))
    return {"A": A, "B": B, "A0": Tensor(A), "B0": Tensor(B)}


@hookimpl
def peft_fit(site, cfg, original, requantize):
    xp, s, least = xp_of(original), cfg.scale(site), np.inf
    A, B = xp.zeros((cfg.r, site.shape[1])), xp.zeros((site.shape[0], cfg.r))
    for _ in range(cfg.iterations):
        before = SimpleNamespace(A0=A, B0=B)
        error = original - requantize(peft_base(site, cfg, before, original))().astype("f8")
        B, A = ((half / s**0.5).astype(original.dtype) for half in lowrank.nearest(error, cfg.r))
        distance = xp.linalg.norm(error - s * (B @ A))
        if distance < least:
            least, nearest = distance, {"A": A, "B": B, **vars(before)}
    return nearest


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
