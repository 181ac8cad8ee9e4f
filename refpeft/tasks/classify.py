"""Sequence classification: a text, or two that belong together, has one of some labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.batches import Batches
from refpeft.errors import RefpeftError, few, nearest
from refpeft.examples import Asked
from refpeft.items import SHOWN_LABELS, Item, Labelled, label_counts, label_lines
from refpeft.models.base import Model
from refpeft.tasks.base import Asking, Told, asked, softmax
from refpeft.tokenizer import Tokenizer


class Labelling(Asking):
    """A task with labels. `weights`, one for each, say how much its examples count."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str]):
        super().__init__(tokenizer)
        if len(set(labels)) < len(labels):
            raise RefpeftError(f"labels names one twice: {few(labels, SHOWN_LABELS)}")
        self.labels = tuple(labels)
        self.weights: np.ndarray | None = None

    def weigh(self, weights: Sequence[float]) -> None:
        """Sets the labels' weights. Raises RefpeftError unless there is one for each, of 0 or more."""
        if len(weights) != len(self.labels) or min(weights) < 0 or max(weights) <= 0:
            raise RefpeftError(
                f"class_weights has {len(weights)} numbers, {few(weights, SHOWN_LABELS)}: expected one of 0 or more "
                f"for each of the labels {few(self.labels, SHOWN_LABELS)}"
            )
        self.weights = np.array(weights, np.float32)


class Classify(Labelling):
    """reads_last: the model's head reads the last token, as decoders' do, not the first."""

    name = "classify"
    outputs = "labels"
    metrics = ("accuracy",)

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str], reads_last: bool = False):
        super().__init__(tokenizer, labels)
        self.reads_last = reads_last

    def encode(self, item: Item, line: int, length: int | None = None) -> list[Asked]:
        if not isinstance(item, Labelled):
            raise RefpeftError("expected a text and a label")
        number = 0 if item.label is None else number_of(item.label, self.labels)
        example = asked(self.tokenizer, item, line, number, self.reads_last, length)
        if self.weights is not None:
            example = replace(example, weights=self.weights[[number]])
        return [example]

    def compared(self, found: Sequence[Told]) -> tuple[np.ndarray, np.ndarray]:
        predicted = np.array([int(told.outputs[0].argmax()) for told in found])
        return predicted, np.array([int(told.example.values[0]) for told in found])

    def predict(self, model: Model, batches: Batches) -> Iterator[tuple[int, dict[str, Any]]]:
        for told in self.told(model, batches):
            p = softmax(told.outputs)[0]
            named = {label: float(share) for label, share in zip(self.labels, p, strict=True)}
            yield (
                told.example.line,
                {
                    "predicted": self.labels[p.argmax()],
                    "probability": float(p.max()),
                    "probabilities": named,
                },
            )


def number_of(label: str | int, labels: Sequence[str]) -> int:
    """The number of a label of the data. Raises RefpeftError for one that is none of `labels`.

    A whole number is the label of that name, or, where labels have other names than numbers, the one with that number.
    """
    name = str(label)
    if name in labels:
        return labels.index(name)
    if isinstance(label, int) and 0 <= label < len(labels) and not any(map(str.isdecimal, labels)):
        return label
    known = nearest(name, labels) or f"; there are {few(labels, SHOWN_LABELS)}"
    if labels[0] == "LABEL_0":  # what transformers calls labels without names
        known = f"; the model's labels have no names: give their numbers, 0 to {len(labels) - 1}"
    raise RefpeftError(f"label {name!r} is unknown{known}")


def labels_of(items: Sequence[Item]) -> tuple[str, ...]:
    """The labels, or tags, of a data set by name: numbers in their order, then names in that of the alphabet.

    Raises RefpeftError where there are fewer than two.
    """
    found = list(dict.fromkeys(map(str, label_counts(items))))  # one file may have 1 where another one has "1"
    if len(found) < 2:
        has = f"of labels the rows have only {found[0]!r}" if found else "; ".join(label_lines(items))
        raise RefpeftError(f"there is nothing to tell apart: {has}")
    return tuple(found)


def balanced(items: Sequence[Item], labels: Sequence[str]) -> np.ndarray:
    """Weights with which each label counts as much as any other: rows / (labels * rows of this one)."""
    counts = np.zeros(len(labels))
    for label, count in label_counts(items).items():
        counts[number_of(label, labels)] += count
    missing = [label for label, count in zip(labels, counts, strict=True) if not count]
    if missing:
        raise RefpeftError(f"class_weights balanced: no row has the label {missing[0]!r}")
    return (counts.sum() / (len(labels) * counts)).astype(np.float32)
