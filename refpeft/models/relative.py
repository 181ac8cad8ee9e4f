"""Attention with a bias of relative positions: what T5 and DeBERTa share."""

from __future__ import annotations

import functools
import math
from types import ModuleType

import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array, xp_of
from refpeft.tensor import Tensor


def biased_attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: fused.Mask, scale: float) -> Tensor:
    """Attention with a bias of the text's keys; keys that adapters put before them have none."""
    if bias is not None and k.shape[2] > bias.shape[3]:
        none = xp_of(bias.data).zeros((*bias.shape[:3], k.shape[2] - bias.shape[3]), bias.dtype)
        bias = ops.concat(Tensor(none), bias, axis=3)
    return fused.attention(q, k, v, bias, mask=mask, scale=scale)


@functools.lru_cache(maxsize=64)
def t5_buckets_on(xp: ModuleType, queries: range, keys: int, buckets: int, distance: int, both: bool) -> Array:
    """t5_buckets as an array of `xp`, which stays there: a captured step copies nothing from the host."""
    return xp.asarray(t5_buckets(queries, keys, buckets, distance, both))


def t5_buckets(queries: range, keys: int, buckets: int, distance: int, both: bool) -> np.ndarray:
    """T5's bucket of each key's position relative to each query's (queries, keys) (arXiv:1910.10683, section 2.1).

    Half of the buckets are for single distances, the others grow logarithmically up to `distance`. Where attention goes
    in `both` directions each has half of all. The logarithm is taken in float32, as the authors' code has it: at some
    distances its last bit decides.
    """
    relative = np.arange(keys)[None, :] - np.arange(queries.start, queries.stop)[:, None]
    start = 0
    if both:
        buckets //= 2
        start = (relative > 0) * buckets
        relative = np.abs(relative)
    else:
        relative = np.maximum(-relative, 0)
    exact = buckets // 2
    share = np.log(np.maximum(relative, 1).astype("f4") / np.float32(exact)) / np.float32(math.log(distance / exact))
    far = exact + (share * np.float32(buckets - exact)).astype(np.int64)
    return start + np.where(relative < exact, relative, np.minimum(far, buckets - 1))
