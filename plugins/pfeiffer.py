"""One bottleneck adapter a layer, after its feed-forward part: y + U f(D y + d) + u, y the layer's output.

Pfeiffer et al., 2020, arXiv:2005.00052, equation 1 (MAD-X), found by search in arXiv:2005.00247. In a post-norm layer,
as BERT's, it reads what the last normalization gives and is added before it: norm(z + U f(D norm(z) + d) + u), with z
the sum that is normalized. A pre-norm layer has none there: it reads the layer's output, its residual included, as in
AdapterHub. To read what the feed-forward part alone gives, and be added inside its residual, as in arXiv:2110.04366
(sequential), LLM-Adapters (series) and Compacter's comparison on T5: targets = ["@mlp_out"].

First values: D and U normal of deviation 0.02, as in AdapterHub, d and u zero: nearly the identity. Trained: down
(size, dim), down_bias, up (dim, size), up_bias: 2 size dim + size + dim numbers a layer. Their size there is dim / 16.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import hookimpl
from refpeft.bottleneck import behind_layer, bottleneck, check_size, normal_values

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 64  # of the bottleneck
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "relu"
    init_std: float = 0.02  # of the first weights
    targets: tuple[str, ...] | str = ("@block_out", "@mlp_norm")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    __post_init__ = check_size


@hookimpl
def peft_params(site, sites, cfg, rng):
    return normal_values(rng, cfg.size, site.shape[0], cfg.init_std) if behind_layer(site, sites) else None


@hookimpl
def peft_block(x, base, p, cfg):
    h = base(x)
    return h + bottleneck(h, p, cfg.activation)


@hookimpl
def peft_norm(x, base, p, cfg):
    return base(x + bottleneck(base(x), p, cfg.activation))
