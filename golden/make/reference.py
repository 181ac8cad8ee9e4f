"""Llama's family and GPT-2 in plain torch, from their papers, with places where a method of fine-tuning can stand.

Independent of transformers: models.py holds the two against each other. Weights come as a dictionary under Hugging
Face's names. `advice[place]` is called as advice(f, *tensors) instead of f(*tensors), where f is what the model does
there; places are listed in golden/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from fused import attend, visible
from torch.nn import functional

Tensors = dict[str, torch.Tensor]
Advice = dict[str, Callable]


def model(config: dict, weights: Tensors, advice: Advice | None = None) -> Gpt2 | Llama:
    return (Gpt2 if config["model_type"] == "gpt2" else Llama)(config, weights, advice or {})


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean of -log p[target] over targets >= 0; targets are already the next tokens."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.long().flatten(), ignore_index=-100)


class _Model:
    head = "lm_head"

    def __init__(self, config: dict, weights: Tensors, advice: Advice):
        self.config, self.weights, self.advice = config, weights, advice

    def at(self, place: str, f: Callable, *tensors: torch.Tensor) -> torch.Tensor:
        advice = self.advice.get(place)
        return advice(f, *tensors) if advice else f(*tensors)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.at(
            name, lambda x: functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")), x
        )

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.at(name, lambda x: self.normalize(name, x), x)

    def attention(self, name: str, q, k, v, segments, scale=None, window=None) -> torch.Tensor:
        y = self.at(f"{name}.attend", lambda q, k, v: self.attended(q, k, v, segments, scale, window), q, k, v)
        return y.transpose(1, 2).flatten(2)

    def attended(self, q, k, v, segments, scale=None, window=None) -> torch.Tensor:
        queries, keys = q.shape[2], k.shape[2]
        tokens = queries if segments is None else segments.shape[1]
        rows = segments.tolist() if segments is not None else [None]
        seen = [visible(queries, keys, tokens, window, row) for row in rows]
        return attend(q, k, v, torch.from_numpy(np.stack(seen)[:, None]), scale)

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def __call__(self, ids, positions=None, segments=None, first_position: int = 0) -> torch.Tensor:
        """Logits (batch, time, vocab). Rows that advice puts before the tokens' embeddings are dropped at the end."""
        time = ids.shape[1]
        x = self.at(self.embed, lambda ids: self.weights[f"{self.embed}.weight"][ids], ids.long())
        virtual = x.shape[1] - time
        if positions is None:
            positions = torch.arange(time)[None]
        before = torch.arange(virtual).expand(len(positions), virtual)
        positions = torch.cat((before, positions.long() + virtual), dim=1) + first_position
        x = self.layers(x, positions, segments)
        x = self.norm(self.last_norm, x[:, -time:])
        table = self.weights.get("lm_head.weight", self.weights[f"{self.embed}.weight"])
        return self.at("lm_head", lambda x: x @ table.mT, x)


class Llama(_Model):
    """arXiv:2302.13971, with the switches of Mistral, Qwen2, Qwen3 and SmolLM3."""

    embed, last_norm = "model.embed_tokens", "model.norm"

    def normalize(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + self.config["rms_norm_eps"]).sqrt() * self.weights[f"{name}.weight"]

    def layers(self, x, positions, segments):
        config = self.config
        cos, sin = rotary(config, positions)
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        for i in range(config["num_hidden_layers"]):
            here = f"model.layers.{i}"
            rope = config.get("no_rope_layers", [1] * (i + 1))[i]  # SmolLM3 writes 1 where a layer has rope

            def self_attention(x, here=here, rope=rope):
                name = f"{here}.self_attn"
                q = self.heads(self.linear(f"{name}.q_proj", x), config["num_attention_heads"])
                k = self.heads(self.linear(f"{name}.k_proj", x), config["num_key_value_heads"])
                v = self.heads(self.linear(f"{name}.v_proj", x), config["num_key_value_heads"])
                if f"{name}.q_norm.weight" in self.weights:
                    q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
                if rope:
                    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
                return self.linear(f"{name}.o_proj", self.attention(name, q, k, v, segments, window=window))

            def mlp(x, here=here):
                gate, up = self.linear(f"{here}.mlp.gate_proj", x), self.linear(f"{here}.mlp.up_proj", x)
                return self.linear(f"{here}.mlp.down_proj", functional.silu(gate) * up)

            def layer(x, here=here, self_attention=self_attention, mlp=mlp):
                x = x + self.at(f"{here}.attn_out", self_attention, self.norm(f"{here}.input_layernorm", x))
                return x + self.at(f"{here}.mlp_out", mlp, self.norm(f"{here}.post_attention_layernorm", x))

            def beside(q, k, v):
                """Attention of a sub-network with heads of its own width, for advice at block_out."""
                angles = rotary(config | {"head_dim": q.shape[-1]}, positions)
                return self.attended(rotate(q, *angles), rotate(k, *angles), v, segments, window=window)

            layer.attention = beside
            x = self.at(f"{here}.block_out", layer, x)
        return x


class Gpt2(_Model):
    """Radford et al., 2019. Linear layers are Conv1D there: weights are stored (in, out)."""

    embed, last_norm = "transformer.wte", "transformer.ln_f"

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.at(name, lambda x: x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"], x)

    def normalize(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.config["layer_norm_epsilon"])

    def layers(self, x, positions, segments):
        heads = self.config["n_head"]
        x = x + self.weights["transformer.wpe.weight"][positions]
        for i in range(self.config["n_layer"]):
            here = f"transformer.h.{i}"

            def attention(x, here=here):
                q, k, v = (self.heads(part, heads) for part in self.linear(f"{here}.attn.c_attn", x).chunk(3, dim=-1))
                return self.linear(f"{here}.attn.c_proj", self.attention(f"{here}.attn", q, k, v, segments))

            def mlp(x, here=here):
                hidden = functional.gelu(self.linear(f"{here}.mlp.c_fc", x), approximate="tanh")
                return self.linear(f"{here}.mlp.c_proj", hidden)

            def layer(x, here=here, attention=attention, mlp=mlp):
                x = x + self.at(f"{here}.attn_out", attention, self.norm(f"{here}.ln_1", x))
                return x + self.at(f"{here}.mlp_out", mlp, self.norm(f"{here}.ln_2", x))

            layer.attention = lambda q, k, v: self.attended(q, k, v, segments)
            x = self.at(f"{here}.block_out", layer, x)
        return x


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotary(config: dict, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (batch, 1, time, head_dim / 2) of the config's rope, in the default dtype."""
    rope, dim = (
        config["rope_parameters"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor")
    amplitude = 1.0
    if kind == "dynamic":  # NTK-aware: the base grows with the sequence once that is longer than the model's own length
        length, own = (
            max(int(positions.max()) + 1, config["max_position_embeddings"]),
            config["max_position_embeddings"],
        )
        theta *= (factor * length / own - (factor - 1)) ** (dim / (dim - 2))
    frequencies = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    if kind == "linear":  # arXiv:2306.15595
        frequencies = [f / factor for f in frequencies]
    elif (
        kind == "llama3"
    ):  # arXiv:2407.21783 and its code: long waves are stretched, short ones are not, others are mixed
        low, high, own = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        turns = [own * f / (2 * math.pi) for f in frequencies]
        kept = [min(max((t - low) / (high - low), 0.0), 1.0) for t in turns]
        frequencies = [k * f + (1 - k) * f / factor for k, f in zip(kept, frequencies, strict=True)]
    elif kind == "yarn":  # arXiv:2309.00071, section 3.2 and the authors' code
        own, fast, slow = rope["original_max_position_embeddings"], rope.get("beta_fast", 32), rope.get("beta_slow", 1)
        low, high = (dim * math.log(own / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        kept = [1 - min(max((j - low) / (high - low), 0.0), 1.0) for j in range(dim // 2)]
        frequencies = [k * f + (1 - k) * f / factor for k, f in zip(kept, frequencies, strict=True)]
        above, below = (
            0.1 * rope.get(name, absent) * math.log(factor) + 1.0
            for name, absent in (("mscale", 1), ("mscale_all_dim", 0))
        )
        amplitude = rope.get("attention_factor") or above / below
    angle = positions[:, None, :, None] * torch.tensor(frequencies)
    return amplitude * angle.cos(), amplitude * angle.sin()
