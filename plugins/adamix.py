"""Bottlenecks of M modules, of which every pass in training draws one at each place: h + U_j f(D_i h + d_i) + u_j.

Wang et al., 2022, arXiv:2205.12410, section 3 (AdaMix). i and j are drawn apart, anew for every place and forward pass.
A step makes two passes over its rows, with probabilities p and q of the next tokens, and minimises -log p(target) +
`consistency` / 2 (KL(p | q) + KL(q | p)), the mean over supervised positions (the logits of both exist as a whole). In
the authors' code the first of each KL is a constant in the backward pass, in the paper not; for text it has consistency
= 100. Outside of training the modules are merged: each of D, d, U and u is the mean of its M. By default all modules
have the same U and u (`share`, section 3.4 and the authors' scripts).

First values as theirs: D and U normal of deviation 0.02, d and u zero: nearly the identity. Trained: down (M, size,
dim), down_bias (M, size), up (1, dim, size), up_bias (1, dim): M (size dim + size) + dim size + dim numbers a place.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np

from refpeft import hookimpl, ops
from refpeft.bottleneck import bottleneck, check_size

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 16  # of the bottleneck
    modules: int = 4  # M
    share: Literal["up", "down", "none"] = "up"  # of what all modules have the same
    consistency: float = 1.0  # weight of the difference of two passes; 0: a single pass
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "gelu"
    init_std: float = 0.02  # of the first weights
    targets: tuple[str, ...] | str = ("@mlp_out",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        check_size(self)
        if self.modules < 1 or self.consistency < 0:
            raise ValueError("expected 1 or more modules and a consistency of 0 or more")


@hookimpl
def peft_params(site, cfg, rng):
    values = {}
    for side, shape in (("down", (cfg.size, site.shape[0])), ("up", (site.shape[0], cfg.size))):
        count = 1 if cfg.share == side else cfg.modules
        values |= {
            side: cfg.init_std * rng.standard_normal((count, *shape)),
            f"{side}_bias": np.zeros((count, shape[0])),
        }
    return values


@hookimpl
def peft_block(x, base, p, cfg, train):
    h, module = base(x), {}
    for side in (("down", "down_bias"), ("up", "up_bias")):
        every = [getattr(p, name) for name in side]
        drawn = train and train.draw(every[0].shape[0], apart=True)
        module |= {n: value[drawn] if train else ops.mean(value, axis=0) for n, value in zip(side, every, strict=True)}
    return h + bottleneck(h, SimpleNamespace(**module), cfg.activation)


@hookimpl
def peft_objective(logits, loss, mean, cfg):
    z = logits()
    if not cfg.consistency:
        return loss(z)
    log_p, log_q = ops.log_softmax(z), ops.log_softmax(logits())
    both = ops.sum((ops.exp(log_p) - ops.exp(log_q)) * (log_p - log_q), axis=-1)
    return loss(z) + cfg.consistency / 2 * mean(both)
