"""What a run is trained and measured on: its files as examples of a task, the held-out rows, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refpeft import files, tasks
from refpeft.batches import Batches
from refpeft.data import Data, examples_of
from refpeft.errors import RefpeftError
from refpeft.formats import Items, read_items
from refpeft.items import Labelled
from refpeft.models.config import AnyConfig
from refpeft.rng import Stream
from refpeft.settings import EMBEDDED, RunConfig
from refpeft.tasks.base import Task
from refpeft.tokenizer import Tokenizer

DEFAULT_LENGTH = 1024  # tokens of a row, where the model's own limit is not less
HERE = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Inputs:
    """The rows of a run, as examples of its task; `held_out` is None where nothing is."""

    task: Task
    rows: Data
    held_out: Data | None


def read(run: RunConfig, model: AnyConfig, tokenizer: Tokenizer) -> Inputs:
    """The training rows and the held-out rows. The task is the run's, or the one that its rows and the model serve."""
    file, held_out = data_files(run)
    items = _items(file, run, model, tokenizer)
    name = tasks.name_of(run.task, items, model)
    how = {"class_weights": run.train.class_weights, "supervise": run.data.supervise}
    try:
        task = tasks.make(name, tokenizer, model, items.items, run.labels, **how)
    except RefpeftError as error:
        raise RefpeftError(f"{file}: {error}") from None
    if run.data.pack and name != "causal-lm":
        raise RefpeftError(f"data.pack puts several texts into a row, and the task {name!r} has one: leave it out")
    rows = _examples(items, task, file, run, model)
    if held_out:
        held = _examples(_items(held_out, run, model, tokenizer), task, held_out, run, model)
        return Inputs(task, rows, _first(held, run))
    if run.data.eval_share:
        rows, held = _split(rows, run.data.eval_share, run.seed)
        return Inputs(task, rows, _first(held, run))
    return Inputs(task, rows, None)


def held_out_rows(run: RunConfig, model: AnyConfig, task: Task) -> Data | None:
    """The held-out rows alone: the training rows are read only where these are a share of them."""
    file, held_out = data_files(run)
    read_from = held_out or (file if run.data.eval_share else None)
    if read_from is None:
        return None
    rows = _examples(_items(read_from, run, model, task.tokenizer), task, read_from, run, model)
    return _first(rows if held_out else _split(rows, run.data.eval_share, run.seed)[1], run)


def to_predict(
    file: str | Path, task: Task, model: AnyConfig, kind: str | None, fields: Mapping[str, str], length: int | None
) -> tuple[Items, Data]:
    """The rows of a file, and an example for each; what is too long is cut, what would be learned may be missing."""
    path = files.expanded(file)
    items = read_items(path, kind, fields, has_template=_templated(task.tokenizer, model), answers=False)
    if items.format == "text" and task.name in ("classify", "regress"):
        texts = [Labelled(item.prompt + item.completion) for item in items.items]
        items = dataclasses.replace(items, items=texts, format="label")
    rows = examples_of(items, task, str(file), row_length(length, model), "truncate", answers=False)
    if len(rows.examples) < len(items.rows):
        raise RefpeftError(f"{file}: {rows.summary.dropped} rows are too long to be predicted: set a larger --length")
    return items, rows


def row_length(asked: int | None, model: AnyConfig) -> int:
    """The most tokens of a row: what was asked for, where the model can do it."""
    if asked and asked > model.context:
        raise RefpeftError(f"length is {asked:,}, but the model was made for {model.context:,} positions")
    return asked or min(DEFAULT_LENGTH, model.context)


def data_files(run: RunConfig) -> tuple[Path, Path | None]:
    """The files of the training rows and of the held-out rows."""
    file, held_out = run.data.file, run.data.eval_file
    if file in (None, EMBEDDED):
        file, held_out = HERE / "train.jsonl", held_out or HERE / "held_out.jsonl"
    return files.expanded(file), files.expanded(held_out) if held_out else None


def make_batches(run: RunConfig, rows: Data, model: AnyConfig, shuffle: bool = True) -> Batches:
    """The batches of training rows; without `shuffle` those of held-out rows, as large as fits where a step fits."""
    size = run.train.batch if shuffle else run.train.rows_at_a_time
    return Batches(rows.examples, size, row_length(run.data.length, model), run.data.pack, run.seed, shuffle)


def _items(file: Path, run: RunConfig, model: AnyConfig, tokenizer: Tokenizer) -> Items:
    kind = None if run.data.format == "auto" else run.data.format
    return read_items(file, kind, run.data.fields, has_template=_templated(tokenizer, model))


def _templated(tokenizer: Tokenizer, model: AnyConfig) -> bool:
    """Whether an instruction is what a conversation's user says."""
    return tokenizer.chat_template is not None and tasks.kind_of(model) == tasks.DECODER


def _examples(items: Items, task: Task, file: Path, run: RunConfig, model: AnyConfig) -> Data:
    return examples_of(items, task, str(file), row_length(run.data.length, model), run.data.overlong)


def _split(rows: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Rows of the file (never parts of one row) held out at random."""
    lines = sorted({example.line for example in rows.examples})
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        raise RefpeftError(f"data.eval_share {share:g} of {len(lines)} rows leaves none to train on")
    chosen = {lines[i] for i in Stream(seed, "held out").permutation(len(lines))[:count]}
    return tuple(_part(rows, [e for e in rows.examples if (e.line in chosen) == held]) for held in (False, True))


def _first(rows: Data, run: RunConfig) -> Data:
    """As many of the held-out rows as the run evaluates on."""
    return _part(rows, rows.examples[: run.data.eval_rows]) if run.data.eval_rows else rows


def _part(rows: Data, examples: list[Any]) -> Data:
    tokens, supervised = sum(map(len, examples)), sum(example.targets for example in examples)
    counts = {"examples": len(examples), "tokens": tokens, "supervised_tokens": supervised}
    return Data(examples, dataclasses.replace(rows.summary, rows=len({e.line for e in examples}), **counts))
