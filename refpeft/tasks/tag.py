"""Token classification: each word of a sentence has a tag, which is asked for at the word's first token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.batches import Batches
from refpeft.errors import RefpeftError
from refpeft.examples import Asked
from refpeft.items import Item, Tagged
from refpeft.models.base import Model
from refpeft.tasks.base import Told, softmax
from refpeft.tasks.classify import Labelling, number_of


class Tag(Labelling):
    """Of a word with several tokens the first one counts."""

    name = "tag"
    outputs = "tags"
    metrics = ("tag_accuracy", "span_f1")

    def encode(self, item: Item, line: int, length: int | None = None) -> list[Asked]:
        if not isinstance(item, Tagged):
            raise RefpeftError("expected words and their tags")
        ids, words = self.tokenizer.encode_words(item.words, length)
        first = {word: at for at, word in reversed(list(enumerate(words))) if word is not None}
        if length is None and (lost := [word for i, word in enumerate(item.words) if i not in first]):
            raise RefpeftError(f"the word {lost[0]!r} has no tokens")
        tags = item.tags or [0] * len(item.words)
        known = sorted(first)
        values = np.array([number_of(tags[word], self.labels) for word in known], np.int32)
        example = Asked(np.array(ids, np.int32), np.array([first[word] for word in known], np.int64), values, line)
        if self.weights is not None:
            example = replace(example, weights=self.weights[values])
        return [example]

    def compared(self, found: Sequence[Told]) -> tuple[list[list[str]], list[list[str]]]:
        def named(numbers: np.ndarray) -> list[str]:
            return [self.labels[number] for number in numbers]

        return [named(told.outputs.argmax(axis=-1)) for told in found], [named(told.example.values) for told in found]

    def predict(self, model: Model, batches: Batches) -> Iterator[tuple[int, dict[str, Any]]]:
        for told in self.told(model, batches):
            p = softmax(told.outputs)
            tags = [self.labels[number] for number in p.argmax(axis=-1)]
            yield told.example.line, {"predicted": tags, "probabilities": p.max(axis=-1).tolist()}
