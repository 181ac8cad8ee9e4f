"""Bottlenecks and PHM layers: for authors of methods of the adapters' family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import fused, ops
from .backend import Array, xp_of
from .errors import RefpeftError, warn
from .rng import Stream
from .tensor import Tensor

if TYPE_CHECKING:
    from .sites import Site

ACTIVATIONS = {
    "gelu_tanh": lambda x: fused.gelu(x, approximate=True),
    "gelu": lambda x: fused.gelu(x, approximate=False),
    "relu": ops.relu,
    "silu": ops.silu,
    "tanh": ops.tanh,
}


def check_size(cfg: Any) -> None:
    """Raises ValueError where the bottleneck of a Config has no width, or nothing that would be learned."""
    if cfg.size < 1:
        raise ValueError(f"size is {cfg.size}: expected 1 or more")
    if getattr(cfg, "init_std", 1) <= 0 or getattr(cfg, "scale", 1) == 0:
        raise ValueError("expected init_std above 0, and scale other than 0: nothing would be learned")


def normal_values(rng: Stream, size: int, dim: int, std: float) -> dict[str, np.ndarray]:
    """First values of a bottleneck: weights normal, biases zero. Nearly nothing is added while `std` is small."""
    down, up = (std * rng.standard_normal(shape) for shape in ((size, dim), (dim, size)))
    return {"down": down, "down_bias": np.zeros(size), "up": up, "up_bias": np.zeros(dim)}


def bottleneck(x: Tensor, p: SimpleNamespace, activation: str) -> Tensor:
    """up f(down x + down_bias) + up_bias, with down (size, in) and up (out, size)."""
    inner = ACTIVATIONS[activation](ops.linear(x, p.down, p.down_bias))
    return ops.linear(inner, p.up, p.up_bias)


def behind_layer(site: Site, sites: Sequence[Site]) -> bool:
    """Whether what stands behind a layer stands at this one of `sites`: its last normalization, or else its output.

    A layer that normalizes last (BERT's) has a bottleneck that reads the normalized sum and is added to it before: y =
    norm(x + A(norm(x))), with x = h + residual (AdapterHub: original_ln_before). Others have y + A(y).
    """
    normalized = any(other.kind == "norm" and other.home == site.home for other in sites)
    return "block_out" not in site.roles or not normalized


def fused_bottlenecks(h: Tensor, p: SimpleNamespace, activation: str) -> Tensor:
    """AdapterFusion: V (s_1 z_1 + ... + s_n z_n), z_i of the i-th bottleneck of h, s = softmax((Q h + a) . K z_i).

    down (n, size, dim), down_bias, up and up_bias are those of all bottlenecks; query, key, value are (dim, dim).
    """
    letters = ("down", "down_bias", "up", "up_bias")
    each = [SimpleNamespace(**{name: getattr(p, name)[n] for name in letters}) for n in range(p.down.shape[0])]
    z = ops.stack(*(bottleneck(h, one, activation) for one in each), axis=2)
    query = ops.linear(h, p.query, p.query_bias).reshape(*h.shape[:2], 1, -1)
    scores = ops.softmax(ops.sum(query * ops.linear(z, p.key), axis=-1, keepdims=True), axis=2)
    return ops.linear(ops.sum(scores * z, axis=2), p.value)


def masked(p: SimpleNamespace) -> SimpleNamespace:
    """The values of a pruned bottleneck, with zeros where its masks are 0: what is pruned has no gradient either."""
    down, up = (w * Tensor(mask.data.astype(w.dtype)) for w, mask in ((p.down, p.down_mask), (p.up, p.up_mask)))
    return SimpleNamespace(**vars(p) | {"down": down, "up": up})


def prune(places: Sequence[SimpleNamespace], share: float, scores: Sequence[Array] = ()) -> None:
    """Sets `share` of the weights of bottlenecks to zero, but one, those with the lowest scores, all places together.

    places  with arrays down, up, down_mask and up_mask, changed in place; masks are 1 where a weight is kept, else 0
    scores  of each place's down and then its up; without them the weights' magnitudes
    """
    scores = scores or [abs(weight) for place in places for weight in (place.down, place.up)]
    xp = xp_of(scores[0])
    every = xp.concatenate([score.reshape(-1) for score in scores])
    count = min(round(share * every.size), every.size - 1)
    masks = xp.ones(every.size, "i1")
    masks[xp.argpartition(every, count)[:count]] = 0
    at = 0
    for place in places:
        for weight, mask in ((place.down, place.down_mask), (place.up, place.up_mask)):
            mask[...] = masks[at : at + mask.size].reshape(mask.shape)
            weight *= mask
            at += mask.size


def gate(x: Tensor, p: SimpleNamespace) -> Tensor:
    """sigmoid(gate x + gate_bias) with gate (1, dim): how much of what a method adds a token gets, (batch, time, 1)."""
    return ops.sigmoid(ops.linear(x, p.gate, p.gate_bias))


# ---- PHM layers (Zhang et al., 2021, arXiv:2102.08597; Compacter: arXiv:2106.04647) ----------------------------------

RULE_STD = 1e-4  # of the first values of the small matrices, in Compacter's authors' code


def check_phm(sites: list[Site], cfg: Any) -> None:
    """Raises RefpeftError where a bottleneck cannot be cut into `cfg.n` parts on both sides."""
    for name, width in [("size", cfg.size), *((f"the width of {site.name}", site.shape[0]) for site in sites)]:
        if cfg.n < 1 or width % cfg.n:
            fits = max(n for n in range(1, min(max(cfg.n, 1), width) + 1) if width % n == 0 and cfg.size % n == 0)
            raise RefpeftError(f"n is {cfg.n}, which does not divide {name}, {width}: n = {fits} does")
    most = min(cfg.size, *(site.shape[0] for site in sites)) // cfg.n
    if getattr(cfg, "rank", 1) > most:
        message = f"rank is {cfg.rank}, but above {most} a product has no higher rank: take {most} or less"
        warn(message)


def glorot(rng: Stream, *shape: int) -> np.ndarray:
    """Matrices (..., rows, columns), uniform in +-sqrt(12 / (rows + columns)): Glorot's, with gain sqrt(2)."""
    bound = math.sqrt(12 / (shape[-2] + shape[-1]))
    return rng.uniform(-bound, bound, shape)


def phm(rule: Tensor, blocks: Tensor) -> Tensor:
    """The sum over i of kron(rule[i], blocks[i]): rule (n, n, n), blocks (n, out / n, in / n); gives (out, in)."""
    n, out, width = blocks.shape
    products = rule.reshape(n, n * n).T @ blocks.reshape(n, out * width)
    return products.reshape(n, n, out, width).transpose(0, 2, 1, 3).reshape(n * out, n * width)


def factored_values(rng: Stream, cfg: Any, dim: int) -> dict[str, np.ndarray]:
    """First values of Compacter's bottleneck, without the rule that all of them share."""
    n, rank, values = cfg.n, cfg.rank, {}
    for name, out, width in (("down", cfg.size, dim), ("up", dim, cfg.size)):
        values[f"{name}_s"] = glorot(rng, n, out // n, rank)
        values[f"{name}_t"] = glorot(rng, n, rank, width // n)
        values[f"{name}_bias"] = np.zeros(out)
    return values


def factored_bottleneck(x: Tensor, p: SimpleNamespace, rule: Tensor, activation: str) -> Tensor:
    """A bottleneck whose matrices are the sums of kron(rule[i], s[i] t[i])."""
    down, up = phm(rule, p.down_s @ p.down_t), phm(rule, p.up_s @ p.up_t)
    weights = SimpleNamespace(down=down, down_bias=p.down_bias, up=up, up_bias=p.up_bias)
    return bottleneck(x, weights, activation)
