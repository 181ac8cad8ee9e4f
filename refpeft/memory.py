"""What a run takes of memory, by part, and without taking it: the model is built of weights that are not there.

Activations are measured on a few tokens (refpeft.cost); the rest follows from shapes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from refpeft import api, doctor, fused, learning, report, sites, survey
from refpeft.absent import Absent, absent
from refpeft.backend import COMPUTE_DTYPES, bfloat16
from refpeft.config import RunConfig, Train
from refpeft.cost import MARGIN, Step
from refpeft.cpu.losses import WORDS
from refpeft.models.base import Model
from refpeft.models.checkpoint import Checkpoint
from refpeft.models.config import ModelConfig
from refpeft.optim import OPTIMIZERS
from refpeft.quant import PANEL, Quantizer
from refpeft.sites import Site

_SAMPLED = 2**20  # numbers of a weight that are quantized to learn how many bytes it takes
_PACKED = 5 * 2**19  # bytes of what BLAS copies of matrices while it multiplies them, a thread
_OF_KL = 8  # arrays of the size of logits, in which a GPU works out KL(base || model)
_PLANNED = 2**22  # scores from which on attention is cuDNN's: see refpeft.cuda.attention
_STRETCHES = 2**24  # bytes at the ends of those of steps and of graphs: half of a chunk each (refpeft.cuda.stretch)
_ON_GPU = 2**25  # bytes of what cuBLAS works with there, on each stream
_BEHIND_LAYERS = 2  # arrays that are kept as long as inputs of layers: the last norm's input, and a gradient
BEFORE_ACTIVATIONS = 4  # so many parts of `by_part` are there before a step and after it

# ---- the model without its weights -----------------------------------------------------------------------------------


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

    def of_head(self, name: str) -> np.ndarray | None:
        found = self._checkpoint.of_head(name)
        return None if found is None else absent(found.shape)

    def tokenizer(self) -> None:
        return None


def skeleton(
    checkpoint: Checkpoint, quantizer: Quantizer | None = None, task: str | None = None, labels: Sequence[str] = ()
) -> Model:
    """The model of a checkpoint in float32 whose weights, and what is attached to it later, are not there.

    With a quantizer it says of the weights which will be quantized; with a task it has a head for it (see api.load).
    """
    model = api.build(_NoWeights(checkpoint), "float32", task=task, labels=labels)
    for name, weight in model.frozen.items():
        weight.array = weight.array.view(Absent)
        here = quantizer and not checkpoint.quantized and name in model.quantizable
        weight.quantized = bool(here or _packed(checkpoint, name, quantizer))
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
        numbers, packed = math.prod(weight.shape), _packed(checkpoint, name, quantizer)
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


def _packed(checkpoint: Checkpoint, name: str, quantizer: Quantizer | None) -> Any:
    """Checkpoint.packed of a weight that the files have; None of others, which are a new head's."""
    return checkpoint.packed(name, quantizer) if name in checkpoint.names else None


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
    config: RunConfig,
    model: Model,
    frozen: dict[str, dict[str, float]],
    rows: int,
    longest: int,
    kept: Activations,
    quantized: bool,
    shards: int,
) -> dict[str, int]:
    """Bytes by part while a step of `rows` rows of `longest` tokens is computed; the first ones are there all the time.

    `frozen` are the frozen_parts; `quantized` says whether some of them are. So many `shards` compute at the same time,
    each with gradients and working arrays of its own. Where something before the first step takes more than a step, its
    excess is the last part.
    """
    dtype, tokens, each = COMPUTE_DTYPES[config.dtype], rows * longest, -(-rows // shards)
    here, recompute = config.device == "cpu", config.train.checkpoint_activations
    narrow = bfloat16 if is_narrow(config) else dtype  # of activations and dense weights, in products
    trained = sum(adapter.size for adapter in model.adapters) * dtype.itemsize
    state = OPTIMIZERS[config.train.optimizer].layout([t.shape for _, t in model.trained()], dtype, config.device)
    paged = f", {report.size(state.nbytes)} paged" if config.train.paged else ""
    states = sum(array.size for array in learning.states(model).values()) * dtype.itemsize
    also = ", and what methods keep" if states else ""
    dense, panel = (_largest_dense(model, config, quantized, rows) for rows in (None, PANEL))
    again = kept.layer if recompute and not here else 0  # is not there together with logits; the host keeps its memory
    activations_there = kept.recomputed - again if recompute else kept.kept
    activations_there -= offloaded(config, model, tokens, kept)
    positions = each * (longest if model.read == "all" else 1)
    logits = shards * _logits(model, positions, here, narrow.itemsize, bool(config.train.kl) and not here)
    gradient = max((tensor.data.size for _, tensor in model.trained()), default=0)  # of a value, before it is added up
    behind = 0 if narrow == dtype else MARGIN
    layer = again + _working(model, rows, longest, here, behind) * narrow.itemsize  # nor are layers and logits
    working = max(shards * gradient * dtype.itemsize, layer - logits)
    made_dense = (shards * panel if here else dense) * narrow.itemsize
    beside = shards * _PACKED if here else _ON_GPU + _STRETCHES
    if narrow != dtype:
        beside += _ON_GPU  # for gradients of values, beside the others
        beside += trained // 2 + _rooms(model) * narrow.itemsize  # values in bfloat16
        beside += _attention(model, rows, longest)
    step = {
        "gradients": trained * shards,
        f"optimizer ({config.train.optimizer}{paged}){also}": states + (state.nbytes_near if paged else state.nbytes),
        f"activations of {rows} x {longest:,} tokens": activations_there,
        "logits, a chunk at a time": logits,
        "other working arrays": working + made_dense + beside,
    }
    most = {
        "while weights are quantized": 3 * dense * dtype.itemsize // 2 if quantized else 0,
        "while methods look at the data first": _survey(model, config, tokens) * dtype.itemsize
        + sum(list(step.values())[2:]),
    }
    what = max(most, key=most.get)
    more = most[what] - sum(step.values())
    found = {"weights": sum(part["bytes"] for part in frozen.values()), "adapter": trained, **step}
    return found | ({f"more {what}": more} if more > 0 else {})


@dataclass(frozen=True)
class Activations:
    """Bytes of what a forward pass keeps, and what that is where layers are computed again; None where they cannot.

    `layer` is how many of the latter are those of the one layer that was computed again.
    """

    kept: int
    recomputed: int | None
    layer: int = 0


def is_narrow(config: RunConfig) -> bool:
    """Whether hidden states are bfloat16, and not only stored weights."""
    return config.device == "cuda" and config.dtype == "bfloat16"


def activations(model: Model, step: Step, dtype: str) -> Activations:
    """What a step keeps in `dtype`; where layers are computed again, their inputs and one layer at a time."""
    scale = COMPUTE_DTYPES[dtype].itemsize / 4
    layers = model.config.layers + getattr(model.config, "decoder_layers", 0)
    if step.inputs is None:
        return Activations(round(step.kept * scale), None)
    layer = (step.kept - step.inputs) / layers
    return Activations(round(step.kept * scale), round((step.inputs + layer) * scale), round(layer * scale))


def offloaded(config: RunConfig, model: Model, tokens: int, kept: Activations) -> int:
    """Bytes of the inputs of layers that lie on the host in a step of so many tokens: of all but two."""
    if not config.train.offload_activations or kept.recomputed is None:
        return 0
    one = tokens * model.config.dim * (bfloat16 if is_narrow(config) else COMPUTE_DTYPES[config.dtype]).itemsize
    layers = (kept.recomputed - kept.layer) // one - _BEHIND_LAYERS
    return max(0, layers - 2) * one


def mixed_precision(trained: int, frozen: int = 0) -> dict[str, int]:
    """Bytes by part of mixed precision training with Adam, as arXiv:1910.02054 (section 3.1) accounts for it.

    Weights and gradients in 16 bits; of what is trained also a copy and two moments in float32. Frozen numbers have
    neither gradients nor moments. Activations are not in it.
    """
    return {"weights": 2 * (trained + frozen), "gradients": 2 * trained, "optimizer": 3 * 4 * trained}


def _logits(model: Model, positions: int, here: bool, itemsize: int, kl: bool) -> int:
    """Bytes of the logits of a shard that are there at once, and of what is made of them."""
    if not hasattr(model, "head"):
        return 0
    vocab, width = model.head.shape
    if kl or model.head.layers:  # the base's beside the model's, or an adapter's
        made = _OF_KL * max(itemsize, np.dtype("f4").itemsize) if kl else 2 * itemsize
        return made * min(max(fused.logits_at_once(here, itemsize), vocab), positions * vocab)
    if here:  # some words at a time: see refpeft.cpu.losses
        return itemsize * (min(fused.LOGITS_AT_ONCE, positions * min(vocab, WORDS)) + 3 * positions * width)
    return min(fused.LOGITS_ON_GPU, positions * vocab * itemsize)  # in place


def _working(model: Model, rows: int, longest: int, here: bool, behind: int) -> int:
    """Numbers of what a layer's MLP or attention has for a moment, with so many `behind` each row."""
    config, tokens = model.config, rows * longest
    mlp = 4 * tokens * (max(config.ff, config.dim) + behind)
    attention = 4 * tokens * (config.heads * config.head_dim + behind)
    if here or not isinstance(config, ModelConfig):
        attention += 3 * rows * config.heads * min(fused.QUERY_BLOCK, longest) * longest  # scores
    return max(mlp, attention)


def _rooms(model: Model) -> int:
    """Numbers of low-rank factors that lie once more beside the dense weights they are added to: see cuda.margins."""
    found = 0
    for layer in (layer for adapter in model.adapters for layer in adapter.layers):
        A, B = map(layer.values.get, "AB")
        if layer.site.kind != "linear" or layer.site.quantized or A is None or B is None:
            continue
        rank, trained = -(-A.shape[0] // 8) * 8, A.node is not None and B.node is not None
        if trained and (A.ndim, B.shape[1:]) == (2, A.shape[:1]) and rank <= MARGIN:
            found += rank * (A.shape[1] + B.shape[0])
    return found


def _attention(model: Model, rows: int, longest: int) -> int:
    """Bytes that cuDNN's attention works in, going back: a gradient of all queries for every 128 keys, in float32."""
    if importlib.util.find_spec("cudnn") is None:
        return 0
    config = model.config
    row = config.heads * config.head_dim * longest * -(-longest // 128) * np.dtype("f4").itemsize
    if rows * config.heads * longest**2 < _PLANNED:
        return 0
    at_once = max((n for n in range(1, rows + 1) if rows % n == 0 and n * row <= fused.ATTENTION_ON_GPU), default=0)
    return at_once * row or fused.ATTENTION_ON_GPU  # of some heads


class _Asked(Exception):
    """Ends a method's look at the data: what it asked for is known."""


class _Survey:
    """In the place of a survey.Survey: finds out how many numbers a look at the data keeps, beside those of a step."""

    rows = steps = 1

    def __init__(self, model: Model, adapter: sites.Adapter, tokens: int):
        self.model, self.adapter, self.tokens = model, adapter, tokens

    def gradients(self, chosen: Sequence[Site], rows: int) -> NoReturn:
        """Copies of the weights, gradients of two rows, what is made of these (twice), and the order of that."""
        raise _Asked(7 * _numbers(chosen))

    def own_gradients(self, rows: int) -> NoReturn:
        raise _Asked(2 * self.adapter.size)

    def inputs(self, chosen: Sequence[Site], batches: int) -> NoReturn:
        raise _Asked(self.tokens * sum(site.shape[-1] for site in chosen))

    def changes(self, chosen: Sequence[Site], steps: int, lr: float, **options: Any) -> NoReturn:
        """Copies of the weights, their gradients, two moments, and the changes."""
        raise _Asked(5 * _numbers(chosen))

    def trained(self, method: str, config: Any, steps: int, lr: float) -> NoReturn:
        """Values, their gradients, two moments, and what is made of these."""
        with sites.bypassed(self.model):
            adapter = sites.attach(self.model, method, config)
            sites.detach(self.model, adapter)
        raise _Asked(4 * adapter.size + _numbers(adapter.sites))


def _survey(model: Model, config: RunConfig, tokens: int) -> int:
    """The most numbers that a look at the data (the hook peft_survey) keeps, without those of a step."""
    most = 0
    for adapter in survey.waiting(model):
        for part in adapter.parts:
            layers = [layer for layer in adapter.layers if layer.part is part]
            try:
                part.call("peft_survey", layers=layers, survey=_Survey(model, adapter, tokens), rng=_NoDraws())
            except _Asked as asked:
                most = max(most, asked.args[0])
    return most


def _numbers(chosen: Sequence[Site]) -> int:
    return sum(math.prod(site.shape) for site in chosen)


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


def lighter(train: Train, device: str, largest: str = "", quantized: bool = True) -> list[str]:
    """What makes a run take less memory, in the words of options: first what helps with the `largest` part.

    `quantized` says whether weights are that already.
    """
    threads = device == "cpu" and train.threads != 1 and train.rows_at_a_time > 1
    dense = largest == "weights" and not quantized
    possible = {
        "--quantizer nf4 --double-quant keeps weights in half a byte each, --dtype bfloat16 in two": ("weights", dense),
        "--paged keeps the optimizer's state elsewhere": ("optimizer", not train.paged),
        "--optimizer adamw8bit keeps it in a quarter": ("optimizer", train.optimizer == "adamw"),
        "--set train.checkpoint_activations=true keeps only the inputs of layers": (
            "activations",
            not train.checkpoint_activations,
        ),
        "--set train.offload_activations=true keeps these inputs in the host's memory": (
            "activations",
            device == "cuda" and train.checkpoint_activations and not train.offload_activations,
        ),
        "--set train.threads=1 keeps gradients once, not for every thread": ("gradients", threads),
        "--set train.micro_batch=1 computes the same step one row at a time": ("activations", train.rows_at_a_time > 1),
    }
    helping = {remedy: part for remedy, (part, helps) in possible.items() if helps}
    return sorted(helping, key=lambda remedy: not largest.startswith(helping[remedy]))


def is_short(error: Exception) -> bool:
    """Whether an error says that memory does not suffice, the host's or a device's."""
    return isinstance(error, MemoryError) or "cudaErrorMemoryAllocation" in str(error)


def at_most(checkpoint: Checkpoint, tokens: int) -> int:
    """A rough bound of the bytes that a run on a GPU takes: weights in float32 and trained, all activations kept."""
    config = checkpoint.config
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    layers = config.layers + getattr(config, "decoder_layers", 0)
    working = 2 * _ON_GPU + fused.LOGITS_ON_GPU + fused.ATTENTION_ON_GPU
    return 4 * (5 * weights + tokens * layers * (16 * config.dim + 8 * config.ff)) + working


def _largest_dense(model: Model, config: RunConfig, quantized: bool, rows: int | None = None) -> int:
    """Numbers of the largest weight that is made dense for a moment, so many rows at once; 0 where all are dense."""
    linear = [site for site in model.sites.values() if site.kind == "linear"]  # of embeddings only rows are taken
    names = {f"{site.tied or site.name}.weight" for site in linear}
    widened = config.dtype == "bfloat16" and not is_narrow(config)
    names = names if widened else names & model.quantizable if quantized else set()
    shapes = [model.frozen[name].shape for name in names]
    return max((min(out, rows or out) * width for out, width in shapes), default=0)


# ---- the machine -----------------------------------------------------------------------------------------------------


def free_memory(device: str) -> int | None:
    """Bytes that are free on the device, within this process's memory limit; None where the system does not tell."""
    if device == "cuda":
        if doctor.obstacle():
            return None
        import cupy

        unused = cupy.get_default_memory_pool().free_bytes()
        return int(cupy.cuda.runtime.memGetInfo()[0]) + unused
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
