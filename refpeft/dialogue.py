"""Asking a model the way it was trained to be asked, and its answers as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refpeft.errors import RefpeftError
from refpeft.formats import ALPACA, SOURCE
from refpeft.generate import answers
from refpeft.models.base import Model
from refpeft.tasks.seq2seq import ended
from refpeft.templates import Template

PLAIN = ("prompt", "source", "text")
"""Formats of rows that know no conversation."""


@dataclass(frozen=True)
class Said:
    """What a model said: `logprob` and `stopped` are those of refpeft.search.Answer."""

    text: str
    logprob: float
    stopped: bool


class Speaker:
    """A model that is asked with texts; an encoder-decoder with a source, as its rows have it.

    format    of the rows that it was trained on, where that is known. Prompts of the formats "prompt" and "text" are
              given as they stand, those of "source" with a line break; others go through the model's chat template.
              Without a template "instruction" is put into Alpaca's own prompt
    system    the system message of every conversation
    decoding  keywords of refpeft.generate.answers: max_tokens, temperature, beams, ...
    """

    def __init__(self, model: Model, format: str | None = None, system: str | None = None, **decoding: Any):
        self.model, self.tokenizer, self.format, self.decoding = model, model.tokenizer, format, decoding
        self.before = [{"role": "system", "content": system}] if system else []
        template = None if model.task == "seq2seq" else self.tokenizer.chat_template
        self.template = Template(template, self.tokenizer.special_tokens) if template else None
        if system and (self.template is None or format in PLAIN):
            raise RefpeftError("a system message needs a chat template, and prompts here are given as they stand")

    def answer(self, prompts: Sequence[str]) -> list[Said]:
        """What the model says to each prompt."""
        return self._generate([self._encode(prompt) for prompt in prompts])

    def reply(self, messages: Sequence[dict[str, str]]) -> str:
        """What the assistant says next in a conversation."""
        self.need_template()
        return self._generate([self._render(messages)])[0].text

    def need_template(self) -> None:
        """Raises RefpeftError for a model without a chat template."""
        if self.template is None:
            raise RefpeftError(f"{self.tokenizer.name} has no chat template, so there is no talking with it")

    def _encode(self, prompt: str) -> list[int]:
        if self.template and self.format not in PLAIN:
            return self._render([{"role": "user", "content": prompt}])
        if self.format == "instruction":
            prompt = ALPACA.format(instruction=prompt)
        if self.model.task == "seq2seq":
            return ended(self.tokenizer, prompt).tolist()
        if self.format == "source":
            prompt = SOURCE.format(source=prompt)
        return self.tokenizer.encode(prompt, specials=True)

    def _render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.tokenizer.encode(self.template.render([*self.before, *messages], add_generation_prompt=True))

    def _generate(self, prompts: list[list[int]]) -> list[Said]:
        found = answers(self.model, prompts, stop=self.tokenizer.eos_ids, **self.decoding)
        return [Said(self.tokenizer.decode(answer.tokens), answer.logprob, answer.stopped) for answer in found]
