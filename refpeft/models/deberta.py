"""DeBERTa v2 and v3 (He et al., 2020, arXiv:2006.03654; 2021, arXiv:2111.09543): disentangled attention.

The score of query i and key j is (q_i k_j + q_i r_k[d(i, j)] + k_j r_q[d(i, j)]) / sqrt(3 head_dim), where d(i, j) is
the bucket of their distance and r_k, r_q are embeddings of distances through a key's and a query's projection.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array, xp_of
from refpeft.capturing import keep
from refpeft.models.base import Cache, Frozen
from refpeft.models.block import Places, beside, chosen
from refpeft.models.deberta_config import PREFIX, DebertaConfig
from refpeft.models.decoder import unit
from refpeft.models.encoder import Encoder, Layer
from refpeft.models.relative import biased_attention
from refpeft.quant import Dense
from refpeft.tensor import Tensor


class Deberta(Encoder):
    """An encoder with relative positions, without a head."""

    def __init__(self, config: DebertaConfig, weights: Callable[..., Frozen], dtype: np.dtype, xp: ModuleType = np):
        super().__init__(config, weights, dtype, xp)
        encoder = f"{PREFIX}encoder"
        wide = config.width == config.dim
        self.widen = None if wide else self.linear(f"{PREFIX}embeddings.embed_proj", "embed_proj")
        self.distances = self.embedding(f"{encoder}.rel_embeddings", "distance")
        norm = config.norm_positions
        self.distance_norm = self.norm(f"{encoder}.LayerNorm", config.norm_eps, "norm", bias=True) if norm else None
        self.conv = Convolution(self, f"{encoder}.conv") if config.conv_kernel else None

    def make_layer(self, start: str, name: dict[str, str]) -> Layer:
        return DisentangledLayer(self, start, name)

    def trunk(
        self,
        ids: Array,
        positions: Array | None,
        segments: Array | None,
        cache: Cache | None,
        types: Array | None = None,
        rows: Array | None = None,
    ) -> Tensor:
        hidden, virtual = self.tokens(ids, positions, types, cache)
        if self.widen:
            hidden = self.widen(hidden)
        hidden = first = self.first_norm(hidden)
        time, span = hidden.shape[1], self.config.span
        real = None
        if segments is not None:
            seen = self.xp.pad(segments, ((0, 0), (virtual, 0))) >= 0
            real = Tensor(seen.astype(self.dtype)[..., None])
            hidden = first = hidden * real
        distances = self.distances(self.xp.arange(2 * span))
        distances = self.distance_norm(distances) if self.distance_norm else distances
        buckets = keep(_buckets_on(self.xp, time, self.config.buckets, self.config.distance))
        mask = fused.Mask(ids.shape[1], None, segments, causal=False)
        places = self.places(rows, ids, virtual)
        around = {"mask": mask, "distances": distances, "buckets": buckets, "cache": None}
        for i, layer in enumerate(self.layers):
            wanted = places if layer is self.layers[-1] else None
            if i == 0 and self.conv:
                hidden = self.run(layer, hidden, rows=None, **around)
                hidden = chosen(self.conv(first, hidden, real), wanted)
            else:
                hidden = self.run(layer, hidden, rows=wanted, **around)
        return hidden if places else self.of_text(hidden, virtual)

    def joins(self, longest: int) -> bool:
        return False  # its biases are of all tokens of a row with each other


class DisentangledLayer(Layer):
    """A layer whose attention adds what content and relative positions have to say of each other."""

    @property
    def attention(self) -> Callable[..., Tensor]:
        return biased_attention

    def __init__(self, model: Deberta, start: str, name: dict[str, str]):
        super().__init__(model, start, name)
        config, attention = model.config, f"{start}.{name['attention']}"
        self.mode = model.mode
        self.span, self.terms = config.span, 1 + config.content_to_position + config.position_to_content
        self.position_key = self.position_query = None
        if config.content_to_position:
            key = f"{attention}.pos_key_proj"
            self.position_key = self.k if config.shared_keys else model.linear(key, "pos_k", bias=True)
        if config.position_to_content:
            query = f"{attention}.pos_query_proj"
            self.position_query = self.q if config.shared_keys else model.linear(query, "pos_q", bias=True)

    def _attention(
        self,
        x: Tensor,
        *,
        rows: Places | None,
        mask: fused.Mask,
        cache: None,
        distances: Tensor,
        buckets: Array,
    ) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = map(self.in_heads, (q, k, v))
        scale = 1 / math.sqrt(q.shape[-1] * self.terms)
        bias = None
        if self.position_key:
            keys = self.of_distances(self.position_key, distances)
            bias = at_buckets(q @ keys.transpose(0, 1, 3, 2), self.bounded(buckets))
        if self.position_query:
            queries = self.of_distances(self.position_query, distances)
            told = at_buckets(k @ queries.transpose(0, 1, 3, 2), self.bounded(-buckets)).transpose(0, 1, 3, 2)
            bias = told if bias is None else bias + told
        bias = None if bias is None else bias * scale
        return self.o(beside(self.attend(q, k, v, bias=bias, mask=mask, scale=scale), rows))

    def of_distances(self, projection: Callable[[Tensor], Tensor], distances: Tensor) -> Tensor:
        """projection(distances) in heads, (1, heads, distances, head_dim).

        It is of all rows of a batch, so its dropout is that of the whole batch in every share.
        """
        mode = self.mode
        before, (mode.share, mode.placed) = (mode.share, mode.placed), (None, None)
        found = projection(distances)
        mode.share, mode.placed = before
        return self.in_heads(found[None])

    def bounded(self, buckets: Array) -> Array:
        """Rows of the table of distances."""
        return (buckets + self.span).clip(0, 2 * self.span - 1)


class Convolution:
    """LayerNorm(h + activation(convolution over time of the embeddings)), zero where there is padding."""

    def __init__(self, model: Deberta, name: str):
        config, weight = model.config, f"{name}.conv.weight"
        self.kernel = config.conv_kernel
        self.activate = ops.tanh if config.conv_activation == "tanh" else unit(config.conv_activation)
        stored = model.weight(weight)()  # (out, in, kernel); as a linear layer it reads all of a window at once
        model.frozen[weight] = Dense(stored.reshape(len(stored), -1), model.dtype)
        self.linear = model.linear(f"{name}.conv", "conv", bias=True)
        self.norm = model.norm(f"{name}.LayerNorm", config.norm_eps, "norm", bias=True)

    def __call__(self, x: Tensor, hidden: Tensor, real: Tensor | None) -> Tensor:
        batch, time, dim = x.shape
        edge = x[:, : self.kernel // 2] * 0.0
        padded = ops.concat(edge, x, edge, axis=1)
        windows = ops.stack(*(padded[:, at : at + time] for at in range(self.kernel)), axis=3)
        told = self.linear(windows.reshape(batch, time, dim * self.kernel))
        if real is None:
            return self.norm(hidden + self.activate(told))
        return self.norm(hidden + self.activate(told * real)) * real


@functools.lru_cache(maxsize=64)
def _buckets_on(xp: ModuleType, time: int, buckets: int, distance: int) -> Array:
    """buckets_of as an array of `xp`, which stays there: a captured step copies nothing from the host."""
    return xp.asarray(buckets_of(time, buckets, distance))


def buckets_of(time: int, buckets: int, far: int) -> np.ndarray:
    """The bucket of each query's distance from each key (time, time): logarithmic, up to those that are `far`."""
    distance = np.arange(time)[:, None] - np.arange(time)[None, :]
    if not buckets:
        return distance
    middle = buckets // 2
    size = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance))
    farthest = math.log((far - 1) / middle)
    logarithmic = np.ceil(np.log(size / middle) / farthest * (middle - 1)) + middle
    return np.where(size <= middle, distance, logarithmic * np.sign(distance)).astype(np.int64)


def at_buckets(scores: Tensor, buckets: Array) -> Tensor:
    """scores (batch, heads, time, rows), of each row of a table, at the rows `buckets` (time, keys) for each key."""
    batch, heads, time, rows = scores.shape
    flat = scores.transpose(2, 3, 0, 1).reshape(time * rows, batch * heads)
    starts = rows * xp_of(buckets).arange(time)[:, None]
    found = ops.take(flat, indices=(starts + buckets).reshape(-1))
    return found.reshape(*buckets.shape, batch, heads).transpose(2, 3, 0, 1)
