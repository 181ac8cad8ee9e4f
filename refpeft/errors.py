"""The one exception that a user's mistake raises, the warning for what is allowed but in vain, and words for both."""

import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class RefpeftError(ValueError):
    """A mistake in what was asked for: what was found, what was expected, what to do. The CLI prints it as one line."""


class RefpeftWarning(UserWarning):
    """What was asked for is done, but a part of it has no effect. The CLI prints it as one line."""


def warn(message: str) -> None:
    """Warns, with the place of whoever called the caller."""
    warnings.warn(message, RefpeftWarning, stacklevel=3)


def few(names: Sequence[Any], most: int) -> str:
    """The first `most` names with commas between, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def nearest(word: str, names: Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'lora'?", or "" where no name is close to `word`."""
    word = word.lower()
    # of names that are equally close, the one of the same letters: 'lroa' is 'lora' rather than 'road'
    names = sorted(names, key=lambda name: sorted(name) != sorted(word))
    ratios = {name: difflib.SequenceMatcher(None, name, word).ratio() for name in names}
    best = max(ratios.values(), default=0)
    close = [name for name in names if ratios[name] == best >= 0.6]
    return f"; did you mean {close[0]!r}?" if close else ""
