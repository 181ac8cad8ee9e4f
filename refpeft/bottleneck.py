"""Bottlenecks and PHM layers: for authors of methods of the adapters' family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from . import fused, ops
from .rng import Stream
from .tensor import Tensor

ACTIVATIONS = {
    "gelu_tanh": lambda x: fused.gelu(x, approximate=True),
    "gelu": lambda x: fused.gelu(x, approximate=False),
    "relu": ops.relu,
    "silu": ops.silu,
    "tanh": ops.tanh,
}


def check_size(cfg: Any) -> None:
    """Raises ValueError where the bottleneck of a Config has no width."""
    if cfg.size < 1:
        raise ValueError(f"size is {cfg.size}: expected 1 or more")


def normal_values(rng: Stream, size: int, dim: int, std: float) -> dict[str, np.ndarray]:
    """First values of a bottleneck: weights normal, biases zero. Nearly nothing is added while `std` is small."""
    down, up = (std * rng.standard_normal(shape) for shape in ((size, dim), (dim, size)))
    return {"down": down, "down_bias": np.zeros(size), "up": up, "up_bias": np.zeros(dim)}


def bottleneck(x: Tensor, p: SimpleNamespace, activation: str) -> Tensor:
    """up f(down x + down_bias) + up_bias, with down (size, in) and up (out, size)."""
    inner = ACTIVATIONS[activation](ops.linear(x, p.down, p.down_bias))
    return ops.linear(inner, p.up, p.up_bias)
