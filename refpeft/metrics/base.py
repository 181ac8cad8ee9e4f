"""What a metric is, and what it is given, which is checked once for all of them."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import RefpeftError

Kind = Literal["labels", "numbers", "tags", "texts", "loss"]

_MODULES = {"sacrebleu": "sacrebleu", "rouge-score": "rouge_score", "pycocoevalcap": "pycocoevalcap", "java": None}
"""What metrics may require: the module to import, or None for a program."""


@dataclass(frozen=True)
class Metric:
    """`metric(predicted, wanted)` is one number. What the two are, `of` says:

    labels   numbers of labels, (n,) both
    numbers  floats, (n,) both
    tags     lists of tags' names, n of them, equally long in both
    texts    n texts, and for each of them the list of its references
    loss     cross-entropies in nats, each summed over some tokens, and how many tokens these were: (n,) or one number
    """

    name: str
    of: Kind
    compute: Callable[..., float]
    summary: str
    higher_is_better: bool = True
    requires: str | None = None  # what must be installed beside refpeft; several with " and "
    context: tuple[str, ...] = ()  # keywords that `compute` takes

    def __call__(self, predicted: Any, wanted: Any, **context: Any) -> float:
        """The metric's value. Keywords that are another metric's are ignored.

        Raises RefpeftError if there is nothing to measure, if the two do not belong together, if a text has no
        reference, or if what the metric requires is missing.
        """
        self.check_installed()
        predicted, wanted = _READERS[self.of](self.name, predicted, wanted)
        return float(self.compute(predicted, wanted, **{key: context[key] for key in self.context if key in context}))

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better than another. nan is better than none, and every number better than nan."""
        if math.isnan(value) or math.isnan(than):
            return not math.isnan(value)
        return value > than if self.higher_is_better else value < than

    def check_installed(self) -> None:
        """Raises RefpeftError that names what the metric requires and is not there."""
        for name in self.requires.split(" and ") if self.requires else ():
            module = _MODULES[name]
            if not (importlib.util.find_spec(module) if module else shutil.which(name)):
                raise RefpeftError(f"{self.name} needs {name}, which is not installed: {_HOW.get(name, _EXTRA)}")


_EXTRA = "pip install 'refpeft[metrics]'"
_HOW = {
    "pycocoevalcap": "pip install pycocoevalcap (it holds METEOR 1.5)",
    "java": "install a Java runtime, 8 or newer",
}


def _same_length(name: str, predicted: Any, wanted: Any) -> None:
    if len(predicted) != len(wanted):
        raise RefpeftError(f"{name}: {len(predicted)} predictions for {len(wanted)} rows; every row needs one")
    if not len(predicted):
        raise RefpeftError(f"{name}: nothing to measure, there are no predictions")


def _arrays(name: str, predicted: Any, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.asarray(predicted), np.asarray(wanted)
    for array in arrays:
        if array.ndim != 1:
            raise RefpeftError(f"{name}: expected one value a row, found an array of shape {array.shape}")
    _same_length(name, *arrays)
    return arrays


def _labels(name: str, predicted: Any, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = _arrays(name, predicted, wanted)
    for array in arrays:
        if array.dtype.kind not in "iub" or array.min() < 0:
            raise RefpeftError(f"{name}: labels are whole numbers from 0, found {array.dtype} from {array.min()}")
    return arrays[0].astype(np.int64), arrays[1].astype(np.int64)


def _numbers(name: str, predicted: Any, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, wanted = _arrays(name, predicted, wanted)
    return predicted.astype(np.float64), wanted.astype(np.float64)


def _tags(name: str, predicted: Any, wanted: Any) -> tuple[list, list]:
    _same_length(name, predicted, wanted)
    for row, (said, right) in enumerate(zip(predicted, wanted, strict=True), 1):
        if len(said) != len(right):
            raise RefpeftError(f"{name}: row {row} has {len(right)} words, but {len(said)} predicted tags")
    return [list(row) for row in predicted], [list(row) for row in wanted]


def _texts(name: str, predicted: Any, wanted: Any) -> tuple[list[str], list[list[str]]]:
    _same_length(name, predicted, wanted)
    for row, (text, references) in enumerate(zip(predicted, wanted, strict=True), 1):
        if not isinstance(text, str) or isinstance(references, str):
            raise RefpeftError(f"{name}: row {row} is not a text and a list of references")
        if not references:
            raise RefpeftError(f"{name}: row {row} has no reference; every row needs at least one")
    return list(predicted), [list(references) for references in wanted]


def _loss(name: str, predicted: Any, wanted: Any) -> tuple[float, int]:
    total, tokens = float(np.sum(predicted)), int(np.sum(wanted))
    if tokens <= 0:
        raise RefpeftError(f"{name}: nothing to measure, there are no tokens")
    return total, tokens


_READERS = {"labels": _labels, "numbers": _numbers, "tags": _tags, "texts": _texts, "loss": _loss}
