"""What held-out rows say of a model: losses, and the metrics of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refpeft import placing
from refpeft.batches import Batches
from refpeft.errors import RefpeftError
from refpeft.models.base import Model
from refpeft.tensor import no_grad

if TYPE_CHECKING:
    from refpeft.data import Data
    from refpeft.tasks.base import Task


class Evaluation:
    """Called, it gives {"loss": the mean loss of the held-out rows, metric: value, ...}.

    Without a task there is the loss alone; `names` are metrics of the task besides.
    """

    def __init__(self, model: Model, batches: Batches, task: Task | None = None, names: Sequence[str] = ()):
        self.model, self.batches, self.task, self.names = model, batches, task, tuple(names)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.batches.longest

    def __call__(self) -> dict[str, float]:
        if self.task is None:
            return {"loss": mean_loss(self.model, self.batches)}
        return self.task.measure(self.model, self.batches, self.names)

    @cached_property
    def denominator(self) -> float:
        """How many targets there are, or the sum of their weights."""
        return sum(batch.denominator for batch in self.batches)


class Several:
    """The evaluations of several data sets, each of which has its number as the task of all its rows.

    "loss" is that of all targets together, a metric the mean over the sets, as GLUE's score is; each set has its own
    beside them, such as "loss a.jsonl".
    """

    def __init__(self, parts: Mapping[str, Evaluation]):
        self.parts = dict(parts)

    @property
    def longest(self) -> int:
        return max(part.longest for part in self.parts.values())

    def __call__(self) -> dict[str, float]:
        found = [of_task(part, number) for number, part in enumerate(self.parts.values())]
        weights = np.array([part.denominator for part in self.parts.values()])
        together = {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}
        together["loss"] = float(weights @ [scores["loss"] for scores in found] / weights.sum())
        for name, scores in zip(self.parts, found, strict=True):
            together |= {f"{metric} {name}": value for metric, value in scores.items()}
        return together


def of_task(part: Evaluation, number: int | None) -> dict[str, float]:
    """An evaluation of rows that are of the data set with this number."""
    mode = part.model.mode
    mode.task = number
    try:
        return part()
    finally:
        mode.task = None


def of_rows(
    model: Model, rows: Data, batches: Callable[[Data], Batches], task: Task | None = None, names: Sequence[str] = ()
) -> Evaluation | Several:
    """The evaluation of held-out rows; of each of their data sets where there are several."""
    if not rows.sets:
        return Evaluation(model, batches(rows), task, names)
    called = short_names([one.summary.file for one in rows.sets])
    return Several({n: Evaluation(model, batches(one), task, names) for n, one in zip(called, rows.sets, strict=True)})


def short_names(files: Sequence[str]) -> list[str]:
    """What files are called in reports: by their own names, or by their paths where two have the same one."""
    names = [Path(file).name for file in files]
    return [name if names.count(name) == 1 else str(file) for name, file in zip(names, files, strict=True)]


def deciding(task: Task, rows: Data | None, asked: str | None) -> str:
    """What the best evaluation of held-out rows is told by: what is asked for, else their first metric, or the loss."""
    return asked or next(iter(task.metrics_of(rows.examples if rows else ())), "loss")


def names_of(task: Task, rows: Data | None, more: Sequence[str] = (), asked: str | None = None) -> list[str]:
    """The metrics of held-out rows: the task's own, `more`, and the deciding one.

    Raises RefpeftError for those that are unknown, or not of such a task.
    """
    from refpeft import metrics

    own = task.metrics_of(rows.examples if rows else ())
    names = list(dict.fromkeys([*own, *more, deciding(task, rows, asked)]))
    names = [name for name in names if name != "loss"]
    speaks = task.outputs == "texts"
    for name in names:
        found = metrics.METRICS.get(name)
        if found and "bytes" in found.context and task.outputs != "texts":
            raise RefpeftError(f"{name} is of texts that are said, and the task {task.name!r} says none: leave it out")
        metrics.check([name], "loss" if speaks and found and found.of == "loss" else task.outputs, task.labels or None)
    return names


def better(metric: str, scores: Mapping[str, float], than: Mapping[str, float]) -> bool:
    """Whether an evaluation is better than another, by one of its values."""
    if metric == "loss":
        return scores["loss"] < than["loss"]
    from refpeft.metrics import METRICS

    return METRICS[metric].better(scores[metric], than[metric])


def mean_loss(model: Model, batches: Batches) -> float:
    """The mean loss of all targets of `batches`, once through: of texts, the mean of -log p over supervised tokens."""
    total, count = 0.0, 0.0
    with no_grad():
        for step in range(batches.steps_per_epoch):
            batch = placing.evaluated(model, batches.at(step))
            total += float(model.loss(batch, 1.0).data)
            count += batch.denominator
    return total / max(count, 1e-30)


def loss_scores(model: Model, batches: Batches, names: Sequence[str], **context: int) -> dict[str, float]:
    """{"loss": the mean loss, and those of `names` that are metrics of losses}; see refpeft.metrics.evaluate."""
    from refpeft import metrics

    loss = mean_loss(model, batches)
    of_loss = [name for name in names if metrics.METRICS[name].of == "loss"]
    count = sum(batch.supervised for batch in batches) if of_loss else 0
    return {"loss": loss} | metrics.evaluate(of_loss, loss * count, count, **context)
