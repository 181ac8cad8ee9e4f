"""Masked language modelling: some tokens of a text are hidden, and told from the rest (arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refpeft.backend import to_host
from refpeft.batches import Batch, Batches
from refpeft.errors import RefpeftError
from refpeft.evaluation import loss_scores
from refpeft.examples import Masked
from refpeft.items import Item, Plain
from refpeft.models.base import Model
from refpeft.tasks.base import Task, softmax
from refpeft.tensor import no_grad
from refpeft.tokenizer import Tokenizer

_SHOWN = 5  # tokens that a prediction names


class MLM(Task):
    """Predictions are of the mask's tokens that stand in a text."""

    name = "mlm"
    metrics = ("perplexity",)

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        if tokenizer.mask_id is None:
            raise RefpeftError(f"{tokenizer.name} names no mask_token, so no token can be hidden")

    def encode(self, item: Item, line: int, length: int | None = None) -> list[Masked]:
        if not isinstance(item, Plain):
            raise RefpeftError("expected a text")
        ids, special = self.tokenizer.encode_text(item.prompt + item.completion, length)
        free = np.flatnonzero(np.array(special) == 0)
        tokenizer = self.tokenizer
        return [Masked(np.array(ids, np.int32), free, line, tokenizer.mask_id, tokenizer.vocab_size)]

    def windows(self, example: Masked, length: int) -> Iterator[Masked]:
        first, last = int(example.free[0]), int(example.free[-1]) + 1
        before, after = example.ids[:first], example.ids[last:]
        room = length - len(before) - len(after)
        if room < 1:
            raise RefpeftError(f"{len(before) + len(after)} special tokens stand around each part: set a larger length")
        for at in range(first, last, room):
            inner = example.ids[at : min(at + room, last)]
            free = np.arange(len(inner)) + len(before)
            yield replace(example, ids=np.concatenate([before, inner, after]), free=free)

    def measure(self, model: Model, batches: Batches, names: Sequence[str] = ()) -> dict[str, float]:
        return loss_scores(model, batches, names)

    def predict(self, model: Model, batches: Batches) -> Iterator[tuple[int, dict[str, Any]]]:
        mask, tokenizer = self.tokenizer.mask_id, self.tokenizer
        bare = sorted(row[0].line for row in batches.rows if mask not in row[0].ids)
        if bare:
            raise RefpeftError(
                f"rows without {tokenizer.backend.id_to_token(mask)}: {len(bare):,}, the first at line {bare[0]}: "
                "write it where a token is to be told"
            )
        with no_grad():
            for step in range(batches.steps_per_epoch):
                for example in batches.examples_at(step):
                    hidden = np.flatnonzero(example.ids == mask)
                    one = Batch(example.ids[None], np.full((1, len(example)), -100, np.int32))
                    p = softmax(to_host(model.head(model.states(one, hidden)).data))
                    order = np.argsort(-p, axis=-1)[:, :_SHOWN]
                    told = [self._named(row, best) for row, best in zip(p, order, strict=True)]
                    yield example.line, {"predicted": told}

    def _named(self, p: np.ndarray, best: np.ndarray) -> dict[str, float]:
        """The texts of the `best` tokens with their probabilities; of tokens that read alike the first one's."""
        found: dict[str, float] = {}
        for token in best:  # "film" may be a token with a space before it, and one without
            found.setdefault(self.tokenizer.decode([token], skip_specials=False).strip(), float(p[token]))
        return found
