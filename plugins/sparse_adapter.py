"""Bottlenecks of which a share of the weights is pruned: h + (N * U) f((M * D) h + d) + u, with masks M, N of 0 and 1.

He et al., 2022, arXiv:2210.04284, section 2 (SparseAdapter). `prune` says which weights go before training: "random";
"magnitude", the smallest; "snip", those with the smallest |weight x gradient| over `rows` rows of the training data; or
only after its last step: "threshold", the smallest then (a run that stops early keeps all). The first two look at each
place by itself, the others at all together; biases stay. Places as houlsby's; targets = ["@block_out"]: as pfeiffer's.
Large-Sparse: size = 256, sparsity = 0.75 keep as many weights as size = 64, sparsity = 0. First values: D and U normal
of deviation 0.02, d and u zero: nearly the identity. Trained: down (size, dim), down_bias, up (dim, size), up_bias:
2 size dim + size + dim numbers a place; a share of `sparsity` of D and U is zero and stays so.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np

from refpeft import RefpeftError, hookimpl
from refpeft.bottleneck import bottleneck, check_size, masked, normal_values, prune
from refpeft.tensor import Tensor

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 64  # of the bottleneck
    sparsity: float = 0.4  # the share of the weights that is pruned
    prune: Literal["random", "magnitude", "snip", "threshold"] = "snip"
    rows: int = 32  # of the training data, for "snip"
    only_with = (("rows", "prune", "snip"),)
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "relu"
    init_std: float = 0.02  # of the first weights
    targets: tuple[str, ...] | str = ("@attn_out", "@mlp_out")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        check_size(self)
        if not (0 <= self.sparsity < 1 and self.rows >= 1):
            raise ValueError("expected sparsity from 0 to less than 1, and 1 or more rows")


@hookimpl
def peft_params(site, cfg, rng):
    values = normal_values(rng, cfg.size, site.shape[0], cfg.init_std)
    masks = {f"{name}_mask": np.ones_like(values[name], "i1") for name in ("down", "up")}
    if cfg.prune in ("random", "magnitude"):
        drawn = [rng.uniform(0, 1, mask.shape) for mask in masks.values()] if cfg.prune == "random" else ()
        prune([SimpleNamespace(**values, **masks)], cfg.sparsity, drawn)
    return values | {name: Tensor(mask) for name, mask in masks.items()}


@hookimpl
def peft_survey(layers, cfg, survey):
    if cfg.prune == "snip":
        total = {}
        for gradients in survey.own_gradients(min(cfg.rows, survey.rows)):
            total = {name: gradient + total.get(name, 0) for name, gradient in gradients.items()}
        weights = {f"{at.site.name}.{name}": at.values[name].data for at in layers for name in ("down", "up")}
        prune([at.arrays for at in layers], cfg.sparsity, [abs(w * total[name]) for name, w in weights.items()])


@hookimpl
def peft_step(update, layers, cfg, step, total):
    update()
    if cfg.prune == "threshold" and step == total - 1:
        prune([layer.arrays for layer in layers], cfg.sparsity)


@hookimpl
def peft_check_values(site, p):
    if any(((mask != 0) & (mask != 1)).any() for mask in (p.down_mask, p.up_mask)):
        raise RefpeftError(f"masks of {site.name} have other numbers than 0 and 1")


@hookimpl
def peft_block(x, base, p, cfg):
    h = base(x)
    return h + bottleneck(h, masked(p), cfg.activation)
