"""A step of each method beside one of LoRA, on one model that stays: `refpeft compare --bench`.

Trained on are full rows of random tokens, all learned, and the model may be a shape with random numbers: no file
is needed. The methods are timed by a process that keeps the model; another one takes its place where it ends, or hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import adapters, api, backend, config, files, inputs, manager, report, shapes, sites
from refpeft.batches import Batches
from refpeft.comparing import ASKED
from refpeft.config import Resolved
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.models.base import Model
from refpeft.models.checkpoint import open_checkpoint
from refpeft.models.hub import resolve
from refpeft.quant import make_quantizer
from refpeft.settings import RunConfig
from refpeft.trainer import Trainer

STEPS, LIMIT = 20, 120.0
WARM_UP = 3
"""Steps before those that are timed: on a GPU the first compiles kernels, and the second is captured."""
BESIDE = "lora"
JSON = "timings.json"


@dataclass(frozen=True)
class Timed:
    """A method's step; with an `error` the rest is None.

    began     seconds from attaching it to its first step: first values, and what it asks the data
    refused   why its steps are not captured in a graph, on a GPU; empty where they are
    """

    method: str
    trained: int | None = None  # numbers
    began: float | None = None
    step_ms: float | None = None  # median
    least_ms: float | None = None
    peak_bytes: int | None = None  # with the model
    captured: bool | None = None
    refused: str = ""
    error: str | None = None


def bench(
    resolved: Mapping[str, Resolved | RefpeftError], out: Path, steps: int, limit: float, say: Callable[[str], None]
) -> list[Timed]:
    """Times `steps` steps of each, LoRA first and, where there are others, last again.

    Each row is said when it is there, and written with those before it into `out`. A method that takes longer than
    `limit` seconds in all is left.
    """
    names = sorted(resolved, key=lambda name: name != BESIDE)
    names += [BESIDE] if names[0] == BESIDE and len(names) > 1 else []
    found: list[Timed] = []
    with contextlib.closing(_Worker()) as worker:
        for number, name in enumerate(names, 1):
            run = resolved[name]
            if isinstance(run, RefpeftError):
                found.append(Timed(name, error=" ".join(str(run).splitlines())))
            else:
                file = out / name / ASKED
                file.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(file, config.to_toml(run))
                wanted = any(str(file.parent) in str(other) for key, other in resolved.items() if key != name)
                found.append(worker.time(name, file, steps, wanted, limit))
            say(f"{number}/{len(names)} {line(found[-1], found[0])}")
            files.write_json(out / JSON, {"rows": [dataclasses.asdict(row) for row in found]})
    return found


def line(row: Timed, first: Timed) -> str:
    """A row in words."""
    if row.error:
        return f"{row.method}: {row.error}"
    *numbers, how = _cells(row, first)[1:]
    return f"{row.method}: {', '.join(f'{n} {what}' for n, what in zip(numbers, _HEAD[1:], strict=False))}; {how}"


def text(rows: Sequence[Timed]) -> str:
    """The table for people, with what failed below it."""
    done, failed = [row for row in rows if not row.error], [row for row in rows if row.error]
    cells = [_HEAD, *(_cells(row, rows[0]) for row in done)]
    numbers = report.table(row[:-1] for row in cells)
    lines = [f"{line}  {how}" for line, (*_, how) in zip(numbers, cells, strict=True)] if done else []
    between = [""] if done and failed else []
    return "".join(f"{each}\n" for each in [*lines, *between, *(line(row, row) for row in failed)])


_HEAD = ("method", "trained", "ms a step", "x LoRA's", "GiB at most", "s to begin", "captured")


def _cells(row: Timed, first: Timed) -> tuple[str, ...]:
    beside = first.step_ms if first.method == BESIDE else None
    ratio = f"{row.step_ms / beside:.2f}" if beside else "-"
    how = {None: "-", True: "yes"}.get(row.captured, f"no: {row.refused}" if row.refused else "no")
    peak = f"{row.peak_bytes / 2**30:.2f}"
    return row.method, f"{row.trained:,}", f"{row.step_ms:.2f}", ratio, peak, f"{row.began:.1f}", how


# ---- a process that times ----


class _Worker:
    """Asks a process for timings; it is started when it is needed first, or again."""

    def __init__(self):
        self._process: Any = None

    def time(self, name: str, file: Path, steps: int, keep: bool, limit: float) -> Timed:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, manager.sources()), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()  # that it is there, however long that takes
        self._pipe.send((name, file, steps, keep))
        try:
            if self._pipe.poll(limit):
                row, goes_on = self._pipe.recv()
            else:
                row, goes_on = Timed(name, error=f"it took longer than {limit:g} s"), False
        except EOFError:
            self._process.join()
            row, goes_on = Timed(name, error=f"its process ended with exit code {self._process.exitcode}"), False
        if not goes_on:
            self.close()
        return row

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Any, sources: Sequence[str]) -> None:
    """Answers with (a row, whether this process can go on)."""
    warnings.simplefilter("ignore")  # rows say what was warned of
    manager.add(*sources)
    pipe.send(None)
    kept: dict[str, Model] = {}
    with contextlib.suppress(EOFError):
        while True:
            name, file, steps, keep = pipe.recv()
            try:
                with np.errstate(all="ignore"):
                    row, goes_on = _timed(name, config.resolve(file), kept, steps, file.parent if keep else None), True
            except RefpeftError as error:
                row, goes_on = Timed(name, error=" ".join(str(error).splitlines())), True
            except Exception as error:  # of a device, say, which may answer no more
                row = Timed(name, error=f"{type(error).__name__}: {error}".partition("\n")[0])
                goes_on = False
            pipe.send((row, goes_on))


def _timed(name: str, resolved: Resolved, kept: dict[str, Model], steps: int, directory: Path | None) -> Timed:
    """Attaches a method to a model, which is `kept` for the next one, and takes steps; `directory` gets the adapter."""
    run = resolved.run
    model = _model(resolved, kept)
    batches = _rows(run, model)
    report.forget_peak(run.device)
    began, records = time.perf_counter(), []
    try:
        for method in run.methods:
            sites.attach(model, method, resolved.options[method], seed=run.seed)
        fixed = {"steps": WARM_UP + steps, "schedule": "constant", "warmup": 0, "best": False}
        fixed |= {"eval_every": None, "save_every": None, "early_stop": None}
        trainer = Trainer(model, batches, None, run.train.model_copy(update=fixed), None, [records.append], run.seed)
        ready = time.perf_counter() - began
        trainer.run()
        if directory:
            adapters.save(directory, model)
        refused = trainer.device.refused if trainer.device else ""
        seconds = [record["seconds"] for record in records[WARM_UP:]]
        return Timed(
            name,
            trained=sum(adapter.size for adapter in model.adapters),
            began=ready,
            step_ms=1e3 * statistics.median(seconds),
            least_ms=1e3 * min(seconds),
            peak_bytes=report.peak(run.device),
            captured=run.train.capture and not refused if trainer.device else None,
            refused=refused,
        )
    finally:
        sites.detach(model)


def _model(resolved: Resolved, kept: dict[str, Model]) -> Model:
    """The model of a run: the one that the run before had, where it is the same."""
    run = resolved.run
    options = resolved.options.get(run.quantizer)
    same = repr((run.model, run.dtype, run.device, run.quantizer, options, run.double_quant, run.task, run.labels))
    if same not in kept:
        kept.clear()
        xp, known = backend.module(run.device), shapes.known(run.model)
        checkpoint = shapes.Filled(shapes.read(run.model)) if known else open_checkpoint(resolve(run.model))
        quantizer = make_quantizer(run.quantizer, options, run.double_quant)
        kept[same] = api.build(checkpoint, run.dtype, xp, quantizer, run.task, run.labels, run.seed)
        kept[same].name = run.model
    return kept[same]


def _rows(run: RunConfig, model: Model) -> Batches:
    """The rows of one batch, full, all of their tokens learned; every step has them."""
    if model.task != "causal-lm":
        what = f"for {model.task}" if model.task else "without a head"
        raise RefpeftError(f"steps are timed of models that go on with texts, and this one is {what}")
    length = inputs.row_length(run.data.length, model.config)
    draw = np.random.default_rng(run.seed)
    rows = [draw.integers(0, model.config.vocab, length, np.int32) for _ in range(run.train.batch)]
    examples = [Example(ids, np.ones(length, bool), line) for line, ids in enumerate(rows, 1)]
    return Batches(examples, run.train.batch, length)
