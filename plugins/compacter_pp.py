"""Compacter++: `compacter` after the feed-forward part alone: h + U f(D h + d) + u, D and U sums of Kronecker products.

D = sum_i A_i (x) (s_i t_i), i < n, and U likewise, the A_i (n, n) the same in all layers. Karimi Mahabadi et al., 2021,
arXiv:2106.04647. The authors' code trains the normalizations too (`norms`). AdapterHub's reads the layer's output, its
residual included: targets = ["@block_out"].

First values: A normal of deviation 1e-4, s and t uniform in +-sqrt(12 / (rows + columns)), d and u zero: nearly the
identity. Trained: rule (n, n, n), the A_i, once; in each layer down_s (n, size / n, rank), down_t (n, rank, dim / n),
down_bias, up_s, up_t, up_bias: 2 rank (size + dim) + size + dim numbers a layer.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import hookimpl
from refpeft.bottleneck import RULE_STD, check_phm, factored_bottleneck, factored_values

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 24  # of the bottleneck
    n: int = 4  # how many Kronecker products are summed up; divides size and dim
    rank: int = 1  # of s t
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "gelu_tanh"
    norms: bool = True  # train the normalizations too
    targets: tuple[str, ...] | str = ("@mlp_out",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if min(self.size, self.rank) < 1:
            raise ValueError(f"size is {self.size} and rank is {self.rank}: expected 1 or more")


@hookimpl
def peft_check(sites, cfg):
    check_phm(sites, cfg)


@hookimpl
def peft_shared(cfg, rng):
    return {"rule": RULE_STD * rng.standard_normal((cfg.n, cfg.n, cfg.n))}


@hookimpl
def peft_params(site, cfg, rng):
    return factored_values(rng, cfg, site.shape[0])


@hookimpl
def peft_companions(cfg):
    return {"ln_tuning": {"layers": cfg.layers}} if cfg.norms else {}


@hookimpl
def peft_block(x, base, p, cfg, shared):
    h = base(x)
    return h + factored_bottleneck(h, p, shared.rule, cfg.activation)
