"""Ladder side-tuning (LST): a thin network beside the model reads its layers and speaks for it; nothing runs back.

Sung et al., 2022, arXiv:2206.06522, section 3.2. The side network has the model's layers, with every width divided by
r: s_0 = D e, e what the first layer reads, and s_i = side_i(m_i L_i h_i + (1 - m_i) s_(i-1)), with ladders L_i that
read h_i, what layer i gives, and gates m_i = sigmoid(a_i / T). The head reads U norm(s_n) in place of h_n, here through
the model's last normalization (the authors' T5 keeps the side network's own); with `output = "add"`, h_n + U norm(s_n).
Of T5 both halves have a side network, and the decoder's reads norm(s_n) of the encoder's. Layers of `drop` have no side
layer and no ladder (section 3.4). All is plain: RMSNorm, SiLU where the model's feed-forward part has a gate and GELU
where not, no biases, no dropout.

The h are constants: of each layer the tape has h, and what is thin. First values: a zero, so that m is 1/2, norms one,
matrices uniform in +-1 / sqrt(in), which changes the model; U zero with "add", which does not. (The paper starts from
the model's own weights, pruned by their Fisher information.) Trained, w = dim / r: first (w, dim), norm (w,) of each
half, last (dim, w); a layer's ladder (w, dim), alpha (1,), norm1, norm2 (w,), q, k, v, o, gate, up, down as the model's
/ r; for cross-attention norm3, q3, k3, v3, o3.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import RefpeftError, fused, hookimpl, ops
from refpeft.lowrank import kaiming
from refpeft.side import EPS, side_layer, side_values
from refpeft.targets import check_layers, stacks

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    r: int = 8  # widths are divided by it
    temperature: float = 0.1  # T
    drop: tuple[int, ...] = ()  # numbers of layers without a side layer
    output: Literal["replace", "add"] = "replace"  # of what the model's last layer gives
    targets: tuple[str, ...] | str = ("@block_out",)

    def __post_init__(self):
        if self.r < 1 or self.temperature <= 0:
            raise ValueError("expected r of at least 1, and a temperature above 0")


@hookimpl
def peft_check(sites, cfg):
    check_layers("ladder_side", cfg, sites, two=True)
    last = min(stack[-1].index for stack in stacks(sites))
    if not set(cfg.drop) < set(range(last + 1)):
        raise RefpeftError(f"ladder_side: drop names layers 0 to {last}, but not all of them: it is {list(cfg.drop)}")


@hookimpl
def peft_params(site, sites, cfg, rng, near):
    dim, width, values = site.shape[0], site.shape[0] // cfg.r, {}
    if any(site is stack[0] for stack in stacks(sites)):
        values["first"] = kaiming(rng, width, dim)
    if site.index not in cfg.drop:
        values |= {"ladder": kaiming(rng, width, dim), "alpha": np.zeros(1)} | side_values(rng, near, cfg.r)
    if any(site is stack[-1] for stack in stacks(sites)):
        values["norm"] = np.ones(width)
    if site is sites[-1]:
        values["last"] = np.zeros((dim, width)) if cfg.output == "add" else kaiming(rng, dim, width)
    return values or None


@hookimpl
def peft_block(x, base, p, cfg, site, sites, memo, near):
    h = base(x)
    side = ops.linear(x, p.first) if hasattr(p, "first") else memo.side
    if site.index not in cfg.drop:
        m = ops.sigmoid(p.alpha * (1 / cfg.temperature))
        mixed = m * ops.linear(h, p.ladder) + (1 - m) * side
        side = side_layer(mixed, p, base, near.site("attend").shape[1] // cfg.r, getattr(memo, "source", None))
    memo.side = side
    if hasattr(p, "norm"):
        memo.source = fused.rms_norm(side, p.norm, eps=EPS)
    if site is not sites[-1]:
        return h
    u = ops.linear(memo.source, p.last)
    return u if cfg.output == "replace" else h + u
