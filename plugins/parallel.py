"""Adapters beside a part of a layer, or behind it: y = f(x) + s (U a(D x + d) + u), a the activation, f what is there.

He et al., 2022, arXiv:2110.04366, section 3.3: the scaled parallel adapter at the feed-forward part, s = 4; with s = 1
the parallel one. `placement` = "series" reads f(x) in place of x (Hu et al., 2023, arXiv:2304.01933, section 2:
LLM-Adapters, with both placements, s = 1 and tanh). It also stands at single linear layers, as LLM-Adapters' code does.
In pre-norm models x is what the part reads, behind its normalization; AdapterHub's adapter reads the residual stream
before it, which is not offered.

First values, which leave the model as it is: D uniform in +-1 / sqrt(in), the rest zero. Trained: down (size, in),
down_bias, up (out, size), up_bias: size (in + out) + size + out numbers a target; s (1,) too where `learn_scale`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.bottleneck import bottleneck, check_size

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 64  # of the bottleneck
    scale: float = 4.0  # s; its first value where it is learned
    learn_scale: bool = False
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "relu"
    placement: Literal["parallel", "series"] = "parallel"
    targets: tuple[str, ...] | str = ("@mlp_out",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    __post_init__ = check_size


@hookimpl
def peft_params(site, cfg, rng):
    out = site.shape[0]
    width = out if cfg.placement == "series" else site.shape[-1]
    values = {
        "down": rng.uniform(-(width**-0.5), width**-0.5, (cfg.size, width)),
        "down_bias": np.zeros(cfg.size),
        "up": np.zeros((out, cfg.size)),
        "up_bias": np.zeros(out),
    }
    return values | ({"scale": np.full(1, cfg.scale)} if cfg.learn_scale else {})


@hookimpl
def peft_block(x, base, p, cfg):
    return _beside(x, base, p, cfg)


@hookimpl
def peft_linear(x, base, p, cfg):
    return _beside(x, base, p, cfg)


def _beside(x, base, p, cfg):
    h = base(x)
    change = bottleneck(h if cfg.placement == "series" else x, p, cfg.activation)
    return h + (p.scale if cfg.learn_scale else cfg.scale) * change
