"""What tasks share whose outputs are texts: answers to the prompts of held-out rows, beside the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from refpeft.batches import Batches
from refpeft.evaluation import loss_scores
from refpeft.generate import generate
from refpeft.models.base import Model
from refpeft.tasks.base import Task
from refpeft.tokenizer import Tokenizer

_BEHIND = 8  # tokens that an answer may be longer than the longest wanted one
_LONGEST = 200  # tokens of an answer
_AT_ONCE = 16  # prompts that are answered at a time


class Texts(Task):
    """`decoding`: keywords of refpeft.generate, such as beams; greedy without any. An answer ends before `until`."""

    outputs = "texts"

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self.decoding: dict[str, Any] = {}
        self.until: str | None = None

    def prompt(self, example: Any) -> np.ndarray:
        """The tokens that a model is asked with."""
        raise NotImplementedError

    def asked(self, example: Any) -> np.ndarray:
        """The tokens before the answer that is to be predicted."""
        return self.prompt(example)

    def wanted(self, example: Any) -> str:
        """The answer that is learned."""
        raise NotImplementedError

    def measure(self, model: Model, batches: Batches, names: Sequence[str] = ()) -> dict[str, float]:
        """Rows with the same prompt are one prompt with several right answers."""
        from refpeft import metrics

        examples = [example for row in batches.rows for example in row]
        context = {}
        if any("bytes" in metrics.METRICS[name].context for name in names):
            context["bytes"] = sum(len(self.tokenizer.decode(self.learned(one)).encode()) for one in examples)
        scores = loss_scores(model, batches, names, **context)
        if of_texts := [name for name in names if name not in scores]:
            references: dict[bytes, list[str]] = {}
            prompts: dict[bytes, np.ndarray] = {}
            for example in sorted(examples, key=lambda example: example.line):
                prompt = self.prompt(example)
                prompts[prompt.tobytes()] = prompt
                references.setdefault(prompt.tobytes(), []).append(self.wanted(example).strip())
            said = [answer.strip() for answer in self.answers(model, list(prompts.values()), self.longest(examples))]
            scores |= metrics.evaluate(of_texts, said, list(references.values()))
        return scores

    def learned(self, example: Any) -> np.ndarray:
        """The tokens that are learned."""
        return example.ids[example.supervised]

    def longest(self, examples: Sequence[Any]) -> int:
        """How many tokens an answer may have: as many as the longest wanted one, and a little."""
        return min(max(example.targets for example in examples) + _BEHIND, _LONGEST)

    def answers(self, model: Model, prompts: Sequence[np.ndarray], most: int) -> list[str]:
        """The text that the model says to each prompt."""
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        said: list[str] = [""] * len(prompts)
        how = {"stop": self.tokenizer.eos_ids} | self.decoding
        for at in range(0, len(order), _AT_ONCE):
            part = order[at : at + _AT_ONCE]
            tokens = generate(model, [prompts[i] for i in part], most, **how)
            for i, answer in zip(part, tokens, strict=True):
                said[i] = self.tokenizer.decode(answer)
                if self.until:
                    said[i] = said[i].lstrip().partition(self.until)[0]
        return said

    def predict(self, model: Model, batches: Batches) -> Iterator[tuple[int, dict[str, Any]]]:
        """Of a conversation the last answer; none depends on what the rows themselves answer."""
        examples: dict[int, Any] = {}
        for row in batches.rows:  # the longest of a line comes first: that of its last answer
            examples.setdefault(row[0].line, row[0])
        said = self.answers(model, [self.asked(example) for example in examples.values()], _LONGEST)
        for line, answer in zip(examples, said, strict=True):
            yield line, {"predicted": answer.strip()}
