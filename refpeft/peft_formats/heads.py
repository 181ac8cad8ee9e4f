"""What an adapter's files have of a task's head: PEFT's modules_to_save."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..backend import Array
from ..errors import RefpeftError
from ..models.base import Model
from ..models.heads import unnamed
from ..sites import Adapter
from .common import PREFIX, Entry, Format

TASKS = {"SEQ_CLS": ("classify", "regress"), "TOKEN_CLS": ("tag",)}
"""What PEFT's words mean that ask for a head."""

_LAST = re.compile(r"(^|\.)(score|classifier|classifier\.out_proj)\.weight$")
_ANY = re.compile(r"(^|\.)(score|(pre_)?classifier|pooler)\.(\w+\.)*(weight|bias)$")
_COPY = re.compile(r"(score|classifier)\.(modules_to_save|original_module)\.")


def task_in(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> tuple[str | None, tuple[str, ...]]:
    """(task, labels) of an adapter of one of TASKS by its head; (None, ()) where it has none."""
    kind = config["task_type"]
    last = [array for name, array in tensors.items() if _LAST.search(name)]
    if not last:
        return None, ()
    if kind == "SEQ_CLS" and len(last[0]) == 1:
        return "regress", ()
    return TASKS[kind][0], unnamed(len(last[0]))


def modules(model: Model) -> list[str]:
    """What PEFT calls the modules that are trained as a whole: RoBERTa's classifier has two layers."""
    return sorted({"classifier" if name.startswith("classifier.") else name for name in model.trained_head})


def apart(adapter: Adapter, model: Model, form: Format | None) -> tuple[Adapter, list[Entry]]:
    """(the adapter without what it trains of the task's head, the tensors of that)."""
    if adapter.plugin.__name__.endswith(".full"):
        return adapter, []
    mine = [layer for layer in adapter.layers if layer.site.name in model.trained_head]
    values = [f"{layer.site.name}.{key}" for layer in mine for key in layer.values]
    others = [layer for layer in adapter.layers if layer not in mine]
    own = {layer.part.name for layer in others}
    rest = replace(
        adapter,
        parts=[part for part in adapter.parts if part.name != "full" or "full" in own],
        layers=others,
        params={name: value for name, value in adapter.params.items() if name not in values},
    )
    return rest, [Entry((form.prefix if form else PREFIX) + name, (name,)) for name in values]


def without(config: dict[str, Any], tensors: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
    """(adapter_config.json, tensors) but what is of a head."""
    saved = [name for name in config.get("modules_to_save") or [] if not _ANY.search(f"{name}.weight")]
    return config | {"modules_to_save": saved}, {n: array for n, array in tensors.items() if not _ANY.search(n)}


def once(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors without PEFT's other copies of a head: with bias = "all" it writes its biases up to three times."""
    return {name: array for name, array in tensors.items() if not _COPY.search(name)}


def check_task(config: Mapping[str, Any], model: Model) -> None:
    """Raises RefpeftError where an adapter is for a task with a head, and the model for another one."""
    kind = config.get("task_type")
    if model.task not in TASKS.get(kind, (model.task,)):
        raise RefpeftError(
            f"task_type is {kind}, and the model is loaded for task {model.task!r}: load it for {TASKS[kind][0]!r}, "
            "with its labels; without a task it is loaded for that of the adapter, if this holds its head"
        )


def check(tensors: Mapping[str, Array], expected: set[str], head: list[Entry], model: Model) -> None:
    """Raises RefpeftError where the head in an adapter's file is missing, or is not the model's."""
    lacking = [entry.name for entry in head if entry.name not in tensors]
    other = [name for name in tensors if _LAST.search(name) and name not in expected]
    if other and (lacking or not head):
        has = f"the head of {model.config.family} has {lacking[0]!r}" if lacking else f"task {model.task!r} has no head"
        raise RefpeftError(f"it holds a head, {other[0]!r}, of another model: {has}")
    if lacking:
        raise RefpeftError(
            f"tensor {lacking[0]!r}, of the head that is trained with it, is missing: save the adapter with "
            f"modules_to_save = {modules(model)}"
        )
    for name in (entry.name for entry in head if _LAST.search(entry.name)):
        count = len(tensors[name])
        if count != model.head.shape[0]:
            raise RefpeftError(
                f"its head tells {count} labels apart, and the model is loaded for {model.head.shape[0]}"
            )
