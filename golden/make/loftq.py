"""LoftQ's first values on NF4 (arXiv:2310.08659, algorithm 1): rounds of quantizing and of an SVD, in torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from common import Case, Compute, Draw, Tensors
from nf4 import BLOCK, BOUNDARIES, decode, encode, f32

NEAR = 1e-5  # no value is so near to a boundary, as a share of its block's largest magnitude


def quantized(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 holds of `weight`, in its dtype. Raises SystemExit where a code hangs on last bits."""
    values = f32(weight.double().numpy())
    blocks = values.reshape(-1, BLOCK)
    scaled = blocks / np.abs(blocks).max(axis=1, keepdims=True)
    if np.abs(scaled[..., None] - BOUNDARIES).min() < NEAR:
        raise SystemExit("loftq: a value is too close to a boundary of NF4")
    parts = encode({"weight": torch.from_numpy(values)}, double=False)
    return decode(parts, list(weight.shape))["weight"].to(weight.dtype)


def loftq(config: dict) -> Compute:
    r = config["r"]

    def compute(t: Tensors) -> Tensors:
        weight = t["weight"]
        product, distances = torch.zeros_like(weight), []
        for _ in range(config["iterations"]):
            base = quantized(weight - product)
            U, S, Vh = torch.linalg.svd(weight - base, full_matrices=False)
            product = (U[:, :r] * S[:r]) @ Vh[:r]
            distances.append(S[r:].norm())
        if distances != sorted(distances, reverse=True):
            raise SystemExit("loftq: a round led away from the weight")
        return {"base": base, "update": product, "y": t["x"] @ (base + product).T}

    return compute


def cases() -> Iterator[Case]:
    rows = [
        ("one", 1, "LoftQScale", "one round: the base is the quantized weight"),
        (
            "three",
            3,
            "LoftQScale LoftQBase",
            "three rounds: the base is the weight minus the second round's update, quantized",
        ),
    ]
    for variant, iterations, flags, comment in rows:
        draw = Draw(f"loftq-linear-{variant}")
        config = {"r": 3, "alpha": 12.0, "iterations": iterations, "quantizer": "nf4", "block": BLOCK}
        yield Case(
            id=f"loftq-linear-{variant}",
            kind="method",
            name="loftq",
            at="linear",
            flags=tuple(flags.split()),
            comment=f"first values; {comment}; update = alpha / r B A",
            spec="arXiv:2310.08659, algorithm 1",
            config=config,
            inputs={"x": draw.normal(2, 16), "weight": draw.normal(12, 16, scale=0.02)},
            compute=loftq(config),
        )
