"""Prompt tuning: learned rows P before the token embeddings: [P; E[ids]].

Lester et al., 2021, arXiv:2104.08691, section 2. The rows have positions 0, 1, ... and the text those after; they are
in neither the logits nor the loss.

First values (`init`): rows of the embedding table, of tokens drawn at random ("vocab", section 3.2) or given ("ids",
repeated or cut to the number of rows), or standard normal numbers ("random", as in PEFT). Trained: prompt (tokens,
dim).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import hookimpl, ops

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # how many rows
    init: Literal["vocab", "random", "ids"] = "vocab"
    ids: tuple[int, ...] = ()  # tokens whose embeddings are the first values, with init = "ids"
    targets: tuple[str, ...] | str = ("@embed",)

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}: expected 1 or more")
        if (self.init == "ids") != bool(self.ids):
            raise ValueError('init = "ids" and a list `ids` belong together')


@hookimpl
def peft_params(site, cfg, rng, weight):
    vocab, dim = site.shape
    if cfg.init == "random":
        return {"prompt": rng.standard_normal((cfg.tokens, dim))}
    if cfg.init == "ids":
        return {"prompt": weight[np.resize(cfg.ids, cfg.tokens)]}
    return {"prompt": weight[rng.uniform(0, vocab, cfg.tokens).astype(int)]}


@hookimpl
def peft_embedding(ids, base, p):
    h = base(ids)
    return ops.concat(ops.broadcast_to(p.prompt, shape=(h.shape[0], *p.prompt.shape)), h, axis=1)
