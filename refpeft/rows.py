"""Data files as rows with named fields: JSON lines, a JSON list, CSV, TSV, and two kinds of text files.

Every row keeps its line number. A file of words and tags (CoNLL) gives a row of `words` and `tags` for each sentence, a
file of `attributes||sentence` lines (E2E) rows of `prompt` and `completion`. A table without a header is recognised
where its second column tells it (SST-2, CoLA), and said aloud.

A mistake in the data never stops at the first: `Problems` collects them and reports ten at once.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refpeft.errors import RefpeftError

SHOWN_PROBLEMS = 10
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

COLA = ("source", "label", "star", "sentence")
"""The columns of CoLA's files, which have no header."""
MOST_LABELS, LONGEST_LABEL = 100, 30
"""Two columns without a header are texts and labels where the second holds no more and no longer ones."""
MOST_COLUMNS = 5
"""Of words and tags: CoNLL-2003 has 4, its German part 5. More (CoNLL-U: 10) do not begin with the word."""


@dataclass(frozen=True)
class Row:
    line: int  # where it begins in the file, from 1
    fields: dict[str, Any]


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


def read_rows(path: str | Path, known: Iterable[str] = (), notes: list[str] | None = None) -> list[Row]:
    """The rows of a file, by the end of its name. Raises RefpeftError with every mistake's line.

    known    names of columns: a table's first line with one of them is a header
    notes    gets what people should be told of the file
    """
    path = Path(path)
    table = _Table(frozenset(known), [] if notes is None else notes)
    readers: dict[str, Callable[[str, Problems], Iterator[Row]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": table.csv,
        ".tsv": table.tsv,
        ".txt": _text,
        ".conll": _words,
        ".bio": _words,
        ".iob": _words,
    }
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


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. (str.splitlines would split at U+2028 and others, which a text may hold.)"""
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json_lines(text: str, problems: Problems) -> Iterator[Row]:
    for number, line in _lines(text):
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


# -- tables ------------------------------------------------------------------------------------------------------------

Records = list[tuple[int, list[str]]]
"""The fields of a table's lines that are not empty, with the line that each begins at."""


@dataclass(frozen=True)
class _Table:
    known: frozenset[str]
    notes: list[str]

    def csv(self, text: str, problems: Problems) -> Iterator[Row]:
        csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        records: Records = []
        while True:
            line = reader.line_num + 1  # a record may span several
            try:
                record = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                problems.add(line, f"this is not CSV: {error}")
                break
            if record:
                records.append((line, record))
        yield from self._rows(records, problems)

    def tsv(self, text: str, problems: Problems) -> Iterator[Row]:
        """Tab-separated values have no quoting: a quotation mark is a character like any other."""
        yield from self._rows([(number, line.split("\t")) for number, line in _lines(text) if line], problems)

    def _rows(self, records: Records, problems: Problems) -> Iterator[Row]:
        if not records:
            return
        header = self._missing_header(records)
        if header is None:
            (line, first), *records = records
            header = tuple(name.strip() for name in first)
            if len(set(header)) < len(header):
                problems.add(line, f"the header names a column twice: {', '.join(header)}")
                return
        for line, record in records:
            if len(record) == len(header):
                yield Row(line, dict(zip(header, record, strict=True)))
            else:
                problems.add(line, f"{len(record)} fields: expected {len(header)} ({', '.join(header)})")

    def _missing_header(self, records: Records) -> tuple[str, ...] | None:
        """The columns of a table whose first line is a row already; None where it is a header."""
        first = records[0][1]
        if len(first) == len(COLA) and first[1] in ("0", "1") and first[2] in ("", "*"):
            self.notes.append(f"the file has no header: its columns are read as CoLA's ({', '.join(COLA)})")
            return COLA
        if len(first) != 2 or self._names_columns(*first):
            return None
        labels = Counter(record[1] for _, record in records if len(record) == 2)
        few = len(labels) <= min(MOST_LABELS, len(records) // 2) and max(map(len, labels)) <= LONGEST_LABEL
        if all(map(NUMBER.fullmatch, labels)):
            what = "a number in every row"
        elif few and labels[first[1]] > 1:
            what = f"one of {len(labels)} labels in every row"
        else:
            return None
        self.notes.append(f"the file has no header: its columns are read as text and label, for the second is {what}")
        return ("text", "label")

    def _names_columns(self, first: str, second: str) -> bool:
        """Whether these are known names. (A class may be called "text", but then its row begins with a sentence.)"""
        return second.strip() in self.known and (first.strip() in self.known or len(first.split()) == 1)


# -- text files --------------------------------------------------------------------------------------------------------


def _text(text: str, problems: Problems) -> Iterator[Row]:
    """The kind of a .txt file is told from its first line."""
    number, first = next(((number, line) for number, line in _lines(text) if line.strip()), (1, ""))
    if "||" in first:
        yield from _attributes(text, problems)
    elif not first or 2 <= len(_columns(first)) <= MOST_COLUMNS:
        yield from _words(text, problems)
    else:
        problems.add(
            number,
            "a .txt file holds lines of `attributes||sentence`, or a word and its tag in each line and an empty line "
            "between sentences: this line is neither",
        )


def _attributes(text: str, problems: Problems) -> Iterator[Row]:
    """E2E: attributes||sentence.

    The separator ends the prompt and a space begins the completion, so that with most tokenizers " ||" is a token and
    the sentence begins as it does behind any other word.
    """
    for number, line in _lines(text):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("||")]
        if len(parts) == 2 and all(parts):
            yield Row(number, {"prompt": f"{parts[0]} ||", "completion": f" {parts[1]}"})
        else:
            problems.add(number, "expected `attributes||sentence`: two texts with one || between them")


def _words(text: str, problems: Problems) -> Iterator[Row]:
    """CoNLL: the word first and its tag last in each line; one column alone: words without tags."""
    start, sentence, width = 0, [], 0
    for number, line in [*_lines(text), (0, "")]:
        if not line.strip() or line.startswith("-DOCSTART-"):
            if sentence:
                words = [columns[0] for columns in sentence]
                if width > 2 and len(words) > 1 and words == list(map(str, range(1, len(words) + 1))):
                    problems.add(start, "the first column counts the words: expected the word first and its tag last")
                yield Row(start, {"words": words, "tags": [columns[-1] for columns in sentence] if width > 1 else None})
            sentence = []
            continue
        columns = _columns(line)
        width = width or len(columns)
        if width > MOST_COLUMNS:
            problems.add(number, f"{width} columns: expected at most {MOST_COLUMNS}, the word first and its tag last")
            return
        if len(columns) != width:
            problems.add(number, f"{len(columns)} columns: expected {width}, as in the first line")
        else:
            start = start if sentence else number
            sentence.append(columns)


def _columns(line: str) -> list[str]:
    """Between tabs, or else between spaces: a word may hold other white space."""
    return line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
