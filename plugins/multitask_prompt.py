"""Multitask prompt tuning: a prompt that tasks share, scaled by a factor of low rank for each: [P * (U_k V_k); E[ids]].

Wang et al., 2023, arXiv:2303.02861, section 3: P (tokens, dim) and for every task U_k (tokens, ranks), V_k (ranks,
dim), multiplied number by number. With `each`, all are trained, U_k and V_k on the k-th data set of the run; else those
of one `task`, and others are constants in the file, PEFT's MULTITASK_PROMPT_TUNING. In use model.mode.task names one.

First values, which change the model: P standard normal, factors normal of deviation 0.02, as in PEFT. From `source`, an
adapter of this method, `start` takes P alone ("shared"), with the factors of its task `source_task` ("exact") or their
means over its tasks ("average"), or everything, to go on with another task ("all"). Trained: P, U_k and V_k.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import RefpeftError, hookimpl, ops
from refpeft.backend import xp_of
from refpeft.prompts import check_tokens, with_rows
from refpeft.tensor import Tensor
from refpeft.transfer import prompts_of_tasks

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # how many rows
    tasks: int = 1
    task: int = 0  # the one that is trained, or used ("refpeft_task" in adapter_config.json)
    each: bool = False  # each data set of the run is a task, and all are trained
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
        shapes = (f"cols{task}", (cfg.tokens, cfg.ranks)), (f"rows{task}", (cfg.ranks, site.shape[1]))
        factors = {name: 0.02 * rng.standard_normal(shape) for name, shape in shapes}
        values |= factors if cfg.each or task == cfg.task else {name: Tensor(array) for name, array in factors.items()}
    return values


@hookimpl
def peft_fit(site, cfg):
    if not cfg.source:
        return None
    tasks, values = prompts_of_tasks(cfg.source, site, cfg.tokens, cfg.ranks)
    if cfg.source_task >= tasks or (cfg.start == "all" and tasks != cfg.tasks):
        raise RefpeftError(f"{cfg.source} has {tasks} tasks, which does not go with tasks or source_task")
    if cfg.start in ("all", "shared"):
        return {name: array for name, array in values.items() if name == "prompt" or cfg.start == "all"}
    taken = [cfg.source_task] if cfg.start == "exact" else range(tasks)
    means = {name: np.mean([values[f"{name}{task}"] for task in taken], axis=0) for name in ("cols", "rows")}
    trained = range(cfg.tasks) if cfg.each else [cfg.task]
    return {"prompt": values["prompt"]} | {f"{name}{task}": means[name] for name in means for task in trained}


@hookimpl
def peft_embedding(ids, base, p, cfg, task, train):
    if (train and cfg.each == (task is None)) or (task is not None and np.max(task) >= cfg.tasks):
        raise RefpeftError("several data sets, and they alone, want multitask_prompt.each = true, and as many tasks")
    task = cfg.task if task is None else task
    factors = [getattr(p, f"cols{k}") @ getattr(p, f"rows{k}") for k in range(cfg.tasks)]
    factor = factors[task] if np.ndim(task) == 0 else ops.take(ops.stack(*factors), indices=xp_of(ids).asarray(task))
    return with_rows(p.prompt * factor, base(ids))
