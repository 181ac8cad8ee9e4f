"""Prefix tuning: learned keys and values before those of the text in every layer: attention(q, [K; k], [V; v]).

Li & Liang, 2021, arXiv:2101.00190, section 4.2, without the network that the paper reparametrizes K and V by. Keys
are not rotated. Real tokens start at position `tokens`, as in PEFT, or at 0 with `positions = "zero"`.

First values: standard normal, as in PEFT (large beside a model's own keys: see `init_std`), so the model is changed
at the start. Trained: keys and values (kv_heads, tokens, head_dim): 2 tokens kv_heads head_dim numbers a layer.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import hookimpl, ops

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # length of the prefix
    init_std: float = 1.0
    positions: Literal["after", "zero"] = "after"  # of real tokens: after the prefix, or as if it were not there
    targets: tuple[str, ...] | str = ("@attend",)
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}: expected 1 or more")


@hookimpl
def peft_params(site, cfg, rng):
    heads, head_dim = site.shape
    keys, values = (cfg.init_std * rng.standard_normal((heads, cfg.tokens, head_dim)) for _ in range(2))
    return {"keys": keys, "values": values}


@hookimpl
def peft_positions(cfg):
    return cfg.tokens if cfg.positions == "after" else 0


@hookimpl
def peft_attention(q, k, v, base, p):
    keys, values = (ops.broadcast_to(a, shape=(k.shape[0], *a.shape)) for a in (p.keys, p.values))
    return base(q, ops.concat(keys, k, axis=2), ops.concat(values, v, axis=2))
