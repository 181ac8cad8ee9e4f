"""What a run would do, without training (`refpeft train --dry-run`), and what it would take (`refpeft plan --shape`).

Of the files of a model only the headers are read; a shape has no files at all.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from refpeft import inputs, memory, report, run, schedule, shapes, sites, toml
from refpeft.config import EMBEDDED, Resolved
from refpeft.models.checkpoint import Checkpoint, open_checkpoint
from refpeft.models.hub import resolve as resolve_model
from refpeft.quant import make_quantizer


@dataclass(frozen=True)
class Sizes:
    """A model and what is attached to it. `memory` is bytes by part; `frozen` says of what kinds the weights are."""

    model: str
    family: str
    layers: int
    dim: int
    vocab: int
    context: int
    parameters: int
    methods: dict[str, dict[str, int]]  # by method: how many sites of each role or name, and "trained"
    trained: int
    frozen: dict[str, dict[str, float]]  # by kind: "numbers", "bytes", and "bits" of a number
    memory: dict[str, int]
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
        lines.append(f"trained  {self.trained:,} numbers ({self.trained / self.parameters:.2%} of the model's)")
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
        lines += [f"steps    {self.steps:,} = {self.formula}", "", "memory"]
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

    def text(self) -> str:
        """For people."""
        table = memory.lines(self.memory, self.frozen)
        total = f"before activations {report.size(self.before_activations)}"
        return "\n".join([*self._lines(), "", f"memory   {total}", *table, *self._given()]) + "\n"


def plan(resolved: Resolved, resume: bool = False) -> Plan:
    """The plan of a configured run. Raises RefpeftError for what training would refuse: targets, rows, directory."""
    config = resolved.run
    directory = run.run_directory(config, resume)
    checkpoint = open_checkpoint(resolve_model(config.model))
    read = inputs.read(config, checkpoint.config, checkpoint.tokenizer())
    rows, held_out = read.rows, read.held_out
    batches = inputs.make_batches(config, rows, checkpoint.config)
    at_a_time = min(config.train.rows_at_a_time, len(batches.rows))
    sizes = _sizes(resolved, checkpoint, at_a_time, batches.longest)
    sizes["memory"] = {"Python and its libraries": report.resident()} | sizes["memory"]
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
        notes=_advice(resolved, sizes["memory"], free),
    )


def plan_shape(resolved: Resolved) -> ShapePlan:
    """What a run takes whose `model` is a shape (see refpeft.shapes): nothing of it needs to be there."""
    checkpoint = shapes.checkpoint_of(resolved.run.model)
    length = inputs.row_length(resolved.run.data.length, checkpoint.config)
    sizes = _sizes(resolved, checkpoint, resolved.run.train.rows_at_a_time, length)
    before = sum(list(sizes["memory"].values())[: memory.BEFORE_ACTIVATIONS])
    return ShapePlan(**sizes, before_activations=before)


def _sizes(resolved: Resolved, checkpoint: Checkpoint, rows: int, longest: int) -> dict[str, Any]:
    """The fields of Sizes, for steps of so many rows of so many tokens."""
    config, shape = resolved.run, checkpoint.config
    quantizer = make_quantizer(config.quantizer, resolved.options.get(config.quantizer), config.double_quant)
    model = memory.skeleton(checkpoint, quantizer)
    for method in config.methods:
        sites.attach(model, method, resolved.options[method], seed=config.seed)
    frozen = memory.frozen_parts(model, checkpoint, config.dtype, quantizer)
    return {
        "model": config.model,
        **{name: getattr(shape, name) for name in ("family", "layers", "dim", "vocab", "context")},
        "parameters": model.parameters(),
        "methods": {adapter.name: _where(adapter) for adapter in model.adapters},
        "trained": sum(adapter.size for adapter in model.adapters),
        "frozen": frozen,
        "memory": memory.by_part(config, model, frozen, rows, longest, bool(quantizer or checkpoint.quantized)),
        "given": [
            (key, toml.text(value), resolved.origins[key])
            for key, value in resolved.values().items()
            if key in resolved.origins and (key, value) != ("data.file", EMBEDDED)
        ],
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


def _advice(resolved: Resolved, parts: dict[str, int], free: int | None) -> list[str]:
    """What to change where memory does not suffice."""
    total = sum(parts.values())
    if free is None or total <= free:
        return []
    largest = max(parts, key=parts.get)
    notes = [
        f"{report.size(total)} is more than the {report.size(free)} that are free; the largest part is {largest!r}"
    ]
    if largest == "weights" and not resolved.run.quantizer:
        notes.append("--quantizer nf4 --double-quant keeps weights in half a byte each, --dtype bfloat16 in two")
    return notes + memory.lighter(resolved.run.train)
