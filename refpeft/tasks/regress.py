"""Regression: a text, or two that belong together, has a number, such as how alike they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from refpeft import ops
from refpeft.batches import Batches
from refpeft.errors import RefpeftError
from refpeft.examples import Asked
from refpeft.items import Item, Labelled, described
from refpeft.models.base import Model
from refpeft.tasks.base import Asking, Told, asked
from refpeft.tensor import Tensor
from refpeft.tokenizer import Tokenizer


class Regress(Asking):
    """The loss is the squared error; reads_last is for decoders."""

    name = "regress"
    outputs = "numbers"
    metrics = ("pearson", "spearman")

    def __init__(self, tokenizer: Tokenizer, reads_last: bool = False):
        super().__init__(tokenizer)
        self.reads_last = reads_last

    def encode(self, item: Item, line: int, length: int | None = None) -> list[Asked]:
        if not isinstance(item, Labelled) or isinstance(item.label, str):
            raise RefpeftError(f"{described(item)}: expected a text and a number")
        value = 0.0 if item.label is None else float(item.label)
        return [asked(self.tokenizer, item, line, value, self.reads_last, length)]

    def losses(self, outputs: Tensor, targets: Any, weights: Any) -> Tensor:
        difference = outputs[:, 0] - Tensor(targets.astype(outputs.dtype))
        return ops.sum(difference * difference)

    def compared(self, found: Sequence[Told]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([told.outputs[0, 0] for told in found]), np.array([told.example.values[0] for told in found])

    def predict(self, model: Model, batches: Batches) -> Iterator[tuple[int, dict[str, Any]]]:
        for told in self.told(model, batches):
            yield told.example.line, {"predicted": float(told.outputs[0, 0])}
