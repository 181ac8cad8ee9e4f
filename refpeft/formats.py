"""The formats of rows: what their columns are called, and the item that each row is.

Formats, told from the columns (in this order: a row that fits two is read as the first):

messages       OpenAI's: [{"role": "system" | "user" | "assistant" | "tool", "content": ...}, ...]; perhaps `tools`
conversations  ShareGPT's: [{"from": "human" | "gpt" | "system" | "tool", "value": ...}, ...]; perhaps `system`
instruction    Alpaca's: instruction, input (may be missing or empty), output
prompt         prompt, completion: joined as they stand, no template
source         source, target: a line break between them
tags           words, tags: lists of the same length
pair           text_a, text_b, and perhaps a label (a name or a number) or a score (a number)
label          text, and its label or score
text           text: all of it is learned

The columns may have the names that GLUE and others give them (`told_by`), or any: then `fields` says which is which.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refpeft.errors import RefpeftError, nearest
from refpeft.items import Chat, Item, Labelled, Plain, Tagged
from refpeft.rows import NUMBER, Problems, Row, read_rows

# Stanford Alpaca's own prompts, for models without a chat template.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

# Where a source ends; a prompt stands as it is.
SOURCE = "{source}\n"

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Items:
    """The rows of a file, which are in one format, and the item of each."""

    rows: list[Row]
    items: list[Item]
    format: str
    unused: list[str]  # columns that the format does not read, in order of appearance
    notes: list[str]  # what people should be told of the file


def read_items(
    path: str | Path,
    format: str | None = None,
    fields: Mapping[str, str] | None = None,
    has_template: bool = False,
    answers: bool = True,
) -> Items:
    """The items of a data file. Raises RefpeftError with every mistake's line.

    format          one of FORMATS; None tells it from the columns
    fields          what the file calls a format's columns: {"text": "review", "label": "stars"}
    has_template    whether the model has a chat template: then an instruction is what its user says
    answers         False: rows are to be predicted, so what would be learned of them may be missing
    """
    notes: list[str] = []
    fields = fields or {}
    _check_names(format, fields)
    rows = read_rows(path, known=(*NAMES, *fields.values()), notes=notes)
    named = _with_fields(rows, fields, answers, str(path))
    named = named if answers else [_asking(row) for row in named]
    format = format or _told(named, fields, str(path))
    names = FORMATS[format].names
    named = [_renamed(row, names(tuple(row.fields))) for row in named]
    columns = dict.fromkeys(name for row in named for name in row.fields)
    unused = [name for name in columns if name not in FORMATS[format].all_columns]
    missing = [name for name in COLUMNS if name not in columns]
    notes += [f"the column {name!r} is not used{hint}" for name in unused if (hint := nearest(name, missing))]
    return Items(rows, _items(named, format, has_template, str(path)), format, unused, notes)


# -- formats and the names of their columns ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """told_by: columns of files that are told to be of this format, as names of the first of `columns + optional`."""

    columns: tuple[str, ...]  # that every row has
    optional: tuple[str, ...]
    tasks: tuple[str, ...]  # that it serves, the likeliest first
    read: Callable[[Row, Problems, bool], Item | None]  # row, problems, whether there is a chat template
    told_by: tuple[tuple[str, ...], ...]

    @property
    def all_columns(self) -> tuple[str, ...]:
        return self.columns + self.optional

    @cache  # noqa: B019 (there is one of each format, and files have rows of few kinds)
    def names(self, columns: tuple[str, ...]) -> dict[str, str]:
        """What a row of these columns calls the format's: {ours: its}; empty where it does not tell the format."""
        for its in self.told_by:
            names = dict(zip(self.all_columns, its, strict=False))
            if all(b in columns and (a == b or a not in columns) for a, b in names.items()):
                return names
        return {}


def _check_names(format: str | None, fields: Mapping[str, str]) -> None:
    """Raises RefpeftError for formats, and columns of formats, that there are not."""
    if format is not None and format not in FORMATS:
        raise RefpeftError(f"format {format!r} is unknown: expected one of {', '.join(FORMATS)}")
    columns = COLUMNS if format is None else FORMATS[format].all_columns
    for name in fields:
        if name not in columns:
            whose = "no format has" if format is None else f"the format {format!r} does not have"
            raise RefpeftError(
                f"fields: {whose} a column {name!r}: expected some of {', '.join(columns)}{nearest(name, columns)}"
            )
    for its, count in Counter(fields.values()).items():
        if count > 1:
            raise RefpeftError(f"fields: the column {its!r} is named {count} times: expected once")


def _with_fields(rows: list[Row], fields: Mapping[str, str], answers: bool, file: str) -> list[Row]:
    """The rows with the format's names for columns that the file calls otherwise."""
    columns = dict.fromkeys(name for row in rows for name in row.fields)
    problems = Problems(file)
    for ours, its in fields.items():
        if its not in columns and (answers or ours not in ANSWERS):
            have = f"the file has {', '.join(columns) or 'none'}{nearest(its, columns)}"
            problems.add(None, f"no column {its!r}, which fields.{ours} names: {have}")
    problems.stop()
    return [_renamed(row, fields) for row in rows] if fields else rows


def _asking(row: Row) -> Row:
    """The row with an empty answer to its prompt, where it has none and without it is of no format, or to its user."""
    for name, answer in _TURNS.items():
        turns = row.fields.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            answered = turns[-1].get(next(iter(answer))) in ("assistant", "gpt")
            return row if answered else Row(row.line, row.fields | {name: [*turns, answer]})
    if any(f.names(tuple(row.fields)) for f in FORMATS.values()):
        return row
    return Row(row.line, row.fields | {its: "" for asked, its in _ANSWER_TO.items() if asked in row.fields})


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    """The row with columns called by our names, {ours: its}, in its own order."""
    if all(ours == its for ours, its in names.items()):
        return row
    ours = {its: ours for ours, its in names.items() if its in row.fields}
    kept = {ours.get(name, name): value for name, value in row.fields.items() if name in ours or name not in names}
    return Row(row.line, kept)


def _told(rows: list[Row], fields: Collection[str], file: str) -> str:
    """The format of all rows, told from their columns. Raises RefpeftError where rows differ or fit no format.

    Of formats that have all of the columns `fields`: the first by whose `told_by` a row is told, or else, where some
    columns were named, the first whose columns it has.
    """
    able = {name: f for name, f in FORMATS.items() if set(fields) <= set(f.all_columns)}

    @cache
    def told(columns: tuple[str, ...]) -> str | None:
        fitting = [name for name, f in able.items() if f.names(columns)]
        if fields:
            fitting += [name for name, f in able.items() if set(f.columns) <= set(columns)]
        return next(iter(fitting), None)

    kinds = [told(tuple(row.fields)) for row in rows]
    problems = Problems(file)
    if set(kinds) == {None}:
        wanted = " | ".join(", ".join(f.told_by[0]) for f in able.values()) or "columns of one format in `fields`"
        hint = "" if fields else "; `fields` says which columns are which"
        columns = ", ".join(rows[0].fields) or "none"
        problems.add(rows[0].line, f"its columns ({columns}) fit no format: expected {wanted}{hint}")
        problems.stop()
    usual = Counter(kind for kind in kinds if kind).most_common(1)[0][0]
    for row, kind in zip(rows, kinds, strict=True):
        columns = ", ".join(row.fields) or "none"
        if kind is None:
            problems.add(row.line, f"its columns ({columns}) differ from those of format {usual!r} and fit no other")
        elif kind != usual:
            problems.add(row.line, f"its columns ({columns}) differ from most rows, which have the format {usual!r}")
    problems.stop()
    return usual


# -- rows as items -----------------------------------------------------------------------------------------------------


def _items(rows: list[Row], format: str, has_template: bool, file: str) -> list[Item]:
    """The item of each row. Raises RefpeftError with every mistake's line."""
    problems, items = Problems(file), []
    for row in rows:
        missing = [name for name in FORMATS[format].columns if name not in row.fields]
        if missing:
            problems.add(row.line, f"{', '.join(missing)} missing: the format {format!r} needs it")
        else:
            items.append(FORMATS[format].read(row, problems, has_template))
    problems.stop()
    items = _with_numbers(items)
    kinds = [_kind_of_answer(item) for item in items]
    usual = Counter(kinds).most_common(1)[0][0]
    for row, kind in zip(rows, kinds, strict=True):
        if kind != usual:
            what = "tags" if format == "tags" else "label"
            problems.add(row.line, f"its {what} is {kind}, but most rows have {usual}")
    problems.stop()
    return items


def _with_numbers(items: list[Item]) -> list[Item]:
    """Labels as numbers where all of them are, and as values where one of these is not whole."""
    labels = [item.label for item in items if isinstance(item, Labelled)]
    if not labels:
        return items
    if all(isinstance(label, str) and NUMBER.fullmatch(label) for label in labels):
        whole = all(re.fullmatch(r"[+-]?\d+", label) for label in labels)
        labels = [int(label) if whole else float(label) for label in labels]
    if any(isinstance(label, float) for label in labels):
        labels = [float(label) if isinstance(label, int) else label for label in labels]
    return [Labelled(item.text, item.text_b, label) for item, label in zip(items, labels, strict=True)]


def _kind_of_answer(item: Item) -> str | None:
    """What there is to be learned of a labelled text or tagged words, in words; None of others."""
    if not isinstance(item, Labelled | Tagged):
        return None
    answer = item.label if isinstance(item, Labelled) else item.tags and item.tags[0]
    return "missing" if answer is None else "a name" if isinstance(answer, str) else "a number"


def _string(row: Row, name: str, problems: Problems, default: str | None = None) -> str | None:
    value = row.fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        problems.add(row.line, f"{name} is {_kind(value)}: expected text")
        return None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _read_messages(row: Row, problems: Problems, has_template: bool) -> Chat | None:
    before = len(problems.found)
    messages = row.fields["messages"]
    if not isinstance(messages, list) or not messages:
        problems.add(
            row.line, "messages is empty" if messages == [] else f"messages is {_kind(messages)}: expected a list"
        )
        return None
    for i, message in enumerate(messages):
        for problem in _message_problems(message):
            problems.add(row.line, f"messages[{i}]{problem}")
    tools = row.fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        problems.add(row.line, f"tools is {_kind(tools)}: expected a list")
    return Chat(messages, tools) if len(problems.found) == before else None


def _message_problems(message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f" is {_kind(message)}: expected an object with role and content"
        return
    if message.get("role") not in ROLES:
        yield f".role is {message.get('role')!r}: expected one of {', '.join(ROLES)}"
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        yield f".content is {_kind(content)}: expected text"
    if message.get("weight", 1) != 1:
        yield f".weight is {message['weight']!r}: weights of messages are not supported, all answers are learned"


def _read_conversations(row: Row, problems: Problems, has_template: bool) -> Chat | None:
    before = len(problems.found)
    turns, messages = row.fields["conversations"], []
    if not isinstance(turns, list) or not turns:
        problems.add(row.line, f"conversations is {'empty' if turns == [] else _kind(turns)}: expected a list of turns")
        return None
    if row.fields.get("system"):
        messages.append({"role": "system", "content": _string(row, "system", problems)})
    for i, turn in enumerate(turns):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(turn, dict):
            problems.add(row.line, f"conversations[{i}] is {_kind(turn)}: expected an object with from and value")
            continue
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            expected = ", ".join(SHAREGPT_ROLES)
            problems.add(row.line, f"conversations[{i}].from is {speaker!r}: expected one of {expected}")
        if not isinstance(value, str):
            problems.add(row.line, f"conversations[{i}].value is {_kind(value)}: expected text")
        if len(problems.found) == before:
            messages.append({"role": SHAREGPT_ROLES[speaker], "content": value})
    return Chat(messages) if len(problems.found) == before else None


def _read_instruction(row: Row, problems: Problems, has_template: bool) -> Chat | Plain | None:
    """With a chat template the instruction and its input are what the user says; without, Alpaca's own prompt."""
    instruction, output = _string(row, "instruction", problems), _string(row, "output", problems)
    extra = _string(row, "input", problems, default="")
    if instruction is None or output is None or extra is None:
        return None
    if has_template:
        said = f"{instruction}\n\n{extra}" if extra else instruction
        return Chat([{"role": "user", "content": said}, {"role": "assistant", "content": output}])
    return Plain((ALPACA_WITH_INPUT if extra else ALPACA).format(instruction=instruction, input=extra), output)


def _read_prompt(row: Row, problems: Problems, has_template: bool) -> Plain | None:
    prompt, completion = _string(row, "prompt", problems), _string(row, "completion", problems)
    return None if prompt is None or completion is None else Plain(prompt, completion)


def _read_source(row: Row, problems: Problems, has_template: bool) -> Plain | None:
    source, target = _string(row, "source", problems), _string(row, "target", problems)
    return None if source is None or target is None else Plain(SOURCE.format(source=source), target)


def _read_text(row: Row, problems: Problems, has_template: bool) -> Plain | None:
    text = _string(row, "text", problems)
    return None if text is None else Plain("", text)


def _read_labelled(row: Row, problems: Problems, has_template: bool) -> Labelled | None:
    before = len(problems.found)
    paired = "text_a" in row.fields
    text = _string(row, "text_a" if paired else "text", problems)
    text_b = _string(row, "text_b", problems) if paired else None
    label = _score(row, problems) if "label" not in row.fields else _label(row, problems)
    return Labelled(text, text_b, label) if len(problems.found) == before else None


def _label(row: Row, problems: Problems) -> str | int | float | None:
    label = row.fields["label"]
    if isinstance(label, str):
        return label.strip() or None
    if isinstance(label, bool):
        return int(label)
    if label is not None and not (isinstance(label, int | float) and math.isfinite(label)):
        what = _kind(label) if not isinstance(label, float) else str(label)
        problems.add(row.line, f"label is {what}: expected a name or a number")
        return None
    return label


def _score(row: Row, problems: Problems) -> float | None:
    """A score is a number, also where all of them happen to be whole."""
    score = row.fields.get("score")
    if score is None or score == "":
        return None
    number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    if number or (isinstance(score, str) and NUMBER.fullmatch(score.strip())):
        return float(score)
    problems.add(row.line, f"score is {score!r}: expected a number")
    return None


def _read_tags(row: Row, problems: Problems, has_template: bool) -> Tagged | None:
    words, tags = row.fields["words"], row.fields.get("tags")
    if not isinstance(words, list) or not words:
        problems.add(row.line, f"words is {'empty' if words == [] else _kind(words)}: expected a list of words")
        return None
    wrong = next((i for i, word in enumerate(words) if not isinstance(word, str) or not word.strip()), None)
    if wrong is not None:
        found = "empty" if isinstance(words[wrong], str) else _kind(words[wrong])
        problems.add(row.line, f"words[{wrong}] is {found}: expected a word")
    elif tags is not None and not isinstance(tags, list):
        problems.add(row.line, f"tags is {_kind(tags)}: expected a list with a tag for each word")
    elif tags is not None and len(tags) != len(words):
        problems.add(row.line, f"{len(tags):,} tags for {len(words):,} words: expected a tag for each word")
    elif tags is not None and {type(tag) for tag in tags} not in ({str}, {int}):
        problems.add(row.line, "tags are not all names or all whole numbers")
    else:
        return Tagged(words, tags)
    return None


_PAIRS = (
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2", "gold_label"),  # MNLI and SNLI
    ("sentence1", "sentence2"),  # RTE and WNLI; STS-B, with a score
    ("question1", "question2", "is_duplicate"),  # QQP
    ("question1", "question2"),
    ("question", "sentence"),  # QNLI
    ("#1 String", "#2 String", "Quality"),  # MRPC
    ("#1 String", "#2 String"),
)
_TEXTS = (("text", "label"), ("sentence",))  # CoLA and SST-2, of which the tests have no label
_TAGS = (("words", "tags"), ("tokens", "tags"), ("words", "ner_tags"), ("tokens", "ner_tags"))
_SOURCES = (("source", "target"), ("document", "summary"), ("article", "highlights"))
_GENERATION = ("causal-lm", "seq2seq")
_CLASSES = ("classify", "regress", "embed")

# In order: a row that fits two formats is read as the first (the published Alpaca set also has a column `text`).
FORMATS = {
    "messages": Format(("messages",), ("tools",), ("causal-lm",), _read_messages, (("messages",),)),
    "conversations": Format(
        ("conversations",), ("system",), ("causal-lm",), _read_conversations, (("conversations",),)
    ),
    "instruction": Format(
        ("instruction", "output"), ("input",), _GENERATION, _read_instruction, (("instruction", "output"),)
    ),
    "prompt": Format(("prompt", "completion"), (), _GENERATION, _read_prompt, (("prompt", "completion"),)),
    "source": Format(("source", "target"), (), _GENERATION, _read_source, _SOURCES),
    "tags": Format(("words",), ("tags",), ("tag",), _read_tags, _TAGS),
    "pair": Format(("text_a", "text_b"), ("label", "score"), _CLASSES, _read_labelled, _PAIRS),
    "label": Format(("text",), ("label", "score"), _CLASSES, _read_labelled, _TEXTS),
    "text": Format(("text",), (), ("causal-lm", "mlm", "embed"), _read_text, (("text",),)),
}
COLUMNS = tuple(dict.fromkeys(name for f in FORMATS.values() for name in f.all_columns))
NAMES = {name for f in FORMATS.values() for names in f.told_by for name in names}
"""What columns are called in files whose format is told."""
ANSWERS = ("label", "score", "tags", "output", "completion", "target")
"""What may be missing in rows that are to be predicted."""
_TURNS = {"messages": {"role": "assistant", "content": ""}, "conversations": {"from": "gpt", "value": ""}}
_ANSWER_TO = {"instruction": "output", "prompt": "completion"} | dict(_SOURCES)
