"""What a run is trained and measured on: its files as examples of a task, the held-out rows, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refpeft import files, tasks
from refpeft.batches import Batches
from refpeft.data import Data, examples_of
from refpeft.errors import RefpeftError
from refpeft.formats import Items, read_items
from refpeft.items import Item, Labelled, Tagged, label_counts
from refpeft.mixtures import Mixture
from refpeft.models import heads
from refpeft.models.config import AnyConfig
from refpeft.rng import Stream
from refpeft.settings import RunConfig, listed
from refpeft.tasks.base import Task
from refpeft.tokenizer import Tokenizer

_REPLAYED = 0.1  # share of an earlier task's rows
DEFAULT_LENGTH = 1024  # tokens of a row, where the model's own limit is not less
HERE = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Inputs:
    """The rows of a run, as examples of its task; `held_out` is None where nothing is.

    Of several files, and of replayed rows, which are the last ones, `rows` has the sets.
    """

    task: Task
    rows: Data
    held_out: Data | None
    earlier: Data | None = None  # held-out rows of an earlier task


def read(run: RunConfig, model: AnyConfig, tokenizer: Tokenizer) -> Inputs:
    """The training rows and the held-out rows. The task is the run's, or the one that its rows and the model serve."""
    files_of, held_out = data_files(run)
    replay, earlier = (files.expanded(file) if file else None for file in (run.data.replay, run.data.earlier))
    items = {file: _items(file, run, model, tokenizer) for file in files_of}
    name = tasks.name_of(run.task, items[files_of[0]], model)
    if replay:
        items[replay] = _items(replay, None, model, tokenizer)
    task = _task(name, items, run, model, tokenizer)
    if run.data.pack and name != "causal-lm":
        raise RefpeftError(f"data.pack puts several texts into a row, and the task {name!r} has one: leave it out")
    read = {file: _examples(found, task, file, run, model) for file, found in items.items()}
    sets, held = [read[file] for file in files_of], []
    if held_out:
        held = [_examples(_items(file, run, model, tokenizer), task, file, run, model) for file in held_out]
    elif run.data.eval_share:
        sets, held = zip(*(_split(rows, run.data.eval_share, run.seed) for rows in sets), strict=True)
    rows = Data.joined([*sets, read[replay]] if replay else sets)
    if rows.sets and task.labels:
        rows.summary.notes.append(f"the labels are those of all files together, {len(task.labels)}")
    measured = Data.joined([_first(one, run) for one in held]) if held else None
    if not earlier:
        return Inputs(task, rows, measured)
    before = _examples(_items(earlier, None, model, tokenizer), task, earlier, run, model)
    return Inputs(task, rows, measured, _first(before, run))


def _task(name: str, items: Mapping[Path, Items], run: RunConfig, model: AnyConfig, tokenizer: Tokenizer) -> Task:
    """The task of all rows that are trained on: its labels are theirs, in the model's own order if it knows them."""
    how = {"class_weights": run.train.class_weights, "supervise": run.data.supervise}
    how |= {"highest_score": run.data.highest_score}
    try:
        every = [item for found in items.values() for item in found.items]
        task = tasks.make(name, tokenizer, model, every, run.labels or _of_model(name, every, model), **how)
        if run.labels and not task.labels:
            raise RefpeftError(f"labels has no effect: the task {name!r} has none")
        return task
    except RefpeftError as error:
        raise RefpeftError(f"{', '.join(map(str, items))}: {error}") from None


def _of_model(name: str, items: Sequence[Item], model: AnyConfig) -> tuple[str, ...]:
    """The labels that the model's own files name for a task, in the order of its head, where the rows have these.

    Rows may have some of the names, or all of the numbers.
    """
    task, labels = heads.read_from(model.raw)
    found = label_counts(items)
    if task != name or labels == heads.unnamed(len(labels)):
        return ()
    return labels if {*found} <= {*labels} or [*found] == [*range(len(labels))] else ()


def held_out_rows(run: RunConfig, model: AnyConfig, task: Task) -> Data | None:
    """The held-out rows alone: the training rows are read only where these are a share of them."""
    files_of, held_out = data_files(run)
    read_from = held_out or (files_of if run.data.eval_share else [])
    if not read_from:
        return None
    rows = [_examples(_items(file, run, model, task.tokenizer), task, file, run, model) for file in read_from]
    held = rows if held_out else [_split(one, run.data.eval_share, run.seed)[1] for one in rows]
    return Data.joined([_first(one, run) for one in held])


def to_predict(
    file: str | Path, task: Task, model: AnyConfig, kind: str | None, fields: Mapping[str, str], length: int | None
) -> tuple[Items, Data]:
    """The rows of a file, and an example for each; what is too long is cut, what would be learned may be missing."""
    path = files.expanded(file)
    items = read_items(path, kind, fields, has_template=_templated(task.tokenizer, model), answers=False)
    if items.format == "text" and task.name in ("classify", "regress"):
        texts = [Labelled(item.prompt + item.completion) for item in items.items]
        items = dataclasses.replace(items, items=texts, format="label")
    if task.labels:  # those of the rows, which may be others, do not matter
        items = dataclasses.replace(items, items=[_unlabelled(item) for item in items.items])
    rows = examples_of(items, task, str(file), row_length(length, model), "truncate", answers=False)
    if len(rows.examples) < len(items.rows):
        raise RefpeftError(f"{file}: {rows.summary.dropped} rows are too long to be predicted: set a larger --length")
    return items, rows


def _unlabelled(item: Item) -> Item:
    field = {Labelled: "label", Tagged: "tags"}.get(type(item))
    return dataclasses.replace(item, **{field: None}) if field else item


def row_length(asked: int | None, model: AnyConfig) -> int:
    """The most tokens of a row: what was asked for, where the model can do it."""
    if asked and asked > model.context:
        raise RefpeftError(f"length is {asked:,}, but the model was made for {model.context:,} positions")
    return asked or min(DEFAULT_LENGTH, model.context)


def data_files(run: RunConfig) -> tuple[list[Path], list[Path]]:
    """The files of the training rows and of the held-out rows."""
    training, held_out = run.data.files, listed(run.data.eval_file)
    if not training:
        training, held_out = [HERE / "train.jsonl"], held_out or [HERE / "held_out.jsonl"]
    return [files.expanded(file) for file in training], [files.expanded(file) for file in held_out]


def make_batches(run: RunConfig, rows: Data, model: AnyConfig, shuffle: bool = True) -> Batches:
    """The batches of training rows; without `shuffle` those of held-out rows, as large as fits where a step fits.

    An epoch of several data sets has as many of their rows as they hold, and those that are replayed beside these.
    """
    size = run.train.batch if shuffle else run.train.rows_at_a_time
    length, how = row_length(run.data.length, model), (run.data.pack, run.seed, shuffle)
    if not (shuffle and rows.sets):
        return Batches(rows.examples, size, length, *how, run.train.group_by_length)
    sets = [Batches(one.examples, 1, length, *how) for one in rows.sets]
    own = len(sets) - bool(run.data.replay)
    counts = [len(one.rows) for one in sets[:own]]
    weights, epoch = list(run.data.mix or counts), sum(counts)
    if run.data.replay:
        share = run.data.replay_share or _REPLAYED
        weights, epoch = [*weights, sum(weights) * share / (1 - share)], round(epoch / (1 - share))
    return Mixture(sets, weights, size, run.seed, epoch)


def _items(file: Path, run: RunConfig | None, model: AnyConfig, tokenizer: Tokenizer) -> Items:
    """The rows of a file in the run's format; without a run in the one that the columns tell."""
    kind = None if run is None or run.data.format == "auto" else run.data.format
    return read_items(file, kind, run.data.fields if run else {}, has_template=_templated(tokenizer, model))


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
