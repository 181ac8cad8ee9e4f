"""The shapes of public models by name, for plans and timings of runs on models that are not at hand."""

from __future__ import annotations

import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refpeft.backend import bfloat16
from refpeft.errors import RefpeftError, nearest
from refpeft.files import expanded, read_json
from refpeft.models.checkpoint import Checkpoint, Stored, expected_tensors
from refpeft.models.config import from_hf

_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA2 = _LLAMA | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3 = _LLAMA2 | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_MISTRAL = {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
_SMOLLM2 = _LLAMA2 | {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257}
_BERT = {"model_type": "bert", "vocab_size": 30522}
_ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA = {
    "model_type": "deberta-v2",
    "vocab_size": 128100,
    "relative_attention": True,
    "position_buckets": 256,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
_DEBERTA_V2 = _DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu"}
_T5 = {"model_type": "t5", "decoder_start_token_id": 0}
_T5_1_1 = _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _decoder(family: dict, dim: int, layers: int, heads: int, kv_heads: int, ff: int) -> dict:
    sizes = {"hidden_size": dim, "num_hidden_layers": layers, "intermediate_size": ff}
    return family | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}


def _encoder(family: dict, dim: int, layers: int, heads: int) -> dict:
    sizes = {"hidden_size": dim, "num_hidden_layers": layers, "intermediate_size": 4 * dim}
    return family | sizes | {"num_attention_heads": heads}


def _t5(family: dict, dim: int, layers: int, heads: int, head_dim: int, ff: int) -> dict:
    return family | {"d_model": dim, "num_layers": layers, "num_heads": heads, "d_kv": head_dim, "d_ff": ff}


def _gpt2(dim: int, layers: int, heads: int) -> dict:
    return _GPT2 | {"n_embd": dim, "n_layer": layers, "n_head": heads}


SHAPES = {
    "llama-7b": _decoder(_LLAMA, 4096, 32, 32, 32, 11008),
    "llama-13b": _decoder(_LLAMA, 5120, 40, 40, 40, 13824),
    "llama-33b": _decoder(_LLAMA, 6656, 60, 52, 52, 17920),
    "llama-65b": _decoder(_LLAMA, 8192, 80, 64, 64, 22016),
    "llama-2-7b": _decoder(_LLAMA2, 4096, 32, 32, 32, 11008),
    "llama-2-13b": _decoder(_LLAMA2, 5120, 40, 40, 40, 13824),
    "llama-2-70b": _decoder(_LLAMA2, 8192, 80, 64, 8, 28672),
    "llama-3-8b": _decoder(_LLAMA3, 4096, 32, 32, 8, 14336),
    "llama-3.2-1b": _decoder(_LLAMA3 | {"tie_word_embeddings": True}, 2048, 16, 32, 8, 8192),
    "llama-3-70b": _decoder(_LLAMA3, 8192, 80, 64, 8, 28672),
    "mistral-7b": _decoder(_MISTRAL, 4096, 32, 32, 8, 14336),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt3-175b": _gpt2(12288, 96, 96) | {"n_positions": 2048},
    "smollm2-135m": _decoder(_SMOLLM2, 576, 30, 9, 3, 1536),
    "minilm-l6": _encoder(_BERT, 384, 6, 12),
    "bert-base": _encoder(_BERT, 768, 12, 12),
    "bert-large": _encoder(_BERT, 1024, 24, 16),
    "roberta-base": _encoder(_ROBERTA, 768, 12, 12),
    "roberta-large": _encoder(_ROBERTA, 1024, 24, 16),
    "deberta-v2-xxlarge": _encoder(_DEBERTA_V2, 1536, 48, 24),
    "deberta-v3-base": _encoder(_DEBERTA, 768, 12, 12),
    "t5-small": _t5(_T5, 512, 6, 8, 64, 2048),
    "t5-base": _t5(_T5, 768, 12, 12, 64, 3072),
    "t5-large": _t5(_T5, 1024, 24, 16, 64, 4096),
    "t5-3b": _t5(_T5, 1024, 24, 32, 128, 16384),
    "t5-11b": _t5(_T5, 1024, 24, 128, 128, 65536),
    "t5-v1.1-small": _t5(_T5_1_1, 512, 8, 6, 64, 1024),
    "t5-v1.1-base": _t5(_T5_1_1, 768, 12, 12, 64, 2048),
    "t5-v1.1-large": _t5(_T5_1_1, 1024, 24, 16, 64, 2816),
    "t5-v1.1-xl": _t5(_T5_1_1, 2048, 24, 32, 64, 5120),
    "t5-v1.1-xxl": _t5(_T5_1_1, 4096, 24, 64, 64, 10240),
}
"""What says the shape in the config.json of each: arXiv:2302.13971 (table 2), 2307.09288, 2407.21783, 2310.06825,
2005.14165 (table 2.1; the head is the embedding table, as GPT-2's is), and the configs that were published with the
weights."""


def checkpoint_of(shape: str) -> Checkpoint:
    """A checkpoint without tensors, of a name in SHAPES, of a config.json, or of the directory of one.

    In names, hyphens and the case of letters do not matter: llama3-8b is llama-3-8b.
    """
    config, dtype = from_hf(read(shape)), np.dtype("f4")
    stored = {name: Stored(Path(shape), size, dtype, None) for name, size in expected_tensors(config).items()}
    return Checkpoint(Path(shape), config, stored)


def read(shape: str) -> dict[str, Any]:
    """The config.json of a shape; see `checkpoint_of`."""
    path, known = expanded(shape), {_plain(name): raw for name, raw in SHAPES.items()}
    if _plain(shape) in known:
        return known[_plain(shape)]
    if (path / "config.json").is_file() or path.is_file():
        return read_json(path if path.is_file() else path / "config.json")
    hint = nearest(shape, SHAPES) or f"; there are {', '.join(SHAPES)}"
    raise RefpeftError(f"{shape!r} is no config.json and no shape that is known{hint}")


def known(model: str) -> bool:
    """Whether this is a shape, and not a model's directory or hub id: a name in SHAPES, or a config.json alone."""
    return _plain(model) in map(_plain, SHAPES) or Path(model).suffix == ".json"


class Filled(Checkpoint):
    """A checkpoint of random numbers in bfloat16 that no file holds, to measure what does not depend on weights.

    `raw` is its config.json. Each tensor is a part of the same few numbers, from a place of its own; norms are ones.
    """

    def __init__(self, raw: dict[str, Any]):
        config, path = from_hf(raw), Path("random")
        super().__init__(
            path,
            config,
            {
                name: Stored(path, shape, bfloat16, lambda name=name, shape=shape: self._made(name, shape))
                for name, shape in expected_tensors(config).items()
            },
        )

    @cached_property
    def _numbers(self) -> np.ndarray:
        return (np.random.default_rng(0).standard_normal(2**24, np.float32) * np.float32(0.02)).astype(bfloat16)

    def _made(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, bfloat16)
        start = zlib.crc32(name.encode()) % (len(self._numbers) // 2)
        return np.resize(self._numbers[start:], shape)

    def tokenizer(self) -> None:
        return None  # no text is read


def _plain(name: str) -> str:
    return name.replace("-", "").lower()
