"""A model's files opened without reading the weights: config, tensors by name, tokenizer. Nothing is ever unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from refpeft.errors import RefpeftError
from refpeft.files import read_json, read_safetensors
from refpeft.models import albert_config, deberta_config, encoder_config, t5_config
from refpeft.models.albert_config import AlbertConfig
from refpeft.models.config import AnyConfig, ModelConfig, from_hf
from refpeft.models.deberta_config import DebertaConfig
from refpeft.models.encoder_config import EncoderConfig
from refpeft.models.quantized_files import Packed, gathered
from refpeft.models.t5_config import T5Config
from refpeft.quant import Quantizer

if TYPE_CHECKING:
    from refpeft.tokenizer import Tokenizer

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Constants that older files hold beside the weights: GPT-2's causal mask, Llama's rotary frequencies, BERT's numbers.
_BUFFER = re.compile(r"\.attn\.(masked_)?bias$|(^|\.)rotary_emb\.inv_freq$|(^|\.)embeddings\.\w+_ids$")
_TABLES = ("embed_tokens", "wte", "wpe", "lm_head", "word_embeddings", "position_embeddings", "token_type_embeddings")
_TABLES += ("rel_embeddings", "shared", "relative_attention_bias")
_SCORE = "score.weight"  # of a decoder that classifies
_TABLES_AGAIN = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # T5's table, which is its `shared`
_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what `read` will give, which may be work (quantized tensors are dequantized)."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    packed: Packed | None = None  # how the file has it, where a Hugging Face directory is quantized


class Checkpoint:
    """A model's files. Tensor names are those of transformers' models with a head (`model.layers.0...`, `bert....`).

    path       the directory or the .gguf file
    config     the ModelConfig or EncoderConfig; the tensors are exactly `expected_tensors(config)`
    unused     names of other tensors in the files, of heads, that no task has taken yet
    """

    def __init__(
        self, path: Path, config: AnyConfig, stored: dict[str, Stored], others: dict[str, Stored] | None = None
    ):
        self.path, self.config, self._stored, self._others = path, config, stored, others or {}
        self._taken: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in the layout of the file: read-only; mapped from the file where it is stored as it is."""
        return (self._stored.get(name) or self._others[name]).read()

    @property
    def unused(self) -> tuple[str, ...]:
        return tuple(name for name in self._others if name not in self._taken)

    def of_head(self, name: str) -> np.ndarray | None:
        """A tensor of a head by its full name; None where the files have none."""
        if name not in self._others:
            return None
        self._taken.add(name)
        found = self._others[name]
        if found.dtype not in _FLOATS:
            raise RefpeftError(
                f"{found.file}: tensor {name!r}, of the head, is {found.dtype}: expected floating-point numbers; take "
                "the original model, or quantize it with its head in llm_int8_skip_modules"
            )
        return found.read()

    def packed(self, name: str, quantizer: Quantizer | None) -> Packed | None:
        """The weight as the file has it quantized, if a model with `quantizer` keeps it so; None where it does not.

        A directory that is quantized stays as it is. Raises RefpeftError where another quantizer is asked for.
        """
        found = self._stored[name].packed
        if found and quantizer and not found.quantizer.serves_as(quantizer):
            raise RefpeftError(
                f"{self.path} is quantized already, as {found.quantizer}, not as {quantizer}: leave the quantizer out "
                "to take it as it is, or take the original weights"
            )
        return found

    @property
    def quantized(self) -> bool:
        """Whether the files are quantized and stay so; what they keep dense stays dense."""
        return any(entry.packed for entry in self._stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `tensor(name)` has."""
        return self._stored[name].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the files that hold the weights."""
        return sum(file.stat().st_size for file in {entry.file for entry in self._stored.values()})

    def tokenizer(self) -> Tokenizer:
        from refpeft.tokenizer import Tokenizer

        return Tokenizer.load(self.path)

    def files(self) -> dict[str, bytes]:
        """By file name, the contents of what a changed copy needs beside its weights: config, tokenizer, template."""
        return {name: (self.path / name).read_bytes() for name in _COMPANIONS if (self.path / name).is_file()}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The model in a Hugging Face directory or a GGUF file.

    Raises RefpeftError, naming the file (and the tensor where one is at fault), if it is not whole or not known.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        from refpeft.models.gguf import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise RefpeftError(f"{path}: expected a directory with config.json and {_SINGLE}, or a .gguf file")

    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise RefpeftError(f"{path} holds an adapter, not a model; give the model that it was trained on")
        raise RefpeftError(f"{path}: has no config.json; expected the directory of a Hugging Face model")
    raw = read_json(path / "config.json")
    try:
        config = from_hf(raw)
    except RefpeftError as error:
        raise RefpeftError(f"{path / 'config.json'}: {error}") from None
    stored = {
        name: Stored(file, array.shape, array.dtype, lambda array=array: array)
        for name, (file, array) in _read(path).items()
    }
    return Checkpoint(path, config, *checked(path, config, stored))


def _of_a_head(config: AnyConfig, name: str) -> bool:
    """Whether a tensor that the model itself does not take may be of a head: of a decoder only one that classifies."""
    return isinstance(config, EncoderConfig) or (isinstance(config, ModelConfig) and name == _SCORE)


def expected_tensors(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape, as files have them, of every tensor of such a model (GPT-2's linear weights are (in, out))."""
    if isinstance(config, DebertaConfig):
        return deberta_config.tensors(config)
    if isinstance(config, AlbertConfig):
        return albert_config.tensors(config)
    if isinstance(config, EncoderConfig):
        return encoder_config.tensors_of(config, config.dim)
    if isinstance(config, T5Config):
        return t5_config.tensors(config)
    return _gpt2_tensors(config) if config.family == "gpt2" else _llama_shaped_tensors(config)


def linear_weights(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape (out, in) of every weight that a quantizer takes: those of all linear layers but the head."""
    order = -1 if config.family == "gpt2" else 1
    found = {name: shape[::order] for name, shape in expected_tensors(config).items() if len(shape) == 2}
    return {name: shape for name, shape in found.items() if name.split(".")[-2] not in _TABLES}


def _llama_shaped_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dim, ff, head_dim = config.dim, config.ff, config.head_dim
    q, kv = config.heads * head_dim, config.kv_heads * head_dim
    linears = {  # name: (shape, has a bias)
        "self_attn.q_proj": ((q, dim), config.qkv_bias),
        "self_attn.k_proj": ((kv, dim), config.qkv_bias),
        "self_attn.v_proj": ((kv, dim), config.qkv_bias),
        "self_attn.o_proj": ((dim, q), config.o_bias),
        "mlp.gate_proj": ((ff, dim), config.mlp_bias),
        "mlp.up_proj": ((ff, dim), config.mlp_bias),
        "mlp.down_proj": ((dim, ff), config.mlp_bias),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab, dim)}
    for layer in range(config.layers):
        start = f"model.layers.{layer}."
        shapes[f"{start}input_layernorm.weight"] = (dim,)
        for name, (shape, bias) in linears.items():
            shapes[f"{start}{name}.weight"] = shape
            if bias:
                shapes[f"{start}{name}.bias"] = shape[:1]
        if config.qk_norm:
            shapes[f"{start}self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{start}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{start}post_attention_layernorm.weight"] = (dim,)
    shapes["model.norm.weight"] = (dim,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, dim)
    return shapes


def _gpt2_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    dim, ff = config.dim, config.ff
    linears = {
        "attn.c_attn": (dim, 3 * dim),
        "attn.c_proj": (dim, dim),
        "mlp.c_fc": (dim, ff),
        "mlp.c_proj": (ff, dim),
    }
    shapes = {"transformer.wte.weight": (config.vocab, dim), "transformer.wpe.weight": (config.context, dim)}
    norms = [f"transformer.h.{layer}.{norm}" for layer in range(config.layers) for norm in ("ln_1", "ln_2")]
    for name in [*norms, "transformer.ln_f"]:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)
    for layer in range(config.layers):
        for name, shape in linears.items():
            shapes[f"transformer.h.{layer}.{name}.weight"] = shape
            shapes[f"transformer.h.{layer}.{name}.bias"] = shape[1:]
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, dim)
    return shapes


def checked(path: Path, config: AnyConfig, stored: dict[str, Stored]) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(the model's tensors in its order, those of heads), both by full name.

    Raises RefpeftError unless the model's are exactly those that the config asks for.
    """
    encoder, expected = isinstance(config, EncoderConfig), expected_tensors(config)
    prefix = _prefix(config)
    bare = not any(name.startswith(prefix) for name in stored)  # files of a model without a head lack the prefix
    found: dict[str, Stored] = {}
    for name, entry in stored.items():
        if _BUFFER.search(name):
            continue
        whole = not prefix or name.startswith((prefix, "lm_head.", _SCORE)) or (encoder and not bare)
        full = name if whole else prefix + name
        if full in found:
            raise RefpeftError(f"{entry.file}: tensor {name!r} is there twice, with and without {prefix!r}")
        found[full] = entry
    scheme = config.raw.get("quantization_config")
    if scheme is not None:
        found = gathered(scheme, found, linear_weights(config), transposed=config.family == "gpt2")
    if not encoder and config.tied:
        _drop_tied_head(config, found)
    others = {name: found.pop(name) for name in [*found] if name not in expected and _of_a_head(config, name)}

    missing = [name for name in expected if name not in found]
    if missing:
        raise RefpeftError(f"{path}: tensor {missing[0]!r}{_others(missing)} missing; the model's config asks for it")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        file, first = found[unexpected[0]].file, unexpected[0]
        if scheme is not None and any(table in first for table in _TABLES):
            raise RefpeftError(
                f"{file}: tensor {first!r} is of a quantized head or embedding, and these are not supported: take the "
                "original model, or quantize it with its head in llm_int8_skip_modules"
            )
        raise RefpeftError(f"{file}: tensor {first!r}{_others(unexpected)} not part of a model of this config")
    for name, shape in expected.items():
        entry = found[name]
        if entry.shape != shape:
            raise RefpeftError(f"{entry.file}: tensor {name!r} has shape {entry.shape}, the config says {shape}")
        if entry.dtype not in _FLOATS:
            raise RefpeftError(
                f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, expected floating-point numbers"
            )
    return {name: found[name] for name in expected}, others


def _others(names: list[str]) -> str:
    return " is" if len(names) == 1 else f" and {len(names) - 1} more are"


def _drop_tied_head(config: ModelConfig, found: dict[str, Stored]) -> None:
    """Some tied models' files hold the table a second time as the head: taken out if it is the same one."""
    table = found.get(next(iter(expected_tensors(config))))
    for name in ("lm_head.weight", *_TABLES_AGAIN):
        again = found.get(name)
        if again is None or table is None:
            continue
        if again.shape != table.shape or not _same_bytes(again.read(), table.read()):
            raise RefpeftError(
                f"{again.file}: tensor {name!r} is not the embedding table, but the config has tie_word_embeddings; "
                "set it to false in config.json if the head is a separate one"
            )
        del found[name]


def _prefix(config: AnyConfig) -> str:
    """What the names of all tensors but the head's begin with: "model.", "bert."; nothing where they are two stacks."""
    return "" if isinstance(config, T5Config) else next(iter(expected_tensors(config))).partition(".")[0] + "."


def _same_bytes(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    chunks = range(0, len(a), rows)
    return a.dtype == b.dtype and all(a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in chunks)


# Safetensors, single or sharded ---------------------------------------------------------------------------------------


def _read(directory: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """All tensors in the directory's safetensors files, each with its file."""
    if (directory / _SINGLE).is_file():
        file = directory / _SINGLE
        return {name: (file, array) for name, array in read_safetensors(file).items()}
    if (directory / _INDEX).is_file():
        return _read_shards(directory)
    if (directory / "pytorch_model.bin").is_file() or (directory / "pytorch_model.bin.index.json").is_file():
        raise RefpeftError(
            f"{directory} has only pytorch_model.bin: pickled weights, which could run any code when read, so refpeft "
            "does not read them; if you trust them, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory)"
        )
    raise RefpeftError(f"{directory}: has neither {_SINGLE} nor {_INDEX}")


def _read_shards(directory: Path) -> dict[str, tuple[Path, np.ndarray]]:
    index = directory / _INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise RefpeftError(f"{index}: expected a weight_map from tensor names to file names")
    tensors: dict[str, tuple[Path, np.ndarray]] = {}
    for shard in sorted(set(places.values())):
        file = _inside(directory, shard)
        for name, array in read_safetensors(file).items():
            if name in tensors:
                raise RefpeftError(f"{file}: tensor {name!r} is also in {tensors[name][0].name}")
            if places.get(name) != shard:
                raise RefpeftError(f"{file}: tensor {name!r} is in this file, but not according to {_INDEX}")
            tensors[name] = file, array
    for name, shard in places.items():
        if name not in tensors:
            raise RefpeftError(f"{directory / shard}: tensor {name!r} is not in this file, as {_INDEX} says it is")
    return tensors


def _inside(directory: Path, shard: str) -> Path:
    """The path of a shard, if it is a plain file name that leads nowhere else."""
    file, outside = directory / shard, f"{directory / _INDEX} names {shard!r}, which is not a file in its directory"
    if Path(shard).name != shard or "\0" in shard or not shard.endswith(".safetensors"):
        raise RefpeftError(outside)
    homes = [os.path.realpath(directory)]
    if directory.parent.name == "snapshots":  # the hub's cache links its snapshots' files to blobs of the same model
        homes.append(os.path.realpath(directory.parent.parent / "blobs"))
    target = os.path.realpath(file)
    if os.path.dirname(target) not in homes:
        raise RefpeftError(f"{outside}: it is a link to {target}; copy that file here")
    return file
