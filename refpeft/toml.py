"""TOML with the line of every key, which tomllib does not give, and TOML text for values, which it does not write."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refpeft.errors import RefpeftError

_NAME = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_NAME}(?:\s*\.\s*{_NAME})*"
_HEADER = re.compile(rf"\s*\[\s*({_DOTTED})\s*\]")
_KEY = re.compile(rf"\s*({_DOTTED})\s*=")


def read(file: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(the values of a TOML file, the line of every key by dotted name). RefpeftError where it is not TOML."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RefpeftError(f"configuration {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RefpeftError(f"configuration {file} cannot be read: {error}") from None
    try:
        return tomllib.loads(text), lines(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", place)
        raise RefpeftError(f"{file}:{line[1] if line else 'end'}: not valid TOML: {message}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise RefpeftError(f"{file} cannot be read: {error}") from None


def lines(document: str) -> dict[str, int]:
    """The line of every table and key of a valid TOML document, by dotted name."""
    found: dict[str, int] = {}
    table, quote = "", ""
    for number, line in enumerate(document.splitlines(), 1):
        if not quote:
            header, key = _HEADER.match(line), _KEY.match(line)
            if header:
                table = header[1] + "."
            if header or key:
                name = header[1] if header else table + key[1]
                parts = [part.strip("\"'") for part in re.findall(_NAME, name)]
                for end in range(1, len(parts) + 1):
                    found.setdefault(".".join(parts[:end]), number)
        for mark in re.findall(r'"""|\'\'\'', line):  # inside a string of several lines nothing is a key
            quote = "" if quote == mark else quote or mark
    return found


def text(value: Any) -> str:
    """`value` as it stands in a TOML file; what TOML does not have (None) reads as Python prints it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text(str(key))} = {text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(text, value)) + "]"
    return repr(value) if isinstance(value, float) else str(value)
