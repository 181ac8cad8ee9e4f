"""Multitask prompt tuning: a prompt that tasks share, scaled by a factor of low rank for each: [P * (U_k V_k); E[ids]].

Wang et al., 2023, arXiv:2303.02861, section 3: P (tokens, dim) and for every task U_k (tokens, ranks), V_k (ranks,
dim), multiplied number by number. A run is of one `task`; the factors of the others are constants that stay in the
file, PEFT's MULTITASK_PROMPT_TUNING. There the program that uses it names the task; here its adapter_config.json does,
as "refpeft_task".

First values, which change the model: P standard normal, factors normal of deviation 0.02, as in PEFT and the authors'
code. From `source`, an adapter of this method, `start` takes P alone ("shared"), with the task's factors of its task
`source_task` ("exact") or their means over its tasks ("average"), or everything, to go on with another task ("all").
Trained: prompt, and the task's cols and rows: tokens dim + ranks (tokens + dim) numbers.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import RefpeftError, hookimpl
from refpeft.adapters import stored
from refpeft.prompts import check_tokens, with_rows
from refpeft.tensor import Tensor

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # how many rows
    tasks: int = 1
    task: int = 0  # the one that is trained, or used
    ranks: int = 1  # rank of a task's factor
    source: str = ""  # adapter directory, of this method, to start from
    start: Literal["average", "exact", "shared", "all"] = "average"  # what is taken from it
    source_task: int = 0  # which of its tasks is taken, with start = "exact"
    head_reads: Literal["text", "prompt"] = "text"  # of an encoder that classifies; PEFT: "prompt", the first row
    targets: tuple[str, ...] | str = ("@embed",)
    only_with = (("source_task", "start", "exact"),)

    def __post_init__(self):
        check_tokens(self)
        if min(self.tasks, self.ranks) < 1 or not 0 <= self.task < self.tasks:
            raise ValueError(f"expected ranks of at least 1, and task less than tasks, which is {self.tasks}")
        if self.source_task < 0 or (self.start != "average" and not self.source):
            raise ValueError("`start` and `source_task` say what is taken from `source`, an adapter directory")


@hookimpl
def peft_params(site, cfg, rng):
    values = {"prompt": rng.standard_normal((cfg.tokens, site.shape[1]))}
    for task in range(cfg.tasks):
        shapes = {"cols": (cfg.tokens, cfg.ranks), "rows": (cfg.ranks, site.shape[1])}
        factors = {f"{name}{task}": 0.02 * rng.standard_normal(shape) for name, shape in shapes.items()}
        values |= factors if task == cfg.task else {name: Tensor(array) for name, array in factors.items()}
    return values


@hookimpl
def peft_fit(site, cfg):
    if not cfg.source:
        return None
    (layer,) = stored(cfg.source, [site]).layers
    found, values = layer.part.cfg, vars(layer.arrays)
    if layer.part.name != "multitask_prompt" or (found.tokens, found.ranks) != (cfg.tokens, cfg.ranks):
        wanted = f"multitask_prompt of {cfg.tokens} tokens and {cfg.ranks} ranks"
        raise RefpeftError(f"{cfg.source} holds {layer.part.name} of {found}: expected {wanted}")
    if cfg.source_task >= found.tasks or (cfg.start == "all" and found.tasks != cfg.tasks):
        raise RefpeftError(f"{cfg.source} has {found.tasks} tasks, which does not go with tasks or source_task")
    if cfg.start in ("all", "shared"):
        return {name: array for name, array in values.items() if name == "prompt" or cfg.start == "all"}
    tasks = [cfg.source_task] if cfg.start == "exact" else range(found.tasks)
    means = {name: np.mean([values[f"{name}{task}"] for task in tasks], axis=0) for name in ("cols", "rows")}
    return {"prompt": values["prompt"]} | {f"{name}{cfg.task}": mean for name, mean in means.items()}


@hookimpl
def peft_embedding(ids, base, p, cfg):
    factor = getattr(p, f"cols{cfg.task}") @ getattr(p, f"rows{cfg.task}")
    return with_rows(p.prompt * factor, base(ids))
