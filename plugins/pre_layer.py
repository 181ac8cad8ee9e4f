"""Prefix-layer tuning (PreLayer): what every layer reads at special tokens before the prompt is trained.

A baseline of Hu et al., 2021, arXiv:2106.09685, section 5.1: `pre_embed`, and in addition what a layer gives at these
tokens is replaced by trained activations: [P_0; E[ids]] are the embeddings, and h becomes [P_i; h of the text] behind
layer i. Behind the last layer nobody reads it, so that there are as many P as layers, which is the paper's count.
Infixes (tokens behind the prompt) are not here: a model is not told where in a row that ends.

First values: normal, of deviation `init_std`; they change the model. Trained: rows (tokens, dim) at the embedding and
at each layer but the last: layers tokens dim numbers. The paper has 8 tokens for GPT-3.
"""

from dataclasses import dataclass

from refpeft import hookimpl, ops
from refpeft.prompts import check_tokens, with_rows
from refpeft.targets import check_layers

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 8  # how many special tokens
    init_std: float = 0.02  # of the first activations
    targets: tuple[str, ...] | str = ("@embed", "@block_out")

    def __post_init__(self):
        check_tokens(self)


@hookimpl
def peft_check(sites, cfg):
    check_layers("pre_layer", cfg, sites)


@hookimpl
def peft_params(site, sites, cfg, rng):
    if site.index is not None and site.index == max(other.index or 0 for other in sites):
        return None
    return {"rows": cfg.init_std * rng.standard_normal((cfg.tokens, site.shape[-1]))}


@hookimpl
def peft_embedding(ids, base, p):
    return with_rows(p.rows, base(ids))


@hookimpl
def peft_block(x, base, p, cfg, behind):
    h = base(x)
    before = h.shape[1] - behind - cfg.tokens  # rows of methods attached later; in cached generation less than 0
    if before < 0:
        return h
    return ops.concat(h[:, :before], with_rows(p.rows, h[:, -behind:]), axis=1)
