"""Rows of a data file as examples of a task, and a summary of what will be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.choices import OVERLONG
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.formats import FORMATS, Items, read_items
from refpeft.items import Chat, Labelled, Plain, Tagged, label_lines
from refpeft.rows import SHOWN_PROBLEMS, Problems
from refpeft.tasks.base import Task
from refpeft.tasks.causal_lm import CausalLM, NoTemplate
from refpeft.templates import Template
from refpeft.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

SHOWN_LINES = 10


@dataclass
class Summary:
    """What a file holds and what became of it. Tokens are counted in the examples that will be trained on."""

    file: str
    format: str
    task: str
    rows: int
    ignored_columns: list[str]
    empty_answers: int  # rows whose answer is empty: they teach the model to say nothing
    duplicates: int  # rows whose tokens are those of an earlier row
    ends_in_eos: int  # texts whose last learned token ends generation
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
        learned = f", {self.supervised_tokens:,} of them learned ({self.supervised_share:.1%})"
        if self.task != "causal-lm":
            learned = f" with {_count(self.supervised_tokens, 'target')}"
        out = [
            f"{self.file}: {self.rows:,} rows, format {self.format}",
            f"{self.tokens:,} tokens in {self.examples:,} examples{learned}",
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
    examples: list[Any]  # of one kind of refpeft.examples
    summary: Summary
    sets: tuple[Data, ...] = ()  # those that it was put together of, where there are several

    @staticmethod
    def joined(sets: Sequence[Data]) -> Data:
        """The rows of several files as one, or the one that there is."""
        if len(sets) == 1:
            return sets[0]
        found, formats = [one.summary for one in sets], {one.summary.format for one in sets}
        added = ("rows", "empty_answers", "duplicates", "ends_in_eos", "examples", "tokens", "supervised_tokens")
        added += ("overlong", "dropped", "truncated", "split", "cut_tokens")
        summary = replace(
            found[0],
            file=", ".join(one.file for one in found),
            format=formats.pop() if len(formats) == 1 else "auto",
            ignored_columns=list(dict.fromkeys(name for one in found for name in one.ignored_columns)),
            longest=max(one.longest for one in found),
            notes=[f"{Path(one.file).name}: {note}" for one in found for note in one.notes],
            **{name: sum(getattr(one, name) for one in found) for name in added},
        )
        return Data([example for one in sets for example in one.examples], summary, tuple(sets))


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
    """The examples of a file for causal language modelling, and their summary: see `examples_of`.

    format      one of refpeft.formats.FORMATS; None tells it from the columns
    fields      what the file calls the format's columns: {"prompt": "question"}
    template    instead of the tokenizer's own chat template
    supervise   "response", or "all" for the loss on every token
    """
    task = CausalLM(tokenizer, template, supervise)
    read = read_items(path, format, fields, has_template=task.template is not None)
    return examples_of(read, task, str(path), length, overlong)


def examples_of(
    read: Items, task: Task, file: str, length: int | None = None, overlong: str = "error", answers: bool = True
) -> Data:
    """The examples of a file's items for a task, and their summary.

    length      the most tokens that an example may have
    overlong    what becomes of longer rows:
                error     refuse the file and say how many there are
                drop      leave the row out
                truncate  keep the first `length` tokens. A row that loses all that is learned is dropped
                split     windows of `length` tokens, each with the prompt (not learned) in front. Every token of the
                          answer is learned once, in sight of at least the token before it
    answers     False: what is to be learned may be missing, for it is to be predicted

    Raises RefpeftError with every mistake in the file; for rows in which nothing is learned, with their line numbers.
    """
    if overlong not in OVERLONG:
        raise RefpeftError(f"overlong is {overlong!r}: expected one of {', '.join(OVERLONG)}")
    if length is not None and length < 2:
        raise RefpeftError(f"length is {length}: expected at least 2 tokens, one to read and one to learn")
    if task.name not in FORMATS[read.format].tasks:
        what = "; ".join([f"the format {read.format!r}", *label_lines(read.items)])
        raise RefpeftError(
            f"{file} ({what}) is not for the task {task.name!r}, but for {', '.join(FORMATS[read.format].tasks)}: "
            "choose another task or format"
        )
    pairs = _encode(read, task, file, answers)
    items, examples = read.items, [example for _, example in pairs]
    summary = Summary(
        file=file,
        format=read.format,
        task=task.name,
        rows=len(read.rows),
        ignored_columns=read.unused,
        empty_answers=sum(not all(a.strip() for a in item.answers) for item in items if isinstance(item, Chat | Plain)),
        duplicates=len(examples) - len({_content(example) for example in examples}),
        ends_in_eos=sum(int(e.ids[e.supervised][-1]) in task.tokenizer.eos_ids for e in examples if type(e) is Example),
        notes=[*read.notes, *label_lines(items), *task.notes(items, examples)],
    )
    return Data(*_counted(_fit(pairs, task, length, overlong, summary), summary))


def _content(example: Any) -> bytes:
    """What an example reads."""
    return b"|".join(value.tobytes() for name, value in vars(example).items() if name in ("ids", "answer", "a", "b"))


def _counted(examples: list[Any], summary: Summary) -> tuple[list[Any], Summary]:
    summary.examples = len(examples)
    summary.tokens = sum(map(len, examples))
    summary.supervised_tokens = sum(example.targets for example in examples)
    return examples, summary


def _encode(read: Items, task: Task, file: str, answers: bool) -> list[tuple[Any, Any]]:
    """(item, example) of all examples. Raises RefpeftError for rows in which nothing is learned."""
    pairs: list[tuple[Any, Any]] = []
    problems = Problems(file)
    for row, item in zip(read.rows, read.items, strict=True):
        try:
            if answers and unanswered(item):
                raise RefpeftError("there is no label: it can be predicted, not learned")
            pairs += [(item, example) for example in task.encode(item, row.line)]
        except NoTemplate as error:
            raise RefpeftError(f"{file} holds {error}") from None
        except RefpeftError as error:
            problems.add(row.line, str(error))
            if len(problems.found) == SHOWN_PROBLEMS:
                break  # each failure of a bad template may take seconds
    problems.stop()
    nothing = sorted({example.line for _, example in pairs if not example.targets})
    if nothing and answers:
        raise RefpeftError(
            f"{file}: {_count(len(nothing), 'row')} with nothing to learn, at {_lines(nothing)}: "
            "a row needs text, or an answer of the assistant"
        )
    return pairs


def unanswered(item: Any) -> bool:
    """Whether an item lacks what would be learned of it; a pair of texts may do without."""
    if isinstance(item, Tagged):
        return item.tags is None
    return isinstance(item, Labelled) and item.label is None and item.text_b is None


# -- rows that are too long --------------------------------------------------------------------------------------------


def _fit(pairs: list[tuple[Any, Any]], task: Task, length: int | None, policy: str, summary: Summary) -> list[Any]:
    """The examples that fit into `length` tokens; what was done is written into the summary."""
    examples = [example for _, example in pairs]
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
    fitting: list[Any] = []
    stuck: dict[str, list[int]] = {}
    for item, example in pairs:
        if len(example) <= length:
            fitting.append(example)
        elif policy == "split":
            try:
                fitting += task.windows(example, length)
                summary.split += 1
            except RefpeftError as error:
                stuck.setdefault(str(error), []).append(example.line)
        else:
            kept = task.cut(item, example, length) if policy == "truncate" else None
            if kept is not None:
                fitting.append(kept)
                summary.truncated += 1
                summary.cut_tokens += len(example) - length
            else:
                summary.dropped += 1
                summary.cut_tokens += len(example)
    for why, lines in stuck.items():
        raise RefpeftError(f"{summary.file}: {_count(len(lines), 'row')} cannot be split, at {_lines(lines)}: {why}")
    if not fitting:
        raise RefpeftError(
            f"{summary.file}: no row is left, for all are longer than {length:,} tokens: set a larger length"
        )
    return fitting


# -- telling people ----------------------------------------------------------------------------------------------------


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
