"""PHM adapters: bottlenecks whose matrices are sums of Kronecker products: h + U f(D h + d) + u.

D = sum_i A_i (x) B_i, i < n, with A_i (n, n) and B_i (size / n, dim / n), and U likewise; nothing is shared. Karimi
Mahabadi et al., 2021, arXiv:2106.04647 (the baseline PHM-Adapter), of layers of arXiv:2102.08597; places as houlsby's.
The authors' code trains the normalizations too (`norms`).

First values: A normal of deviation 1e-4, B uniform in +-sqrt(12 / (rows + columns)), d and u zero: nearly the identity.
Trained: down (n, size / n, dim / n), down_rule (n, n, n), down_bias, up (n, dim / n, size / n), up_rule, up_bias: 2
size dim / n + 2 n^3 + size + dim numbers a place.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.bottleneck import RULE_STD, bottleneck, check_phm, check_size, glorot, phm

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 24  # of the bottleneck
    n: int = 4  # how many Kronecker products are summed up; divides size and dim
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "gelu_tanh"
    norms: bool = True  # train the normalizations too
    targets: tuple[str, ...] | str = ("@attn_out", "@mlp_out")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    __post_init__ = check_size


@hookimpl
def peft_check(sites, cfg):
    check_phm(sites, cfg)


@hookimpl
def peft_params(site, cfg, rng):
    n, (dim,), values = cfg.n, site.shape, {}
    for name, out, width in (("down", cfg.size, dim), ("up", dim, cfg.size)):
        values[name] = glorot(rng, n, out // n, width // n)
        values[f"{name}_rule"] = RULE_STD * rng.standard_normal((n, n, n))
        values[f"{name}_bias"] = np.zeros(out)
    return values


@hookimpl
def peft_companions(cfg):
    return {"ln_tuning": {"layers": cfg.layers}} if cfg.norms else {}


@hookimpl
def peft_block(x, base, p, cfg):
    h = base(x)
    down, up = phm(p.down_rule, p.down), phm(p.up_rule, p.up)
    weights = SimpleNamespace(down=down, down_bias=p.down_bias, up=up, up_bias=p.up_bias)
    return h + bottleneck(h, weights, cfg.activation)
