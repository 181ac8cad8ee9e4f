"""Methods of fine-tuning, each from its paper's equation: what stands in for f, the frozen layer, at a place.

Names and layouts of the trained tensors: golden/README.md, Methods.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

PAPERS = {
    "full": "every weight is trained",
    "lora": "arXiv:2106.09685, section 4.1; rsLoRA: arXiv:2312.03732",
    "ia3": "arXiv:2205.05638, section 3.3; sides as PEFT",
    "bitfit": "arXiv:2106.10199",
    "ln_tuning": "arXiv:2312.11420",
    "houlsby": "arXiv:1902.00751, section 2.1",
    "prompt_tuning": "arXiv:2104.08691",
    "prefix_tuning": "arXiv:2101.00190; positions as PEFT",
}


def lora(
    f: Callable, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, keep=None, rate=0.0
) -> torch.Tensor:
    dropped = x if keep is None else x * keep / (1 - rate)
    return f(x) + scale * (dropped @ A.mT) @ B.mT


def lora_scale(config: dict) -> float:
    return config["alpha"] / (config["r"] ** 0.5 if config.get("rslora") else config["r"])


def ia3(f: Callable, x: torch.Tensor, gain: torch.Tensor, feedforward: bool) -> torch.Tensor:
    return f(x * gain) if feedforward else f(x) * gain


ACTIVATIONS = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def houlsby(f: Callable, x: torch.Tensor, down, down_bias, up, up_bias, activation: str) -> torch.Tensor:
    """The adapter has its own skip connection, and stands before the residual of the sub-layer is added."""
    h = f(x)
    return h + ACTIVATIONS[activation](h @ down.mT + down_bias) @ up.mT + up_bias


def prompt(f: Callable, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows.expand(len(ids), *rows.shape), f(ids)), dim=1)


def prefix(f: Callable, q, k, v, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """keys and values are (kv_heads, virtual tokens, head_dim); keys are not rotated."""
    keys, values = (t.expand(len(q), *t.shape) for t in (keys, values))
    return f(q, torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2))
