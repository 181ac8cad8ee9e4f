"""Soft prompts: rows, keys and values that are trained, and networks that give them. For authors of such methods."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ops
from .rng import Stream
from .tensor import Tensor, parameter

if TYPE_CHECKING:
    from .layers import Train


def check_tokens(cfg: Any) -> None:
    """Raises ValueError where a Config asks for no virtual tokens, or for a width or a rate of dropout that is none."""
    if cfg.tokens < 1:
        raise ValueError(f"tokens is {cfg.tokens}: expected 1 or more")
    if getattr(cfg, "hidden", 0) < 0 or not 0 <= getattr(cfg, "dropout", 0) < 1:
        raise ValueError("expected hidden of at least 0, and dropout of at least 0 and less than 1")


def linear_values(rng: Stream, name: str, out: int, width: int, std: float | None = None) -> dict[str, np.ndarray]:
    """First values of a linear layer and its bias: uniform in +-1 / sqrt(width), as torch has them.

    With `std` the weight is normal and the bias zero, as in BERT.
    """
    if std is not None:
        return {name: std * rng.standard_normal((out, width)), f"{name}_bias": np.zeros(out)}
    bound = width**-0.5
    return {name: rng.uniform(-bound, bound, (out, width)), f"{name}_bias": rng.uniform(-bound, bound, out)}


# ---- rows before the token embeddings --------------------------------------------------------------------------------


def with_rows(rows: Tensor, h: Tensor) -> Tensor:
    """[rows; h]: rows (tokens, dim) before those of every h (batch, time, dim)."""
    return ops.concat(ops.broadcast_to(rows, shape=(h.shape[0], *rows.shape)), h, axis=1)


# ---- keys and values before those of the text ------------------------------------------------------------------------


def prefix_shared(rng: Stream, cfg: Any, shape: tuple[int, int], std: float | None = None) -> dict[str, Tensor]:
    """What all layers share of a reparametrised prefix: P', of `cfg.init_std`, and the first layer of the network.

    `shape` is that of an attention, (kv_heads, head_dim). Empty where `cfg.hidden` is 0. `std` as in `linear_values`.
    """
    if not cfg.hidden:
        return {}
    width = shape[0] * shape[1]
    values = {"rows": cfg.init_std * rng.standard_normal((cfg.tokens, width))}
    values |= linear_values(rng, "inner", cfg.hidden, width, std)
    return {name: parameter(array) for name, array in values.items()}


def prefix_values(rng: Stream, cfg: Any, shape: tuple[int, int], std: float | None = None) -> dict[str, np.ndarray]:
    """What a layer has of its own: keys and values, of `cfg.init_std`, or the part of the network that gives them."""
    heads, head_dim = shape
    if cfg.hidden:
        return linear_values(rng, "outer", 2 * heads * head_dim, cfg.hidden, std)
    return {name: cfg.init_std * rng.standard_normal((heads, cfg.tokens, head_dim)) for name in ("keys", "values")}


def prefix(p: SimpleNamespace, shared: SimpleNamespace, shape: tuple[int, int]) -> Tensor:
    """The keys and the values of one layer: (2, kv_heads, tokens, head_dim)."""
    if hasattr(p, "keys"):
        return ops.stack(p.keys, p.values)
    inner = ops.tanh(ops.linear(shared.rows, shared.inner, shared.inner_bias))
    outer = ops.linear(inner, p.outer, p.outer_bias)
    return outer.reshape(outer.shape[0], 2, *shape).transpose(1, 2, 0, 3)


def with_prefix(pair: Tensor, k: Tensor, v: Tensor, rate: float, train: Train | None) -> tuple[Tensor, Tensor]:
    """k and v (batch, kv_heads, time, head_dim) with what `prefix` gave before them, in training with dropout."""
    pair = ops.broadcast_to(pair, shape=(k.shape[0], *pair.shape))
    if train:
        pair = train.dropout(pair, rate)
    return ops.concat(pair[:, 0], k, axis=2), ops.concat(pair[:, 1], v, axis=2)
