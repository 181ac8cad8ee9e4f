"""GGUF files (llama.cpp's format), read as the Hugging Face directory that they were made from.

The header is parsed here, because the `gguf` package believes every count in it; that package knows the block formats
and dequantizes. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers

from refpeft.errors import RefpeftError
from refpeft.files import let_go
from refpeft.models.checkpoint import Checkpoint, Stored, checked, linear_weights
from refpeft.models.config import ModelConfig, from_hf
from refpeft.models.gguf_tokenizer import build_tokenizer, end_ids
from refpeft.models.quantized_files import Packed
from refpeft.models.rope import inverse_frequencies
from refpeft.quant import Quantizer, make_quantizer
from refpeft.tokenizer import Tokenizer

# llama.cpp's names of a layer's modules -> transformers'
_LLAMA_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_MODULES = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", "gpt2")
_PERMUTED = (
    "llama",
    "smollm3",
)  # llama.cpp rotates neighbouring pairs there, and has the rows of q and k in that order

# Keys below "<architecture>." that are read, or that repeat what the tensors say.
_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}

# GGUF's value types: number -> struct format. 8 is a string, 9 an array.
_FLOATS = ("F32", "F16", "BF16")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def open_gguf(path: Path) -> Checkpoint:
    """The model in a GGUF file, under transformers' names and in its layout; tensors are dequantized when asked for.

    Raises RefpeftError for a file that is corrupt, or of an architecture that is not known.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise RefpeftError(f"{path}: reading GGUF files needs the gguf package: pip install 'refpeft[gguf]'") from None
    try:
        fields, entries = _parse(path)
    except OSError as error:
        raise RefpeftError(f"{path}: cannot be read: {error.strerror}") from None
    except RefpeftError as error:  # nothing is broken, but it is not supported
        raise RefpeftError(f"{path}: {error}") from None
    except (ValueError, struct.error) as error:
        raise RefpeftError(f"{path}: not a valid GGUF file: {error}; download or copy it again") from None
    try:
        raw = _config(fields, entries)
        config = from_hf(raw)
        names = {name: _full_name(name, config.family) for name in entries if name != "rope_freqs.weight"}
    except RefpeftError as error:
        raise RefpeftError(f"{path}: {error}") from None

    heads = {"attn_q": config.heads, "attn_k": config.kv_heads} if fields["general.architecture"] in _PERMUTED else {}
    stored, blocks = {}, {}
    for name, full in names.items():
        entry, transposed = entries[name], config.family == "gpt2" and full.endswith(_CONV1D)
        shape, its_heads = entry.shape[::-1] if transposed else entry.shape, heads.get(name.split(".")[-2])
        stored[full] = Stored(path, shape, entry.dtype, partial(_read, entry, its_heads, transposed))
        blocks[full] = entry.kind.name, partial(_in_order, entry.data, its_heads)
    taken, _ = checked(path, config, stored)
    return GgufCheckpoint(path, config, taken, fields, blocks)


class GgufCheckpoint(Checkpoint):
    """A Checkpoint whose config and tokenizer are made from the file's metadata; `blocks` are (type, how to read)."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        stored: dict[str, Stored],
        fields: dict[str, Any],
        blocks: dict[str, tuple[str, Callable[[], np.ndarray]]],
    ):
        super().__init__(path, config, stored)
        self._fields, self._blocks, self._linear = fields, blocks, linear_weights(config)

    def packed(self, name: str, quantizer: Quantizer | None) -> Packed | None:
        """The file's own blocks of a linear weight for the quantizer `gguf`; None for floats, which it quantizes.

        Raises RefpeftError for a type that the quantizer lacks.
        """
        kind, blocks = self._blocks[name]
        if quantizer is None or quantizer.name != "gguf" or name not in self._linear or kind in _FLOATS:
            return None
        try:
            return Packed(_quantizer_of(kind), {"blocks": blocks()})
        except RefpeftError:
            raise RefpeftError(
                f"{self.path}: tensor {name!r} is of type {kind}, in which refpeft cannot keep it: leave the quantizer "
                "out for dense weights, or take another"
            ) from None

    def tokenizer(self) -> Tokenizer:
        backend, config = self._tokenizer
        return Tokenizer(backend, config, name=str(self.path))

    def files(self) -> dict[str, bytes]:
        backend, config = self._tokenizer
        texts = {
            "config.json": json.dumps(self.config.raw, indent=2),
            "tokenizer.json": backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        }
        return {name: text.encode() for name, text in texts.items()}

    @cached_property
    def _tokenizer(self) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
        try:
            return build_tokenizer(self._fields)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic inside the Rust library is no Exception
            reason = " ".join(str(error).split())  # the library's messages may have several lines
            raise RefpeftError(f"{self.path}: its tokenizer cannot be rebuilt: {reason}") from None


@cache
def _quantizer_of(kind: str) -> Quantizer:
    """The quantizer of a GGUF type, one object for all weights. Raises RefpeftError for a type that it lacks."""
    return make_quantizer("gguf", {"type": kind})


# The file -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One tensor in the file."""

    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # outermost dimension first, unlike in the file
    data: np.ndarray  # its bytes, (rows, bytes a row), mapped

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(self.kind.name, np.float32))


class _Cursor:
    """Reads values one after another. Lengths are compared with what is left of the file before they are believed."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def scalar(self, kind: str):
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)  # struct.error at the end of the file
        self.at += struct.calcsize("<" + kind)
        return value

    def count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self.scalar("Q")
        if count * least > len(self.data) - self.at:
            raise ValueError(f"byte {self.at - 8} announces {count} values, more than the file holds")
        return count

    def string(self) -> str:
        length = self.count(1)
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def value(self):
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"byte {self.at - 4} has value type {kind}, which is not known")
        kind = self.scalar("I")
        if kind == _STRING:
            return [self.string() for _ in range(self.count(8))]
        if kind not in _SCALARS:
            raise ValueError(f"byte {self.at - 4} has an array of value type {kind}, which is not known")
        size = struct.calcsize("<" + _SCALARS[kind])
        count = self.count(size)
        self.at += count * size
        return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.at - count * size))


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """(metadata, tensors) by name. Raises ValueError or struct.error for a file that contradicts itself."""
    if path.stat().st_size < 24:
        raise ValueError("it is shorter than any header")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    cursor = _Cursor(memoryview(data))
    magic, version = cursor.scalar("4s"), cursor.scalar("I")
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}, not with b'GGUF'")
    if version not in (2, 3):
        raise RefpeftError(f"its version is {version}; refpeft reads little-endian GGUF files of version 2 and 3")
    tensors, values = cursor.count(0), cursor.count(0)

    fields: dict[str, Any] = {}
    for _ in range(values):  # a false count soon meets the end of the file: every turn reads at least 12 bytes
        name = cursor.string()
        if name in fields:
            raise ValueError(f"key {name!r} stands there twice")
        fields[name] = cursor.value()

    heads: dict[str, tuple] = {}
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.scalar("I")
        if name in heads or not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r} is there twice, or does not have 1 to 4 dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        heads[name] = shape, cursor.scalar("I"), cursor.scalar("Q")

    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return fields, {name: _entry(name, *head, start=start, data=data) for name, head in heads.items()}


def _entry(name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, data: np.ndarray) -> _Entry:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(kind)  # ValueError for an unknown one
    block, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        raise RefpeftError(
            f"tensor {name!r} is of type {kind.name}, which the gguf package cannot dequantize"
        ) from None
    rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
    if shape[-1] % block:
        raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}")
    begin = start + offset
    if begin + rows * row_bytes > len(data):
        raise ValueError(f"tensor {name!r} ends at byte {begin + rows * row_bytes}, the file has {len(data)}")
    if 0 in shape:
        raise ValueError(f"tensor {name!r} is empty")
    return _Entry(kind, shape, data[begin : begin + rows * row_bytes].reshape(rows, row_bytes))


def _read(entry: _Entry, heads: int | None, transposed: bool) -> np.ndarray:
    """A tensor in transformers' layout: mapped if the file has it so, computed otherwise."""
    from gguf.quants import dequantize

    if entry.kind.name in _FLOATS:
        array = entry.data.view(entry.dtype).reshape(entry.shape)
    else:
        with np.errstate(all="ignore"):  # scales of a corrupt file overflow; NaN is reported when it is trained on
            array = dequantize(entry.data, entry.kind).reshape(entry.shape)
        let_go(entry.data)
    array = _in_order(array, heads)
    array = np.ascontiguousarray(array.T if transposed else array)
    array.flags.writeable = False
    return array


def _in_order(array: np.ndarray, heads: int | None) -> np.ndarray:
    """The rows as transformers has them; with heads, each one's are (pair, first or second) in llama.cpp."""
    if heads is None:
        return array
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


# The model ------------------------------------------------------------------------------------------------------------

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (out, in) in GGUF, (in, out) in transformers
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def _full_name(name: str, family: str) -> str:
    """transformers' name of a tensor."""
    gpt2 = family == "gpt2"
    module, _, kind = name.rpartition(".")
    outer = {
        "token_embd": "transformer.wte" if gpt2 else "model.embed_tokens",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f" if gpt2 else "model.norm",
        "output": "lm_head",
    }
    if module in outer:
        return f"{outer[module]}.{kind}"
    found = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", module)
    modules = _GPT2_MODULES if gpt2 else _LLAMA_MODULES
    if not found or found[2] not in modules:
        raise RefpeftError(f"tensor {name!r} is not known in a {family} model")
    return f"{'transformer.h' if gpt2 else 'model.layers'}.{found[1]}.{modules[found[2]]}.{kind}"


def _config(fields: dict[str, Any], entries: dict[str, _Entry]) -> dict[str, Any]:
    """The config.json of the model."""
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise RefpeftError(f"general.architecture is {architecture!r}; refpeft has {', '.join(_ARCHITECTURES)}")
    if fields.get("split.count", 1) not in (0, 1):
        raise RefpeftError("it is one part of a split model; join the parts with llama-gguf-split --merge")
    if "token_embd.weight" not in entries:
        raise RefpeftError("tensor 'token_embd.weight' is missing")
    values = _values(fields, architecture)

    def need(key: str):
        if key not in values:
            raise RefpeftError(f"key '{architecture}.{key}' is missing")
        return values[key]

    common = {
        "vocab_size": entries["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in entries,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids(fields),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }
    if architecture == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": need("context_length"),
            "n_embd": need("embedding_length"),
            "n_layer": need("block_count"),
            "n_head": need("attention.head_count"),
            "n_inner": values.get("feed_forward_length"),
            "layer_norm_epsilon": need("attention.layer_norm_epsilon"),
        }

    window = values.get("attention.sliding_window")
    family = "mistral" if architecture == "llama" and window is not None else architecture  # a llama to llama.cpp
    config = common | {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": need("attention.head_count"),
        "num_key_value_heads": values.get("attention.head_count_kv", values["attention.head_count"]),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
    }
    if "attention.key_length" in values:
        config["head_dim"] = values["attention.key_length"]
    if values.get("attention.value_length") != values.get("attention.key_length"):
        raise RefpeftError("keys and values have different lengths (attention.key_length, attention.value_length)")
    if window is not None:
        config["sliding_window"] = window
    if family in ("llama", "smollm3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in entries
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in entries
    config["rope_parameters"] = _rope_parameters(values, config, entries.get("rope_freqs.weight"))
    return config


def _values(fields: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The metadata below "<architecture>.", every key of which is known."""
    values = {}
    for key, value in fields.items():
        group, _, short = key.partition(".")
        if group != architecture or (short == "expert_count" and value == 0):
            continue
        if short not in _KEYS:
            raise RefpeftError(f"key {key!r} = {reprlib.repr(value)} is not known, and may change what is computed")
        if isinstance(value, float):
            # The makers wrote a decimal (1e-05), the file has its float32: the shortest decimal for that is theirs.
            with np.errstate(over="ignore"):
                value = float(str(np.float32(value)))
        values[short] = value
    return values


def _rope_parameters(values: dict[str, Any], config: dict[str, Any], factors: _Entry | None) -> dict[str, Any]:
    """`rope_parameters` of config.json; `factors` divide the frequencies: llama.cpp's form of Llama 3.1's scaling."""
    plain = {"rope_theta": values.get("rope.freq_base", 10000.0), "rope_type": "default"}
    model = from_hf(config | {"rope_parameters": plain})
    if values.get("rope.dimension_count", model.head_dim) != model.head_dim:
        raise RefpeftError(f"rope.dimension_count is {values['rope.dimension_count']!r}, heads have {model.head_dim}")
    kind = values.get("rope.scaling.type", "none")
    if factors is not None and kind == "none":
        return _llama3_parameters(plain, config, _read(factors, None, False))
    if factors is not None or kind not in ("none", "linear", "yarn"):
        raise RefpeftError(
            f"rope.scaling.type is {kind!r}; refpeft has none, linear and yarn, without rope_freqs.weight"
        )
    if kind == "none":
        return plain
    scaled = plain | {"rope_type": kind, "factor": values.get("rope.scaling.factor")}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = values.get("rope.scaling.original_context_length")
    return scaled


def _llama3_parameters(plain: dict[str, Any], config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The llama3 scaling that gives these factors; its numbers beside `factor` are those of all Llama 3 models."""
    scaled = plain | {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    models = [from_hf(config | {"rope_parameters": parameters}) for parameters in (plain, scaled)]
    before, after = (inverse_frequencies(model.rope, model.head_dim, 0)[0] for model in models)
    if factors.shape != before.shape or not np.allclose(before / after, factors, rtol=1e-5):
        raise RefpeftError("tensor 'rope_freqs.weight' is not Llama 3.1's rope scaling, the only one of its kind known")
    return scaled
