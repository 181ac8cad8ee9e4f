"""Side networks: thin transformer layers beside the model's own. For authors of such methods."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from . import fused, ops
from .errors import RefpeftError
from .lowrank import kaiming
from .rng import Stream
from .tensor import Tensor

if TYPE_CHECKING:
    from .layers import Base, Near

EPS = 1e-6
"""Of a side network's normalizations."""


def side_values(rng: Stream, near: Near, r: int) -> dict[str, np.ndarray]:
    """First values of a layer whose every width is that of the model's layer, near, divided by `r` and rounded down.

    It has as many heads. RMSNorm: norm1, norm2; attention: q, k, v, o; feed-forward part: up, down and, where the
    model's has one, gate; in a decoder that reads an encoder also norm3, and q3, k3, v3, o3. No biases. Raises
    RefpeftError where heads cannot be divided by `r`.
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
    if near.has("cross_q"):
        shapes |= {f"{letter}3": shapes[letter] for letter in "qkvo"}
        norms["norm3"] = np.ones(width)
    return norms | {name: kaiming(rng, *shape) for name, shape in shapes.items()}


def side_layer(x: Tensor, p: SimpleNamespace, base: Base, head: int, source: Tensor | None = None) -> Tensor:
    """x + attention(norm(x)), then x + MLP(norm(x)): x (batch, time, width), heads of width `head`.

    In a decoder x + attention to the `source` comes between them. The MLP is down (silu(gate x) * up x), or down
    gelu(up x).
    """

    def in_heads(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [ops.linear(x, w).reshape(*x.shape[:2], -1, head).transpose(0, 2, 1, 3) for w in weights]

    def joined(y: Tensor, weight: Tensor) -> Tensor:
        return ops.linear(y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), weight)

    h = fused.rms_norm(x, p.norm1, eps=EPS)
    x = x + joined(base.attention(*in_heads(h, p.q, p.k, p.v)), p.o)
    if hasattr(p, "norm3"):
        (q,) = in_heads(fused.rms_norm(x, p.norm3, eps=EPS), p.q3)
        x = x + joined(base.cross_attention(q, lambda: tuple(in_heads(source, p.k3, p.v3))), p.o3)
    h = fused.rms_norm(x, p.norm2, eps=EPS)
    up = ops.linear(h, p.up)
    inner = fused.silu_mul(ops.linear(h, p.gate), up) if hasattr(p, "gate") else fused.gelu(up, approximate=True)
    return x + ops.linear(inner, p.down)
