"""Side networks: thin transformer layers beside the model's own. For authors of such methods."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from . import fused, ops
from .errors import RefpeftError
from .lowrank import kaiming
from .rng import Stream
from .tensor import Tensor

if TYPE_CHECKING:
    from .layers import Near

EPS = 1e-6
"""Of a side network's normalizations."""


def side_values(rng: Stream, near: Near, r: int) -> dict[str, np.ndarray]:
    """First values of a layer whose every width is that of the model's layer, near, divided by `r` and rounded down.

    It has as many heads. RMSNorm: norm1, norm2; attention: q, k, v, o; feed-forward part: up, down and, where the
    model's has one, gate. No biases. Raises RefpeftError where heads cannot be divided by `r`.
    """
    (kv_heads, head), (ff, dim) = near.site("attend").shape, near.site("up").shape
    fit = [n for n in range(1, head + 1) if head % n == 0 and head // n % 2 == head % 2]  # even, for rotary positions
    if r not in fit:
        nearest = max(n for n in fit if n <= r)
        raise RefpeftError(f"r is {r}, and heads of {head} numbers have no r-th part of even width: r = {nearest} fits")
    width, inner, q, kv = dim // r, ff // r, near.site("o").shape[1] // r, kv_heads * head // r
    shapes = {"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q)}
    shapes |= {"gate": (inner, width)} if near.has("gate") else {}
    shapes |= {"up": (inner, width), "down": (width, inner)}
    norms = {"norm1": np.ones(width), "norm2": np.ones(width)}
    return norms | {name: kaiming(rng, *shape) for name, shape in shapes.items()}


def side_layer(x: Tensor, p: SimpleNamespace, attention: Callable[..., Tensor], head: int) -> Tensor:
    """x + attention(norm(x)), then x + MLP(norm(x)): x (batch, time, width), heads of width `head`.

    `attention` is refpeft.layers.Base.attention. The MLP is down (silu(gate x) * up x), or down gelu(up x).
    """
    batch, time, _ = x.shape
    h = fused.rms_norm(x, p.norm1, eps=EPS)
    q, k, v = (ops.linear(h, w).reshape(batch, time, -1, head).transpose(0, 2, 1, 3) for w in (p.q, p.k, p.v))
    y = attention(q, k, v).transpose(0, 2, 1, 3).reshape(batch, time, -1)
    x = x + ops.linear(y, p.o)
    h = fused.rms_norm(x, p.norm2, eps=EPS)
    up = ops.linear(h, p.up)
    inner = fused.silu_mul(ops.linear(h, p.gate), up) if hasattr(p, "gate") else fused.gelu(up, approximate=True)
    return x + ops.linear(inner, p.down)
