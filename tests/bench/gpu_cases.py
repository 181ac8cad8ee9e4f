"""The cases of gpu.py: which model is trained, over which rows, and how many operations a step of it takes."""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import cost, memory, sites
from refpeft.backend import single, to_host
from refpeft.batches import Batches
from refpeft.examples import Example
from refpeft.models.checkpoint import linear_weights
from refpeft.models.quantized_files import Packed
from refpeft.quant import Quantizer
from refpeft.shapes import Filled

LORA = {"r": 16, "alpha": 32.0, "targets": "all-linear"}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "rope_theta": 100000.0, "max_position_embeddings": 8192}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def _llama(family: dict, dim: int, ff: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": dim, "intermediate_size": ff, "num_hidden_layers": layers}
    return family | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5}


SHAPES = {
    "1b": _llama(_LLAMA3 | _TIED, 2048, 8192, 16, 32, 8),
    "8b": _llama(_LLAMA3 | _UNTIED, 4096, 14336, 32, 32, 8),
    "135m": _llama(_SMOLLM2 | _TIED, 576, 1536, 30, 9, 3),
}
"""Llama-3.2-1B, Llama-3.1-8B and SmolLM2-135M, as config.json has them."""

_TINY = _llama(_SMOLLM2 | _TIED | {"vocab_size": 96}, 64, 128, 2, 4, 2)
_TINY_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A step over `rows` rows of `tokens` tokens, all learned; activations of layers may be computed again.

    Rows are full; or padded: the lengths go from a half of `tokens` to all of them; or packed: four texts in each.
    """

    shape: str
    rows: int
    tokens: int
    quantized: bool = False
    recompute: bool = False
    fill: str = "full"
    tiny: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return _TINY if self.tiny else SHAPES[self.shape]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        most = _TINY_TOKENS if self.tiny else self.tokens
        if self.fill == "packed":
            return [most // 4] * 4 * self.rows
        shortest = most // 2 if self.fill == "padded" else most
        return np.linspace(shortest, most, self.rows).astype(int).tolist() if self.rows > 1 else [most]

    def examples(self) -> list[Example]:
        rng = np.random.default_rng(0)
        vocab = self.config["vocab_size"]
        rows = [rng.integers(0, vocab, length, np.int32) for length in self.lengths]
        return [Example(ids, np.ones(len(ids), bool), line) for line, ids in enumerate(rows, 1)]

    def batches(self) -> Batches:
        """Every step has all rows."""
        return Batches(self.examples(), self.rows, max(self.lengths) * (4 if self.fill == "packed" else 1),
                       pack=self.fill == "packed")  # fmt: skip

    def operations(self) -> float:
        """Operations of a step in products of matrices, as `refpeft plan` counts them, with what is computed again."""
        skeleton = memory.skeleton(Random(self.config))
        sites.attach(skeleton, "lora", LORA)
        some = (16, 32, 64)  # what a text takes is a polynomial of degree 2 of its tokens
        of_text = np.polyfit(some, [cost.step(skeleton, 1, n).flops(self.recompute) for n in some], 2)
        return float(np.polyval(of_text, self.lengths).sum())

    def floors(self) -> dict[str, tuple[str, float]]:
        """The least that each kind of work of gpu_profile.py takes in a step of full rows, nothing of it computed
        again: operations ("FLOP") of products and attention; of the rest bytes ("B"), each array of two bytes a number
        that is there before it, or needed after it, read or written once.
        """
        config = self.config
        dim, ff, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        tokens, narrow = sum(self.lengths), 2
        pairs = sum(n * (n + 1) // 2 for n in self.lengths)
        attention = 3.5 * 4 * pairs * dim * layers
        values = LORA["r"] * layers * (6 * dim + 2 * dim * kv_heads // heads + 3 * (dim + ff))
        return {
            "products": ("FLOP", self.operations() - attention),
            "attention": ("FLOP", attention),
            "norms": ("B", 2 * layers * (4 + 4) * tokens * dim * narrow),  # sums; and the way back
            "silu_mul": ("B", layers * (3 + 5) * tokens * ff * narrow),
            "rope": ("B", layers * (2 + 2) * tokens * (dim + dim * kv_heads // heads) * narrow),
            "cross-entropy": ("B", 2 * tokens * config["vocab_size"] * narrow),  # logits, and their gradients
            "optimizer": ("B", 7 * 4 * values),  # AdamW reads four arrays of float32 and writes three
        }


CASES = {
    "1b": Case("1b", 4, 2048),
    "135m": Case("135m", 8, 512),
    "135m-short": Case("135m", 1, 128),
    "1b-qlora": Case("1b", 4, 2048, quantized=True),
    "8b-qlora": Case("8b", 1, 2048, quantized=True, recompute=True),
    "1b-padded": Case("1b", 4, 2048, fill="padded"),
    "1b-packed": Case("1b", 4, 2048, fill="packed"),
}


class Random(Filled):
    """Random weights; what a quantizer takes is quantized once for each shape, where `xp` computes, to save time."""

    def __init__(self, raw: dict[str, Any], xp: ModuleType = np):
        super().__init__(raw)
        self._xp, self._linear = xp, linear_weights(self.config)
        self._packed: dict[tuple[int, ...], Packed] = {}

    def packed(self, name: str, quantizer: Quantizer | None) -> Packed | None:
        if quantizer is None or name not in self._linear:
            return None
        shape = self.shape(name)
        if shape not in self._packed:
            parts = quantizer.pack(self._xp.asarray(single(self.tensor(name))))
            self._packed[shape] = Packed(quantizer, {part: to_host(array) for part, array in parts.items()})
        return self._packed[shape]
