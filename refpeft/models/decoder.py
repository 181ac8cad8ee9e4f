"""Decoders of Llama's shape: Llama, Mistral, Qwen2, Qwen3, SmolLM2 and 3. What sets them apart is in ModelConfig."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array
from refpeft.errors import RefpeftError
from refpeft.models import rope
from refpeft.models.base import Cache, Frozen, Model
from refpeft.models.block import Block, Places, beside, chosen
from refpeft.models.config import ModelConfig
from refpeft.tensor import Tensor


class Decoder(Model):
    """Pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and a gated MLP (arXiv:2302.13971)."""

    def __init__(self, config: ModelConfig, weights: Callable[..., Frozen], dtype: np.dtype, xp: ModuleType = np):
        super().__init__(config, weights, dtype, xp)
        self.embed = self.embedding("model.embed_tokens", "embed")
        self.layers = [Layer(self, i) for i in range(config.layers)]
        self.last_norm = self.norm("model.norm", config.norm_eps, "norm")
        self.head = self.linear("lm_head", "head", tied="model.embed_tokens" if config.tied else None)

    def trunk(
        self,
        ids: Array,
        positions: Array | None,
        segments: Array | None,
        cache: Cache | None,
        rows: Array | None = None,
    ) -> Tensor:
        hidden = self.embedded(ids, cache)
        positions, virtual = self.positioned(hidden, ids, positions, cache)
        keys = ids.shape[1] + (cache.tokens if cache else 0)
        tables = self._tables(positions, keys + self.first_position(virtual, cache))
        places = self.places(rows, ids, virtual)
        for i, layer in enumerate(self.layers):
            cos, sin = tables if self.config.use_rope[i] else (None, None)
            mask = fused.Mask(keys, self.config.windows[i], segments)
            wanted = places if layer is self.layers[-1] else None
            hidden = self.run(layer, hidden, rows=wanted, cos=cos, sin=sin, mask=mask, cache=cache)
        if cache:
            cache.tokens += ids.shape[1]
        return hidden[:, virtual:] if virtual and rows is None else hidden

    def finish(self, hidden: Tensor) -> Tensor:
        return self.last_norm(hidden)

    def joins(self, longest: int) -> bool:
        wide = all(window is None or window >= longest for window in self.config.windows)
        return wide and self.config.rope.kind != "dynamic"  # which goes by the row's length

    def _tables(self, positions: Array, length: int) -> tuple[Array, Array]:
        """cos and sin (batch or 1, 1, time, head_dim / 2) at `positions`; `length` decides dynamic scaling."""
        inverse, factor = rope.frequencies(self.xp, self.config.rope, self.config.head_dim, length)
        angles = positions[:, None, :, None] * inverse
        return tuple((f(angles) * factor).astype(self.dtype) for f in (self.xp.cos, self.xp.sin))


class Layer(Block):
    """One layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, model: Decoder, index: int):
        config, name = model.config, f"model.layers.{index}"
        self.config, self.index = config, index
        attn, mlp = f"{name}.self_attn", f"{name}.mlp"
        self.norm1 = model.norm(f"{name}.input_layernorm", config.norm_eps, "norm")
        self.q = model.linear(f"{attn}.q_proj", "q", bias=config.qkv_bias)
        self.k = model.linear(f"{attn}.k_proj", "k", bias=config.qkv_bias)
        self.v = model.linear(f"{attn}.v_proj", "v", bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm = model.norm(f"{attn}.q_norm", config.norm_eps, "qk_norm")
            self.k_norm = model.norm(f"{attn}.k_norm", config.norm_eps, "qk_norm")
        shape = (config.kv_heads, config.head_dim)
        self.attend = model.place_of(f"{attn}.attend", "attention", shape, "attend", fused.attention)
        self.o = model.linear(f"{attn}.o_proj", "o", bias=config.o_bias)
        self.norm2 = model.norm(f"{name}.post_attention_layernorm", config.norm_eps, "norm")
        self.gate = model.linear(f"{mlp}.gate_proj", "gate", bias=config.mlp_bias)
        self.up = model.linear(f"{mlp}.up_proj", "up", bias=config.mlp_bias)
        self.down = model.linear(f"{mlp}.down_proj", "down", bias=config.mlp_bias)
        self.activate = gated(config.activation)
        dim = (config.dim,)
        self.attn_out = model.place_of(f"{name}.attn_out", "block", dim, "attn_out", self._attention)
        self.mlp_out = model.place_of(f"{name}.mlp_out", "block", dim, "mlp_out", self._mlp)
        self.block_out = model.place_of(f"{name}.block_out", "block", dim, "block_out", self._layer)
        mlp = (self.norm2, self.gate, self.up, self.down, self.mlp_out)
        self.late = (self.o, self.attn_out, *mlp, self.block_out)

    def _layer(self, x: Tensor, *, rows: Places | None, **around: object) -> Tensor:
        x = chosen(x, rows) + self.attn_out(self.norm1(x), rows=rows, **around)
        return x + self.mlp_out(self.norm2(x))

    def _attention(
        self,
        x: Tensor,
        *,
        rows: Places | None,
        cos: Array | None,
        sin: Array | None,
        mask: fused.Mask,
        cache: Cache | None,
    ) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (a.reshape(batch, time, -1, self.config.head_dim) for a in (q, k, v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        if cos is not None:
            q, k = fused.rope(q, cos=cos, sin=sin), fused.rope(k, cos=cos, sin=sin)
        if cache:
            k, v = cache.extend(self.index, k, v)
        return self.o(beside(self.attend(q, k, v, mask=mask), rows))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate(x), self.up(x)))


def gated(activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """activation(gate) * up"""
    if activation == "silu":
        return fused.silu_mul
    single = unit(activation)
    return lambda gate, up: single(gate) * up


def unit(activation: str) -> Callable[[Tensor], Tensor]:
    """The activation function of this name in ModelConfig."""
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": ops.silu,
        "relu": ops.relu,
        "gelu": lambda x: fused.gelu(x, approximate=False),
        "gelu_tanh": lambda x: fused.gelu(x, approximate=True),
    }
    if activation not in table:
        raise RefpeftError(f"activation is {activation!r}: expected one of {', '.join(table)}")
    return table[activation]
