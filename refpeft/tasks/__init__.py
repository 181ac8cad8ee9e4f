"""Tasks: what models are trained for. One file each: how rows become examples, and what outputs mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refpeft.errors import RefpeftError
from refpeft.formats import FORMATS, Items
from refpeft.items import Labelled
from refpeft.models.config import AnyConfig
from refpeft.models.heads import DECODER, POSSIBLE, check_possible, kind_of
from refpeft.tasks.base import Task
from refpeft.tasks.causal_lm import CausalLM
from refpeft.tasks.classify import Classify, balanced, labels_of
from refpeft.tasks.embed import Embed
from refpeft.tasks.mlm import MLM
from refpeft.tasks.regress import Regress
from refpeft.tasks.seq2seq import Seq2Seq
from refpeft.tasks.tag import Tag
from refpeft.tokenizer import Tokenizer


def name_of(asked: str | None, read: Items, config: AnyConfig) -> str:
    """The task that rows are for: the one that is asked for, or the likeliest that rows and model both serve.

    Raises RefpeftError where there is none.
    """
    served, possible = FORMATS[read.format].tasks, POSSIBLE[kind_of(config)]
    if asked:
        check_possible(asked, config)
        return asked
    answers = [item.label for item in read.items if isinstance(item, Labelled)]
    if answers and all(answer is None for answer in answers):
        served = ("embed",)
    elif any(isinstance(answer, float) for answer in answers):
        served = tuple(task for task in served if task != "classify")
    fitting = [task for task in served if task in possible]
    if not fitting:
        raise RefpeftError(
            f"rows of the format {read.format!r} are for {', '.join(served)}, and a model of {config.family} does "
            f"{', '.join(possible)}: take another model, or name the columns (--fields)"
        )
    return fitting[0]


def make(
    name: str,
    tokenizer: Tokenizer,
    config: AnyConfig,
    items: Sequence[Any] = (),
    labels: Sequence[str] = (),
    class_weights: str | Sequence[float] | None = None,
    supervise: str = "response",
    highest_score: float | None = None,
) -> Task:
    """The task of this name for a model.

    items          of the training rows, whose labels are the task's where `labels` names none
    class_weights  how much each label's rows count, or "balanced"
    highest_score  of pairs to embed, whose cosine is to be 1; None: that of `items`, or 1 where theirs are lower

    Raises RefpeftError for options that have no effect on such a task, and as the task itself does.
    """
    if highest_score is not None and name != "embed":
        raise RefpeftError(f"highest_score has no effect: the task {name!r} compares no vectors")
    reads_last = kind_of(config) == DECODER
    if name in ("classify", "tag"):
        labels = tuple(labels) or labels_of(items)
        task = Classify(tokenizer, labels, reads_last) if name == "classify" else Tag(tokenizer, labels)
        if class_weights == "balanced":
            task.weights = balanced(items, labels)
        elif class_weights is not None:
            task.weigh(class_weights)
        return task
    if class_weights is not None:
        raise RefpeftError(f"class_weights has no effect: the task {name!r} has no labels")
    if name == "regress":
        return Regress(tokenizer, reads_last)
    if name == "seq2seq":
        return Seq2Seq(tokenizer, config.start_id)
    if name == "embed":
        scores = [float(item.label) for item in items if isinstance(getattr(item, "label", None), int | float)]
        return Embed(tokenizer, highest_score or max([1.0, *scores]))
    return MLM(tokenizer) if name == "mlm" else CausalLM(tokenizer, supervise=supervise)
