"""Optimizers and schedules: cases of the kinds `optimizer` and `schedule`."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refpeft import schedule
from refpeft.optim import OPTIMIZERS, Flat
from refpeft.tensor import parameter

from ..vectors import Arrays, Case
from .operations import placed

_NOT_OPTIONS = ("lr", "clip", "block")
"""Members of an optimizer's config that are none of its own options; the block of adamw8bit is always 256."""


def run_optimizer(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    name = "adamw" if case.name == "adam" else case.name  # the same without decay
    if name not in OPTIMIZERS:
        raise NotImplementedError(f"refpeft has no optimizer {name!r}")
    config, arrays = case.config, placed(given, xp)
    flat = Flat((name, parameter(arrays[name])) for name in ("p0", "p1"))
    options = {option: value for option, value in config.items() if option not in _NOT_OPTIONS}
    optimizer = OPTIMIZERS[name](flat, **options)
    path: dict[str, list] = {"path.p0": [], "path.p1": []}
    norms = []
    for step, lr in enumerate(config["lr"]):
        flat.grads[...] = xp.concatenate([arrays[name][step].reshape(-1) for name in ("g0", "g1")])
        norms.append(flat.clip(config.get("clip", 0)))
        optimizer.step(lr)
        for name, tensor in flat.params.items():
            path[f"path.{name}"].append(tensor.data.copy())
    return {name: xp.stack(steps) for name, steps in path.items()} | {"norms": xp.stack(norms)}


def run_schedule(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    if xp is not np:
        raise NotImplementedError("learning rates are the host's, also of training on a GPU")
    if case.name not in ("constant", "linear", "cosine"):
        raise NotImplementedError(f"refpeft has no schedule {case.name!r}")
    steps, warmup = case.config["steps"], case.config["warmup"]
    return {"factors": np.array([schedule.factor(case.name, step, steps, warmup) for step in range(steps)])}
