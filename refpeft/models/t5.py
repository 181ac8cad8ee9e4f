"""T5, mT5 and Flan-T5 (Raffel et al., 2019, arXiv:1910.10683; arXiv:2010.11934; arXiv:2210.11416): encoder and decoder.

Pre-norm layers with RMSNorm, scores that are not scaled but have a bias of relative positions, which all layers of a
side share, and an MLP with or without a gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import fused
from refpeft.backend import Array
from refpeft.capturing import keep
from refpeft.layers import Part
from refpeft.models.base import Cache, Frozen, Model
from refpeft.models.block import Block, Places, beside, chosen
from refpeft.models.decoder import gated, unit
from refpeft.models.relative import biased_attention, t5_buckets_on
from refpeft.models.t5_config import T5Config
from refpeft.tensor import Tensor


class T5(Model):
    """An encoder-decoder: `model(ids, said)` gives the logits of what comes next in `said`."""

    task = "seq2seq"
    room = math.inf  # positions are relative

    def __init__(self, config: T5Config, weights: Callable[..., Frozen], dtype: np.dtype, xp: ModuleType = np):
        super().__init__(config, weights, dtype, xp)
        self.embed = self.embedding("shared", "embed")
        self.encoder = Side(self, "encoder", config.layers)
        self.decoder = Side(self, "decoder", config.decoder_layers)
        self.head = self.linear("lm_head", "head", tied="shared" if config.tied else None)

    def joins(self, longest: int) -> bool:
        return False  # its biases are of all tokens of a row with each other

    def encode(self, ids: Array, segments: Array | None = None) -> Tensor:
        """The encoder's states (batch, time, dim) of integer ids (batch, time); segments are -1 at padding.

        Rows that adapters put before the text are among them.
        """
        self.check_ids(ids)
        ids, segments = self._placed(ids), self._placed(segments)
        hidden = self.embed(ids)
        mask = fused.Mask(ids.shape[1], None, segments, causal=False)
        bias = self.encoder.bias(range(hidden.shape[1]), hidden.shape[1], both=True)
        try:
            states = self.encoder(hidden, mask=mask, bias=bias, cache=None)
            return Encoded(states, [(part, dict(vars(part.memo))) for one in self.adapters for part in one.parts])
        finally:
            self.forget()

    def decode(
        self,
        said: Array,
        states: Tensor,
        segments: Array | None = None,
        cache: Cache | None = None,
        rows: Array | None = None,
    ) -> Tensor:
        """The decoder's states (batch, time, dim) of `said` (batch, time), which reads the encoder's `states`.

        With `rows`, positions of the flattened `said`, of these alone: (rows, dim).
        """
        self.check_ids(said)
        said, segments = self._placed(said), self._placed(segments)
        past = cache.tokens if cache else 0
        keys = past + said.shape[1]
        bias = self.decoder.bias(range(past, keys), keys, both=False)
        asking = None if segments is None else self.xp.zeros(said.shape, np.int32)
        read = fused.Mask(states.shape[1] - self._virtual(states, segments), None, segments, False, asking)
        hidden = self.embed(said)[:, -said.shape[1] :]
        for part, memo in getattr(states, "memos", ()):
            vars(part.memo).update(memo)
        places = self.places(self._placed(rows), said, 0)
        around = {"mask": fused.Mask(keys), "bias": bias, "states": states, "read": read, "cache": cache}
        try:
            hidden = self.decoder(hidden, places, **around)
        finally:
            self.forget()
        if cache:
            cache.tokens += said.shape[1]
        return hidden

    def __call__(self, ids: Array, said: Array, segments: Array | None = None) -> Tensor:
        """Logits (batch, time, vocab) of the token after each of `said`, given the source `ids`."""
        return self.head(self.finish(self.decode(said, self.encode(ids, segments), segments)))

    def hidden_of(self, batch: Any, rows: np.ndarray | None = None) -> Tensor:
        return self.decode(batch.said, self.encode(batch.ids, batch.segments), batch.segments, rows=rows)

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head reads."""
        return hidden * (1 / math.sqrt(self.config.dim)) if self.config.scaled else hidden

    def _placed(self, array: Array | None) -> Array | None:
        return None if array is None else self.xp.asarray(array)

    def _virtual(self, states: Tensor, segments: Array | None) -> int:
        return 0 if segments is None else states.shape[1] - segments.shape[1]


class Encoded(Tensor):
    """An encoder's states, and what hooks handed on there (`memo`), for those of the decoder."""

    def __init__(self, states: Tensor, memos: list[tuple[Part, dict[str, object]]]):
        super().__init__(states.data, states.node)
        self.memos = memos


class Side:
    """The encoder or the decoder: layers, and the norm after them."""

    def __init__(self, model: T5, name: str, layers: int):
        self.model = model
        self.layers = [Layer(model, f"{name}.block.{i}", name == "decoder") for i in range(layers)]
        table = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias"
        self.relative = model.embedding(table, "relative")
        self.norm = model.norm(f"{name}.final_layer_norm", model.config.norm_eps, "norm")

    def bias(self, queries: range, keys: int, both: bool) -> Tensor:
        """The bias of relative positions: (1, heads, queries, keys)."""
        config = self.model.config
        buckets = keep(t5_buckets_on(self.model.xp, queries, keys, config.buckets, config.distance, both))
        return self.relative(buckets).transpose(2, 0, 1)[None]

    def __call__(self, hidden: Tensor, places: Places | None = None, **around: object) -> Tensor:
        for layer in self.layers:
            wanted = places if layer is self.layers[-1] else None
            hidden = self.model.run(layer, hidden, rows=wanted, **around)
        return self.norm(hidden)


class Layer(Block):
    """x + attention(norm(x)); of a decoder's then x + attention(norm(x), the encoder's states); x + MLP(norm(x))."""

    def __init__(self, model: T5, name: str, decodes: bool):
        config, dim = model.config, (model.config.dim,)
        self.attention = Attention(model, f"{name}.layer.0.SelfAttention", "")
        self.cross = Attention(model, f"{name}.layer.1.EncDecAttention", "cross_") if decodes else None
        last = f"{name}.layer.{2 if decodes else 1}"
        self.norms = [
            model.norm(f"{name}.layer.{i}.layer_norm", config.norm_eps, "norm") for i in range(3 if decodes else 2)
        ]
        mlp = f"{last}.DenseReluDense"
        self.gate = model.linear(f"{mlp}.wi_0", "gate") if config.gated else None
        self.up = model.linear(f"{mlp}.wi_1" if config.gated else f"{mlp}.wi", "up")
        self.down = model.linear(f"{mlp}.wo", "down")
        self.activate = gated(config.activation) if config.gated else unit(config.activation)
        self.attn_out = model.place_of(f"{name}.attn_out", "block", dim, "attn_out", self._attention)
        if decodes:
            self.cross_out = model.place_of(f"{name}.cross_out", "block", dim, "cross_out", self._cross)
        self.mlp_out = model.place_of(f"{name}.mlp_out", "block", dim, "mlp_out", self._mlp)
        self.block_out = model.place_of(f"{name}.block_out", "block", dim, "block_out", self._layer)
        if decodes:
            mlp = [site for site in (self.gate, self.up, self.down) if site]
            self.late = (self.cross.o, self.cross_out, self.norms[-1], *mlp, self.mlp_out, self.block_out)

    def _layer(
        self,
        x: Tensor,
        *,
        mask: fused.Mask,
        bias: Tensor,
        cache: Cache | None,
        rows: Places | None,
        states: Tensor | None = None,
        read: fused.Mask | None = None,
    ) -> Tensor:
        x = x + self.attn_out(self.norms[0](x), mask=mask, bias=bias, cache=cache)
        if self.cross:
            told = self.cross_out(self.norms[1](x), rows=rows, states=states, mask=read, cache=cache)
            x = chosen(x, rows) + told
        return x + self.mlp_out(self.norms[-1](x))

    def _attention(self, x: Tensor, *, mask: fused.Mask, bias: Tensor, cache: Cache | None) -> Tensor:
        k, v = self.attention.keys_and_values(x)
        if cache:
            k, v = cache.extend(self.attention.name, k, v)
        return self.attention(x, k, v, mask=mask, bias=bias)

    def _cross(
        self, x: Tensor, *, rows: Places | None, states: Tensor, mask: fused.Mask, cache: Cache | None
    ) -> Tensor:
        known = cache and cache.layers.get(self.cross.name)  # of the same source, in generation
        k, v = (Tensor(kept.array) for kept in known) if known else self.cross.keys_and_values(states)
        if cache and not known:
            cache.extend(self.cross.name, k, v)
        return self.cross(x, k, v, mask=mask, bias=None, rows=rows)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate(x), self.up(x)) if self.gate else self.activate(self.up(x)))


class Attention:
    """Heads whose scores are not scaled."""

    def __init__(self, model: T5, name: str, role: str):
        self.name, self.heads, self.head_dim = name, model.config.heads, model.config.head_dim
        self.q, self.k, self.v, self.o = (model.linear(f"{name}.{letter}", role + letter) for letter in "qkvo")
        shape = (self.heads, self.head_dim)
        self.attend = model.place_of(f"{name}.attend", "attention", shape, f"{role}attend", biased_attention)

    def in_heads(self, x: Tensor) -> Tensor:
        """(batch, time, heads * head_dim) as (batch, heads, time, head_dim)."""
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).transpose(0, 2, 1, 3)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.k(x), self.v(x)
        return self.in_heads(k), self.in_heads(v)

    def __call__(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: fused.Mask,
        bias: Tensor | None,
        rows: Places | None = None,
    ) -> Tensor:
        y = self.attend(self.in_heads(self.q(x)), k, v, bias=bias, mask=mask, scale=1.0)
        return self.o(beside(y, rows))
