"""transformers 5 under test: its schedules and its Adafactor."""

from __future__ import annotations

import torch
import transformers
from torch_parts import arrays, path, tensors
from transformers.optimization import Adafactor

from refpeft.conformance.vectors import Arrays, Case


class Transformers:
    """What its public functions give. Schedules are Python's floats, whatever the dtype."""

    name, version = "transformers", transformers.__version__
    dtypes = ("float64", "float32")

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        if case.kind == "schedule":
            return arrays({"factors": factors(case.name, **case.config)})
        if case.kind == "optimizer" and case.name == "adafactor":
            return arrays(path(tensors(given), case.config, lambda params: adafactor(params, case.config)))
        raise NotImplementedError("of transformers its schedules and Adafactor are under test")


def factors(name: str, warmup: int, steps: int) -> torch.Tensor:
    """What the rate is multiplied by in each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" else name
    schedule = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return torch.tensor(rates, dtype=torch.float64)


def adafactor(params: list[torch.Tensor], config: dict) -> Adafactor:
    """Its rate is a factor of the parameter's size with `scale_parameter`, and 1 / sqrt(t) with `relative_step`."""
    scaled = config["relative_step"]
    if scaled and any(lr > 1 / len(config["lr"]) ** 0.5 for lr in config["lr"]):
        raise NotImplementedError("it takes no rate beside 1 / sqrt(t)")
    options = {"scale_parameter": scaled, "relative_step": False, "weight_decay": config["weight_decay"]}
    return Adafactor(params, lr=1.0, **options)
