"""Sentence embedding: texts that belong together get vectors near each other (arXiv:1908.10084)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.backend import to_host
from refpeft.batches import Batches
from refpeft.errors import RefpeftError
from refpeft.evaluation import mean_loss
from refpeft.examples import Pair
from refpeft.items import Item, Labelled, Plain, described
from refpeft.models.base import Model
from refpeft.tasks.base import Task, ended_early
from refpeft.tensor import no_grad
from refpeft.tokenizer import Tokenizer


class Embed(Task):
    """Pairs of texts, with a score or without. Cosines are to become scores / `highest`, of which STS-B has 5.

    Metrics compare the cosines with the scores.
    """

    name = "embed"
    outputs = "numbers"
    metrics = ("pearson", "spearman")

    def __init__(self, tokenizer: Tokenizer, highest: float = 1.0):
        super().__init__(tokenizer)
        self.highest = highest

    def encode(self, item: Item, line: int) -> list[Pair]:
        if isinstance(item, Plain):  # a text alone, whose vector is to be predicted
            item = Labelled(item.prompt + item.completion)
        if not isinstance(item, Labelled) or isinstance(item.label, str):
            raise RefpeftError(f"{described(item)}: expected two texts, and perhaps a score that is a number")
        a, b = (self._ids(text) for text in (item.text, item.text if item.text_b is None else item.text_b))
        return [Pair(a, b, line, None if item.label is None else float(item.label) / self.highest)]

    def cut(self, item: Item, example: Pair, length: int) -> Pair:
        return replace(example, a=ended_early(example.a, length), b=ended_early(example.b, length))

    def metrics_of(self, examples: Sequence[Pair]) -> tuple[str, ...]:
        return () if any(example.score is None for example in examples) else self.metrics

    def measure(self, model: Model, batches: Batches, names: Sequence[str] = ()) -> dict[str, float]:
        from refpeft import metrics

        scores = {"loss": mean_loss(model, batches)}
        if names:
            found = [(float(a @ b), example.score) for example, a, b in self._vectors(model, batches)]
            if any(score is None for _, score in found):
                raise RefpeftError(
                    f"{names[0]} compares cosines with scores, and the rows have none: leave the metric out"
                )
            scores |= metrics.evaluate(names, *map(np.array, zip(*found, strict=True)))
        return scores

    def predict(self, model: Model, batches: Batches) -> Iterator[tuple[int, dict[str, Any]]]:
        for example, a, b in self._vectors(model, batches):
            told = {"vector": a.tolist()}
            if not np.array_equal(example.a, example.b):
                told |= {"vector_b": b.tolist(), "cosine": float(a @ b)}
            yield example.line, told

    def _ids(self, text: str) -> np.ndarray:
        ids, _ = self.tokenizer.encode_text(text)
        if not ids:
            raise RefpeftError("a text has no tokens")
        return np.array(ids, np.int32)

    def _vectors(self, model: Model, batches: Batches) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
        with no_grad():
            for step in range(batches.steps_per_epoch):
                batch = batches.at(step)
                vectors = to_host(model(batch.ids, segments=batch.segments).data)
                yield from zip(batches.examples_at(step), vectors[::2], vectors[1::2], strict=True)
