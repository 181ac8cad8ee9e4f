"""The one exception that a user's mistake raises, and the hint that ends its message."""

import difflib
from collections.abc import Iterable


class RefpeftError(ValueError):
    """A mistake in what was asked for: what was found, what was expected, what to do. The CLI prints it as one line."""


def nearest(word: str, names: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'lora'?", or "" where no name is close to `word`."""
    close = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
