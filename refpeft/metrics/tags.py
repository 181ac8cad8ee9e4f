"""Metrics of tagged words."""

from ..errors import RefpeftError


def tag_accuracy(predicted: list[list[str]], wanted: list[list[str]]) -> float:
    """The share of words with the right tag, 0 to 1; 0 where no row has a word."""
    pairs = [pair for said, right in zip(predicted, wanted, strict=True) for pair in zip(said, right, strict=True)]
    return sum(said == right for said, right in pairs) / max(len(pairs), 1)


def span_f1(predicted: list[list[str]], wanted: list[list[str]]) -> float:
    """CoNLL's F1, 0 to 1: a span counts if its words and its type are right; 0 where there are no spans.

    Raises RefpeftError for tags that mark no spans.
    """
    hits = total = 0
    for said, right in zip(map(spans, predicted), map(spans, wanted), strict=True):
        hits += len(said & right)
        total += len(said) + len(right)
    return 2 * hits / total if total else 0.0


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """The spans (type, first word, word behind the last) of a sentence's tags in IOB1, IOB2 or IOBES, as conlleval
    reads them: one starts at B-X and S-X, and wherever a tag of X follows a word that is in no span of X that goes on.
    """
    found, start, inside = set(), 0, None
    for i, tag in enumerate([*tags, "O"]):
        place, _, kind = tag.partition("-")
        if place not in ("B", "I", "O", "E", "S") or (place == "O" and kind):
            raise RefpeftError(f"span_f1: {tag!r} is no tag of a span (O, B-X, I-X, E-X, S-X); tag_accuracy takes any")
        if place in "BSO" or kind != inside:
            if inside is not None:
                found.add((inside, start, i))
            start, inside = i, None if place == "O" else kind
        if place in "ES":
            found.add((kind, start, i + 1))
            inside = None
    return found
