"""LLaMA-Adapter: attention(q, k, v) + tanh(g) softmax(q K^T / sqrt(d)) V, K and V what the layer makes of a prompt P.

Zhang et al., 2023, arXiv:2303.16199, sections 3.1 and 3.2, and the authors' code: P stands in the topmost layers, the
layer's own projections give its keys and values (with their biases, and normalized where the layer's keys are; not
rotated), its scores have a softmax of their own, and each head has a gate g. The output layer comes after the sum. (The
scores are divided by sqrt(d) in T5, too, which does not divide its own; its cross-attention has prompts as well.)

`compat = "peft"` has PEFT's gate: one for all heads, without tanh. (PEFT's adapters of Llama and Mistral are read and
written. On GPT-2 it adds the prompt's part behind the output layer, without it; that is not computed here.)

First values: P standard normal, g zero, so the model is unchanged. Trained: prompt (tokens, dim) and gate (heads,), or
(1,): tokens dim + heads numbers a layer. The authors have 10 tokens in the last 30 of 32 layers.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import RefpeftError, hookimpl, ops
from refpeft.prompts import check_tokens, widened
from refpeft.targets import homes

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 10  # length of the prompt
    count: int | None = None  # how many of the last layers have one; none: all
    compat: Literal["none", "peft"] = "none"  # the gate: for each head, by tanh, or PEFT's
    targets: tuple[str, ...] | str = ("@attend",)
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        check_tokens(self)


@hookimpl
def peft_check(sites, cfg):
    layers = len(homes(sites))
    if cfg.count is not None and not 1 <= cfg.count <= layers:
        raise RefpeftError(f"llama_adapter: count is {cfg.count}: expected 1 to {layers}, the layers that there are")


@hookimpl
def peft_params(site, sites, cfg, rng, near):
    if site.home not in homes(sites)[-(cfg.count or 0) :]:
        return None
    dim, heads = near.site("k").shape[1], near.site("o").shape[1] // site.shape[1]
    gates = 1 if cfg.compat == "peft" else heads
    return {"prompt": rng.standard_normal((cfg.tokens, dim)), "gate": np.zeros(gates)}


@hookimpl
def peft_attention(q, k, v, base, p, cfg, site, near):
    keys, values = near.keys_and_values(p.prompt, site)
    (batch, heads, time, wide), (kv_heads, width) = q.shape, site.shape
    grouped = q[..., :width].reshape(batch, kv_heads, -1, width)  # the heads of one key head side by side
    scores = ops.softmax(grouped @ keys.transpose(0, 2, 1) * width**-0.5)
    told = widened((scores @ values).reshape(batch, heads, time, width), wide - width)
    gate = p.gate if cfg.compat == "peft" else ops.tanh(p.gate)
    return base(q, k, v) + gate.reshape(-1, 1, 1) * told
