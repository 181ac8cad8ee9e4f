"""Prefix tuning: learned keys and values before those of the text in every layer: attention(q, [K; k], [V; v]).

Li & Liang, 2021, arXiv:2101.00190, section 4.2. With `hidden` they are reparametrised (section 4.3): [K, V] =
U tanh(D P' + d) + u, with rows P' (tokens, w), w = kv_heads head_dim, D (hidden, w) and d that all layers share, and U
and u of each layer; the authors have hidden = 512, or 800. Keys are not rotated. Real tokens start at position
`tokens`, as in the authors' code and PEFT, or at 0 with `positions = "zero"`. A file in PEFT's form has K and V alone.
T5 has a prefix in its encoder, its decoder and its cross-attention, as BART has in the authors' code, and no bias of
relative positions there, nor DeBERTa. (PEFT gives T5's decoder alone one, which half of the layers share: not read.)

First values, with which the model is changed at the start: K and V, or P', normal, of deviation 1 as in PEFT (large
beside a model's own keys: see `init_std`); D, d, U, u uniform in +-1 / sqrt(their inputs), as torch has them. Trained:
keys and values (kv_heads, tokens, head_dim), 2 tokens kv_heads head_dim numbers a layer. With `hidden`: shared.rows,
shared.inner and shared.inner_bias, tokens w + hidden (w + 1) numbers, once; outer and outer_bias, 2 w (hidden + 1), in
each layer.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import hookimpl
from refpeft.prompts import check_tokens, prefix, prefix_shared, prefix_values, with_prefix

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # length of the prefix
    hidden: int = 0  # width of the network that gives keys and values; 0: none, they are trained themselves
    init_std: float = 1.0
    dropout: float = 0.0  # rate, of keys and values, in training
    positions: Literal["after", "zero"] = "after"  # of real tokens: after the prefix, or as if it were not there
    targets: tuple[str, ...] | str = ("@attend",)
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        check_tokens(self)


@hookimpl
def peft_shared(sites, cfg, rng):
    return prefix_shared(rng, cfg, sites[0].shape)


@hookimpl
def peft_params(site, cfg, rng):
    return prefix_values(rng, cfg, site.shape)


@hookimpl
def peft_positions(cfg):
    return cfg.tokens if cfg.positions == "after" else 0


@hookimpl
def peft_attention(q, k, v, base, p, cfg, site, shared, train):
    return base(q, *with_prefix(prefix(p, shared, site.shape), k, v, cfg.dropout, train))
