"""Low-rank methods at linear layers beside LoRA."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import peft
import torch
from common import Case
from equations import lora_scale
from linear_methods import Equation, Variant, cases_of, shapes_of

LORA_NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}


def cases() -> Iterator[Case]:
    yield from dora()
    yield from vera()


def direction(weight: torch.Tensor, t: dict, config: dict) -> torch.Tensor:
    """DoRA's V (out, in), and nothing of it in the gradient of its norms."""
    return weight + lora_scale(config) * t["B"] @ t["A"]


def dora_value(f, x, weight, t, config) -> torch.Tensor:
    V = direction(weight, t, config)
    factor = t["m"] / V.detach().square().sum(1).sqrt()
    return f(x) - x @ weight.mT + (x @ V.mT) * factor


def dora_merged(weight, t, config) -> torch.Tensor:
    V = direction(weight, t, config)
    return V * (t["m"] / V.square().sum(1).sqrt())[:, None]


def dora() -> Iterator[Case]:
    config = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}

    def start(letters, weight, config):
        return letters | {"m": np.abs(letters["m"]) + np.float32(0.5)}

    equation = Equation(
        "dora",
        "arXiv:2402.09353, section 4",
        lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"]), "m": (out,)},
        dora_value,
        merged=dora_merged,
        start=start,
        peft=lambda config, targets: peft.LoraConfig(
            r=config["r"],
            lora_alpha=config["alpha"],
            use_rslora=config["rslora"],
            use_dora=True,
            target_modules=targets,
        ),
        names=LORA_NAMES | {"m": "lora_magnitude_vector.default.weight"},
        flags="DoraNormIsConstant DoraNormOfRows Scaling",
    )
    yield from cases_of(
        equation,
        *shapes_of(config),
        Variant("rslora", config | {"rslora": True, "r": 4}, flags="RsLoraScale"),
        Variant("square", config, out=5, inp=5, comment="norms are of rows, one for each output"),
        models=config,
    )


def vera_delta(weight, t, config) -> torch.Tensor:
    A, B = t["A"][:, : weight.shape[1]], t["B"][: weight.shape[0]]
    return (t["b"][:, None] * B) @ (t["d"][:, None] * A)


def vera() -> Iterator[Case]:
    config = {"r": 3, "dropout": 0.0}
    equation = Equation(
        "vera",
        "arXiv:2310.11454, section 3.1; matrices for targets of several shapes as PEFT",
        lambda config, out, inp: {"d": (config["r"],), "b": (out,)},
        lambda f, x, weight, t, config: f(x) + x @ vera_delta(weight, t, config).mT,
        merged=lambda weight, t, config: weight + vera_delta(weight, t, config),
        shared=lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"])},
        peft=lambda config, targets: peft.VeraConfig(r=config["r"], target_modules=targets),
        names={"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"},
        peft_constants={"A": "vera_A.default", "B": "vera_B.default"},
        flags="VeraShared",
    )
    wide = Variant("wide", config | {"r": 7}, comment="r is above both sides of the weight")
    yield from cases_of(equation, *shapes_of(config), wide, models=config)
