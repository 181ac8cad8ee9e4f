"""A configured run, put together from its parts: data, model, methods, training, report."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import adapters, api, config, files, manager, paging, report, sites, survey
from refpeft.batches import Batches
from refpeft.config import EMBEDDED, Resolved, RunConfig
from refpeft.data import Data, load_data
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.generate import generate
from refpeft.models.base import Model
from refpeft.models.config import ModelConfig, check_speaks
from refpeft.quant import make_quantizer
from refpeft.rng import Stream
from refpeft.tokenizer import Tokenizer
from refpeft.trainer import Summary, Trainer, mean_loss

DEFAULT_LENGTH = 1024  # tokens of a row, where the model's own limit is not less
HERE = Path(__file__).parent / "embedded"
_EXACT_ROWS = 120  # held-out rows whose answers are compared word for word
_LONGEST_SAMPLE = 200  # tokens


# ---- what is trained on ----


def row_length(asked: int | None, model: ModelConfig) -> int:
    """The most tokens of a row: what was asked for, where the model can do it."""
    check_speaks(model)
    if asked and asked > model.context:
        raise RefpeftError(f"length is {asked:,}, but the model was made for {model.context:,} positions")
    return asked or min(DEFAULT_LENGTH, model.context)


def data_files(run: RunConfig) -> tuple[Path, Path | None]:
    """The files of the training rows and of the held-out rows."""
    file, held_out = run.data.file, run.data.eval_file
    if file in (None, EMBEDDED):
        file, held_out = HERE / "train.jsonl", held_out or HERE / "held_out.jsonl"
    return files.expanded(file), files.expanded(held_out) if held_out else None


def load_rows(run: RunConfig, model: ModelConfig, tokenizer: Tokenizer) -> tuple[Data, Data | None]:
    """The training rows and the held-out rows as tokens; None where nothing is held out."""
    file, held_out = data_files(run)
    rows = _read(file, run, model, tokenizer)
    if held_out:
        return rows, _read(held_out, run, model, tokenizer)
    return _split(rows, run.data.eval_share, run.seed) if run.data.eval_share else (rows, None)


def held_out_rows(run: RunConfig, model: ModelConfig, tokenizer: Tokenizer) -> Data | None:
    """The held-out rows alone: the training rows are read only where these are a share of them."""
    held_out = data_files(run)[1]
    return _read(held_out, run, model, tokenizer) if held_out else load_rows(run, model, tokenizer)[1]


def _read(file: Path, run: RunConfig, model: ModelConfig, tokenizer: Tokenizer) -> Data:
    kind, length = run.data.format, row_length(run.data.length, model)
    how = {"format": None if kind == "auto" else kind, "overlong": run.data.overlong, "supervise": run.data.supervise}
    return load_data(file, tokenizer, length=length, fields=run.data.fields, **how)


def _split(rows: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Rows of the file (never parts of one row) held out at random."""
    lines = sorted({example.line for example in rows.examples})
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        raise RefpeftError(f"data.eval_share {share:g} of {len(lines)} rows leaves none to train on")
    chosen = {lines[i] for i in Stream(seed, "held out").permutation(len(lines))[:count]}
    return tuple(_part(rows, [e for e in rows.examples if (e.line in chosen) == held]) for held in (False, True))


def _part(rows: Data, examples: list[Example]) -> Data:
    tokens, supervised = sum(map(len, examples)), sum(example.targets for example in examples)
    counts = {"examples": len(examples), "tokens": tokens, "supervised_tokens": supervised}
    return Data(examples, dataclasses.replace(rows.summary, rows=len({e.line for e in examples}), **counts))


def make_batches(run: RunConfig, rows: Data, model: ModelConfig, shuffle: bool = True) -> Batches:
    """The batches of training rows; without `shuffle` those of held-out rows, as large as fits where a step fits."""
    size = run.train.batch if shuffle else run.train.rows_at_a_time
    return Batches(rows.examples, size, row_length(run.data.length, model), run.data.pack, run.seed, shuffle)


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


def how_kept(adapter: str | Path | None, quantizer: str | None = None) -> dict[str, Any]:
    """How an adapter's run kept its frozen weights, as keywords of refpeft.load; `quantizer` wins, "none" is dense."""
    said = config.written(adapter)
    chosen = None if quantizer == "none" else quantizer or said.get("quantizer")
    double_quant = quantizer in (None, said.get("quantizer")) and said.get("double_quant", False)
    dtype = said.get("dtype", "float32")
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

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        kept = ("steps", "loss_before", "loss_after", "best_loss", "best_step", "stopped_early")
        scores = {name: (before, after) for name, before, after in self.report.scores}
        numbers = {name: getattr(self.summary, name) for name in kept}
        numbers |= {"adapter": dataclasses.asdict(self.stored)} if self.stored else {}
        numbers |= {"trained": sum(adapter.size for adapter in self.model.adapters), "exact_match": self.exact}
        numbers |= {"frozen_bytes": self.model.nbytes, "frozen_bits": self.model.bits, "peak_bytes": self.peak}
        return {"directory": str(self.directory), **numbers, "scores": scores}


def train(resolved: Resolved, directory: Path, resume: bool = False, say: Callable[[str], None] = print) -> Outcome:
    """Trains as configured and writes into `directory` (see run_directory). `say` gets lines for people.

    Raises RefpeftError for what is wrong with the files or the run; KeyboardInterrupt after a checkpoint was saved.
    """
    run = resolved.run
    quantizer_options = {"double_quant": run.double_quant, "options": resolved.options.get(run.quantizer)}
    model = api.load(run.model, None, run.quantizer, run.dtype, run.device, **quantizer_options)
    rows, held_out = load_rows(run, model.config, model.tokenizer)
    resolved = _stated(resolved, rows, directory)
    run = resolved.run
    for line in rows.summary.lines() + (held_out.summary.lines()[:2] if held_out else []):
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
    compare = Comparison(model, held_out, exact=data_files(run)[1] == HERE / "held_out.jsonl")
    with sites.bypassed(model):
        compare.ask()
    say(f"{' + '.join(run.methods)} trains {trained:,} numbers, {trained / model.parameters():.2%} of the model's")
    say(_frozen(model))

    if resume and not any((directory / "checkpoints").glob("step-*")):
        say(f"there is no checkpoint in {directory}: the run begins at its first step")
    batches = make_batches(run, rows, model.config)
    evaluation = make_batches(run, held_out, model.config, shuffle=False) if held_out else None
    progress = report.Progress(run.train.log_every)
    metrics = report.Metrics(directory / "metrics.jsonl", resume, run.device)
    if run.train.paged and (why := paging.obstacle(model.xp)):
        say(f"the optimizer's state is not paged: {why}")
    for adapter in survey.waiting(model):
        say(f"{adapter.name} looks at the training data first, which may take as long as the training")
    trainer = Trainer(model, batches, evaluation, run.train, directory, (progress, metrics), run.seed)
    progress.steps = trainer.total
    directory.mkdir(parents=True, exist_ok=True)  # now, for the trainer may have refused the run
    if not (resume and (directory / config.FILE).is_file()):  # the run that goes on may refuse other options
        files.write_text(directory / config.FILE, config.to_toml(resolved))
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
        stored = Stored(packer.name, error, mean_loss(model, evaluation) if evaluation else None)
    compare.ask()
    told = _report(run, directory, summary, stored, compare, seconds)
    peak = report.peak(run.device)
    told.notes.append(f"{_frozen(model)}; the run took {report.size(peak)} of memory at most")
    exact = compare.score(compare.said[-1]) if compare.exact else None
    return Outcome(directory, model, summary, told, peak, exact, stored)


def _frozen(model: Model) -> str:
    """What the frozen weights take, in words."""
    bits = f", {model.bits:.3f} bits for each number that is quantized" if model.bits else ""
    return f"frozen weights take {report.size(model.nbytes)}{bits}"


def _stated(resolved: Resolved, rows: Data, directory: Path) -> Resolved:
    """The configuration with what was found out: the format of the rows, and the directory."""
    data = resolved.run.data.model_copy(update={"format": rows.summary.format})
    run = resolved.run.model_copy(update={"data": data, "out": str(directory)})
    return dataclasses.replace(resolved, run=run)


class Comparison:
    """What the model answers to held-out prompts, asked before and after training."""

    def __init__(self, model: Model, held_out: Data | None, exact: bool):
        self.model, self.exact = model, exact
        self.rows = held_out.examples[: _EXACT_ROWS if exact else 1] if held_out else []
        self.said: list[list[str]] = []

    def ask(self) -> None:
        """Greedy answers to all prompts, each as long as the longest wanted answer and a little."""
        if self.rows:
            prompts = [_prompt(row) for row in self.rows]
            longest = max(len(row) - len(prompt) for row, prompt in zip(self.rows, prompts, strict=True))
            most = min(longest + 8, _LONGEST_SAMPLE)
            tokens = generate(self.model, prompts, most, stop=self.model.tokenizer.eos_ids)
            self.said.append([self.model.tokenizer.decode(answer) for answer in tokens])

    @property
    def wanted(self) -> list[str]:
        return [self.model.tokenizer.decode(row.ids[len(_prompt(row)) :]) for row in self.rows]

    def score(self, said: list[str]) -> float:
        """The share of answers that are exactly the wanted ones, but for white space around them."""
        return sum(a.strip() == b.strip() for a, b in zip(said, self.wanted, strict=True)) / len(self.rows)

    def sample(self) -> report.Sample | None:
        """The first row whose answer changed."""
        if not self.rows:
            return None
        before, after = self.said
        changed = next((i for i in range(len(self.rows)) if before[i] != after[i]), 0)
        prompt = self.model.tokenizer.decode(_prompt(self.rows[changed]))
        return report.Sample(prompt, self.wanted[changed], before[changed], after[changed])


def _prompt(example: Example) -> np.ndarray:
    """The tokens before the first learned one; at least one, for a text is learned from its start."""
    return example.ids[: max(1, int(example.supervised.argmax()))]


def _report(
    run: RunConfig, directory: Path, summary: Summary, stored: Stored | None, compare: Comparison, seconds: float
) -> report.Report:
    scores, notes = [], []
    if summary.loss_before is not None and summary.loss_after is not None:
        scores.append(("held-out loss", f"{summary.loss_before:.4f}", f"{summary.loss_after:.4f}"))
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
    sample = compare.sample()
    plain = sample is not None and run.data.format == "prompt" and len(sample.prompt) < 80
    prompt = sample.prompt if plain else "Your prompt"
    asking = f"refpeft generate --adapter {directory}"
    text = shlex.quote(prompt.removesuffix("\n"))
    commands = [f"echo {text} | {asking}" if prompt.endswith("\n") else f"{asking} {text}"]
    if all(manager.hook(manager.load(method), "peft_merge") for method in run.methods):
        commands.append(f"refpeft merge --adapter {directory} --out merged")
    if run.model == EMBEDDED:
        commands.append("refpeft train --model DIRECTORY|HUB-ID --data YOUR.jsonl")
    return commands
