"""The shapes of public models by name, for plans of runs on models that are not at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refpeft.errors import RefpeftError, nearest
from refpeft.files import expanded, read_json
from refpeft.models.checkpoint import Checkpoint, Stored, expected_tensors
from refpeft.models.config import from_hf

_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA2 = _LLAMA | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3 = _LLAMA2 | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_MISTRAL = {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257}


def _decoder(family: dict, dim: int, layers: int, heads: int, kv_heads: int, ff: int) -> dict:
    sizes = {"hidden_size": dim, "num_hidden_layers": layers, "intermediate_size": ff}
    return family | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}


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
    "llama-3-70b": _decoder(_LLAMA3, 8192, 80, 64, 8, 28672),
    "mistral-7b": _decoder(_MISTRAL, 4096, 32, 32, 8, 14336),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}
"""What says the shape in the config.json of each: arXiv:2302.13971 (table 2), 2307.09288, 2407.21783, 2310.06825, and
the configs that were published with the weights."""


def checkpoint_of(shape: str) -> Checkpoint:
    """A checkpoint without tensors, of a name in SHAPES, of a config.json, or of the directory of one."""
    path = expanded(shape)
    if shape in SHAPES:
        raw = SHAPES[shape]
    elif (path / "config.json").is_file() or path.is_file():
        raw = read_json(path if path.is_file() else path / "config.json")
    else:
        hint = nearest(shape, SHAPES) or f"; there are {', '.join(SHAPES)}"
        raise RefpeftError(f"{shape!r} is no config.json and no shape that is known{hint}")
    config = from_hf(raw)
    dtype = np.dtype("f4")
    stored = {name: Stored(Path(shape), size, dtype, None) for name, size in expected_tensors(config).items()}
    return Checkpoint(Path(shape), config, stored)
