"""Adapter-L: a bottleneck after each layer that reads through a normalization of its own: y + U relu(D LN(y) + d) + u.

Lin et al., 2020, arXiv:2004.03829, section 3 (and the authors' code: y is the layer's output, its residual included);
the name is the LoRA paper's (arXiv:2106.09685, section 5.1). LN is a LayerNorm with gain and shift, as eps `eps`.

First values: D and U normal of deviation 0.02, gain ones, the rest zero: nearly the identity. Trained: down (size,
dim), down_bias, up (dim, size), up_bias, gain and shift (dim,): 2 size dim + size + 3 dim numbers a layer.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import fused, hookimpl
from refpeft.bottleneck import bottleneck, check_size, normal_values

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 64  # of the bottleneck
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "relu"
    init_std: float = 0.02  # of the first weights
    eps: float = 1e-5  # of the normalization
    targets: tuple[str, ...] | str = ("@block_out",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    __post_init__ = check_size


@hookimpl
def peft_params(site, cfg, rng):
    (dim,) = site.shape
    return normal_values(rng, cfg.size, dim, cfg.init_std) | {"gain": np.ones(dim), "shift": np.zeros(dim)}


@hookimpl
def peft_block(x, base, p, cfg):
    h = base(x)
    return h + bottleneck(fused.layer_norm(h, p.gain, p.shift, eps=cfg.eps), p, cfg.activation)
