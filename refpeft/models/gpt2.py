"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, one linear layer for q, k and v, weights as (in, out)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from refpeft import fused
from refpeft.backend import Array
from refpeft.models.base import Cache, Frozen, Model
from refpeft.models.block import Block, Places, beside, chosen
from refpeft.models.config import ModelConfig
from refpeft.models.decoder import unit
from refpeft.tensor import Tensor


class GPT2(Model):
    """Pre-norm decoder with learned positions and a plain MLP."""

    def __init__(self, config: ModelConfig, weights: Callable[..., Frozen], dtype: np.dtype, xp: ModuleType = np):
        super().__init__(config, weights, dtype, xp)
        self.embed = self.embedding("transformer.wte", "embed")
        self.position = self.embedding("transformer.wpe", "position")
        self.layers = [Layer(self, i) for i in range(config.layers)]
        self.last_norm = self.norm("transformer.ln_f", config.norm_eps, "norm", bias=True)
        self.head = self.linear("lm_head", "head", tied="transformer.wte" if config.tied else None)

    def trunk(
        self,
        ids: Array,
        positions: Array | None,
        segments: Array | None,
        cache: Cache | None,
        rows: Array | None = None,
    ) -> Tensor:
        hidden = self.embedded(ids, cache)
        keys = ids.shape[1] + (cache.tokens if cache else 0)
        self.check_positions(ids, positions, hidden.shape[1] - ids.shape[1], cache)
        positions, virtual = self.positioned(hidden, ids, positions, cache)
        hidden = hidden + self.position(positions)
        places, mask = self.places(rows, ids, virtual), fused.Mask(keys, None, segments)
        for layer in self.layers:
            wanted = places if layer is self.layers[-1] else None
            hidden = self.run(layer, hidden, rows=wanted, mask=mask, cache=cache)
        if cache:
            cache.tokens += ids.shape[1]
        return hidden[:, virtual:] if virtual and rows is None else hidden

    def finish(self, hidden: Tensor) -> Tensor:
        return self.last_norm(hidden)


class Layer(Block):
    """One layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, model: GPT2, index: int):
        config, name = model.config, f"transformer.h.{index}"
        self.config, self.index = config, index
        self.norm1 = model.norm(f"{name}.ln_1", config.norm_eps, "norm", bias=True)
        self.qkv = model.linear(f"{name}.attn.c_attn", "q", "k", "v", bias=True, transposed=True)
        shape = (config.kv_heads, config.head_dim)
        self.attend = model.place_of(f"{name}.attn.attend", "attention", shape, "attend", fused.attention)
        self.o = model.linear(f"{name}.attn.c_proj", "o", bias=True, transposed=True)
        self.norm2 = model.norm(f"{name}.ln_2", config.norm_eps, "norm", bias=True)
        self.up = model.linear(f"{name}.mlp.c_fc", "up", bias=True, transposed=True)
        self.down = model.linear(f"{name}.mlp.c_proj", "down", bias=True, transposed=True)
        self.activate = unit(config.activation)
        dim = (config.dim,)
        self.attn_out = model.place_of(f"{name}.attn_out", "block", dim, "attn_out", self._attention)
        self.mlp_out = model.place_of(f"{name}.mlp_out", "block", dim, "mlp_out", self._mlp)
        self.block_out = model.place_of(f"{name}.block_out", "block", dim, "block_out", self._layer)
        self.late = (self.o, self.attn_out, self.norm2, self.up, self.down, self.mlp_out, self.block_out)

    def _layer(self, x: Tensor, *, rows: Places | None, **around: object) -> Tensor:
        x = chosen(x, rows) + self.attn_out(self.norm1(x), rows=rows, **around)
        return x + self.mlp_out(self.norm2(x))

    def _attention(self, x: Tensor, *, rows: Places | None, mask: fused.Mask, cache: Cache | None) -> Tensor:
        batch, time, _ = x.shape
        y = self.qkv(x).reshape(batch, time, 3, self.config.heads, self.config.head_dim)
        q, k, v = (y[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        if cache:
            k, v = cache.extend(self.index, k, v)
        return self.o(beside(self.attend(q, k, v, mask=mask), rows))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))
