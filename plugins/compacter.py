"""Compacter: bottlenecks whose matrices are sums of Kronecker products with shared factors: h + U f(D h + d) + u.

D = sum_i A_i (x) (s_i t_i), i < n, and U likewise, with s_i (out / n, rank) and t_i (rank, in / n) of their own and the
same A_i (n, n) everywhere: the slow weights. Karimi Mahabadi et al., 2021, arXiv:2106.04647; places as houlsby's. The
authors' code trains the normalizations too (`norms`), and has f = gelu in its tanh form and size dim / 32.

First values, as there: A normal of deviation 1e-4, s and t uniform in +-sqrt(12 / (rows + columns)) (Glorot's, gain
sqrt(2); in AdapterHub normal), d and u zero: nearly the identity. Trained: rule (n, n, n), the A_i, once; at each place
down_s (n, size / n, rank), down_t (n, rank, dim / n), down_bias, up_s, up_t, up_bias: 2 rank (size + dim) + size + dim
numbers a place.
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
    targets: tuple[str, ...] | str = ("@attn_out", "@mlp_out")
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
