"""Encoders of BERT's shape: BERT (MiniLM and others), RoBERTa, XLM-RoBERTa, DistilBERT.

Attention sees both directions, and each sub-layer is followed by its norm: LayerNorm(x + attention(x)), then
LayerNorm(x + MLP(x)) (Devlin et al., 2018, arXiv:1810.04805; Vaswani et al., 2017, arXiv:1706.03762).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array
from refpeft.models.base import Cache, Frozen, Model
from refpeft.models.block import Block, Places, beside, chosen
from refpeft.models.decoder import unit
from refpeft.models.encoder_config import NAMES, PREFIX, EncoderConfig
from refpeft.tensor import Tensor


class Encoder(Model):
    """An encoder: what it computes are the hidden states of its last layer, or what a head makes of them."""

    task = None

    def __init__(self, config: EncoderConfig, weights: Callable[..., Frozen], dtype: np.dtype, xp: ModuleType = np):
        super().__init__(config, weights, dtype, xp)
        self.transform: Callable[[Tensor], Tensor] = lambda hidden: hidden
        """What a head does before its last layer."""
        name, prefix = NAMES[config.family], PREFIX[config.family]
        self.embed = self.embedding(prefix + name["words"], "embed")
        self.position = self.embedding(prefix + name["positions"], "position") if config.positions else None
        self.type = self.embedding(prefix + name["types"], "type") if config.types else None
        self.first_norm = self.norm(prefix + name["norm"], config.norm_eps, "norm", bias=True)
        self.layers = [self.make_layer(f"{prefix}{name['layer']}.{i}", name) for i in range(config.distinct)]

    def make_layer(self, start: str, name: dict[str, str]) -> Layer:
        """The layer whose modules' names begin with `start` and go on as in `name`."""
        return Layer(self, start, name)

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
        hidden = self.first_norm(hidden)
        mask = fused.Mask(ids.shape[1], None, segments, causal=False, padded=positions is None)
        places = self.places(rows, ids, virtual)
        for layer in self.layers:
            wanted = places if layer is self.layers[-1] else None
            hidden = self.run(layer, hidden, rows=wanted, mask=mask, cache=None)
        return hidden if places else self.of_text(hidden, virtual)

    def of_text(self, hidden: Tensor, virtual: int) -> Tensor:
        """`hidden` without virtual tokens; the first of these stands in for the text's first if a method says so."""
        if not virtual:
            return hidden
        if self._read_by_head:
            return ops.concat(hidden[:, :1], hidden[:, virtual + 1 :], axis=1)
        return hidden[:, virtual:]

    def places(self, rows: Array | None, ids: Array, virtual: int) -> Places | None:
        found = super().places(rows, ids, virtual)
        if found is None or not self._read_by_head:
            return found
        row, token = found
        return row, self.xp.where(token == virtual, 0, token)

    @property
    def _read_by_head(self) -> bool:
        return any(adapter.read_by_head for adapter in self.adapters)

    def tokens(
        self, ids: Array, positions: Array | None, types: Array | None, cache: Cache | None
    ) -> tuple[Tensor, int]:
        """(the sum of the embeddings of tokens, positions and types, number of virtual tokens among them)."""
        hidden = self.embedded(ids, cache)
        self.check_positions(ids, positions, hidden.shape[1] - ids.shape[1], None)
        positions, virtual = self.positioned(hidden, ids, positions, cache)
        if self.position:
            hidden = hidden + self.position(positions + self.config.first_position)
        if self.type:
            types = self.xp.zeros((1, 1), np.int32) if types is None else self.xp.pad(types, ((0, 0), (virtual, 0)))
            hidden = hidden + self.type(types)
        return hidden, virtual

    def finish(self, hidden: Tensor) -> Tensor:
        return self.transform(hidden)

    def hidden_of(self, batch: Any, rows: np.ndarray | None = None) -> Tensor:
        return self._hidden(batch.ids, batch.positions, batch.segments, types=batch.types, rows=rows)

    def __call__(
        self, ids: Array, positions: Array | None = None, segments: Array | None = None, types: Array | None = None
    ) -> Tensor:
        """The hidden states (batch, time, dim) of integer ids (batch, time); with a head what `outputs` says.

        segments (batch, time) are 0, and -1 at padding, which no token sees: on the right, unless positions are given.
        types (batch, time) tell the texts of a pair apart, where the model does: 0 and 1.
        """
        hidden = self._hidden(ids, positions, segments, types=types)
        return hidden if self.task is None else self.outputs(hidden, segments)


class Layer(Block):
    """One layer: LayerNorm(x + attention(x)), then LayerNorm(x + MLP(x))."""

    def __init__(self, model: Encoder, start: str, name: dict[str, str]):
        config, dim = model.config, (model.config.dim,)
        self.heads = config.heads
        self.q, self.k, self.v, self.o, self.up, self.down = (
            model.linear(f"{start}.{name[role]}", role, bias=True) for role in ("q", "k", "v", "o", "up", "down")
        )
        self.norm1 = model.norm(f"{start}.{name['norm1']}", config.norm_eps, "norm", bias=True)
        self.norm2 = model.norm(f"{start}.{name['norm2']}", config.norm_eps, "norm", "mlp_norm", bias=True)
        self.activate = unit(config.activation)
        shape = (config.heads, config.head_dim)
        attend = f"{start}.{name['attention']}.attend"
        self.attend = model.place_of(attend, "attention", shape, "attend", self.attention)
        self.attn_out = model.place_of(f"{start}.attn_out", "block", dim, "attn_out", self._attention)
        self.mlp_out = model.place_of(f"{start}.mlp_out", "block", dim, "mlp_out", self._mlp)
        self.block_out = model.place_of(f"{start}.block_out", "block", dim, "block_out", self._layer)
        mlp = (self.up, self.down, self.mlp_out)
        self.late = (self.o, self.attn_out, self.norm1, *mlp, self.norm2, self.block_out)

    @property
    def attention(self) -> Callable[..., Tensor]:
        """What the heads do: (q, k, v, **what the layer gives it beside them) -> (batch, heads, time, head_dim)."""
        return fused.attention

    def _layer(self, x: Tensor, *, rows: Places | None, **around: object) -> Tensor:
        x = self.norm1(chosen(x, rows) + self.attn_out(x, rows=rows, **around))
        return self.norm2(x + self.mlp_out(x))

    def _attention(self, x: Tensor, *, rows: Places | None, mask: fused.Mask, cache: None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = map(self.in_heads, (q, k, v))
        return self.o(beside(self.attend(q, k, v, mask=mask), rows))

    def in_heads(self, x: Tensor) -> Tensor:
        """(batch, time, dim) as (batch, heads, time, head_dim)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))
