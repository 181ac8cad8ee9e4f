"""Rows of a data file as token ids with a mask of what is learned, and a summary of what will be trained on.

How a row becomes tokens. The prompt is encoded alone, as it is when the model is asked; the answer is encoded alone and
put behind it. One encoding of both would merge tokens across the boundary ("Q: " + "yes" has a token " yes"): the mask
could not be exact, and training would show prompts that generation never does. BOS stands first where the model's own
tokenizer puts it. An end token is always learned: EOS behind a completion or a text, the template's own end of turn
(<|im_end|>, <|eot_id|>) in a conversation, or EOS where the template has none. What a template writes behind its end
of turn (ChatML: a newline) is not learned, for generation has stopped by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.choices import OVERLONG, SUPERVISE
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.formats import FORMATS, Items, read_items
from refpeft.items import Chat, Plain, label_lines
from refpeft.rows import SHOWN_PROBLEMS, Problems
from refpeft.templates import Rendered, Template
from refpeft.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

SHOWN_LINES = 10


@dataclass
class Summary:
    """What a file holds and what became of it. Tokens are counted in the examples that will be trained on."""

    file: str
    format: str
    rows: int
    ignored_columns: list[str]
    empty_answers: int  # rows whose answer is empty: they teach the model to say nothing
    duplicates: int  # rows whose tokens are those of an earlier row
    ends_in_eos: int  # rows whose last learned token ends generation
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0  # tokens of the longest row, before anything is cut
    length: int | None = None
    overlong: int = 0  # rows longer than `length`
    overlong_policy: str = "error"
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    cut_tokens: int = 0  # lost by dropping and truncating
    notes: list[str] = field(default_factory=list)

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / max(self.tokens, 1)

    @property
    def mean(self) -> float:
        """Tokens of an example."""
        return self.tokens / max(self.examples, 1)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"supervised_share": self.supervised_share, "mean": self.mean}

    def lines(self) -> list[str]:
        """For people: one fact a line, and a fact that asks for attention only where there is one."""
        share = f"{self.supervised_tokens:,} of them learned ({self.supervised_share:.1%})"
        out = [
            f"{self.file}: {self.rows:,} rows, format {self.format}",
            f"{self.tokens:,} tokens in {self.examples:,} examples, {share}",
            f"an example has {self.mean:.0f} tokens on average, the longest row {self.longest:,}",
        ]
        if self.overlong:
            fates = {
                "dropped": self.dropped,
                "truncated": self.truncated,
                "split": self.split,
                "tokens lost": self.cut_tokens,
            }
            fate = ", ".join(f"{count:,} {name}" for name, count in fates.items() if count)
            out.append(f"{self.overlong:,} rows are longer than {self.length:,} tokens: {fate}")
        if self.ignored_columns:
            out.append(f"columns that are not used: {', '.join(self.ignored_columns)}")
        if self.empty_answers:
            out.append(f"{self.empty_answers:,} rows have an empty answer")
        if self.duplicates:
            out.append(f"{self.duplicates:,} rows repeat an earlier one")
        return out + self.notes


@dataclass(frozen=True)
class Data:
    examples: list[Example]
    summary: Summary


def load_data(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    format: str | None = None,
    fields: Mapping[str, str] | None = None,
    template: Template | None = None,
    length: int | None = None,
    overlong: str = "error",
    supervise: str = "response",
) -> Data:
    """The examples of a file and their summary.

    format      one of refpeft.formats.FORMATS; None tells it from the columns
    fields      what the file calls the format's columns: {"prompt": "question"}
    template    instead of the tokenizer's own chat template
    length      the most tokens that an example may have
    overlong    what becomes of longer rows:
                error     refuse the file and say how many there are
                drop      leave the row out
                truncate  keep the first `length` tokens. The end is lost and no EOS is put in its place, for the model
                          must not learn to stop there. A row that loses all of its answer is dropped
                split     windows of `length` tokens, each with the prompt (not learned) in front. Every token of the
                          answer is learned once, in sight of at least the token before it
    supervise   "response", or "all" for the loss on every token

    Raises RefpeftError with every mistake in the file; for rows in which nothing is learned, with their line numbers.
    """
    if overlong not in OVERLONG:
        raise RefpeftError(f"overlong is {overlong!r}: expected one of {', '.join(OVERLONG)}")
    if supervise not in SUPERVISE:
        raise RefpeftError(f"supervise is {supervise!r}: expected one of {', '.join(SUPERVISE)}")
    if length is not None and length < 2:
        raise RefpeftError(f"length is {length}: expected at least 2 tokens, one to read and one to learn")
    if tokenizer.eos_id is None:
        raise RefpeftError(
            f"{tokenizer.name} names no eos_token, so no answer could end: set it in tokenizer_config.json"
        )
    if template is None and tokenizer.chat_template is not None:
        template = Template(tokenizer.chat_template, tokenizer.special_tokens)
    read = read_items(path, format, fields, has_template=template is not None)
    examples, rewritten = _encode(read, tokenizer, template, supervise, str(path))
    summary = _summarise(str(path), read, examples, tokenizer)
    if rewritten:
        summary.notes.append(
            f"{rewritten:,} conversations became one example per answer: the template rewrites history"
        )
    examples = _fit(examples, length, overlong, summary)
    summary.examples = len(examples)
    summary.tokens = sum(map(len, examples))
    summary.supervised_tokens = sum(example.targets for example in examples)
    return Data(examples, summary)


# -- encoding ----------------------------------------------------------------------------------------------------------


def _encode(
    read: Items, tokenizer: Tokenizer, template: Template | None, supervise: str, file: str
) -> tuple[list[Example], int]:
    """Examples, and how many conversations became several. Raises RefpeftError for rows in which nothing is learned."""
    if "causal-lm" not in FORMATS[read.format].tasks:
        what = "; ".join([f"the format {read.format!r}", *label_lines(read.items)])
        raise RefpeftError(f"{file} ({what}) holds no texts to go on with: choose another format")
    examples: list[Example] = []
    rewritten, problems = 0, Problems(file)
    for row, item in zip(read.rows, read.items, strict=True):
        if isinstance(item, Chat) and template is None:
            raise RefpeftError(
                f"{file} holds conversations, but {tokenizer.name} has no chat template: give one, "
                "or use rows of prompt and completion"
            )
        try:
            if isinstance(item, Plain):
                found = [encode_plain(item, tokenizer, row.line, supervise)]
            else:
                texts = template.conversation(item.messages, tools=item.tools)
                found = [encode_rendered(text, tokenizer, row.line, supervise) for text in texts]
        except RefpeftError as error:
            problems.add(row.line, str(error))
            if len(problems.found) == SHOWN_PROBLEMS:
                break  # each failure of a bad template may take seconds
            continue
        examples += found
        rewritten += len(found) > 1
    problems.stop()
    nothing = sorted({example.line for example in examples if not example.targets})
    if nothing:
        raise RefpeftError(
            f"{file}: {_count(len(nothing), 'row')} with nothing to learn, at {_lines(nothing)}: "
            "a row needs text, or an answer of the assistant"
        )
    return examples, rewritten


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


# -- rows that are too long --------------------------------------------------------------------------------------------


def _fit(examples: list[Example], length: int | None, policy: str, summary: Summary) -> list[Example]:
    """The examples that fit into `length` tokens; what was done is written into the summary."""
    summary.length, summary.overlong_policy = length, policy
    summary.longest = max(map(len, examples))
    long = [example for example in examples if length is not None and len(example) > length]
    if length is None or not long:
        return examples
    summary.overlong = len(long)
    if policy == "error":
        longest = max(long, key=len)
        raise RefpeftError(
            f"{summary.file}: {len(long):,} of {len(examples):,} rows are longer than {length:,} tokens (the longest, "
            f"line {longest.line}, has {len(longest):,}; the first are at {_lines([e.line for e in long])}): "
            "set a larger length, or choose what to do with them: overlong drop, truncate or split"
        )
    if policy == "split" and (stuck := [e.line for e in long if length - _prompt_tokens(e) < 2]):
        raise RefpeftError(
            f"{summary.file}: {_count(len(stuck), 'row')} cannot be split, at {_lines(stuck)}: the prompt alone has "
            f"{length - 1:,} tokens or more: set a larger length"
        )
    fitting: list[Example] = []
    for example in examples:
        if len(example) <= length:
            fitting.append(example)
        elif policy == "split":
            fitting += _windows(example, length)
            summary.split += 1
        else:
            kept = Example(example.ids[:length], example.supervised[:length], example.line)
            if policy == "truncate" and kept.targets:
                fitting.append(kept)
                summary.truncated += 1
                summary.cut_tokens += len(example) - length
            else:
                summary.dropped += 1
                summary.cut_tokens += len(example)
    if not fitting:
        raise RefpeftError(
            f"{summary.file}: no row is left, for all are longer than {length:,} tokens: set a larger length"
        )
    return fitting


def _prompt_tokens(example: Example) -> int:
    """Tokens before the first that is learned; none in a text without BOS."""
    return int(example.supervised.argmax())


def _windows(example: Example, length: int) -> Iterator[Example]:
    """Windows of `length` tokens: the prompt, the last token of the window before, the next part of the rest."""
    ids, supervised, prompt = example.ids, example.supervised, _prompt_tokens(example)
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


# -- telling people ----------------------------------------------------------------------------------------------------


def _summarise(file: str, read: Items, examples: list[Example], tokenizer: Tokenizer) -> Summary:
    last = [int(example.ids[example.supervised][-1]) for example in examples]
    ends = sum(token in tokenizer.eos_ids for token in last)
    summary = Summary(
        file=file,
        format=read.format,
        rows=len(read.rows),
        ignored_columns=read.unused,
        empty_answers=sum(not all(answer.strip() for answer in item.answers) for item in read.items),
        duplicates=len(examples) - len({example.ids.tobytes() for example in examples}),
        ends_in_eos=ends,
        notes=list(read.notes),
    )
    if ends < len(examples):
        other = next(token for token in last if token not in tokenizer.eos_ids)
        summary.notes.append(
            f"{len(examples) - ends:,} answers end in {tokenizer.decode([other], skip_specials=False)!r}, "
            f"at which generation does not stop (the model's files name {', '.join(map(repr, tokenizer.ends))})"
        )
    spaces = sum(isinstance(item, Plain) and item.prompt.endswith(" ") for item in read.items)
    if spaces:
        summary.notes.append(
            f"{spaces:,} prompts end in a space, which most tokenizers put at the start of the next word: "
            "move it to the completion"
        )
    return summary


def runs(example: Example, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """An example as runs of tokens that are learned or not: [{"text", "tokens", "learned"}, ...]."""
    edges = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1).tolist(), len(example)]
    # The text of a run depends on where it stands (leading spaces, bytes): it is what the run adds to the text before.
    texts = [tokenizer.decode(example.ids[:edge], skip_specials=False) for edge in edges]
    return [
        {"text": texts[i + 1][len(texts[i]) :], "tokens": b - a, "learned": bool(example.supervised[a])}
        for i, (a, b) in enumerate(pairwise(edges))
    ]


def view(example: Example, tokenizer: Tokenizer) -> Text:
    """An example for the terminal: what is learned is green, what is only read is dim."""
    from rich.text import Text

    text = Text()
    for run in runs(example, tokenizer):
        text.append(run["text"], style="green" if run["learned"] else "dim")
    return text


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _lines(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:SHOWN_LINES]))
    more = f" and {len(lines) - SHOWN_LINES:,} more" if len(lines) > SHOWN_LINES else ""
    return f"line{'s' if len(lines) > 1 else ''} {shown}{more}"
