"""Chat templates: a conversation as the text that the model expects, and which part of it the assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from refpeft.errors import RefpeftError
from refpeft.sandbox import CLOSE, OPEN, Environment

LONGEST_TEMPLATE = 1_000_000  # characters

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the spans [start, end) of its characters that the assistant says."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Template:
    """A compiled chat template.

    special_tokens   variables such as {"bos_token": "<s>", "eos_token": "</s>"}
    now              the clock behind `strftime_now`. Llama 3 and SmolLM3 write the date into the system message, so a
                     run that must give the same tokens on another day passes a fixed one.

    Raises RefpeftError, here and in every method, for a template that is wrong, leaves the sandbox or does too much.
    """

    def __init__(
        self, text: str, special_tokens: dict[str, str] | None = None, now: Callable[[], datetime] = datetime.now
    ):
        if len(text) > LONGEST_TEMPLATE:
            raise RefpeftError(f"the chat template has {len(text):,} characters: expected at most {LONGEST_TEMPLATE:,}")
        self.text, self.special_tokens = text, dict(special_tokens or {})
        self.has_generation = re.search(r"\{%[-+]?\s*generation\b", text) is not None
        self._environment = Environment(now)
        try:
            self._template = self._environment.from_string(text)
        except TemplateSyntaxError as error:
            raise RefpeftError(f"the chat template is wrong at line {error.lineno}: {error.message}") from None
        except Exception as error:
            raise RefpeftError(f"the chat template cannot be compiled: {_reason(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text; with `add_generation_prompt` it ends where the assistant's answer begins."""
        return self._marked(messages, add_generation_prompt, tools, variables).replace(OPEN, "").replace(CLOSE, "")

    def conversation(
        self, messages: Sequence[Message], *, tools: list[Any] | None = None, **variables: Any
    ) -> list[Rendered]:
        """What to train on: usually one text with a span for each message of the assistant.

        A template with {% generation %} marks the spans itself. Any other is rendered step by step: what is before the
        assistant's turn together with the generation prompt, and what is after it; the span lies between. That holds
        only if each of these texts begins with the one before it, so this is checked.

        Some templates (Qwen3's, where they drop earlier reasoning) write a turn differently once others follow. Then
        each turn of the assistant becomes a text of its own, with all that came before it: just what the model will
        see when it is asked for that turn.
        """
        if self.has_generation:
            found = [_spans_of_marks(self._marked(messages, False, tools, variables))]
        else:
            found = self._step_by_step(messages, tools, variables)
        said = "".join(rendered.text[start:stop] for rendered in found for start, stop in rendered.spans)
        for i, message in enumerate(messages):
            words = (message.get("content") or "").split() if message.get("role") == "assistant" else []
            if said and words and words[-1] not in said:
                raise RefpeftError(
                    f"the chat template leaves out the text of messages[{i}]: templates of models that see pictures, "
                    "for example, expect lists instead of texts"
                )
        return found

    def _step_by_step(self, messages: Sequence[Message], tools: Any, variables: Any) -> list[Rendered]:
        steps = []
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                prompt = self.render(messages[:i], add_generation_prompt=True, tools=tools, **variables)
                done = self.render(messages[: i + 1], tools=tools, **variables)
                if not done.startswith(prompt):
                    raise RefpeftError(_not_a_prefix(i, prompt, done))
                steps.append((prompt, done))
        text = self.render(messages, tools=tools, **variables)
        if all(text.startswith(done) for _, done in steps):
            return [Rendered(text, tuple((len(prompt), len(done)) for prompt, done in steps))]
        return [Rendered(done, ((len(prompt), len(done)),)) for prompt, done in steps]

    def _marked(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: list[Any] | None,
        variables: dict[str, Any],
    ) -> str:
        """The rendered text with OPEN and CLOSE around what stands in {% generation %}."""
        try:
            data = json.dumps([list(messages), tools, variables], ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise RefpeftError(f"a chat template gets plain JSON values only: {error}") from None
        if OPEN in data or CLOSE in data:
            raise RefpeftError("a message holds the character U+FDD0 or U+FDD1, which no text may contain: remove it")
        messages, tools, variables = json.loads(data)  # a copy: a template gets no object with methods of its own
        self._environment.begin()
        try:
            return self._template.render(
                **self.special_tokens,
                **variables,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            raise RefpeftError(f"the chat template fails: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateError):
        return str(error.message)
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return f"{type(error).__name__}: {error}"


def _spans_of_marks(marked: str) -> Rendered:
    """The text without its marks, and the spans that they enclosed (an empty span is none)."""
    pieces, spans, start, at = [], [], None, 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece == OPEN:
            if start is not None:
                raise RefpeftError("the chat template has a {% generation %} inside a {% generation %}")
            start = at
        elif piece == CLOSE and start is not None:
            if spans and spans[-1][1] == start:  # one answer in two tags
                start = spans.pop()[0]
            if at > start:
                spans.append((start, at))
            start = None
        else:
            pieces.append(piece)
            at += len(piece)
    return Rendered("".join(pieces), tuple(spans))


def _not_a_prefix(index: int, prompt: str, done: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, done, strict=False)) if a != b), min(len(prompt), len(done)))
    return (
        f"the chat template does not show what the assistant says: its text before messages[{index}] with the "
        f"generation prompt has {prompt[at : at + 40]!r} where its text with that message has {done[at : at + 40]!r}. "
        "Use a template that marks the answer with {% generation %} ... {% endgeneration %}"
    )
