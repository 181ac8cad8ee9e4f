"""What held-out rows say of a model: losses, and the metrics of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from refpeft.batches import Batches
from refpeft.models.base import Model
from refpeft.tensor import no_grad

if TYPE_CHECKING:
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


def deciding(task: Task, asked: str | None) -> str:
    """What the best evaluation is told by: what was asked for, else the task's first metric, or the loss."""
    return asked or (task.metrics[0] if task.metrics else "loss")


def names_of(task: Task, more: Sequence[str] = (), asked: str | None = None) -> list[str]:
    """The metrics of a run: the task's own, `more`, and the deciding one.

    Raises RefpeftError for those that are unknown, or not of such a task.
    """
    from refpeft import metrics

    names = list(dict.fromkeys([*task.metrics, *more, deciding(task, asked)]))
    names = [name for name in names if name != "loss"]
    speaks = task.outputs in ("texts", "loss")
    for name in names:
        found = metrics.METRICS.get(name)
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
            batch = batches.at(step)
            total += float(model.loss(batch, 1.0).data)
            count += batch.denominator
    return total / max(count, 1e-30)


def loss_scores(model: Model, batches: Batches, names: Sequence[str], **context: int) -> dict[str, float]:
    """{"loss": the mean loss, and those of `names` that are metrics of losses}; see refpeft.metrics.evaluate."""
    from refpeft import metrics

    loss = mean_loss(model, batches)
    count = sum(batch.supervised for batch in batches)
    of_loss = [name for name in names if metrics.METRICS[name].of == "loss"]
    return {"loss": loss} | metrics.evaluate(of_loss, loss * count, count, **context)
