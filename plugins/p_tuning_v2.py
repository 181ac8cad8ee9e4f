"""P-tuning v2: deep prompts, keys and values before those of the text in every layer: attention(q, [K; k], [V; v]).

Liu et al., 2021, arXiv:2110.07602, section 3.2. It computes what prefix_tuning does, real tokens at position `tokens`
and on, as in the authors' code, and differs in how it is trained: the network that gives K and V, U tanh(D P' + d) + u,
is left out unless `hidden` is set (the authors: "task-dependent", then 512), and first values are small. The authors'
code has dropout = 0.1. On T5 and DeBERTa as prefix_tuning. A file in PEFT's form has K and V alone, and is read as
prefix_tuning, as PEFT does.

First values, with which the model is changed at the start: K and V, or P', D and U, normal of deviation 0.02, as BERT's
own weights, d and u zero. Trained: keys and values (kv_heads, tokens, head_dim), 2 tokens kv_heads head_dim numbers a
layer. With `hidden`, w = kv_heads head_dim: shared.rows (tokens, w), shared.inner (hidden, w) and shared.inner_bias,
tokens w + hidden (w + 1) numbers, once; outer (2 w, hidden) and outer_bias, 2 w (hidden + 1) numbers, in each layer.
"""

from dataclasses import dataclass

from refpeft import hookimpl
from refpeft.prompts import check_tokens, prefix, prefix_shared, prefix_values, with_prefix

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # length of the prompt
    hidden: int = 0  # width of the network that gives keys and values; 0: none, they are trained themselves
    init_std: float = 0.02
    dropout: float = 0.0  # rate, of keys and values, in training
    targets: tuple[str, ...] | str = ("@attend",)
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        check_tokens(self)


@hookimpl
def peft_shared(sites, cfg, rng):
    return prefix_shared(rng, cfg, sites[0].shape, cfg.init_std)


@hookimpl
def peft_params(site, cfg, rng):
    return prefix_values(rng, cfg, site.shape, cfg.init_std)


@hookimpl
def peft_positions(cfg):
    return cfg.tokens


@hookimpl
def peft_attention(q, k, v, base, p, cfg, site, shared, train):
    return base(q, *with_prefix(prefix(p, shared, site.shape), k, v, cfg.dropout, train))
