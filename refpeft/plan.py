"""What a run would do, without training (`refpeft train --dry-run`), and what it would take (`refpeft plan --shape`).

Of the files of a model only the headers are read; a shape has no files at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refpeft import (
    adapters,
    backend,
    cost,
    doctor,
    evaluation,
    inputs,
    learning,
    memory,
    placing,
    report,
    run,
    schedule,
    shapes,
    shards,
    sites,
    toml,
)
from refpeft.batches import Batches
from refpeft.config import EMBEDDED, Resolved, RunConfig
from refpeft.models.base import Model
from refpeft.models.checkpoint import Checkpoint, open_checkpoint
from refpeft.models.hub import resolve as resolve_model
from refpeft.quant import make_quantizer


@dataclass(frozen=True)
class Sizes:
    """A model, what is attached to it, and a step of training. `memory` is bytes by part."""

    model: str
    family: str
    layers: int
    dim: int
    vocab: int
    context: int
    parameters: int
    methods: dict[str, dict[str, int]]  # by method: how many sites of each role or name, and "trained"
    trained: int
    adapter_bytes: int  # of the values in the adapter's file
    frozen: dict[str, dict[str, float]]  # the frozen weights by kind: "numbers", "bytes", and "bits" of a number
    memory: dict[str, int]
    activations: memory.Activations
    tokens_of_a_step: int
    step: cost.Step
    flops: float  # of a step, with what is computed again
    given: list[tuple[str, str, str]]  # key, value, origin of what is not a default

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)

    def _lines(self) -> list[str]:
        """The model and the methods, for people."""
        shape = (
            f"{self.family}, {self.layers} layers of {self.dim}, vocabulary {self.vocab:,}, {self.context:,} positions"
        )
        lines = [f"model    {self.model}: {shape}", f"         {self.parameters:,} parameters"]
        for name, found in self.methods.items():
            where = ", ".join(f"{count} {site}" for site, count in found.items())
            lines.append(f"method   {name} at {where}")
        share = f"{100 * self.trained / self.parameters:.2g}% of the model's"
        lines.append(f"trained  {self.trained:,} numbers ({share}), {report.size(self.adapter_bytes)} in a file")
        return lines

    def _costs(self) -> list[str]:
        """What a step computes, and what activations take with and without recomputation."""
        step, kept = self.step, self.activations
        again = self.flops - step.forward - step.backward
        parts = f"{_tera(step.forward)} forward, {_tera(step.backward)} back"
        parts += f", {_tera(again)} again" if again else ""
        token = f"{self.flops / self.tokens_of_a_step / 1e9:,.4g} GFLOP a token"
        lines = [f"compute  {_tera(self.flops)} TFLOP a step: {parts}; {token}"]
        if kept.recomputed is not None:
            less = f"{report.size(kept.recomputed)} with checkpoint_activations, for {_tera(step.forward)} TFLOP more"
            lines.append(f"         activations {report.size(kept.kept)}, or {less}")
        return lines

    def _given(self) -> list[str]:
        return ["", "given", *(f"  {key} = {value}  ({origin})" for key, value, origin in self.given)]


@dataclass(frozen=True)
class Plan(Sizes):
    """A run before it is run. `free` is what memory the machine has, None where that is not known."""

    data: list[str]
    tokens: int
    supervised_tokens: int
    steps: int
    formula: str
    free: int | None
    directory: str
    files: list[str]
    notes: list[str]

    def text(self) -> str:
        """For people."""
        lines = self._lines()
        lines += [f"data     {line}" if i == 0 else f"         {line}" for i, line in enumerate(self.data)]
        lines += [f"steps    {self.steps:,} = {self.formula}", *self._costs(), "", "memory"]
        lines += memory.lines(self.memory, self.frozen)
        free = f"of {report.size(self.free)} free" if self.free is not None else ""
        lines[-1] += f"  {free}".rstrip()
        lines += ["", f"files in {self.directory}", *(f"  {file}" for file in self.files)]
        if self.given:
            lines += self._given()
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes]) + "\n"


@dataclass(frozen=True)
class ShapePlan(Sizes):
    """What fine-tuning a model of some shape takes, wherever it is done."""

    before_activations: int  # bytes: frozen weights, what is trained, its gradients, the optimizer's state
    mixed_precision: dict[str, int]  # the same in 16 bits with Adam, as it is usually accounted for
    speed: cost.Speed | None  # of a device, where one is named
    seconds: float | None  # of a step

    def text(self) -> str:
        """For people."""
        lines = [*self._lines(), *self._costs()]
        if self.speed:
            rate = f"{self.tokens_of_a_step / self.seconds:,.0f} tokens/s"
            lines.append(f"time     {self.seconds:.3g} s a step, {rate}, {self.speed.text()}")
        lines += ["", f"memory   before activations {report.size(self.before_activations)}"]
        lines += memory.lines(self.memory, self.frozen)
        mixed = " + ".join(f"{nbytes / 1e9:,.4g} ({part})" for part, nbytes in self.mixed_precision.items())
        total = sum(self.mixed_precision.values()) / 1e9
        lines += ["", f"in mixed precision with Adam, before activations: {mixed} = {total:,.4g} GB"]
        return "\n".join([*lines, *self._given()]) + "\n"


def plan(resolved: Resolved, resume: bool = False) -> Plan:
    """The plan of a configured run. Raises RefpeftError for what training would refuse: targets, rows, directory."""
    config = resolved.run
    directory = run.run_directory(config, resume)
    checkpoint = open_checkpoint(resolve_model(config.model))
    read = inputs.read(config, checkpoint.config, checkpoint.tokenizer())
    rows, held_out = read.rows, read.held_out
    evaluation.names_of(read.task, held_out, config.train.metrics, config.train.metric)
    batches = inputs.make_batches(config, rows, checkpoint.config)
    libraries = report.resident()  # now, before anything is probed
    shape = _shape(config, batches, checkpoint)
    model, sizes = _sizes(resolved, checkpoint, *shape, read.task.name, read.task.labels, here=True)
    away = memory.offloaded(config, model, math.prod(shape), sizes["activations"])
    if config.device == "cpu":
        sizes["memory"] = {"Python and its libraries": libraries} | sizes["memory"]
    steps = config.train.total_steps(batches.steps_per_epoch)
    free = memory.free_memory(config.device)
    return Plan(
        **sizes,
        data=rows.summary.lines() + (held_out.summary.lines()[:2] if held_out else ["nothing is held out"]),
        tokens=rows.summary.tokens,
        supervised_tokens=rows.summary.supervised_tokens,
        steps=steps,
        formula=_formula(config, batches.steps_per_epoch, steps),
        free=free,
        directory=str(directory),
        files=run.output_files(config),
        notes=_here(config.device) + _on_host(away) + _advice(resolved, sizes["memory"], free),
    )


def shortage(resolved: Resolved, checkpoint: Checkpoint, read: inputs.Inputs) -> str | None:
    """What is said before a run on a GPU whose memory will not suffice, as far as is foreseen; None where it will.

    It takes seconds to foresee that, so it is not done where much more would be free than such a run takes.
    """
    config = resolved.run
    free = memory.free_memory(config.device) if config.device == "cuda" else None
    rows, longest = _shape(config, inputs.make_batches(config, read.rows, checkpoint.config), checkpoint)
    if free is None or memory.at_most(checkpoint, rows * longest) <= free:
        return None
    parts = _sizes(resolved, checkpoint, rows, longest, read.task.name, read.task.labels)[1]["memory"]
    remedies = _remedies(resolved, parts, free)
    if not remedies:
        return None
    each = ", ".join(f"{part} {report.size(parts[part])}" for part in sorted(parts, key=parts.get, reverse=True))
    wanted = f"{report.size(sum(parts.values()))} are foreseen, {report.size(free)} are free"
    return f"memory may not suffice: {wanted} ({each}). What helps: {'; '.join(remedies)}"


def plan_shape(resolved: Resolved, speed: cost.Speed | None = None) -> ShapePlan:
    """What a run takes whose `model` is a shape (see refpeft.shapes): nothing of it needs to be there.

    Raises RefpeftError where the rows are longer than such a model reads.
    """
    config, checkpoint = resolved.run, shapes.checkpoint_of(resolved.run.model)
    length = inputs.row_length(config.data.length, checkpoint.config)
    labels = config.labels or ("0", "1") * (config.task in ("classify", "tag"))
    model, sizes = _sizes(resolved, checkpoint, config.train.rows_at_a_time, length, config.task, labels)
    layers = [layer for adapter in model.adapters for layer in adapter.layers if layer.part.name == "full"]
    whole = sum(value.data.size for layer in layers for value in layer.values.values())  # in place of frozen numbers
    return ShapePlan(
        **sizes,
        before_activations=sum(list(sizes["memory"].values())[: memory.BEFORE_ACTIVATIONS]),
        mixed_precision=memory.mixed_precision(sizes["trained"], sizes["parameters"] - whole),
        speed=speed,
        seconds=speed.seconds(sizes["flops"]) if speed else None,
    )


def _shape(config: RunConfig, batches: Batches, checkpoint: Checkpoint) -> tuple[int, int]:
    """(rows that are computed at a time, tokens of the longest)."""
    longest = batches.longest
    if config.device == "cuda":  # where rows are of few lengths
        longest = max(longest, min(placing.rounded(longest, placing.LENGTHS), checkpoint.config.context))
    return min(config.train.rows_at_a_time, len(batches.rows)), longest


def _sizes(
    resolved: Resolved,
    checkpoint: Checkpoint,
    rows: int,
    longest: int,
    task: str | None,
    labels: Sequence[str],
    here: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """The model, and the fields of Sizes for steps of so many rows of so many tokens; `here`, with so many threads."""
    config, shape = resolved.run, checkpoint.config
    quantizer = make_quantizer(config.quantizer, resolved.options.get(config.quantizer), config.double_quant)
    model = memory.skeleton(checkpoint, quantizer, task, labels)
    for method in config.methods:
        sites.attach(model, method, resolved.options[method], seed=config.seed)
    if config.train.checkpoint_activations:
        learning.refuse_recomputation(model)
    frozen = memory.frozen_parts(model, checkpoint, config.dtype, quantizer)
    trained, at_once = sum(adapter.size for adapter in model.adapters), 1
    if here and config.device == "cpu":
        with backend.blas_threads(model.parameters(), config.train.threads):
            at_once = min(rows, shards.number(model, trained))
    step = cost.step(model, rows, longest, memory.is_narrow(config))
    kept, quantized = memory.activations(model, step, config.dtype), bool(quantizer or checkpoint.quantized)
    return model, {
        "model": config.model,
        **{name: getattr(shape, name) for name in ("family", "layers", "dim", "vocab", "context")},
        "parameters": model.parameters(),
        "methods": {adapter.name: _where(adapter) for adapter in model.adapters},
        "trained": trained,
        "adapter_bytes": sum(adapters.nbytes(adapter, model) for adapter in model.adapters),
        "frozen": frozen,
        "memory": memory.by_part(config, model, frozen, rows, longest, kept, quantized, at_once),
        "activations": kept,
        "tokens_of_a_step": rows * longest,
        "step": step,
        "flops": step.flops(config.train.checkpoint_activations),
        "given": [
            (key, toml.text(value), resolved.origins[key])
            for key, value in resolved.values().items()
            if key in resolved.origins and (key, value) != ("data.file", EMBEDDED)
        ],
    }


# ---- words ----


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.4g}"


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


def _here(device: str) -> list[str]:
    """Why this is no machine for such a run, if it is not."""
    reason = doctor.obstacle() if device == "cuda" else None
    return [f"here device 'cuda' cannot be used: {reason}"] if reason else []


def _on_host(away: int) -> list[str]:
    """What a step keeps elsewhere."""
    return [f"{report.size(away)} of activations lie in the host's memory, pinned"] if away else []


def _advice(resolved: Resolved, parts: dict[str, int], free: int | None) -> list[str]:
    """What to change where memory does not suffice."""
    remedies = _remedies(resolved, parts, free)
    if not remedies:
        return []
    total, largest = report.size(sum(parts.values())), max(parts, key=parts.get)
    return [f"{total} is more than the {report.size(free)} that are free; the largest part is {largest!r}", *remedies]


def _remedies(resolved: Resolved, parts: dict[str, int], free: int | None) -> list[str]:
    """What helps where memory does not suffice, first what helps most; [] where it does."""
    if free is None or sum(parts.values()) <= free:
        return []
    config, largest = resolved.run, max(parts, key=parts.get)
    remedies = memory.lighter(config.train, config.device, largest, config.quantizer is not None)
    return [*remedies, "a smaller rank, or fewer targets, train less"]
