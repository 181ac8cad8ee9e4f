"""Writing a model as a Hugging Face directory, tensor by tensor: as it is now, or its files quantized."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import files
from refpeft.backend import bfloat16, cast, single, to_host
from refpeft.errors import RefpeftError
from refpeft.models import heads
from refpeft.models.base import Model
from refpeft.models.checkpoint import Checkpoint, expected_tensors, linear_weights
from refpeft.models.encoder_config import PREFIX
from refpeft.models.quantized_files import scheme_of, tensors_of
from refpeft.quant import Quantized, Quantizer

DTYPES = {"float32": np.dtype("f4"), "float16": np.dtype("f2"), "bfloat16": bfloat16}
_HEAD = "lm_head.weight"
_WEIGHTS = "model.safetensors"
_AT_ONCE = 1 << 16  # numbers whose squares are summed in float32

Tensors = Iterator[tuple[str, np.ndarray]]


def save(model: Model, directory: str | Path, dtype: str = "float32") -> None:
    """Writes the model's weights as they are now, its config and its tokenizer files: what transformers loads.

    Dense weights become `dtype`; quantized ones stay as they are (quantized_files says in which form). A head is
    written with what the config says of it; of a model without one, what its files have of others. Raises RefpeftError
    while adapters are attached, for weights that the config has no place for, and for those quantized in
    different ways.
    """
    if model.adapters:
        names = ", ".join(adapter.name for adapter in model.adapters)
        raise RefpeftError(f"{names} is attached to the model: merge or detach it before the model is saved")
    known = {*model.checkpoint.names, _HEAD, *model.head_tensors}
    if extra := [name for name in model.frozen if name not in known]:
        raise RefpeftError(f"the model cannot be saved: its architecture has no {', '.join(extra[:5])}")
    changes = {"dtype": dtype, "tie_word_embeddings": _HEAD not in model.frozen} | heads.described(model)
    _write(
        model.checkpoint, directory, changes | {"quantization_config": _scheme(model, dtype)}, _tensors(model, dtype)
    )


def _tensors(model: Model, dtype: str) -> Tensors:
    if not model.head_tensors:
        for name in model.checkpoint.unused:
            yield name, cast(model.checkpoint.tensor(name), DTYPES[dtype])
    transposed = {f"{site.name}.weight" for site in model.sites.values() if site.transposed}
    shapes = expected_tensors(model.config)  # a convolution is a linear layer here
    for name, frozen in model.frozen.items():
        if isinstance(frozen, Quantized):
            yield from tensors_of(name, frozen, dtype).items()
        else:
            array = cast(to_host(frozen()), DTYPES[dtype])
            in_file = array.T if name in transposed else array.reshape(shapes.get(name, array.shape))
            yield model.head_tensors.get(name, name), in_file


def _scheme(model: Model, dtype: str) -> dict[str, Any] | None:
    """config.json's quantization_config; None where no weight is quantized."""
    found = {name: weight.quantizer for name, weight in model.frozen.items() if isinstance(weight, Quantized)}
    if not found:
        return None
    first, *others = dict.fromkeys(found.values())
    for other in others:
        if not (first.serves_as(other) and other.serves_as(first)):
            raise RefpeftError(f"weights are quantized in different ways, {first} and {other}: save them dense")
    dense = [name.removesuffix(".weight") for name in [*linear_weights(model.config), _HEAD] if name not in found]
    return scheme_of(first, dtype, dense + _modules(model, model.head_tensors or model.checkpoint.unused))


def _modules(model: Model | Checkpoint, tensors: Iterable[str]) -> list[str]:
    """The modules of a head's tensors, without what stands before their names where the model has a head."""
    prefix = PREFIX.get(model.config.family, "")
    return sorted({name.removeprefix(prefix).rpartition(".")[0] for name in tensors})


@dataclass
class Summary:
    """What `quantize` has made so far: how many numbers were quantized, into how many bytes, with what error."""

    numbers: int = 0
    nbytes: int = 0  # without code books and JSON
    squares: float = 0.0  # of the numbers
    error_squares: float = 0.0

    @property
    def bits(self) -> float:
        """Bits of a quantized number."""
        return 8 * self.nbytes / self.numbers

    @property
    def error(self) -> float:
        """The root of the mean squared error over that of the mean square."""
        return math.sqrt(self.error_squares / self.squares) if self.squares else 0.0


def quantize(
    checkpoint: Checkpoint,
    directory: str | Path,
    quantizer: Quantizer,
    dtype: str | None = None,
    listen: Callable[[str], None] = lambda name: None,
) -> Summary:
    """Writes a checkpoint with its linear weights quantized, but a head's; one tensor at a time is in memory.

    dtype   what all weights are made before; None: each keeps its own
    listen  is called with a tensor's name before it is worked on

    Raises RefpeftError for a checkpoint that is quantized already, weights that are not finite or too large for
    `dtype`, and what the form of the files does not hold; no directory is then left.
    """
    if checkpoint.quantized:
        raise RefpeftError(f"{checkpoint.path} is quantized already: take the original weights")
    kept = DTYPES[dtype] if dtype else checkpoint.dtype(next(iter(linear_weights(checkpoint.config))))
    summary = Summary()
    dense = ["lm_head", *_modules(checkpoint, checkpoint.unused)]
    changes = {"dtype": kept.name, "quantization_config": scheme_of(quantizer, _computed(kept), dense)}

    def tensors() -> Tensors:
        linear, transposed = linear_weights(checkpoint.config), checkpoint.config.family == "gpt2"
        for name in (*checkpoint.names, *checkpoint.unused):
            listen(name)
            stored = checkpoint.tensor(name)
            array = _cast(name, stored, dtype) if dtype else stored
            if name in linear:
                weight = _quantized(name, array.T if transposed else array, quantizer, summary)
                yield from tensors_of(name, weight, _computed(array.dtype)).items()
                del weight  # before the next one is made
            else:
                yield name, array
            files.let_go(stored)

    _write(checkpoint, directory, changes, tensors())
    return summary


def _cast(name: str, stored: np.ndarray, dtype: str) -> np.ndarray:
    """The tensor in `dtype`. Raises RefpeftError where that holds no numbers so large."""
    with np.errstate(over="ignore"):
        array = cast(stored, DTYPES[dtype])
    if np.isinf(array).any() and not np.isinf(stored).any():
        raise RefpeftError(f"{name} holds numbers that are too large for {dtype}: choose another --dtype")
    if array is not stored:
        files.let_go(stored)
    return array


def _quantized(name: str, array: np.ndarray, quantizer: Quantizer, summary: Summary) -> Quantized:
    """The array quantized, and counted in the summary."""
    exact = single(array)
    if exact is not array:
        files.let_go(array)
    weight = quantizer(exact, exact.dtype, name)
    difference = weight()
    difference -= exact
    summary.numbers += exact.size
    summary.nbytes += weight.nbytes
    summary.squares += _squares(exact)
    summary.error_squares += _squares(difference)
    return weight


def _squares(array: np.ndarray) -> float:
    """The sum of squares: of a piece in float32, of the pieces in float64."""
    flat = array.reshape(-1)
    pieces = (flat[at : at + _AT_ONCE] for at in range(0, flat.size, _AT_ONCE))
    return sum(float(np.dot(piece, piece)) for piece in pieces)


def _computed(dtype: np.dtype) -> str:
    """The dtype that a weight of this one is dequantized to, in bitsandbytes, which has no float64."""
    return dtype.name if dtype.name in DTYPES else "float32"


def _write(checkpoint: Checkpoint, directory: str | Path, changes: dict[str, Any], tensors: Tensors) -> None:
    """The directory of a checkpoint with other weights; what is None in `changes` goes out of config.json."""
    companions = checkpoint.files()
    config = json.loads(companions.pop("config.json")) | changes
    gone = {"torch_dtype", *(key for key, value in changes.items() if value is None)}
    with files.replace_directory(directory) as folder:
        for name, content in companions.items():
            (folder / name).write_bytes(content)
        files.write_json(folder / "config.json", {key: value for key, value in config.items() if key not in gone})
        with files.safetensors_writer(folder / _WEIGHTS, {"format": "pt"}) as write:
            for name, array in tensors:
                write(name, array)
