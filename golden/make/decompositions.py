"""Methods that train a part of the weight itself: PiSSA its largest singular values, OLoRA a part of its QR."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import Case, Compute, Draw, Tensors
from equations import lora_scale
from linear_methods import Equation, Variant, cases_of, shapes_of
from loftq import quantized
from method_sites import linear_inputs, site_case
from nf4 import BLOCK
from torch.nn import functional

CONFIG = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}


def largest(weight: torch.Tensor, r: int) -> torch.Tensor:
    """The product of PiSSA's first values and of s: the matrix of rank r that is nearest to the weight."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def leading(weight: torch.Tensor, r: int) -> torch.Tensor:
    """The product of OLoRA's first values, without s."""
    Q, R = torch.linalg.qr(weight)
    return Q[:, :r] @ R[:r]


def pissa_start(weight: torch.Tensor, config: dict) -> torch.Tensor:
    return largest(weight, config["r"])


def olora_start(weight: torch.Tensor, config: dict) -> torch.Tensor:
    return lora_scale(config) * leading(weight, config["r"])


def cases() -> Iterator[Case]:
    yield from of("pissa", "arXiv:2404.02948, section 3", pissa_start, "PissaRank PissaScale")
    yield from of("olora", "arXiv:2406.01775, section 3", olora_start, "PissaRank OloraScale")


def of(method: str, source: str, start: Callable, flags: str) -> Iterator[Case]:
    """`start` (weight, config) is s B0 A0, which the frozen weight is without."""

    def merged(weight, t, config) -> torch.Tensor:
        return weight - start(weight.detach(), config) + lora_scale(config) * t["B"] @ t["A"]

    equation = Equation(
        method,
        source,
        lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"])},
        lambda f, x, weight, t, config: f(x) + x @ (merged(weight, t, config) - weight).mT,
        merged=merged,
        flags=f"Scaling {flags}",
    )
    rslora = Variant("rslora", CONFIG | {"rslora": True, "r": 3}, flags="RsLoraScale")
    yield from cases_of(equation, *shapes_of(CONFIG), rslora, models=CONFIG)
    yield with_dropout(method, start, merged)
    for variant, quantizer in (("first", None), ("quantized", "nf4")):
        draw = Draw(f"{method}-linear-{variant}")
        yield Case(
            id=f"{method}-linear-{variant}",
            kind="method",
            name=method,
            at="linear",
            flags=("QuantizedResidual",) if quantizer else tuple(flags.split()),
            comment="first values; " + ("the base is quantized without them" if quantizer else "the function is x W"),
            spec=source,
            config=CONFIG | ({"quantizer": quantizer, "block": BLOCK} if quantizer else {}),
            inputs={"x": draw.normal(2, 16), "weight": draw.normal(12, 16, scale=0.02)},
            compute=first_values(start, quantizer),
        )


def with_dropout(method: str, start: Callable, merged: Callable) -> Case:
    """The frozen weight, which is without s B0 A0, reads all of x."""
    draw, inputs = linear_inputs(f"{method}-linear-dropout", bias=True)
    config = CONFIG | {"dropout": 0.25}
    inputs |= {"A": draw.normal(config["r"], 5, scale=0.5), "B": draw.normal(6, config["r"], scale=0.5)}
    inputs["keep"] = (draw.generator.random(inputs["x"].shape) >= config["dropout"]).astype(np.float32)

    def forward(x, weight, A, B, bias, keep) -> torch.Tensor:
        y = functional.linear(x, weight - start(weight.detach(), config), bias)
        return y + lora_scale(config) * (x * keep / (1 - config["dropout"])) @ A.mT @ B.mT

    return site_case(
        method,
        "linear",
        "dropout",
        inputs,
        forward,
        "x A B",
        config=config,
        merged=lambda t: {"merged.weight": merged(t["weight"], t, config)},
        comment="in training: the mask `keep` is given; only what A reads is dropped",
        flags="DropoutPlace DropoutScale",
    )


def first_values(start: Callable, quantizer: str | None) -> Compute:
    def compute(t: Tensors) -> Tensors:
        update = start(t["weight"], CONFIG)
        base = t["weight"] - update
        base = quantized(base) if quantizer else base
        return {"base": base, "update": update, "y": t["x"] @ (base + update).T}

    return compute
