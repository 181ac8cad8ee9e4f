"""Soft prompts: rows, keys and values that are trained, and networks that give them. For authors of such methods."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ops
from .backend import xp_of
from .errors import RefpeftError
from .lowrank import kaiming
from .rng import Stream
from .tensor import Tensor

if TYPE_CHECKING:
    from .layers import Base, Train
    from .tokenizer import Tokenizer


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
    return {name: kaiming(rng, out, width), f"{name}_bias": rng.uniform(-bound, bound, out)}


# ---- rows before the token embeddings --------------------------------------------------------------------------------


def with_rows(rows: Tensor, h: Tensor) -> Tensor:
    """[rows; h]: rows (tokens, dim), or for each its own (batch, tokens, dim), before those of h (batch, time, dim)."""
    if len(rows.shape) == 2:
        rows = ops.broadcast_to(rows, shape=(h.shape[0], *rows.shape))
    return ops.concat(rows, h, axis=1)


def text_ids(tokenizer: Tokenizer | None, text: str) -> list[int]:
    """The ids of a text that rows start from, BOS first where the model has it. Raises RefpeftError for none."""
    if tokenizer is None:
        raise RefpeftError(
            f"{text!r} cannot become tokens: the model has no tokenizer; give their numbers (ids) instead"
        )
    return tokenizer.encode(text, specials=True)


def common_ids(tokenizer: Tokenizer | None, vocab: int, count: int) -> np.ndarray:
    """The first `count` ids of the vocabulary, without those of special and other added tokens.

    Byte-pair encodings number tokens in the order in which they merged them, the most common pairs first.
    """
    left_out = [] if tokenizer is None else sorted(tokenizer.added_ids)
    return np.setdiff1d(np.arange(vocab), left_out)[:count]


# ---- keys and values before those of the text ------------------------------------------------------------------------


def prefix_shared(rng: Stream, cfg: Any, shape: tuple[int, int], std: float | None = None) -> dict[str, np.ndarray]:
    """What all layers share of a reparametrised prefix: P', of `cfg.init_std`, and the first layer of the network.

    `shape` is that of an attention, (kv_heads, head_dim). Empty where `cfg.hidden` is 0. `std` as in `linear_values`.
    """
    if not cfg.hidden:
        return {}
    width = shape[0] * shape[1]
    values = {"rows": cfg.init_std * rng.standard_normal((cfg.tokens, width))}
    values |= linear_values(rng, "inner", cfg.hidden, width, std)
    return values


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
    pair = widened(pair, k.shape[-1] - pair.shape[-1])
    return ops.concat(pair[:, 0], k, axis=2), ops.concat(pair[:, 1], v, axis=2)


def with_gated_prefix(base: Base, pair: Tensor, gate: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over (g K, k) and (g V, v), K and V what `prefix` gave, g (batch, time, 1) with a value for each query.

    Heads become twice as wide: text has the first half of a key, the prefix the second, with which gated queries meet.
    """
    width, gate = q.shape[-1], gate.reshape(gate.shape[0], 1, gate.shape[1], 1)
    pair = ops.broadcast_to(pair, shape=(k.shape[0], *pair.shape))
    pair = widened(widened(pair, width - pair.shape[-1]), width, before=True)
    k, v = (ops.concat(pair[:, n], widened(text, width), axis=2) for n, text in enumerate((k, v)))
    y = base(ops.concat(q, gate * q, axis=3), k, v, scale=base.scale(q))  # that of heads as wide as they were
    return y[..., :width] + gate * y[..., width:]


def widened(x: Tensor, more: int, before: bool = False) -> Tensor:
    """x with `more` zeros after, or before, the last axis: heads are wider within `with_gated_prefix` of others."""
    if not more:
        return x
    zeros = Tensor(xp_of(x.data).zeros((*x.shape[:-1], more), x.dtype))
    return ops.concat(zeros, x, axis=-1) if before else ops.concat(x, zeros, axis=-1)


# ---- networks that give rows -----------------------------------------------------------------------------------------


def encoded(p: SimpleNamespace, rate: float = 0.0, train: Train | None = None) -> Tensor:
    """`p.rows` (tokens, dim) through the LSTM and the MLP that `p` has the values of: (tokens, dim)."""
    states = lstm(p.rows, p, rate, train) if hasattr(p, "weight_ih_l0") else p.rows
    return mlp(states, p)


def mlp_values(rng: Stream, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """First values of linear layers from each width to the next, called mlp0, mlp1, ..., as torch has them."""
    values: dict[str, np.ndarray] = {}
    for number, (width, out) in enumerate(pairwise(widths)):
        values |= linear_values(rng, f"mlp{number}", out, width)
    return values


def mlp(x: Tensor, p: SimpleNamespace) -> Tensor:
    """The layers mlp0, mlp1, ... of `p`, with ReLU between them."""
    layers = [name for name in vars(p) if name.startswith("mlp") and not name.endswith("_bias")]
    for number, name in enumerate(sorted(layers)):
        x = ops.linear(ops.relu(x) if number else x, getattr(p, name), getattr(p, f"{name}_bias"))
    return x


LSTM_ENDS = (("l0", "l0_reverse"), ("l1", "l1_reverse"))  # of names of values, by layer: forward and backward in time


def lstm_values(rng: Stream, width: int, hidden: int) -> dict[str, np.ndarray]:
    """First values of an LSTM of two layers in both directions, all uniform in +-1 / sqrt(hidden), named as torch's.

    weight_ih_l0 (4 hidden, width), weight_hh_l0 (4 hidden, hidden), bias_ih_l0 and bias_hh_l0 (4 hidden,); the same of
    l0_reverse; and of l1 and l1_reverse, whose width is 2 hidden.
    """
    bound, rows = hidden**-0.5, 4 * hidden
    values = {}
    for inputs, ends in zip((width, 2 * hidden), LSTM_ENDS, strict=True):
        for end in ends:
            shapes = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden), "bias_ih": rows, "bias_hh": rows}
            values |= {f"{name}_{end}": rng.uniform(-bound, bound, shape) for name, shape in shapes.items()}
    return values


def lstm(x: Tensor, p: SimpleNamespace, rate: float, train: Train | None) -> Tensor:
    """The states of an LSTM of two layers in both directions: x (time, width) gives (time, 2 hidden).

    In training what the second layer reads has dropout.
    """
    for number, ends in enumerate(LSTM_ENDS):
        if number and train:
            x = train.dropout(x, rate)
        x = _states(x, p, ends)
    return x


def _states(x: Tensor, p: SimpleNamespace, ends: tuple[str, str]) -> Tensor:
    """The states h of one layer, both directions at once: x (time, width) gives (time, 2 hidden).

    i, f, g, o = W x + U h + b; c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c).
    """
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    W, U, b, b_U = (ops.stack(*(getattr(p, f"{name}_{end}") for end in ends)) for name in names)
    of_inputs = ops.stack(x, x[::-1]) @ W.transpose(0, 2, 1) + (b + b_U)[:, None]  # (2, time, 4 hidden)
    U, hidden = U.transpose(0, 2, 1), U.shape[2]
    h = c = Tensor(xp_of(x.data).zeros((2, 1, hidden), x.dtype))
    states = []
    for t in range(x.shape[0]):
        gates = of_inputs[:, t : t + 1] + h @ U
        i, f, g, o = (gates[..., n * hidden : (n + 1) * hidden] for n in range(4))
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        states.append(h)
    both = ops.concat(*states, axis=1)  # (2, time, hidden), the second ones from the end
    return ops.concat(both[0], both[1][::-1], axis=1)
