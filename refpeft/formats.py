"""Data files and the formats of their rows.

Files: JSON lines, a JSON list, CSV and TSV. Every row keeps its line number. Formats, told from the columns:

messages       OpenAI's: [{"role": "system" | "user" | "assistant" | "tool", "content": ...}, ...]; perhaps `tools`
conversations  ShareGPT's: [{"from": "human" | "gpt" | "system" | "tool", "value": ...}, ...]; perhaps `system`
instruction    Alpaca's: instruction, input (may be missing or empty), output
prompt         prompt, completion: joined as they stand, no template
text           text: all of it is learned

A mistake in the data never stops at the first: `Problems` collects them and reports ten at once.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refpeft.errors import RefpeftError

SHOWN_PROBLEMS = 10

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
class Row:
    line: int  # where it begins in the file, from 1
    fields: dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, to be rendered by the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[str]:
        """What is to be learned: an assistant's message may be a call of a tool without content."""
        said = [m for m in self.messages if m["role"] == "assistant"]
        return [m.get("content") or ("tool" if m.get("tool_calls") else "") for m in said]


@dataclass(frozen=True)
class Plain:
    """A prompt, and the completion that is to be learned."""

    prompt: str
    completion: str

    @property
    def answers(self) -> list[str]:
        return [self.completion]


@dataclass
class Problems:
    """Mistakes found in a file. `stop()` raises all of them as one RefpeftError."""

    file: str
    found: list[str] = field(default_factory=list)

    def add(self, line: int | None, text: str) -> None:
        self.found.append(f"{self.file}{'' if line is None else f':{line}'}: {text}")

    def stop(self) -> None:
        if self.found:
            more = len(self.found) - SHOWN_PROBLEMS
            shown = self.found[:SHOWN_PROBLEMS] + ([f"and {more:,} more"] if more > 0 else [])
            raise RefpeftError("\n".join(shown))


# -- files -------------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a .jsonl (or .ndjson), .json, .csv or .tsv file. Raises RefpeftError with every mistake's line."""
    path = Path(path)
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv}
    reader = readers.get(path.suffix.lower())
    if reader is None and path.exists() and not path.is_dir():
        raise RefpeftError(f"{path}: expected a file whose name ends in {', '.join(readers)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RefpeftError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RefpeftError(f"{path}:{line}: this is not UTF-8 text ({error.reason}): convert the file") from None
    problems = Problems(str(path))
    rows = list(reader(text, problems))
    problems.stop()
    if not rows:
        raise RefpeftError(f"{path} has no rows")
    return rows


def _json_lines(text: str, problems: Problems) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a string may hold U+2028
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                column = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
                problems.add(number, f"this line is not JSON: {column}")
                continue
            yield from _object(value, number, problems)


def _json(text: str, problems: Problems) -> Iterator[Row]:
    """A list of objects. (Some .json files hold JSON lines: they begin with an object.)"""
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        yield from _json_lines(text, problems)
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        column = f"column {error.colno}: {error.msg}" if line else error
        problems.add(line, f"this file is not JSON: {column}")
        return
    # It is a list, so its items can be found one by one; that tells the line of each.
    decoder, at, line, counted = json.JSONDecoder(), start + 1, 1, 0
    for value in values:
        while text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        yield from _object(value, line, problems)
        at = decoder.raw_decode(text, at)[1]


def _object(value: Any, line: int, problems: Problems) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(line, value)
    else:
        problems.add(line, f"a row is a {type(value).__name__}: expected an object with named fields")


def _csv(text: str, problems: Problems) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        """Records with the line that each begins at: one may span several."""
        while True:
            line = reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problems.add(line, f"this is not CSV: {error}")
                return

    yield from _table(records(), problems)


def _tsv(text: str, problems: Problems) -> Iterator[Row]:
    """Tab-separated values have no quoting: a quotation mark is a character like any other."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    yield from _table(
        ((number, line.split("\t") if line else []) for number, line in enumerate(lines, start=1)), problems
    )


def _table(records: Iterable[tuple[int, list[str]]], problems: Problems) -> Iterator[Row]:
    """Rows below a header; empty lines are skipped."""
    header: list[str] = []
    for line, record in records:
        if not record:
            continue
        if not header:
            header = [name.strip() for name in record]
            if len(set(header)) < len(header):
                problems.add(line, f"the header names a column twice: {', '.join(header)}")
                return
        elif len(record) != len(header):
            problems.add(line, f"{len(record)} fields: expected {len(header)} ({', '.join(header)})")
        else:
            yield Row(line, dict(zip(header, record, strict=True)))


# -- formats -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row, Problems, bool], Chat | Plain | None]  # row, problems, whether there is a chat template


def detect_format(rows: list[Row], file: str = "the data") -> str:
    """The format of all rows, told from their columns. Raises RefpeftError where rows differ or fit no format."""
    kinds = [next((name for name, f in FORMATS.items() if set(f.required) <= row.fields.keys()), None) for row in rows]
    problems = Problems(file)
    if set(kinds) == {None}:
        columns = ", ".join(rows[0].fields) or "none"
        wanted = " | ".join(", ".join(f.required) for f in FORMATS.values())
        problems.add(rows[0].line, f"its columns ({columns}) fit no format: expected {wanted}")
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


def read_format(
    rows: list[Row], format: str, *, has_template: bool, file: str = "the data"
) -> list[tuple[Row, Chat | Plain]]:
    """Each row as a Chat or a Plain. Raises RefpeftError with every mistake's line."""
    if format not in FORMATS:
        raise RefpeftError(f"format {format!r} is unknown: expected one of {', '.join(FORMATS)}")
    problems, out = Problems(file), []
    for row in rows:
        missing = [name for name in FORMATS[format].required if name not in row.fields]
        if missing:
            problems.add(row.line, f"{', '.join(missing)} missing: the format {format!r} needs it")
            continue
        item = FORMATS[format].read(row, problems, has_template)
        if item is not None:
            out.append((row, item))
    problems.stop()
    return out


def ignored_columns(rows: list[Row], format: str) -> list[str]:
    """Columns that the format does not read, in order of appearance."""
    known = {*FORMATS[format].required, *FORMATS[format].optional}
    return [name for name in Counter(name for row in rows for name in row.fields) if name not in known]


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


def _read_text(row: Row, problems: Problems, has_template: bool) -> Plain | None:
    text = _string(row, "text", problems)
    return None if text is None else Plain("", text)


# In order: a row that fits two formats is read as the first (the published Alpaca set also has a column `text`).
FORMATS = {
    "messages": Format(("messages",), ("tools",), _read_messages),
    "conversations": Format(("conversations",), ("system",), _read_conversations),
    "instruction": Format(("instruction", "output"), ("input",), _read_instruction),
    "prompt": Format(("prompt", "completion"), (), _read_prompt),
    "text": Format(("text",), (), _read_text),
}
