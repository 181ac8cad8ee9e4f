"""torch's optimizers and clipping under test, as they come: the fused or batched step, in the dtype of the case.

(The vectors are made with the same optimizers' plain loops, in float64.)
"""

from __future__ import annotations

import torch
from torch_parts import arrays, path, tensors

from refpeft.conformance.vectors import Arrays, Case


class Torch:
    name, version = "torch", torch.__version__
    dtypes = ("float64", "float32")

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        make = OPTIMIZERS.get(case.name)
        if case.kind != "optimizer" or make is None:
            raise NotImplementedError("of torch its optimizers are under test: Adam, AdamW, SGD and Adafactor")
        return arrays(path(tensors(given), case.config, lambda params: make(params, case.config)))


Params = list[torch.Tensor]


def adamw(params: Params, config: dict) -> torch.optim.AdamW:
    options = {name: config[name] for name in ("betas", "eps", "weight_decay")}
    return torch.optim.AdamW(params, **options, fused=True)


def adam(params: Params, config: dict) -> torch.optim.Adam:
    return torch.optim.Adam(params, betas=config["betas"], eps=config["eps"], fused=True)


def sgd(params: Params, config: dict) -> torch.optim.SGD:
    return torch.optim.SGD(params, momentum=config["momentum"], weight_decay=config["weight_decay"], fused=True)


def adafactor(params: Params, config: dict) -> torch.optim.Adafactor:
    if not config["relative_step"]:
        raise NotImplementedError("torch's Adafactor has no rate without the parameter's size in it")
    return torch.optim.Adafactor(params, weight_decay=config["weight_decay"])


OPTIMIZERS = {"adam": adam, "adamw": adamw, "sgd": sgd, "adafactor": adafactor}
