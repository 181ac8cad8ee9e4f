"""Bottleneck adapters behind each sub-layer, inside its residual: h + U f(D h + d) + u, with h the sub-layer's output.

Houlsby et al., 2019, arXiv:1902.00751, section 2.1. The authors' code (google-research/adapter-bert) has f = gelu in
its tanh form and size 64, and trains the normalizations too (`norms`).

First values: D and U normal of deviation 1e-3 (theirs cuts the tails off at two deviations), d and u zero: nearly the
identity. Trained: down (size, dim), down_bias, up (dim, size), up_bias: 2 size dim + size + dim numbers a place.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import hookimpl
from refpeft.bottleneck import bottleneck, check_size, normal_values

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 64  # of the bottleneck
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "gelu_tanh"
    init_std: float = 1e-3  # of the first weights
    norms: bool = True  # train the normalizations too
    targets: tuple[str, ...] | str = ("@attn_out", "@mlp_out")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    __post_init__ = check_size


@hookimpl
def peft_params(site, cfg, rng):
    return normal_values(rng, cfg.size, site.shape[0], cfg.init_std)


@hookimpl
def peft_companions(cfg):
    return {"ln_tuning": {"layers": cfg.layers}} if cfg.norms else {}


@hookimpl
def peft_block(x, base, p, cfg):
    h = base(x)
    return h + bottleneck(h, p, cfg.activation)
