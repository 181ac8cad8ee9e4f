"""Causal language modelling: a text goes on token by token; answers, or whole texts, are learned.

How a row becomes tokens. The prompt is encoded alone, as it is when the model is asked; the answer is encoded alone and
put behind it. One encoding of both would merge tokens across the boundary ("Q: " + "yes" has a token " yes"): the mask
could not be exact, and training would show prompts that generation never does. BOS stands first where the model's own
tokenizer puts it. An end token is always learned: EOS behind a completion or a text, the template's own end of turn
(<|im_end|>, <|eot_id|>) in a conversation, or EOS where the template has none. What a template writes behind its end
of turn (ChatML: a newline) is not learned, for generation has stopped by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from refpeft.choices import SUPERVISE
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.items import Chat, Item, Plain
from refpeft.tasks.texts import Texts
from refpeft.templates import Rendered, Template
from refpeft.tokenizer import Tokenizer


class CausalLM(Texts):
    """template: instead of the tokenizer's own; supervise: "response", or "all" for the loss on every token."""

    name = "causal-lm"

    def __init__(self, tokenizer: Tokenizer, template: Template | None = None, supervise: str = "response"):
        super().__init__(tokenizer)
        if supervise not in SUPERVISE:
            raise RefpeftError(f"supervise is {supervise!r}: expected one of {', '.join(SUPERVISE)}")
        if tokenizer.eos_id is None:
            raise RefpeftError(
                f"{tokenizer.name} names no eos_token, so no answer could end: set it in tokenizer_config.json"
            )
        if template is None and tokenizer.chat_template is not None:
            template = Template(tokenizer.chat_template, tokenizer.special_tokens)
        self.template, self.supervise = template, supervise

    def encode(self, item: Item, line: int) -> list[Example]:
        if isinstance(item, Plain):
            return [encode_plain(item, self.tokenizer, line, self.supervise)]
        if not isinstance(item, Chat):
            raise RefpeftError("expected a text, a prompt with its completion, or a conversation")
        if self.template is None:
            raise NoTemplate(
                f"conversations, but {self.tokenizer.name} has no chat template: give one, "
                "or use rows of prompt and completion"
            )
        texts = self.template.conversation(item.messages, tools=item.tools)
        return [encode_rendered(text, self.tokenizer, line, self.supervise) for text in texts]

    def cut(self, item: Item, example: Example, length: int) -> Example | None:
        """The first `length` tokens. No EOS takes the place of the end: the model must not learn to stop there."""
        kept = Example(example.ids[:length], example.supervised[:length], example.line)
        return kept if kept.targets else None

    def windows(self, example: Example, length: int) -> Iterator[Example]:
        """Windows of `length` tokens: the prompt, the last token of the window before, the next part of the rest."""
        ids, supervised, prompt = example.ids, example.supervised, prompt_tokens(example)
        if length - prompt < 2:
            raise RefpeftError(f"the prompt alone has {length - 1:,} tokens or more: set a larger length")
        yield Example(ids[:length], supervised[:length], example.line)
        for start in range(length - 1, len(ids) - 1, length - prompt - 1):
            part = slice(start, start + length - prompt)
            mask = supervised[part].copy()
            mask[0] = False  # learned in the window before
            window = Example(
                np.concatenate([ids[:prompt], ids[part]]), np.concatenate([supervised[:prompt], mask]), example.line
            )
            if window.targets:
                yield window

    def notes(self, items: Sequence[Item], examples: Sequence[Example]) -> list[str]:
        tokenizer, found = self.tokenizer, []
        several = len(examples) - len({example.line for example in examples})
        if several:
            rewritten = len({e.line for e, f in pairwise(examples) if e.line == f.line})
            found.append(f"{rewritten:,} conversations became one example per answer: the template rewrites history")
        last = [int(example.ids[example.supervised][-1]) for example in examples]
        others = [token for token in last if token not in tokenizer.eos_ids]
        if others:
            found.append(
                f"{len(others):,} answers end in {tokenizer.decode([others[0]], skip_specials=False)!r}, "
                f"at which generation does not stop (the model's files name {', '.join(map(repr, tokenizer.ends))})"
            )
        spaces = sum(isinstance(item, Plain) and item.prompt.endswith(" ") for item in items)
        if spaces:
            found.append(
                f"{spaces:,} prompts end in a space, which most tokenizers put at the start of the next word: "
                "move it to the completion"
            )
        return found

    def prompt(self, example: Example) -> np.ndarray:
        """The tokens before the first learned one; at least one, for a text is learned from its start."""
        return example.ids[: max(1, prompt_tokens(example))]

    def asked(self, example: Example) -> np.ndarray:
        """The tokens before the last answer: those before it are read."""
        starts = np.flatnonzero(~example.supervised[:-1] & example.supervised[1:]) + 1
        return example.ids[: starts[-1]] if len(starts) else self.prompt(example)

    def wanted(self, example: Example) -> str:
        return self.tokenizer.decode(example.ids[len(self.prompt(example)) :])


class NoTemplate(RefpeftError):
    """Raised at the first conversation, for all rows have the same fault."""


def encode_plain(item: Plain, tokenizer: Tokenizer, line: int, supervise: str = "response") -> Example:
    """BOS (where the model has it), prompt, completion, EOS; the last two are learned."""
    prompt = tokenizer.encode(item.prompt, specials=True)
    answer = tokenizer.encode(item.completion, after=item.prompt)
    if prompt == answer[:1] == [tokenizer.bos_id]:  # a text that brings its own BOS
        answer = answer[1:]
    if (item.completion or item.prompt) and (not answer or answer[-1] not in tokenizer.eos_ids):
        answer = [*answer, tokenizer.eos_id]
    learned = [supervise == "all"] * len(prompt) + [True] * len(answer)
    return Example(np.array(prompt + answer, np.int32), np.array(learned, bool), line)


def encode_rendered(rendered: Rendered, tokenizer: Tokenizer, line: int, supervise: str = "response") -> Example:
    """A rendered conversation, each span encoded alone; the assistant's are learned, with their end of turn."""
    text, pieces, at = rendered.text, [], 0
    for start, stop in rendered.spans:
        end = _end_of_answer(text, start, stop, tokenizer)
        pieces += [(at, start, False), (start, end, True)]
        at = end
    unended = bool(pieces) and not text[at:].strip() and not text[:at].endswith(tokenizer.added)
    if not unended:
        pieces.append((at, len(text), False))
    ids: list[int] = []
    learned: list[bool] = []
    for start, end, mine in pieces:
        tokens = tokenizer.encode(text[start:end], after=text[:start])
        ids += tokens
        learned += [mine or supervise == "all"] * len(tokens)
    if unended:
        ids, learned = [*ids, tokenizer.eos_id], [*learned, True]
    return Example(np.array(ids, np.int32), np.array(learned, bool), line)


def _end_of_answer(text: str, start: int, stop: int, tokenizer: Tokenizer) -> int:
    """Where the learned part of a span ends: behind the token at which generation stops, or the end of the turn."""
    stops = [at + len(end) for end in tokenizer.ends if (at := text.find(end, start, stop)) >= 0]
    if stops:
        return min(stops)
    said = text[start:stop].rstrip()
    if said.endswith(tokenizer.added):
        return start + len(said)
    # {% generation %} may leave out the end token that follows: it must be learned all the same.
    following = next((end for end in tokenizer.ends if text.startswith(end, stop)), "")
    return stop + len(following)


def prompt_tokens(example: Example) -> int:
    """Tokens before the first that is learned; none in a text without BOS."""
    return int(example.supervised.argmax())
