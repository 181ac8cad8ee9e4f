"""Prompt tuning: learned rows P before the token embeddings: [P; E[ids]].

Lester et al., 2021, arXiv:2104.08691, section 2. The rows have positions 0, 1, ... and the text those after; they are
in neither the logits nor the loss. In T5, the paper's model, they stand before the source: the decoder reads what the
encoder makes of them. (PEFT's files for T5 have as many rows again, for the decoder's text, and do not use them.)

First values (`init`), with which the model is changed at the start: rows of the embedding table, of tokens drawn at
random ("vocab"), as section 3.2 has it among the 5,000 most common (`common`: the first of the vocabulary, special ones
left out; PEFT draws from all), or of a `text` ("text") or tokens that are given ("ids"), repeated or cut to the number
of rows; or standard normal numbers ("random", PEFT's default). Trained: prompt (tokens, dim): tokens dim numbers in
all.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import RefpeftError, hookimpl
from refpeft.prompts import check_tokens, common_ids, text_ids, with_rows

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # how many rows
    init: Literal["vocab", "text", "random", "ids"] = "vocab"
    common: int = 5000  # how many of the first tokens of the vocabulary "vocab" draws from
    text: str = ""  # whose tokens' embeddings are the first values, with init = "text"
    ids: tuple[int, ...] = ()  # tokens whose embeddings are the first values, with init = "ids"
    head_reads: Literal["text", "prompt"] = "text"  # of an encoder that classifies; PEFT: "prompt", the first row
    targets: tuple[str, ...] | str = ("@embed",)
    only_with = (("common", "init", "vocab"),)

    def __post_init__(self):
        check_tokens(self)
        if (self.init == "text") != bool(self.text) or (self.init == "ids") != bool(self.ids):
            raise ValueError('init = "text" and `text` belong together, and so do init = "ids" and a list `ids`')
        if self.common < 1:
            raise ValueError(f"common is {self.common}: expected 1 or more")


@hookimpl
def peft_check(sites, cfg):
    vocab = sites[0].shape[0]
    wrong = [number for number in cfg.ids if not 0 <= number < vocab]
    if wrong:
        raise RefpeftError(f"prompt_tuning.ids names {wrong[0]}: the model has tokens 0 to {vocab - 1}")


@hookimpl
def peft_params(site, cfg, rng):
    shape = (cfg.tokens, site.shape[1])
    return {"prompt": rng.standard_normal(shape) if cfg.init == "random" else np.zeros(shape)}


@hookimpl
def peft_fit(site, cfg, rng, weight, tokenizer):
    if cfg.init == "random":
        return {}
    if cfg.init == "vocab":
        among = common_ids(tokenizer, site.shape[0], cfg.common)
        ids = among[rng.uniform(0, len(among), cfg.tokens).astype(int)]
    else:
        ids = cfg.ids or text_ids(tokenizer, cfg.text)
    return {"prompt": weight[np.resize(ids, cfg.tokens)]}


@hookimpl
def peft_embedding(ids, base, p):
    return with_rows(p.prompt, base(ids))
