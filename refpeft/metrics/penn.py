"""Words as Stanford's PTBTokenizer makes them for coco-caption: Penn Treebank tokens, lower case, no punctuation.

What is rare in English prose is left out: markup, entities, web addresses, long lists of abbreviations.
"""

import re

_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "£": "#", "€": "$", "…": "...", "—": "--", "–": "--"}  # noqa: RUF001
    | {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
)
_TOKEN = re.compile(
    r"""
    -[lr][rsc]b-                                                                # a bracket
  | (?:mr|mrs|ms|dr|prof|st|rd|ave|jr|sr|vs|etc|inc|ltd|co|corp)\.(?!\w)        # these keep their full stop
  | [^\W\d_](?:\.[^\W\d_])*\.(?![\w.])                                          # and so do letters: u.s., e.g.
  | \.{3} | -{2,} | \*+
  | [+-]?\d+(?:[.,:/-]\d+)*(?:-?\w+)*                                           # 20-25, 1,000, 5-star
  | can(?=not\b) | (?:gon|wan)(?=na\b) | (?:gim|lem)(?=me\b) | got(?=ta\b)      # can|not
  | (?:[^\W_](?!n't\b))*[^\W_](?=n't\b) | n't\b                                 # is|n't
  | '(?:s|re|ve|ll|d|m)\b                                                       # it|'s
  | \w+(?:[-_.]\w+|'(?!(?:s|re|ve|ll|d|m|t)\b)\w+)*                             # family-friendly, d'oeuvres
  | \S
    """,
    re.VERBOSE,
)
_PUNCTUATION = frozenset(["'", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""What coco-caption leaves out. It means to leave out brackets too, but looks for them in capital letters."""


def content_words(text: str) -> list[str]:
    """The tokens of a text that are not punctuation."""
    return [token for token in _TOKEN.findall(text.lower().translate(_PLAIN)) if token not in _PUNCTUATION]
