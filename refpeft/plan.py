"""What a run would do, without training: `refpeft train --dry-run`.

The model is built with weights of zeros, which take no memory until they are written, so only the headers of its
files are read. Activations are measured on the tape of a few tokens and scaled up; the rest follows from shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import api, fused, report, run, schedule, sites, toml
from refpeft.backend import COMPUTE_DTYPES, bfloat16
from refpeft.batches import Batch, Batches
from refpeft.config import Resolved
from refpeft.models.base import Model
from refpeft.models.checkpoint import Checkpoint, open_checkpoint
from refpeft.models.hub import resolve as resolve_model
from refpeft.optim import OPTIMIZERS
from refpeft.quant import Quantizer
from refpeft.tensor import Node

_PROBED = 4  # tokens of a row whose tape is measured
_SAMPLED_ROWS = 64  # rows of a weight that are quantized to learn how many bytes it takes


@dataclass(frozen=True)
class Plan:
    """A run before it is run. `memory` is bytes by part; `free` what the machine has, None where that is not known."""

    model: str
    family: str
    layers: int
    dim: int
    vocab: int
    context: int
    parameters: int
    methods: dict[str, dict[str, int]]  # by method: how many sites of each role or name, and "trained"
    trained: int
    data: list[str]
    tokens: int
    supervised_tokens: int
    steps: int
    formula: str
    memory: dict[str, int]
    free: int | None
    directory: str
    files: list[str]
    given: list[tuple[str, str, str]]  # key, value, origin of what is not a default
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """For people."""
        shape = (
            f"{self.family}, {self.layers} layers of {self.dim}, vocabulary {self.vocab:,}, {self.context:,} positions"
        )
        lines = [f"model    {self.model}: {shape}", f"         {self.parameters:,} parameters"]
        for name, found in self.methods.items():
            where = ", ".join(f"{count} {site}" for site, count in found.items())
            lines.append(f"method   {name} at {where}")
        lines.append(f"trained  {self.trained:,} numbers ({self.trained / self.parameters:.2%} of the model's)")
        lines += [f"data     {line}" if i == 0 else f"         {line}" for i, line in enumerate(self.data)]
        lines += [f"steps    {self.steps:,} = {self.formula}", "", "memory"]
        total = sum(self.memory.values())
        rows = [(f"  {part}", report.size(count)) for part, count in self.memory.items()]
        free = f"of {report.size(self.free)} free" if self.free is not None else ""
        lines += report.table([*rows, ("  in all", report.size(total))])
        lines[-1] += f"  {free}".rstrip()
        lines += ["", f"files in {self.directory}", *(f"  {file}" for file in self.files)]
        if self.given:
            lines += ["", "given", *(f"  {key} = {value}  ({origin})" for key, value, origin in self.given)]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes]) + "\n"


def plan(resolved: Resolved, resume: bool = False) -> Plan:
    """The plan of a configured run. Raises RefpeftError for what training would refuse: targets, rows, directory."""
    config = resolved.run
    directory = run.run_directory(config, resume)
    checkpoint = open_checkpoint(resolve_model(config.model))
    shape, tokenizer = checkpoint.config, checkpoint.tokenizer()
    rows, held_out = run.load_rows(config, shape, tokenizer)
    model = skeleton(checkpoint)
    for method in config.methods:
        sites.attach(model, method, resolved.options[method], seed=config.seed)
    batches = run.make_batches(config, rows, shape)
    steps = config.train.total_steps(batches.steps_per_epoch)
    quantizer = api.make_quantizer(config.quantizer, resolved.options.get(config.quantizer), config.double_quant)
    memory = _memory(resolved, model, checkpoint, quantizer, batches)
    free = free_memory(config.device)
    return Plan(
        model=config.model,
        family=shape.family,
        layers=shape.layers,
        dim=shape.dim,
        vocab=shape.vocab,
        context=shape.context,
        parameters=model.parameters(),
        methods={adapter.name: _where(adapter) for adapter in model.adapters},
        trained=sum(adapter.size for adapter in model.adapters),
        data=rows.summary.lines() + (held_out.summary.lines()[:2] if held_out else ["nothing is held out"]),
        tokens=rows.summary.tokens,
        supervised_tokens=rows.summary.supervised_tokens,
        steps=steps,
        formula=_formula(config, batches.steps_per_epoch, steps),
        memory=memory,
        free=free,
        directory=str(directory),
        files=run.output_files(config),
        given=[(k, toml.text(v), resolved.origins[k]) for k, v in resolved.values().items() if k in resolved.origins],
        notes=_advice(resolved, memory, free),
    )


# ---- the model without its weights ----


class _Zeros:
    """A checkpoint whose tensors are zeros of the right shape: pages that are only read take no memory."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint, self.config, self.quantized = checkpoint, checkpoint.config, False

    def packed(self, name: str, quantizer: Quantizer | None) -> None:
        return None

    def tensor(self, name: str) -> np.ndarray:
        return np.zeros(self._checkpoint.shape(name), np.float32, order="F")  # its transpose is then free, too

    def tokenizer(self) -> None:
        return None


def skeleton(checkpoint: Checkpoint) -> Model:
    """The model of a checkpoint in float32, all its weights (and what is attached to it later) being zeros."""
    model = api.build(_Zeros(checkpoint), "float32")
    model.weightless, model.place = True, lambda array: np.zeros(array.shape, model.dtype)
    return model


# ---- memory ----


def _memory(
    resolved: Resolved, model: Model, checkpoint: Checkpoint, quantizer: Quantizer | None, batches: Batches
) -> dict[str, int]:
    """Bytes by part while a step of the longest rows is computed."""
    config = resolved.run
    itemsize = COMPUTE_DTYPES[config.dtype].itemsize
    trained = sum(adapter.size for adapter in model.adapters) * itemsize
    rows, longest = min(config.train.rows_at_a_time, len(batches.rows)), batches.longest
    tokens = rows * longest
    kept = f"activations of {rows} x {longest:,} tokens"
    activations = _tape_of(model, rows, longest) * itemsize // 4
    if config.train.checkpoint_activations:  # of one layer at a time, beside the inputs of all
        layers = model.config.layers
        activations = activations // layers + tokens * layers * model.config.dim * itemsize
    widest = max(model.config.ff, model.config.dim)
    shapes = [tensor.shape for _, tensor in model.trained()]
    state = OPTIMIZERS[config.train.optimizer].layout(shapes, COMPUTE_DTYPES[config.dtype], config.device)
    optimizer = f"optimizer ({config.train.optimizer})"
    if config.train.paged:
        optimizer = f"optimizer ({config.train.optimizer}, {report.size(state.nbytes)} paged)"
    return {
        "Python and its libraries": report.resident(),
        "weights": sum(_frozen_bytes(model, checkpoint, config.dtype, quantizer)),
        "adapter": trained,
        "gradients": trained,
        optimizer: state.nbytes_near if config.train.paged else state.nbytes,
        kept: activations,
        "logits, a chunk at a time": 2 * itemsize * min(fused.LOGITS_AT_ONCE, tokens * model.config.vocab),
        "other working arrays": 4 * tokens * widest * itemsize
        + _largest_dense(model, config.dtype, bool(quantizer or checkpoint.quantized), itemsize),
    }


def _frozen_bytes(model: Model, checkpoint: Checkpoint, dtype: str, quantizer: Quantizer | None) -> Iterator[int]:
    """Bytes of each frozen weight as it will be kept."""
    quantized = model.quantizable if quantizer and not checkpoint.quantized else set()
    for name, weight in model.frozen.items():
        count, packed = math.prod(weight.shape), checkpoint.packed(name, quantizer)
        if packed:
            yield sum(part.nbytes for part in packed.parts.values())
        elif name in quantized:
            sample = np.ones((min(_SAMPLED_ROWS, weight.shape[0]), *weight.shape[1:]), np.float32)
            yield round(quantizer(sample, np.dtype("f4")).nbytes * count / sample.size)
        elif dtype == "bfloat16" and len(weight.shape) == 2:
            yield count * bfloat16.itemsize
        else:
            yield count * COMPUTE_DTYPES[dtype].itemsize


def _largest_dense(model: Model, dtype: str, quantized: bool, itemsize: int) -> int:
    """Bytes of the largest weight that is made dense for a moment; 0 where all are dense anyway."""
    names = set(model.frozen) if dtype == "bfloat16" else model.quantizable if quantized else set()
    return max((math.prod(model.frozen[name].shape) * itemsize for name in names), default=0)


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


def free_memory(device: str) -> int | None:
    """Bytes that are free on the device, within this process's memory limit; None where the system does not tell."""
    if device == "cuda":
        import cupy

        return int(cupy.cuda.runtime.memGetInfo()[0])
    found = []
    for path, kind in (("/proc/meminfo", "meminfo"), ("/sys/fs/cgroup", "cgroup")):
        try:
            found.append(_MEMORY[kind](Path(path)))
        except (OSError, ValueError, StopIteration):
            continue
    return min(found, default=None)


_MEMORY = {
    "meminfo": lambda path: next(
        int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith("MemAvailable")
    ),
    "cgroup": lambda path: int((path / "memory.max").read_text()) - int((path / "memory.current").read_text()),
}


# ---- words ----


def _where(adapter: sites.Adapter) -> dict[str, int]:
    """How many sites of each name an adapter acts on: {"q_proj": 30, "v_proj": 30}."""
    return dict(Counter(layer.site.name.rpartition(".")[2] for layer in adapter.layers))


def _formula(config: Any, steps_per_epoch: int, steps: int) -> str:
    train = config.train
    warmup = schedule.warmup_steps(train.warmup, steps)
    rate = f"learning rate {train.lr:g}, {train.schedule}, warm-up {warmup:,}"
    if train.steps:
        return f"train.steps; {rate}"
    return f"{train.epochs:g} epochs of {steps_per_epoch:,} batches of {train.batch}; {rate}"


def _advice(resolved: Resolved, memory: dict[str, int], free: int | None) -> list[str]:
    """What to change where memory does not suffice."""
    total = sum(memory.values())
    if free is None or total <= free:
        return []
    largest = max(memory, key=memory.get)
    notes = [
        f"{report.size(total)} is more than the {report.size(free)} that are free; the largest part is {largest!r}"
    ]
    train = resolved.run.train
    if largest.startswith("activations"):
        if not train.checkpoint_activations:
            notes.append("--set train.checkpoint_activations=true keeps only the inputs of layers")
        if train.rows_at_a_time > 1:
            notes.append("--set train.micro_batch=1 computes the same step one row at a time")
    elif largest == "weights" and not resolved.run.quantizer:
        notes.append("--quantizer nf4 --double-quant keeps weights in half a byte each, --dtype bfloat16 in two")
    return notes
