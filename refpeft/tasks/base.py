"""What a task is: how the items of a file become examples, and what the outputs of a model mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refpeft import fused, placing
from refpeft.backend import to_host
from refpeft.batches import Batches
from refpeft.errors import RefpeftError
from refpeft.examples import Asked
from refpeft.items import Item, Labelled
from refpeft.models.base import Model
from refpeft.tensor import Tensor, no_grad
from refpeft.tokenizer import Tokenizer


@dataclass(frozen=True)
class Told:
    """What a model says of one example: `outputs` are the head's, a row for each value that is asked for."""

    example: Any
    outputs: np.ndarray


class Task:
    """How items become examples of one kind, and what is measured of a model's outputs.

    name     as in configurations: "classify"
    outputs  the kind of metrics that it has, see refpeft.metrics.Metric.of
    metrics  those that an evaluation gives unless others are asked for
    labels   the names of what is told apart, in the order of their numbers
    """

    name: str
    outputs: str = "loss"
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, item: Item, line: int, length: int | None = None) -> list[Any]:
        """The examples of an item. Raises RefpeftError, without naming the row, where it is none of this task's.

        length   the most tokens, of a task that leaves `cut` as it is
        """
        raise NotImplementedError

    def cut(self, item: Item, example: Any, length: int) -> Any | None:
        """The example of an item in at most `length` tokens; None where nothing would be learned from it."""
        (kept,) = self.encode(item, example.line, length)
        return kept if kept.targets else None

    def windows(self, example: Any, length: int) -> Iterator[Any]:
        """The example in parts of at most `length` tokens. Raises RefpeftError where that makes no sense."""
        raise RefpeftError(f"overlong split is for texts; for the task {self.name!r} there are drop and truncate")

    def notes(self, items: Sequence[Item], examples: Sequence[Any]) -> list[str]:
        """What people should be told of the data."""
        texts = [(item.text, item.text_b) for item in items if isinstance(item, Labelled)]
        empty = sum(not all(text is None or text.strip() for text in both) for both in texts)
        return [f"{empty:,} rows have an empty text"] if empty else []

    # ---- outputs ----

    def metrics_of(self, examples: Sequence[Any]) -> tuple[str, ...]:
        """Those that an evaluation of these examples gives unless others are asked for."""
        return self.metrics

    def measure(self, model: Model, batches: Batches, names: Sequence[str] = ()) -> dict[str, float]:
        """{"loss": mean loss, metric: value, ...} over `batches`, once through."""
        raise NotImplementedError

    def predict(self, model: Model, batches: Batches) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, what the model predicts of it) of each example, in the order of `batches`.

        That is {"predicted": ...}, with probabilities beside it where there are some.
        """
        raise NotImplementedError


class Asking(Task):
    """A task whose examples are refpeft.examples.Asked: the model says something at some tokens of a text."""

    def told(self, model: Model, batches: Batches) -> Iterator[Told]:
        """What the model says of each example."""
        return (told for told, _ in self._passes(model, batches))

    def measure(self, model: Model, batches: Batches, names: Sequence[str] = ()) -> dict[str, float]:
        from refpeft import metrics

        found, loss, count = [], 0.0, 0.0
        for told, (part, weight) in self._passes(model, batches):
            found.append(told)
            loss, count = loss + part, count + weight
        scores = {"loss": loss / max(count, 1e-30)}
        if names:
            scores |= metrics.evaluate(names, *self.compared(found), labels=self.labels)
        return scores

    def compared(self, found: Sequence[Told]) -> tuple[Any, Any]:
        """(predicted, wanted) of all examples, as the metrics of `outputs` want them."""
        raise NotImplementedError

    def losses(self, outputs: Tensor, targets: Any, weights: Any) -> Tensor:
        """The sum of losses of a batch's outputs."""
        return fused.cross_entropy(outputs, targets=targets, weights=weights, denominator=1.0)

    def _passes(self, model: Model, batches: Batches) -> Iterator[tuple[Told, tuple[float, float]]]:
        """What the model says of each example; with the first of a batch its summed loss and weights, else zeros."""
        with no_grad():
            for step in range(batches.steps_per_epoch):
                batch, examples = placing.evaluated(model, batches.at(step)), batches.examples_at(step)
                rows, targets, weights = batch.picked(model.xp)
                outputs = model.head(model.states(batch, rows))
                loss = float(self.losses(outputs, targets, weights).data), batch.denominator
                each = np.split(to_host(outputs.data), np.cumsum([example.targets for example in examples])[:-1])
                for example, values in zip(examples, each, strict=True):
                    yield Told(example, values), loss
                    loss = 0.0, 0.0


def ended_early(ids: np.ndarray, length: int) -> np.ndarray:
    """At most `length` tokens of a text: the last one, a special token, stays."""
    return ids if len(ids) <= length else np.append(ids[: length - 1], ids[-1:])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (n, labels), in float64."""
    shifted = logits.astype(np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def asked(
    tokenizer: Tokenizer, item: Any, line: int, value: int | float, reads_last: bool, length: int | None
) -> Asked:
    """A text or a pair with one value at the token that a model's head reads: the first, or the last."""
    ids, types = tokenizer.encode_pair(item.text, item.text_b, length)
    if not ids:
        raise RefpeftError("the text has no tokens")
    at = np.array([len(ids) - 1 if reads_last else 0])
    dtype = np.float32 if isinstance(value, float) else np.int32
    return Asked(np.array(ids, np.int32), at, np.array([value], dtype), line, np.array(types, np.int32))
