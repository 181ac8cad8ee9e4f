"""In-context learning, the baseline of fine-tuning: examples of a training file stand before every prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from refpeft import evaluation, files, inputs, metrics, tasks
from refpeft.backend import to_host
from refpeft.batches import Batches
from refpeft.data import Data, examples_of
from refpeft.errors import RefpeftError
from refpeft.formats import Items, read_items
from refpeft.items import Item, Labelled, Plain
from refpeft.models.base import Model
from refpeft.rng import Stream
from refpeft.tasks.classify import labels_of, number_of
from refpeft.tasks.texts import Texts
from refpeft.tensor import no_grad

BETWEEN = "\n\n"  # examples, and where an answer ends that goes on with another one


def as_prompt(item: Item) -> Plain:
    """A row as prompt and completion: of a text with a label the label's name, on a line of its own."""
    if isinstance(item, Plain) and item.prompt:
        return item
    if isinstance(item, Labelled) and item.label is not None:
        return Plain("".join(f"{text}\n" for text in (item.text, item.text_b) if text is not None), str(item.label))
    raise RefpeftError("shots are for rows of prompt and completion, or of text and label: choose such a file")


def with_shots(rows: Sequence[Plain], pool: Sequence[Plain], count: int, seed: int) -> list[Plain]:
    """Each row with `count` rows of `pool` before its prompt, a blank line between them: the same for all rows.

    They are drawn by the seed. In place of one with a row's own prompt, which would give its answer away, that row has
    the next one drawn. Raises RefpeftError where there are too few.
    """
    drawn = [pool[i] for i in Stream(seed, "shots").permutation(len(pool))] if count else []
    found = []
    for row in rows:
        shown = list(islice((shot for shot in drawn if shot.prompt != row.prompt), count))
        if len(shown) < count:
            raise RefpeftError(f"{count} shots are asked for, but only {len(shown)} rows have another prompt")
        before = [(shot.prompt + shot.completion).rstrip("\n") for shot in shown]
        found.append(Plain(BETWEEN.join([*before, row.prompt]), row.completion))
    return found


def evaluate(
    model: Model,
    file: str,
    shots_from: str | None,
    count: int,
    *,
    seed: int = 0,
    kind: str | None = None,
    fields: Mapping[str, str] | None = None,
    length: int | None = None,
    overlong: str = "error",
    batch: int = 8,
    names: Sequence[str] = (),
    most: int | None = None,
) -> tuple[dict[str, float], Data]:
    """(the scores of a model that is shown `count` examples, the rows that it was asked).

    Those are "loss" and the metrics `names`; of texts with labels also "accuracy": the label is predicted whose name is
    the likeliest to follow. `most`: the first so many rows alone. Raises RefpeftError for a model that writes no text,
    rows that are none for this, and rows that are too long with their examples.
    """
    if model.task not in ("causal-lm", "seq2seq"):
        raise RefpeftError(f"shots are for models that write text, and the task of this one is {model.task!r}")
    if count and not shots_from:
        raise RefpeftError("shots are rows of a training file: give --shots-from FILE")
    asked, known = (read_items(files.expanded(one), kind, fields) if one else None for one in (file, shots_from))
    if most:
        asked = dataclasses.replace(asked, rows=asked.rows[:most], items=asked.items[:most])
    pool = [as_prompt(item) for item in known.items] if known else []
    prompts = with_shots([as_prompt(item) for item in asked.items], pool, count, seed)
    task = tasks.make(model.task, model.tokenizer, model.config)
    task.until = BETWEEN
    rows = _rows(dataclasses.replace(asked, items=prompts, format="prompt"), task, model, file, length, overlong, count)
    every = [*asked.items, *(known.items if known else [])]
    classes = all(isinstance(item, Labelled) and not isinstance(item.label, float) for item in every)
    of_labels = [name for name in names if name in metrics.METRICS and metrics.METRICS[name].of == "labels"] * classes
    of_texts = evaluation.names_of(task, rows, [name for name in names if name not in of_labels])
    made = inputs.row_length(length, model.config)
    scores = task.measure(model, Batches(rows.examples, batch, made, shuffle=False), of_texts)
    if classes:
        labels = labels_of(every)
        wanted = np.array([number_of(item.label, labels) for item in asked.items])
        predicted = likeliest(model, task, prompts, labels, batch)
        scores |= metrics.evaluate(dict.fromkeys(["accuracy", *of_labels]), predicted, wanted, labels=labels)
    return scores, rows


def _rows(items: Items, task: Texts, model: Model, file: str, length: int | None, overlong: str, count: int) -> Data:
    try:
        return examples_of(items, task, Path(file).name, inputs.row_length(length, model.config), overlong)
    except RefpeftError as error:
        fewer = f"; with {count} shots: fewer of them are shorter" if count and "longer than" in str(error) else ""
        raise RefpeftError(f"{error}{fewer}") from None


def likeliest(model: Model, task: Texts, prompts: Sequence[Plain], labels: Sequence[str], batch: int) -> np.ndarray:
    """The number of the label whose name is the likeliest to follow each prompt; the end token is left out."""
    asked = [
        task.encode(Plain(row.prompt, label), number)[0]
        for number, (row, label) in enumerate((row, label) for row in prompts for label in labels)
    ]
    batches, found = Batches(asked, batch, max(map(len, asked)), shuffle=False), np.zeros(len(asked))
    with no_grad():
        for step in range(len(batches)):
            one, examples = batches.at(step), batches.examples_at(step)
            rows, targets, _ = one.picked(model.xp)
            logits = to_host(model.head(model.states(one, rows)).data).astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            said = logits[np.arange(len(rows)), to_host(targets)] - np.log(np.exp(logits).sum(axis=-1))
            each = np.split(said, np.cumsum([example.targets for example in examples])[:-1])
            for example, scores in zip(examples, each, strict=True):
                found[example.line] = scores[:-1].sum()
    return found.reshape(-1, len(labels)).argmax(axis=1)
