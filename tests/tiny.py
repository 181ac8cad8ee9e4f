"""Tiny random models of every family, and what the tests of methods do with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from refpeft import sites
from refpeft.api import class_of
from refpeft.backend import bfloat16, xp_of
from refpeft.batches import Batch
from refpeft.models.base import Model
from refpeft.models.checkpoint import expected_tensors
from refpeft.models.config import from_hf
from refpeft.models.decoder import Decoder
from refpeft.models.gpt2 import GPT2
from refpeft.quant import Dense, Quantizer
from refpeft.tensor import Tensor

_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA = _SHAPE | {"model_type": "llama", "tie_word_embeddings": False}
TIED_LLAMA = _SHAPE | {"model_type": "llama", "tie_word_embeddings": True}
QWEN2 = _SHAPE | {"model_type": "qwen2", "tie_word_embeddings": True}
GPT2_SMALL = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_positions": 64,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
}
WIDE = LLAMA | {"hidden_size": 32, "intermediate_size": 64}  # rows of whole blocks of 32, as GGUF's formats want them
CONFIGS = {"llama": LLAMA, "wide": WIDE, "tied": TIED_LLAMA, "qwen2": QWEN2, "gpt2": GPT2_SMALL}


def arrays(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of such a model, under the names and in the layout of its files."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.normal(0.0 if name.endswith("bias") else 1.0, 0.2, shape).astype("f4")
        return rng.normal(0.0, shape[-1] ** -0.5, shape).astype("f4")

    return {name: draw(name, shape) for name, shape in expected_tensors(from_hf(config)).items()}


def model(
    name: str = "llama", dtype: str = "float64", quantizer: Quantizer | None = None, seed: int = 0, xp=np
) -> Model:
    """The tiny model of CONFIGS with this name."""
    config, compute = from_hf(CONFIGS[name]), np.dtype(dtype)
    tensors = arrays(CONFIGS[name], seed)

    def weights(key: str, linear: bool, transposed: bool):
        array = tensors[key].T if transposed else tensors[key]
        if linear and quantizer is not None:
            return quantizer(xp.asarray(np.ascontiguousarray(array)), compute, key)
        return Dense(xp.asarray(array.astype(compute)), compute)

    return (GPT2 if config.family == "gpt2" else Decoder)(config, weights, compute, xp)


def low(name: str = "llama", quantizer: Quantizer | None = None, seed: int = 0, xp=np) -> Model:
    """The same with matrices and hidden states in bfloat16, as `--dtype bfloat16` has them on a GPU."""
    return in_bfloat16(model(name, "float32", quantizer, seed, xp))


def in_bfloat16(found: Model) -> Model:
    """A model in float32, from now on with matrices and hidden states in bfloat16."""
    for weight in found.frozen.values():
        if isinstance(weight, Dense) and len(weight.shape) == 2:
            weight.array = weight.array.astype(bfloat16)
    found.activations = bfloat16
    return found


def drawn(config: dict) -> dict[str, np.ndarray]:
    """Random tensors of any model, under the names and in the layout of its files."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, shape) for name, shape in expected_tensors(from_hf(config)).items()}


def of(config: dict, quantizer: Quantizer | None = None, xp=np, dtype: str = "f8") -> Model:
    """The model of any config.json, with the weights of `drawn`."""
    found, compute, read = drawn(config), np.dtype(dtype), from_hf(config)

    def weights(name: str, linear: bool, transposed: bool):
        array = xp.asarray(found[name].T if transposed else found[name])
        if linear and quantizer:
            return quantizer(array.astype("f4"), compute, name)
        return Dense(array.astype(compute, copy=False), compute)

    return class_of(read)(read, weights, compute, xp)


def ids(rows: int = 2, time: int = 9, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, (rows, time)).astype("i4")


def batch(rows: int = 2, time: int = 9, seed: int = 1) -> Batch:
    """Next-token targets, the first two positions of a row without one."""
    tokens = ids(rows, time + 1, seed)
    targets = tokens[:, 1:].copy()
    targets[:, :2] = -100
    return Batch(tokens[:, :-1], targets)


def scramble(adapter: sites.Adapter, seed: int = 2, scale: float = 0.1) -> None:
    """Moves every trained value away from its start, as training would."""
    rng = np.random.default_rng(seed)
    for tensor in adapter.params.values():
        tensor.data += xp_of(tensor.data).asarray(rng.normal(0, scale, tensor.shape).astype(tensor.dtype))


def assert_slope(adapter: sites.Adapter, value: Callable[[], Tensor]) -> None:
    """The gradient of `value` along a random direction of all parameters is its finite difference."""
    start = value()
    start.backward()
    rng, slope = np.random.default_rng(4), 0.0
    directions = {name: rng.standard_normal(tensor.shape) for name, tensor in adapter.params.items()}
    here = {name: tensor.data for name, tensor in adapter.params.items()}
    for sign in (1, -1):
        for name, tensor in adapter.params.items():
            tensor.data = here[name] + sign * 1e-6 * directions[name]
        slope += sign * float(value().data) / 2e-6
    expected = sum((tensor.grad * directions[name]).sum() for name, tensor in adapter.params.items())
    rounding = 1e-14 * abs(float(start.data)) / 1e-6
    assert slope == pytest.approx(expected, rel=1e-5, abs=rounding)


def gradients(built: Model, one: Batch) -> dict[str, np.ndarray]:
    """The gradient of the loss by everything that is trained, by name; zeros where a step leaves a value out."""
    tensors = dict(built.trained())
    for tensor in tensors.values():
        tensor.node.grad = None
    built.loss(one).backward()
    return {name: np.zeros_like(t.data) if t.grad is None else t.grad for name, t in tensors.items()}
