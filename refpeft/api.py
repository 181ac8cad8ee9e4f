"""Loading a model for use in Python: `refpeft.load`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import backend, manager
from .backend import COMPUTE_DTYPES
from .choices import TF32_ON_THE_HOST
from .errors import RefpeftError
from .files import let_go
from .models import heads
from .models.albert import Albert
from .models.albert_config import AlbertConfig
from .models.base import Frozen, Model
from .models.checkpoint import Checkpoint, open_checkpoint
from .models.config import AnyConfig
from .models.deberta import Deberta
from .models.deberta_config import DebertaConfig
from .models.decoder import Decoder
from .models.encoder import Encoder
from .models.encoder_config import EncoderConfig
from .models.gpt2 import GPT2
from .models.hub import resolve
from .models.t5 import T5
from .models.t5_config import T5Config
from .quant import Dense, Quantized, Quantizer, make_quantizer

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


def load(
    model: str | Path,
    adapter: str | Path | Sequence[str | Path] | None = None,
    quantizer: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    double_quant: bool = False,
    options: dict[str, Any] | None = None,
    plugins: Sequence[str | Path] = (),
    task: str | None = None,
    labels: Sequence[str] = (),
) -> Model:
    """A model ready to be called, trained and generated from.

    model      a Hugging Face directory, a GGUF file, a hub id, or "embedded"
    adapter    an adapter directory (PEFT's form), or several, innermost first
    quantizer  a quantizer plugin for the frozen linear weights; `options` are its Config's fields
               (a model that is quantized already needs none and stays so; "gguf" keeps a GGUF file's own blocks)
    double_quant  quantize the quantizer's float32 constants, too
    dtype      "float32", "float64", or "bfloat16": frozen weights are kept in it, and on a GPU hidden states and
               factors of products too, which add up in float32; the host computes in float32. "tf32", on a GPU: all
               is float32, and tensor cores round the factors of products to 10 bits behind the point. That holds for
               the whole process, until a model is loaded otherwise
    device     "cpu" or "cuda"
    plugins    plugin files, folders or module names to make known first
    task       what the model ends in: "classify", "regress", "tag", "mlm", "embed", or what it is without a head
               ("causal-lm", "seq2seq"). Default: what the adapter was trained for, or the model's own config.json says
    labels     the labels' names, where the task has some

    The model has `.name`, `.tokenizer` and `.checkpoint` besides what Model says. Raises RefpeftError for everything
    that is wrong with the files or the arguments.
    """
    if dtype not in COMPUTE_DTYPES:
        raise RefpeftError(f"dtype is {dtype!r}: expected one of {', '.join(COMPUTE_DTYPES)}")
    if dtype == "tf32" and device == "cpu":
        raise RefpeftError(TF32_ON_THE_HOST)
    manager.add(*plugins)
    xp = backend.module(device)
    chosen = make_quantizer(quantizer, options, double_quant)
    checkpoint = open_checkpoint(resolve(str(model)))
    directories = [adapter] if isinstance(adapter, (str, Path)) else list(adapter or ())
    if isinstance(labels, str):
        raise RefpeftError(f"labels is {labels!r}: expected a list of names")
    if directories:
        from . import adapters

        found = [adapters.task_of(directory) for directory in directories]
        trained_for, names = next((one for one in found if one[0]), (None, ()))
        if task in (None, trained_for):
            task, labels = trained_for, labels or names
    built = build(checkpoint, dtype, xp, chosen, task, labels)
    built.name = str(model)
    for directory in directories:
        adapters.load(built, directory)
    if labels and not built.labels:
        raise RefpeftError(f"labels are of a task that tells some apart, and the model is for {built.task or 'none'}")
    return built


def build(
    checkpoint: Checkpoint,
    dtype: str,
    xp: ModuleType = np,
    quantizer: Quantizer | None = None,
    task: str | None = None,
    labels: Sequence[str] = (),
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Model:
    """The model of an opened checkpoint, with weights read one at a time; see `load`.

    What a head lacks in the checkpoint has first values that `seed` decides. `tokenizer` is the checkpoint's own, where
    it has been read.
    """
    compute = COMPUTE_DTYPES[dtype]

    def weights(name: str, linear: bool, transposed: bool) -> Frozen:
        packed = checkpoint.packed(name, quantizer)
        if packed is not None:
            parts = {part: xp.asarray(array) for part, array in packed.parts.items()}
            shape = checkpoint.shape(name)
            return Quantized(packed.quantizer, parts, shape[::-1] if transposed else shape, compute)
        array = checkpoint.tensor(name)
        oriented = array.T if transposed else array
        if linear and quantizer is not None and not checkpoint.quantized:
            # a device is given the file's own numbers, of half the bytes, and widens them itself
            single = backend.single(oriented) if xp is np else backend.cast(xp.asarray(oriented), np.dtype("f4"))
            kept = quantizer(single, compute, name)
        else:
            narrow = dtype == "bfloat16" and array.ndim == 2
            placed = xp.asarray(backend.cast(oriented, backend.bfloat16 if narrow else compute))
            kept = Dense(placed, compute)
            if placed is oriented:
                return kept  # mapped from the file
        let_go(array)
        return kept

    config = checkpoint.config
    model = class_of(config)(config, weights, compute, xp)
    if xp is not np:
        model.tf32 = dtype == "tf32"
        if blas := sys.modules.get("refpeft.cuda.blas"):  # imported where a GPU is used
            blas.use_tf32(model.tf32)
        if dtype == "bfloat16":
            model.activations = backend.bfloat16
    model.checkpoint, model.tokenizer = checkpoint, tokenizer or checkpoint.tokenizer()
    own, names = heads.read_from(config.raw)
    if task in (None, own):
        unnamed = len(labels) == len(names) and tuple(labels) == heads.unnamed(len(names))
        task, labels = own, names if unnamed else labels or names
    heads.put_on(model, task, labels, seed, checkpoint.of_head)
    return model


def class_of(config: AnyConfig) -> type[Model]:
    """The class of the model that a config describes."""
    if isinstance(config, DebertaConfig):
        return Deberta
    if isinstance(config, AlbertConfig):
        return Albert
    if isinstance(config, EncoderConfig):
        return Encoder
    if isinstance(config, T5Config):
        return T5
    return GPT2 if config.family == "gpt2" else Decoder
