"""UniPELT: LoRA, a prefix and an adapter at once, each with a learned gate g = sigmoid(w x + c), x what it reads.

Mao et al., 2022, arXiv:2110.07577, section 3: W x + b + g B A x, the gate in place of alpha / r; attention over (g K,
k) and (g V, v), g of what the attention part reads; h + g (U relu(D h + d) + u) in the residual of the feed-forward
part. There, and in AdapterHub, a gate is averaged over a row, which in a decoder shows tokens those after them: here
each token has its own. First values, which change the model: A and gates as torch has them, B zero, adapters as
`pfeiffer`, prefixes as `prefix_tuning`. Trained: r (in + out) + in + 1 numbers a target of LoRA, 2 size dim + size + 2
dim + 1 an adapter, what `prefix_tuning` has, and dim + 1 for its gate, at attn_out, in T5's decoder also at cross_out.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, fused, hookimpl, lowrank, ops
from refpeft.bottleneck import bottleneck, gate, normal_values
from refpeft.prompts import check_tokens, linear_values, prefix, prefix_shared, prefix_values, with_gated_prefix

FAMILY = "hybrid"
GATED = ("attn_out", "cross_out")  # blocks that have the gates of prefixes


@dataclass(frozen=True)
class Config(lowrank.Ranked):
    r: int = 8
    tokens: int = 10  # length of the prefix
    hidden: int = 512  # width of the network that gives it; 0: none, keys and values are trained themselves
    init_std: float = 1.0  # of the prefix, or of what the network reads
    size: int = 48  # of the adapter's bottleneck
    targets: tuple[str, ...] | str = ("@q", "@v", "@attn_out", "@cross_out", "@attend", "@mlp_out")
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        check_tokens(self)
        if min(self.r, self.size) < 1:
            raise ValueError("expected r and size of at least 1")


@hookimpl
def peft_shared(sites, cfg, rng):
    shapes = [site.shape for site in sites if site.kind == "attention"]
    if len(shapes) != sum(site.roles[0] in GATED for site in sites):
        gated = "@attn_out, which has the prefix's gate (for cross-attention @cross_out)"
        raise RefpeftError(f"unipelt.targets: expected {gated}, and @attend together")
    return prefix_shared(rng, cfg, shapes[0]) if shapes else {}


@hookimpl
def peft_params(site, cfg, rng):
    if site.kind == "attention":
        return prefix_values(rng, cfg, site.shape)
    width = site.shape[-1]
    values = linear_values(rng, "gate", 1, width)
    if site.kind == "linear":
        return values | {"A": linear_values(rng, "A", cfg.r, width)["A"], "B": np.zeros((site.shape[0], cfg.r))}
    return values if site.roles[0] in GATED else values | normal_values(rng, cfg.size, width, 0.02)


@hookimpl
def peft_positions(cfg, sites):
    return cfg.tokens if any(site.kind == "attention" for site in sites) else 0


@hookimpl
def peft_linear(x, base, p):
    return fused.addmm(base(x), ops.linear(x, p.A) * gate(x, p), p.B, alpha=1.0)


@hookimpl
def peft_block(x, base, p, site, memo):
    if site.roles[0] in GATED:
        memo.gate = gate(x, p)
        return base(x)
    h = base(x)
    return h + gate(h, p) * bottleneck(h, p, "relu")


@hookimpl
def peft_attention(q, k, v, base, p, site, shared, memo):
    return with_gated_prefix(base, prefix(p, shared, site.shape), memo.gate, q, k, v)
