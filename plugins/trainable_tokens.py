"""Trainable tokens: chosen rows of the token embedding are trained in place of the frozen ones; of the head likewise.

As in PEFT (https://huggingface.co/docs/peft/package_reference/trainable_tokens), for tokens that a model did not know.
A head that is tied to the embedding shares the rows; one of its own has trained rows of its own if it is a target. A
model without a head has those of the embedding.

First values: the frozen rows, so the model is unchanged. Trained: tokens (tokens, dim) a target, once where tied. What
acts is their difference to the frozen rows, which are kept beside them: adapters below keep what they add to a row.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, fused, hookimpl, ops
from refpeft.backend import xp_of
from refpeft.tensor import Tensor

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    token_indices: tuple[int, ...] = ()  # numbers of the tokens
    targets: tuple[str, ...] | str = ("@embed", "@head")
    exclude: tuple[str, ...] | str = ()

    def __post_init__(self):
        if len(set(self.token_indices)) < len(self.token_indices):
            raise ValueError("expected token_indices to name a token once")


@hookimpl
def peft_check(sites, cfg):
    vocab, names = sites[0].shape[0], {site.name for site in sites}
    if not cfg.token_indices:
        raise RefpeftError("trainable_tokens.token_indices is empty: name the tokens whose rows are trained")
    for token in cfg.token_indices:
        if not 0 <= token < vocab:
            raise RefpeftError(f"trainable_tokens.token_indices names {token}: the model has tokens 0 to {vocab - 1}")
    for site in sites:
        if "position" in site.roles or not {"embed", "head"} & set(site.roles):
            raise RefpeftError(f"trainable_tokens: {site.name} has no rows of tokens: target @embed and @head")
        if site.tied and site.tied not in names:
            raise RefpeftError(f"trainable_tokens: {site.name} shares its weight with {site.tied}: target both")


@hookimpl
def peft_params(site, cfg, weight):
    rows = weight[xp_of(weight).array(cfg.token_indices)]
    constants = {"frozen": Tensor(rows), "numbers": Tensor(np.array(cfg.token_indices, np.int32))}
    return {"tokens": f"{site.tied}.tokens" if site.tied else rows} | constants


@hookimpl
def peft_embedding(ids, base, p):
    match = ids[..., None] == p.numbers.data
    change = ops.take(p.tokens - p.frozen, indices=match.argmax(axis=-1))
    return base(ids) + change * Tensor(match.any(axis=-1, keepdims=True).astype(change.dtype))


@hookimpl
def peft_linear(x, base, p):
    return fused.add_columns(base(x), ops.linear(x, p.tokens - p.frozen), columns=p.numbers.data)


@hookimpl
def peft_merge(weight, p):
    merged = xp_of(weight).array(weight)
    merged[p.numbers] += p.tokens - p.frozen
    return merged
