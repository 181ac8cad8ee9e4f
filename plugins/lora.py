"""LoRA: y = W x + b + s B A dropout(x), with W frozen and s = alpha / r.

Hu et al., 2021, arXiv:2106.09685, section 4.1. With `rslora`, s = alpha / sqrt(r) (Kalajdzievski, 2023,
arXiv:2312.03732). On an embedding y = W[ids] + s B A[:, ids], without dropout. LoRA+ (Hayou et al., 2024,
arXiv:2402.12354): B learns `lr_ratio` times as fast as A, at embeddings too. LoRA-FA (Zhang et al., 2023,
arXiv:2308.03303, section 3): with `freeze_A` the A of linear layers keeps its first values, and x need not be kept.

First values, which leave the model as it is. Linear: A uniform in +-1 / sqrt(in), which is kaiming_uniform(a=sqrt(5))
as in loralib and PEFT, or normal of deviation 1 / r (`init = "gaussian"`); B zero. Embedding: A zero, B normal.
Trained: A (r, in), B (out, r): r (in + out) numbers a target, r out with A frozen; what bias, modules_to_save name.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refpeft import Tensor, fused, hookimpl, ops
from refpeft.lowrank import Scaled, kaiming
from refpeft.targets import matches

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Scaled):
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # rate, of what A reads, in training
    rslora: bool = False  # scale by alpha / sqrt(r)
    init: Literal["kaiming", "gaussian"] = "kaiming"
    lr_ratio: float = 1.0  # learning rate of B as a multiple of A's, which is the run's
    freeze_A: bool = False  # train B alone
    bias: Literal["none", "all", "lora_only"] = "none"  # frozen biases trained too: the model's, or the targets'
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha, likewise
    modules_to_save: tuple[str, ...] = ()  # layers trained in full instead
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_params(site, cfg, rng):
    if any(matches(name, site) for name in cfg.modules_to_save):
        return None
    r, (out, width) = cfg.rank(site), site.shape
    if site.kind == "embedding":
        return {"A": np.zeros((r, out)), "B": rng.standard_normal((width, r))}
    A = rng.standard_normal((r, width)) / r if cfg.init == "gaussian" else kaiming(rng, r, width)
    return {"A": Tensor(A) if cfg.freeze_A else A, "B": np.zeros((out, r))}


@hookimpl
def peft_companions(cfg, sites):
    targets = ["*"] if cfg.bias == "all" else [site.name for site in sites if site.kind == "linear"]
    found = {} if cfg.bias == "none" else {"bitfit": {"targets": targets, "exclude": cfg.modules_to_save}}
    return found | ({"full": {"targets": cfg.modules_to_save, "tie": False}} if cfg.modules_to_save else {})


@hookimpl
def peft_rates(cfg):
    return {"B": cfg.lr_ratio}


@hookimpl
def peft_linear(x, base, p, cfg, site, train):
    dropped = train.dropout(x, cfg.dropout) if train else x
    return fused.addmm(base(x), ops.linear(dropped, p.A), p.B, alpha=cfg.scale(site))


@hookimpl
def peft_embedding(ids, base, p, cfg, site):
    return fused.addmm(base(ids), fused.embedding(p.A.T, ids=ids), p.B, alpha=cfg.scale(site))


@hookimpl
def peft_merge(weight, p, cfg, site):
    delta = cfg.scale(site) * (p.B @ p.A)
    return weight + (delta.T if site.kind == "embedding" else delta)
