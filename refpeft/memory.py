"""What a run takes of memory, by part, and without taking it: the model is built of weights that are not there.

Activations are measured on the tape of a few tokens and scaled up; the rest follows from shapes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import api, fused, learning, report
from refpeft.backend import COMPUTE_DTYPES, bfloat16
from refpeft.batches import Batch
from refpeft.config import RunConfig, Train
from refpeft.models.base import Model
from refpeft.models.checkpoint import Checkpoint
from refpeft.optim import OPTIMIZERS
from refpeft.quant import Quantizer
from refpeft.tensor import Node

_PROBED = 4  # tokens of a row whose tape is measured
_SAMPLED = 2**20  # numbers of a weight that are quantized to learn how many bytes it takes
BEFORE_ACTIVATIONS = 4  # so many parts of `by_part` are there before a step and after it

# ---- the model without its weights -----------------------------------------------------------------------------------


class Absent(np.ndarray):
    """Zeros that are not there: an array of any shape in the room of one number. A product with it takes no time."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **keywords: Any) -> Any:
        if ufunc is np.matmul:
            a, b = map(np.shape, inputs)
            product = out[0] if out else np.empty((*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1]), self.dtype)
            product.fill(0)
            return product
        if out:
            keywords["out"] = tuple(map(_plain, out))
        return getattr(ufunc, method)(*map(_plain, inputs), **keywords)


def absent(shape: int | tuple[int, ...], dtype: np.dtype | None = None) -> Absent:
    """Zeros, float32 or another dtype, that are not there. Raises MemoryError where NumPy could not count them."""
    if np.prod(shape, dtype=float) >= 2**60:
        raise MemoryError(f"{shape} numbers are wanted at once")
    return np.broadcast_to(np.zeros((), dtype or np.float32), shape).view(Absent)


def _plain(array: Any) -> Any:
    return array.view(np.ndarray) if isinstance(array, Absent) else array


class _NoDraws:
    """Stands for a rng.Stream where what is drawn does not matter."""

    def __init__(self, *key: str | int):
        pass

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | tuple[int, ...] = ()) -> Absent:
        return absent(size)

    def standard_normal(self, size: int | tuple[int, ...] = ()) -> Absent:
        return absent(size)

    def permutation(self, n: int) -> np.ndarray:
        return np.arange(n)


class _NoWeights:
    """A checkpoint whose tensors are not there."""

    quantized = False

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint, self.config = checkpoint, checkpoint.config

    def packed(self, name: str, quantizer: Quantizer | None) -> None:
        return None

    def tensor(self, name: str) -> np.ndarray:
        return absent(self._checkpoint.shape(name))

    def tokenizer(self) -> None:
        return None


def skeleton(checkpoint: Checkpoint, quantizer: Quantizer | None = None) -> Model:
    """The model of a checkpoint in float32 whose weights, and what is attached to it later, are not there.

    With a quantizer it says of the weights which will be quantized.
    """
    model = api.build(_NoWeights(checkpoint), "float32")
    for name, weight in model.frozen.items():
        weight.array = weight.array.view(Absent)
        here = quantizer and not checkpoint.quantized and name in model.quantizable
        weight.quantized = bool(here or checkpoint.packed(name, quantizer))
    model.weightless, model.stream = True, _NoDraws
    model.place = lambda array, dtype=None: absent(np.shape(array), dtype)
    return model


# ---- parts -----------------------------------------------------------------------------------------------------------


def frozen_parts(
    model: Model, checkpoint: Checkpoint, dtype: str, quantizer: Quantizer | None
) -> dict[str, dict[str, float]]:
    """The frozen weights by kind as they will be kept: {"linear layers": {"numbers", "bytes", "bits" of a number}}."""
    found: dict[str, dict[str, float]] = {}
    one_of: dict[tuple[int, ...], int] = {}  # bytes of a quantized weight, by shape
    quantized = model.quantizable if quantizer and not checkpoint.quantized else set()
    for name, weight in model.frozen.items():
        numbers, packed = math.prod(weight.shape), checkpoint.packed(name, quantizer)
        if packed:
            nbytes = sum(part.nbytes for part in packed.parts.values())
        elif name in quantized:
            nbytes = one_of.setdefault(weight.shape, 0) or _quantized_bytes(quantizer, weight.shape)
            one_of[weight.shape] = nbytes
        elif dtype == "bfloat16" and len(weight.shape) == 2:
            nbytes = numbers * bfloat16.itemsize
        else:
            nbytes = numbers * COMPUTE_DTYPES[dtype].itemsize
        part = found.setdefault(_kind(model, name), {"numbers": 0, "bytes": 0})
        part["numbers"] += numbers
        part["bytes"] += nbytes
    return {kind: part | {"bits": 8 * part["bytes"] / part["numbers"]} for kind, part in found.items()}


def _kind(model: Model, name: str) -> str:
    """What a frozen weight is of, in words."""
    if name in model.quantizable:
        return "linear layers"
    site = model.sites.get(name.removesuffix(".weight"))  # None of a bias
    if site is None or site.kind == "norm":
        return "norms and biases"
    return "head" if site.kind == "linear" else "embeddings"


def _quantized_bytes(quantizer: Quantizer, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of this shape, from those of some of its rows (of all, where it is small)."""
    sample = np.ones((min(-(-_SAMPLED // math.prod(shape[1:])), shape[0]), *shape[1:]), np.float32)
    return round(quantizer(sample, np.dtype("f4")).nbytes * math.prod(shape) / sample.size)


def by_part(
    config: RunConfig, model: Model, frozen: dict[str, dict[str, float]], rows: int, longest: int, quantized: bool
) -> dict[str, int]:
    """Bytes by part while a step of `rows` rows of `longest` tokens is computed; the first ones are there all the time.

    `frozen` are the frozen_parts; `quantized` says whether some of them are.
    """
    dtype = COMPUTE_DTYPES[config.dtype]
    trained = sum(adapter.size for adapter in model.adapters) * dtype.itemsize
    tokens = rows * longest
    activations = _tape_of(model, rows, longest) * dtype.itemsize // 4
    if config.train.checkpoint_activations:  # of one layer at a time, beside the inputs of all
        layers = model.config.layers
        activations = activations // layers + tokens * layers * model.config.dim * dtype.itemsize
    widest = max(model.config.ff, model.config.dim)
    state = OPTIMIZERS[config.train.optimizer].layout([t.shape for _, t in model.trained()], dtype, config.device)
    paged = f", {report.size(state.nbytes)} paged" if config.train.paged else ""
    kept = sum(array.size for array in learning.states(model).values()) * dtype.itemsize
    also = ", and what methods keep" if kept else ""
    return {
        "weights": sum(part["bytes"] for part in frozen.values()),
        "adapter": trained,
        "gradients": trained,
        f"optimizer ({config.train.optimizer}{paged}){also}": kept + (state.nbytes_near if paged else state.nbytes),
        f"activations of {rows} x {longest:,} tokens": activations,
        "logits, a chunk at a time": 2 * dtype.itemsize * min(fused.LOGITS_AT_ONCE, tokens * model.config.vocab),
        "other working arrays": (4 * tokens * widest + _largest_dense(model, config.dtype, quantized)) * dtype.itemsize,
    }


def lines(memory: dict[str, int], frozen: dict[str, dict[str, float]]) -> list[str]:
    """The table of `by_part` for people, with the frozen weights by kind."""
    rows = []
    for part, nbytes in memory.items():
        if part == "weights":
            kinds = [
                (f"weights: {kind}, {kept['bits']:.4g} bits a number", kept["bytes"]) for kind, kept in frozen.items()
            ]
        else:
            kinds = [(part, nbytes)]
        rows += [(f"  {kind}", report.size(count)) for kind, count in kinds]
    return report.table([*rows, ("  in all", report.size(sum(memory.values())))])


def lighter(train: Train) -> list[str]:
    """What makes a step take less memory, in the words of options."""
    possible = {
        "--paged keeps the optimizer's state elsewhere": not train.paged,
        "--optimizer adamw8bit keeps it in a quarter": train.optimizer == "adamw",
        "--set train.checkpoint_activations=true keeps only the inputs of layers": not train.checkpoint_activations,
        "--set train.micro_batch=1 computes the same step one row at a time": train.rows_at_a_time > 1,
    }
    return [remedy for remedy, helps in possible.items() if helps]


def _largest_dense(model: Model, dtype: str, quantized: bool) -> int:
    """Numbers of the largest weight that is made dense for a moment; 0 where all are dense anyway."""
    names = set(model.frozen) if dtype == "bfloat16" else model.quantizable if quantized else set()
    return max((math.prod(model.frozen[name].shape) for name in names), default=0)


# ---- activations -----------------------------------------------------------------------------------------------------


def _tape_of(model: Model, rows: int, longest: int) -> int:
    """Bytes of the tape of a forward pass in float32 over full rows, all tokens learned: measured on small ones.

    A row costs something for each token, and something for what a method puts before the tokens.
    """

    def measured(count: int, tokens: int) -> int:
        ids = np.zeros((count, tokens), np.int32)
        return tape_bytes(model, Batch(ids=ids, targets=ids))

    once, longer, twice = measured(1, _PROBED), measured(1, 2 * _PROBED), measured(2, _PROBED)
    per_token = (longer - once) / _PROBED
    return round(rows * (twice - once - per_token * _PROBED + per_token * longest))


def tape_bytes(model: Model, batch: Batch) -> int:
    """Bytes of all arrays that a forward pass keeps for the backward pass; what is trained itself is not counted."""
    loss = model.loss(batch)
    parameters = {id(tensor.data) for _, tensor in model.trained()}
    owners: dict[int, int] = {}
    nodes, seen = [loss.node], {loss.node}
    while nodes:
        node = nodes.pop()
        for array in _arrays(node.saved or ()):
            while isinstance(array.base, np.ndarray):
                array = array.base
            if id(array) not in parameters:
                owners[id(array)] = array.nbytes
        fresh = [parent for parent in node.parents if isinstance(parent, Node) and parent not in seen]
        seen.update(fresh)
        nodes += fresh
    return sum(owners.values())


def _arrays(saved: Any) -> Iterator[np.ndarray]:
    """The arrays in what an op saved."""
    if isinstance(saved, np.ndarray):
        yield saved
    elif isinstance(saved, (tuple, list)):
        for part in saved:
            yield from _arrays(part)


# ---- the machine -----------------------------------------------------------------------------------------------------


def free_memory(device: str) -> int | None:
    """Bytes that are free on the device, within this process's memory limit; None where the system does not tell."""
    if device == "cuda":
        import cupy

        return int(cupy.cuda.runtime.memGetInfo()[0])
    found = []
    for read in (_available, _left_of_limit):
        with contextlib.suppress(OSError, ValueError, IndexError):
            found.append(read())
    return min(found, default=None)


def _available() -> int:
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024


def _left_of_limit() -> int:
    group = Path("/sys/fs/cgroup")
    return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
