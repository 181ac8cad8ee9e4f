"""Prefix-embedding tuning (PreEmbed): embeddings of new, special tokens before the prompt are trained: [P; E[ids]].

A baseline of Hu et al., 2021, arXiv:2106.09685, section 5.1. The special tokens are in no vocabulary: they have
positions 0, 1, ... and the text those after. The function is that of `prompt_tuning`, which starts from words that the
model knows; here first values are such as new words have. In PEFT's form both are PROMPT_TUNING, and read as that one.
The paper also has infixes, behind the prompt: not here, since a model is not told where in a row that ends.

First values: normal, of deviation `init_std`; they change the model. Trained: prompt (tokens, dim). The paper has 256
tokens for GPT-3.
"""

from dataclasses import dataclass

from refpeft import hookimpl
from refpeft.prompts import check_tokens, with_rows

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # how many special tokens
    init_std: float = 0.02  # of the first embeddings
    targets: tuple[str, ...] | str = ("@embed",)

    def __post_init__(self):
        check_tokens(self)


@hookimpl
def peft_params(site, cfg, rng):
    return {"prompt": cfg.init_std * rng.standard_normal((cfg.tokens, site.shape[1]))}


@hookimpl
def peft_embedding(ids, base, p):
    return with_rows(p.prompt, base(ids))
