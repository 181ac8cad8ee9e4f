"""A configured run, put together from its parts: data, model, methods, training, report."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import adapters, api, backend, config, evaluation, files, inputs, manager, paging, report, sites, survey
from refpeft.batches import Batches
from refpeft.config import EMBEDDED, Resolved, RunConfig
from refpeft.data import Data
from refpeft.errors import RefpeftError, few
from refpeft.evaluation import Evaluation
from refpeft.inputs import Inputs
from refpeft.models.base import Model
from refpeft.models.checkpoint import Checkpoint, open_checkpoint
from refpeft.models.hub import resolve
from refpeft.quant import make_quantizer
from refpeft.tasks.base import Task
from refpeft.tasks.classify import Labelling
from refpeft.tasks.embed import Embed
from refpeft.tasks.texts import Texts
from refpeft.trainer import Summary, Trainer

_NAMED = 5  # names of tensors or labels that are told
_EXACT_ROWS = 120  # held-out rows whose answers are compared word for word


# ---- where it goes ----


def run_directory(run: RunConfig, resume: bool) -> Path:
    """Where the run's files go. Without `out` it is runs/<model>-<method>, with a number where that is taken.

    Raises RefpeftError where another run's files would be overwritten."""
    return free_directory(run.out, f"{Path(run.model).stem}-{'-'.join(run.methods)}", resume)


def free_directory(out: str | None, name: str, resume: bool) -> Path:
    """`out`, or runs/<name> with a number where that is taken; the newest one with `resume`."""
    if out:
        path = files.expanded(out)
        if not resume and _taken(path):
            raise RefpeftError(f"{path} already holds a run: go on with it (--resume), or choose another --out")
        return path
    numbered = [Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000)]
    free = next(i for i, path in enumerate(numbered) if not _taken(path))
    return numbered[max(free - 1, 0)] if resume else numbered[free]


def _taken(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def output_files(run: RunConfig) -> list[str]:
    """What a run writes into its directory."""
    methods = run.methods
    folders = [""] if len(methods) == 1 else [f"{number}-{method}/" for number, method in enumerate(methods, 1)]
    adapter = [folder + name for folder in folders for name in (adapters.CONFIG, adapters.TENSORS)]
    return [*adapter, "metrics.jsonl", config.FILE, "checkpoints/"]


def base_model(adapter: str | Path) -> str:
    """The model that an adapter belongs to, as its run or its adapter_config.json names it."""
    name = config.written(adapter).get("model")
    if not name:
        settings = files.read_json(adapters.directories(adapter)[0] / adapters.CONFIG)
        name = settings.get("base_model_name_or_path") or settings.get("model_name")  # PEFT's key, and AdapterHub's
    if not name:
        raise RefpeftError(f"{adapter} does not name its model: give --model")
    return name


def how_kept(adapter: str | Path | None, quantizer: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """How an adapter's run kept its frozen weights, as keywords of refpeft.load on a device.

    `quantizer` wins, "none" is dense.
    """
    said = config.written(adapter)
    chosen = None if quantizer == "none" else quantizer or said.get("quantizer")
    double_quant = quantizer in (None, said.get("quantizer")) and said.get("double_quant", False)
    dtype = said.get("dtype", "float32")
    if dtype == "tf32" and device == "cpu":  # which are the same weights
        dtype = "float32"
    return {"quantizer": chosen, "double_quant": double_quant, "options": said.get(chosen), "dtype": dtype}


# ---- the run ----


@dataclass(frozen=True)
class Stored:
    """An adapter in a quantizer's format beside the trained one: its relative error (RMS) and its held-out loss."""

    quantizer: str
    error: float
    loss: float | None


@dataclass(frozen=True)
class Outcome:
    """What a finished run gives back."""

    directory: Path
    model: Model
    summary: Summary
    report: report.Report
    peak: int  # bytes of memory, at most
    exact: float | None = None  # share of held-out answers that are as wanted, where they are compared
    stored: Stored | None = None
    forgetting: Forgetting | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        kept = ("steps", "before", "after", "best", "best_step", "stopped_early")
        scores = {name: (before, after) for name, before, after in self.report.scores}
        numbers = {name: getattr(self.summary, name) for name in kept}
        numbers |= {f"loss_{when}": (numbers[when] or {}).get("loss") for when in ("before", "after")}
        numbers |= {"adapter": dataclasses.asdict(self.stored)} if self.stored else {}
        numbers |= {"trained": sum(adapter.size for adapter in self.model.adapters), "exact_match": self.exact}
        numbers |= {"frozen_bytes": self.model.nbytes, "frozen_bits": self.model.bits, "peak_bytes": self.peak}
        if self.forgetting and self.forgetting.scores:
            numbers["forgetting"] = self.forgetting.as_dict()
        return {"directory": str(self.directory), **numbers, "scores": scores}


def train(resolved: Resolved, directory: Path, resume: bool = False, say: Callable[[str], None] = print) -> Outcome:
    """Trains as configured and writes into `directory` (see run_directory). `say` gets lines for people.

    Raises RefpeftError for what is wrong with the files or the run; KeyboardInterrupt after a checkpoint was saved.
    """
    from refpeft import plan  # which imports this module

    run = resolved.run
    checkpoint = open_checkpoint(resolve(run.model))
    found = inputs.read(run, checkpoint.config, checkpoint.tokenizer())
    task, rows, held_out, earlier = found.task, found.rows, found.held_out, found.earlier
    scored = evaluation.names_of(task, held_out, run.train.metrics, run.train.metric)
    if short := plan.shortage(resolved, checkpoint, found):
        say(short)
    quantizer = make_quantizer(run.quantizer, resolved.options.get(run.quantizer), run.double_quant)
    xp, for_task = backend.module(run.device), (task.name, task.labels, run.seed, task.tokenizer)
    model = api.build(checkpoint, run.dtype, xp, quantizer, *for_task)
    model.name = run.model
    resolved = _stated(resolved, found, directory)
    run = resolved.run
    for line in rows.summary.lines() + (held_out.summary.lines()[:2] if held_out else []):
        say(line)
    if earlier:
        say(f"what is forgotten is measured on {earlier.summary.lines()[0]}")
    for line in _of_task(model, checkpoint):
        say(line)
    for method in run.methods:
        fit = manager.hook(manager.load(method), "peft_fit")
        if fit and "original" in fit[1]:
            say(f"{method} is fitted to the weights: with large ones this takes minutes")
        sites.attach(model, method, resolved.options[method], seed=run.seed)
    trained = sum(adapter.size for adapter in model.adapters)
    packer = make_quantizer(run.adapter_quantizer, resolved.options.get(run.adapter_quantizer))
    if packer:
        for adapter in model.adapters:
            adapters.packed(adapter, packer)  # what it cannot keep is said now, not after hours of training
    compare = Comparison(model, task, held_out, exact=inputs.data_files(run)[1] == [inputs.HERE / "held_out.jsonl"])
    say(f"{' + '.join(run.methods)} trains {trained:,} numbers, {trained / model.parameters():.2%} of the model's")
    say(_frozen(model))

    if resume and not any((directory / "checkpoints").glob("step-*")):
        say(f"there is no checkpoint in {directory}: the run begins at its first step")
    batches = inputs.make_batches(run, rows, model.config)
    for one, share in zip(rows.sets, batches.shares, strict=True):
        say(f"{share:.1%} of a step's rows are of {one.summary.file}, {len(one.examples):,} examples")
    unshuffled = partial(inputs.make_batches, run, model=model.config, shuffle=False)
    measured = evaluation.of_rows(model, held_out, unshuffled, task, scored) if held_out else None
    forgetting = Forgetting(model, earlier, unshuffled, task, scored, len(rows.sets) - 1 if run.data.replay else None)
    progress = report.Progress(run.train.log_every)
    metrics = report.Metrics(directory / "metrics.jsonl", resume, run.device)
    if run.train.paged and (why := paging.obstacle(model.xp)):
        say(f"the optimizer's state is not paged: {why}")
    for adapter in survey.waiting(model):
        say(f"{adapter.name} looks at the training data first, which may take as long as the training")
    metric = evaluation.deciding(task, held_out, run.train.metric)
    trainer = Trainer(model, batches, measured, run.train, directory, (progress, metrics), run.seed, metric)
    progress.steps = trainer.total
    directory.mkdir(parents=True, exist_ok=True)  # now, for the trainer may have refused the run
    if not (resume and (directory / config.FILE).is_file()):  # the run that goes on may refuse other options
        files.write_text(directory / config.FILE, config.to_toml(resolved))
    forgetting.measure()
    started = time.monotonic()
    try:
        with np.errstate(all="ignore"):  # the trainer itself says where a loss is not finite
            summary = trainer.run(resume)
    finally:
        progress.close()
    seconds = time.monotonic() - started
    adapters.save(directory, model, quantizer=packer)
    stored = None
    if packer:
        error = adapters.quantize(model, packer)
        stored = Stored(packer.name, error, measured()["loss"] if measured else None)
    compare.ask()
    forgetting.measure()
    told = _report(run, directory, summary, stored, compare, seconds)
    told.notes += forgetting.lines()
    peak = report.peak(run.device)
    told.notes.append(f"{_frozen(model)}; the run took {report.size(peak)} of memory at most")
    exact = compare.score(compare.said[-1]) if compare.exact else None
    return Outcome(directory, model, summary, told, peak, exact, stored, forgetting)


def _frozen(model: Model) -> str:
    """What the frozen weights take, in words."""
    bits = f", {model.bits:.3f} bits for each number that is quantized" if model.bits else ""
    return f"frozen weights take {report.size(model.nbytes)}{bits}"


def _of_task(model: Model, checkpoint: Checkpoint) -> list[str]:
    """What the model ends in, in words."""
    lines = [f"task {model.task}{': ' + few(model.labels, _NAMED) if model.labels else ''}"]
    if model.trained_head:
        lines.append(f"{few(model.trained_head, _NAMED)} of the head is trained beside the method")
    if model.new_head:
        lines.append(f"new, for the model's files have none of this shape: {few(model.new_head, _NAMED)}")
    if checkpoint.unused:
        lines.append(f"not used of the model's files: {few(checkpoint.unused, _NAMED)}")
    return lines if model.task != "causal-lm" or checkpoint.unused else []


def _stated(resolved: Resolved, found: Inputs, directory: Path) -> Resolved:
    """The configuration with what was found out of the rows, by which others can be measured alike; and the directory.

    That is their format and task, the labels and their weights, the highest score.
    """
    run, task = resolved.run, found.task
    told = found.rows.summary.format  # "auto" where files differ
    data, train = {"format": run.data.format if told == "auto" else told}, {}
    if isinstance(task, Embed):
        data["highest_score"] = task.highest
    if isinstance(task, Labelling) and task.weights is not None:
        train["class_weights"] = tuple(task.weights.tolist())
    said = {"data": run.data.model_copy(update=data), "train": run.train.model_copy(update=train)}
    said |= {"task": task.name, "labels": task.labels, "out": str(directory)}
    return dataclasses.replace(resolved, run=run.model_copy(update=said))


class Comparison:
    """What the model answers to held-out prompts, without what was trained and with it; nothing for other tasks."""

    def __init__(self, model: Model, task: Task, held_out: Data | None, exact: bool):
        self.model, self.task, self.exact = model, task, exact
        speaks = held_out is not None and isinstance(task, Texts)
        self.rows = held_out.examples[: _EXACT_ROWS if exact else 1] if speaks else []
        self.said: list[list[str]] = []

    def ask(self) -> None:
        """Greedy answers to all prompts, each as long as the longest wanted answer and a little.

        Bypassed the model is what it was before training, so that no step has to wait for those answers.
        """
        if self.rows:
            with sites.bypassed(self.model):
                self.said.append(self._answers())
            self.said.append(self._answers())

    def _answers(self) -> list[str]:
        prompts = [self.task.prompt(row) for row in self.rows]
        return self.task.answers(self.model, prompts, self.task.longest(self.rows))

    @property
    def wanted(self) -> list[str]:
        return [self.task.wanted(row) for row in self.rows]

    def score(self, said: list[str]) -> float:
        """The share of answers that are exactly the wanted ones, but for white space around them."""
        return sum(a.strip() == b.strip() for a, b in zip(said, self.wanted, strict=True)) / len(self.rows)

    def sample(self) -> report.Sample | None:
        """The first row whose answer changed."""
        if not self.rows:
            return None
        before, after = self.said
        changed = next((i for i in range(len(self.rows)) if before[i] != after[i]), 0)
        prompt = self.model.tokenizer.decode(self.task.prompt(self.rows[changed]))
        return report.Sample(prompt, self.wanted[changed], before[changed], after[changed])


class Forgetting:
    """The scores of an earlier task's held-out rows, before and after training; nothing without such rows.

    `number` is that of the data set whose rows they are like, where the run replays one.
    """

    def __init__(
        self, model: Model, rows: Data | None, batches: Callable[[Data], Batches], task: Task, names: Sequence[str],
        number: int | None,
    ):  # fmt: skip
        self.file, self.number = rows and rows.summary.file, number
        self.evaluation = Evaluation(model, batches(rows), task, names) if rows else None
        self.scores: list[dict[str, float]] = []

    def measure(self) -> None:
        """Before the first step, and after the last."""
        if self.evaluation:
            self.scores.append(evaluation.of_task(self.evaluation, self.number))

    def as_dict(self) -> dict[str, Any]:
        before, after = self.scores
        return {"file": self.file, "before": before, "after": after}

    def lines(self) -> list[str]:
        """For people."""
        if not self.scores:
            return []
        before, after = self.scores
        changes = ", ".join(f"{name} {value:.4f} -> {after[name]:.4f}" for name, value in before.items())
        return [f"forgetting, on {Path(self.file).name}: {changes}"]


def _report(
    run: RunConfig, directory: Path, summary: Summary, stored: Stored | None, compare: Comparison, seconds: float
) -> report.Report:
    scores, notes = [], []
    if summary.before is not None and summary.after is not None:
        for name, after in summary.after.items():
            called = "held-out loss" if name == "loss" else name
            before = summary.before.get(name)  # None: a metric that was not asked for before the run was resumed
            scores.append((called, "-" if before is None else f"{before:.4f}", f"{after:.4f}"))
    elif summary.train_losses:
        part = max(1, len(summary.train_losses) // 10)
        first, last = (sum(losses) / part for losses in (summary.train_losses[:part], summary.train_losses[-part:]))
        notes.append(f"training loss: {first:.4f} in the first tenth, {last:.4f} in the last; nothing was held out")
    if stored:
        notes.append(f"the adapter is saved in {stored.quantizer}, {stored.error:.2%} (RMS) off the trained one")
        if stored.loss is not None:
            scores.append((f"with the adapter in {stored.quantizer}", "", f"{stored.loss:.4f}"))
    if compare.exact:
        scores.append(("exact match", *(f"{compare.score(said):.1%}" for said in compare.said)))
    if summary.stopped_early:
        notes.append(
            f"stopped early: {summary.worse} evaluations in a row were not better than that of step {summary.best_step}"
        )
    if run.train.best and summary.best_step != summary.steps:
        notes.append(f"the adapter is that of step {summary.best_step}, the best one")
    title = f"{' + '.join(run.methods)} on {run.model}: {summary.steps:,} steps in {report.duration(seconds)}"
    return report.Report(title, scores, compare.sample(), directory, notes, _next_commands(run, directory, compare))


def _next_commands(run: RunConfig, directory: Path, compare: Comparison) -> list[str]:
    """What to try with the adapter."""
    files = [path for method in run.methods if (path := manager.path_of(method)).parent != manager.shipped().resolve()]
    plugins = "".join(f" -p {shlex.quote(str(path))}" for path in files)
    if not isinstance(compare.task, Texts):
        return [f"refpeft predict FILE{plugins} --adapter {directory}"]
    sample = compare.sample()
    plain = sample is not None and run.data.format == "prompt" and len(sample.prompt) < 80
    prompt = sample.prompt if plain else "Your prompt"
    asking = f"refpeft generate{plugins} --adapter {directory}"
    text = shlex.quote(prompt.removesuffix("\n"))
    commands = [f"echo {text} | {asking}" if prompt.endswith("\n") else f"{asking} {text}"]
    if all(manager.hook(manager.load(method), "peft_merge") for method in run.methods):
        commands.append(f"refpeft merge{plugins} --adapter {directory} --out merged")
    if run.model == EMBEDDED:
        commands.append("refpeft train --model DIRECTORY|HUB-ID --data YOUR.jsonl")
    return commands
