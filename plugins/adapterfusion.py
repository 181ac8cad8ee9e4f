"""Attention over trained adapters: h + V (s_1 z_1 + ... + s_n z_n), z_i what the i-th makes of h, s = softmax(q . k_i).

Pfeiffer et al., 2020, arXiv:2005.00247, section 3: q = Q h + a, k_i = K z_i, z_i = U_i f(D_i h + d_i) + u_i.
`adapters` are directories of trained ones of one size and activation (pfeiffer, adapterdrop, houlsby without norms);
what they have at other places is left out. The loss gets `penalty` times the sum of (V - I)^2 of each place. As in
AdapterHub the residual is no part of z_i, and there is a; a bias of K, which it has too, would change nothing. Its
option of a temperature is not offered: it falls from 50 with every pass, those of evaluation too, and no file has it.

First values, as there: Q and K normal of deviation 0.02, a zero, V one on the diagonal and 1e-6 elsewhere: about the
mean of the adapters is added. Trained: query, key, value (dim, dim), query_bias: 3 dim^2 + dim numbers a place.
Constant, and kept with this adapter: down (n, size, dim), down_bias, up (n, dim, size), up_bias.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import RefpeftError, hookimpl, ops
from refpeft.backend import xp_of
from refpeft.bottleneck import behind_layer, check_size, fused_bottlenecks
from refpeft.tensor import Tensor
from refpeft.transfer import bottlenecks

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    adapters: tuple[str, ...] = ()  # directories, two or more
    size: int = 64  # of their bottlenecks
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "relu"  # theirs
    penalty: float = 0.01  # on the distance of V from the identity
    targets: tuple[str, ...] | str = ("@block_out", "@mlp_norm")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    __post_init__ = check_size


@hookimpl
def peft_check(cfg):
    if len(cfg.adapters) < 2:
        raise RefpeftError("adapterfusion.adapters: name two or more directories of adapters")


@hookimpl
def peft_params(site, sites, cfg, rng):
    if not behind_layer(site, sites):
        return None
    dim, n, zeros = site.shape[0], len(cfg.adapters), np.zeros
    values = {name: 0.02 * rng.standard_normal((dim, dim)) for name in ("query", "key")}
    values |= {"query_bias": zeros(dim), "value": np.where(np.eye(dim), 1, 1e-6)}
    shapes = {"down": (cfg.size, dim), "down_bias": (cfg.size,), "up": (dim, cfg.size), "up_bias": (dim,)}
    return values | {name: Tensor(zeros((n, *shape))) for name, shape in shapes.items()}


@hookimpl
def peft_fit(site, cfg):
    return bottlenecks(cfg.adapters, site, cfg.size, cfg.activation)


@hookimpl
def peft_block(x, base, p, cfg):
    h = base(x)
    return h + fused_bottlenecks(h, p, cfg.activation)


@hookimpl
def peft_norm(x, base, p, cfg):
    return base(x + fused_bottlenecks(base(x), p, cfg.activation))


@hookimpl
def peft_penalty(p, cfg):
    off = p.value - Tensor(xp_of(p.value.data).eye(p.value.shape[0], dtype=p.value.dtype))
    return cfg.penalty * ops.sum(off * off)
