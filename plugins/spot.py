"""SPoT: prompt tuning that starts from the prompt of another task: [P; E[ids]].

Vu et al., 2022, arXiv:2110.07904, section 2. Of several `sources` those are taken that are most similar to `task`, a
prompt of this task from a short run of prompt_tuning: by the cosine of the prompts' mean rows, their weighted average
(section 3: with top = 1 the best one, else "top-k weighted average"). Sources may be of any method that puts rows
before the embeddings, in refpeft's form or PEFT's, such as PROMPT_TUNING; a file of this one is read as prompt_tuning.

First values: P = the sum of s_i P_i over the sum of s_i, s_i the similarities of the `top` sources. They change the
model. Trained: prompt (tokens, dim), tokens dim numbers in all.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, hookimpl
from refpeft.prompts import check_tokens, with_rows
from refpeft.transfer import prompt

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # how many rows, as many as the sources have
    sources: tuple[str, ...] = ()  # adapter directories with prompts of other tasks
    task: str = ""  # one with a prompt of this task, which says which of several sources are similar to it
    top: int = 1  # how many of the sources, the most similar ones, are averaged
    targets: tuple[str, ...] | str = ("@embed",)

    def __post_init__(self):
        check_tokens(self)
        if self.sources and not 1 <= self.top <= len(self.sources):
            raise ValueError(f"top is {self.top}: expected 1 to {len(self.sources)}, the number of sources")
        if bool(self.task) != (len(self.sources) > 1):
            raise ValueError("`task`, a prompt of this task, chooses among several sources: expected both or neither")


@hookimpl
def peft_check(sites, cfg):
    if not cfg.sources:
        raise RefpeftError("spot.sources is empty: name an adapter directory with the prompt of another task")


@hookimpl
def peft_params(site, cfg):
    return {"prompt": np.zeros((cfg.tokens, site.shape[1]))}


@hookimpl
def peft_fit(site, cfg):
    sources = np.stack([prompt(source, site, cfg.tokens) for source in cfg.sources])
    if not cfg.task:
        return {"prompt": sources[0]}
    means, mean = sources.mean(axis=1), prompt(cfg.task, site, cfg.tokens).mean(axis=0)
    similar = means @ mean / (np.linalg.norm(means, axis=1) * np.linalg.norm(mean))
    best = np.argsort(-similar, kind="stable")[: cfg.top]
    if cfg.top > 1 and similar[best[-1]] <= 0:
        raise RefpeftError(
            f"spot.top is {cfg.top}, and only {int((similar > 0).sum())} sources are similar to the task"
        )
    return {"prompt": np.average(sources[best], axis=0, weights=similar[best])}


@hookimpl
def peft_embedding(ids, base, p):
    return with_rows(p.prompt, base(ids))
