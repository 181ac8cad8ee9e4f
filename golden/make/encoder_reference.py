"""Encoders and T5 in plain torch, from their papers, independent of transformers: the witness of encoders.py.

Weights come as a dictionary under the names of transformers' models without a head (T5: with one).
"""

from __future__ import annotations

import math

import torch
from fused import attend
from torch.nn import functional

Tensors = dict[str, torch.Tensor]

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
}
BERT = {
    "layer": "encoder.layer.{}",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
NAMES = {
    "bert": BERT,
    "roberta": BERT,
    "distilbert": {
        "layer": "transformer.layer.{}",
        **{letter: f"attention.{letter}_lin" for letter in "qkv"},
        "o": "attention.out_lin",
        "norm1": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm2": "output_layer_norm",
    },
    "albert": {
        "layer": "encoder.albert_layer_groups.{}.albert_layers.0",
        "q": "attention.query",
        "k": "attention.key",
        "v": "attention.value",
        "o": "attention.dense",
        "norm1": "attention.LayerNorm",
        "up": "ffn",
        "down": "ffn_output",
        "norm2": "full_layer_layer_norm",
    },
    "deberta-v2": BERT
    | {letter: f"attention.self.{word}_proj" for letter, word in (("q", "query"), ("k", "key"), ("v", "value"))},
}


class Model:
    def __init__(self, config: dict, weights: Tensors):
        self.config, self.weights = config, weights

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.unflatten(-1, (count, -1)).transpose(-2, -3)


class Encoder(Model):
    """LayerNorm(x + attention(x)), then LayerNorm(x + MLP(x)): arXiv:1810.04805, 1907.11692, 1910.01108, 1909.11942."""

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.config.get("layer_norm_eps", 1e-12))

    def embedded(self, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        first = self.config["pad_token_id"] + 1 if self.config["model_type"] == "roberta" else 0
        x = self.weights["embeddings.word_embeddings.weight"][ids.long()]
        if "embeddings.position_embeddings.weight" in self.weights:
            x = x + self.weights["embeddings.position_embeddings.weight"][first : first + ids.shape[1]]
        if "embeddings.token_type_embeddings.weight" in self.weights:
            kinds = torch.zeros_like(ids) if types is None else types
            x = x + self.weights["embeddings.token_type_embeddings.weight"][kinds.long()]
        return x

    def __call__(self, ids, types=None, segments=None) -> torch.Tensor:
        """The hidden states (batch, time, dim) of the last layer."""
        config, family = self.config, self.config["model_type"]
        real = torch.ones(ids.shape, dtype=torch.bool) if segments is None else segments >= 0
        x = self.norm("embeddings.LayerNorm", self.embedded(ids, types))
        layers = config.get("num_hidden_layers") or config["n_layers"]
        order = range(layers)
        if family == "albert":
            x = self.linear("encoder.embedding_hidden_mapping_in", x)
            order = [layer * config["num_hidden_groups"] // layers for layer in order]
        for number in order:
            x = self.layer(NAMES[family]["layer"].format(number), x, real)
        return x

    def layer(self, here: str, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        names = {role: f"{here}.{name}" for role, name in NAMES[self.config["model_type"]].items()}
        heads = self.config.get("num_attention_heads") or self.config["n_heads"]
        q, k, v = (self.heads(self.linear(names[letter], x), heads) for letter in "qkv")
        y = self.attended(names, q, k, v, real[:, None, None]).transpose(1, 2).flatten(2)
        x = self.norm(names["norm1"], x + self.linear(names["o"], y))
        activate = ACTIVATIONS[self.config.get("hidden_act") or self.config["activation"]]
        return self.norm(names["norm2"], x + self.linear(names["down"], activate(self.linear(names["up"], x))))

    def attended(self, names: dict[str, str], q, k, v, seen: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, seen, None)


class Deberta(Encoder):
    """arXiv:2006.03654, with the buckets, shared projections and convolution of version 2's code."""

    def __call__(self, ids, types=None, segments=None) -> torch.Tensor:
        config = self.config
        real = torch.ones(ids.shape, dtype=torch.bool) if segments is None else segments >= 0
        x = self.embedded(ids, types if config["type_vocab_size"] else None)
        if "embeddings.embed_proj.weight" in self.weights:
            x = self.linear("embeddings.embed_proj", x)
        x = first = self.norm("embeddings.LayerNorm", x) * real[..., None]
        self.distances = self.weights["encoder.rel_embeddings.weight"]
        if "layer_norm" in config["norm_rel_ebd"]:
            self.distances = self.norm("encoder.LayerNorm", self.distances)
        for number in range(config["num_hidden_layers"]):
            x = self.layer(f"encoder.layer.{number}", x, real)
            if number == 0 and config.get("conv_kernel_size"):
                x = self.convolved(first, x, real[..., None])
        return x

    def attended(self, names, q, k, v, seen):
        heads, time, span = self.config["num_attention_heads"], q.shape[2], len(self.distances) // 2
        shared = self.config["share_att_key"]
        place = names["q"].rpartition(".")[0]
        kinds = self.config["pos_att_type"]
        rows = torch.tensor([[self.bucket(i - j) for j in range(time)] for i in range(time)]) + span
        rows = rows.clamp(0, 2 * span - 1)
        scores = q @ k.mT
        if "c2p" in kinds:
            keys = self.heads(self.linear(names["k"] if shared else f"{place}.pos_key_proj", self.distances), heads)
            scores = scores + torch.einsum("bhid,hijd->bhij", q, keys[:, rows])
        if "p2c" in kinds:
            asks = self.heads(self.linear(names["q"] if shared else f"{place}.pos_query_proj", self.distances), heads)
            scores = scores + torch.einsum("bhjd,hijd->bhij", k, asks[:, rows])
        scores = scores / math.sqrt(q.shape[-1] * (1 + len(kinds)))
        return torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v

    def bucket(self, distance: int) -> int:
        buckets, most = self.config["position_buckets"], self.config["max_relative_positions"]
        middle = buckets // 2
        if buckets < 1 or abs(distance) <= middle:
            return distance
        share = math.log(abs(distance) / middle) / math.log((most - 1) / middle)
        return int(math.copysign(math.ceil(share * (middle - 1)) + middle, distance))

    def convolved(self, first, x, real):
        weight, bias = (self.weights[f"encoder.conv.conv.{part}"] for part in ("weight", "bias"))
        y = functional.conv1d(first.mT, weight, bias, padding=weight.shape[-1] // 2).mT * real
        return self.norm("encoder.conv.LayerNorm", x + ACTIVATIONS[self.config["conv_act"]](y)) * real


class T5(Model):
    """arXiv:1910.10683, and version 1.1's MLP: arXiv:2002.05202."""

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + self.config["layer_norm_epsilon"]).sqrt() * self.weights[f"{name}.weight"]

    def __call__(self, ids, said, segments=None) -> torch.Tensor:
        """Logits (batch, time, vocab) of what follows each token of `said`."""
        real = torch.ones(ids.shape, dtype=torch.bool) if segments is None else segments >= 0
        told = self.side("encoder", ids, real[:, None, None], None, None)
        before = torch.ones(said.shape[1], said.shape[1], dtype=torch.bool).tril()
        x = self.side("decoder", said, before, told, real[:, None, None])
        if self.config["tie_word_embeddings"]:
            return x * self.config["d_model"] ** -0.5 @ self.weights["shared.weight"].mT
        return x @ self.weights["lm_head.weight"].mT

    def side(self, side: str, ids, seen, told, read) -> torch.Tensor:
        x, time = self.weights["shared.weight"][ids.long()], ids.shape[1]
        table = self.weights[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        buckets = [[self.bucket(j - i, side == "encoder") for j in range(time)] for i in range(time)]
        bias = table[torch.tensor(buckets)].permute(2, 0, 1)
        layers = self.config["num_layers"] if side == "encoder" else self.config["num_decoder_layers"]
        for number in range(layers):
            here = f"{side}.block.{number}.layer"
            y = self.norm(f"{here}.0.layer_norm", x)
            x = x + self.attention(f"{here}.0.SelfAttention", y, y, seen, bias)
            if told is not None:
                x = x + self.attention(f"{here}.1.EncDecAttention", self.norm(f"{here}.1.layer_norm", x), told, read, 0)
            last = f"{here}.{1 if told is None else 2}"
            x = x + self.mlp(f"{last}.DenseReluDense", self.norm(f"{last}.layer_norm", x))
        return self.norm(f"{side}.final_layer_norm", x)

    def attention(self, name: str, x, told, seen, bias) -> torch.Tensor:
        heads = self.config["num_heads"]
        q = self.heads(self.linear(f"{name}.q", x), heads)
        k, v = (self.heads(self.linear(f"{name}.{letter}", told), heads) for letter in "kv")
        scores = (q @ k.mT + bias).masked_fill(~seen, float("-inf"))
        return self.linear(f"{name}.o", (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.config["feed_forward_proj"] == "relu":
            return self.linear(f"{name}.wo", torch.relu(self.linear(f"{name}.wi", x)))
        gate = ACTIVATIONS["gelu_new"](self.linear(f"{name}.wi_0", x))
        return self.linear(f"{name}.wo", gate * self.linear(f"{name}.wi_1", x))

    def bucket(self, distance: int, both: bool) -> int:
        """Half of the buckets are for single distances, the others grow; of two directions each has half."""
        buckets, most = self.config["relative_attention_num_buckets"], self.config["relative_attention_max_distance"]
        start = 0
        if both:
            buckets //= 2
            start = buckets if distance > 0 else 0
        far = abs(distance) if both else max(-distance, 0)
        single = buckets // 2
        if far < single:
            return start + far
        grown = int(math.log(far / single) / math.log(most / single) * (buckets - single))
        return start + min(single + grown, buckets - 1)


def model(config: dict, weights: Tensors) -> Model:
    kinds = {"deberta-v2": Deberta, "t5": T5}
    return kinds.get(config["model_type"], Encoder)(config, weights)
