"""Metrics of texts with references: exact match, and what sacrebleu and rouge-score compute."""

from typing import Any

from ..errors import RefpeftError

_SCORERS = {
    "bleu": ("BLEU", {"force": True}),  # force: no warning about text that is tokenized, as E2E's
    "e2e_bleu": ("BLEU", {"force": True, "lowercase": True}),
    "chrf": ("CHRF", {}),
    "ter": ("TER", {}),
}


def exact_match(predicted: list[str], wanted: list[list[str]]) -> float:
    """The share of texts that equal a reference but for white space around them, 0 to 1."""
    hits = [text.strip() in {r.strip() for r in references} for text, references in zip(predicted, wanted, strict=True)]
    return sum(hits) / len(hits)


def _scorer(name: str) -> Any:
    from sacrebleu import metrics

    kind, options = _SCORERS[name]
    return getattr(metrics, kind)(**options)


def sacre(predicted: list[str], wanted: list[list[str]], name: str) -> float:
    """BLEU, chrF (F2 of 6-grams of characters) or TER of the whole, on sacrebleu's scale of 0 to 100."""
    # sacrebleu wants the first references of all rows, then the second ones; None where a row has fewer
    most = max(map(len, wanted))
    streams = [[row[i] if i < len(row) else None for row in wanted] for i in range(most)]
    return _scorer(name).corpus_score(predicted, streams).score


def signature(name: str, references: int | None = None) -> str:
    """sacrebleu's description of how it counts, to be given with a figure: "nrefs:1|case:mixed|eff:no|tok:13a|...".

    references: how many a row has; None if that varies. Raises RefpeftError for metrics that are not sacrebleu's.
    """
    if name not in _SCORERS:
        raise RefpeftError(f"sacrebleu has no signature of {name!r}; it has of {', '.join(_SCORERS)}")
    scorer = _scorer(name)
    scorer.num_refs = -1 if references is None else references
    return scorer.get_signature().format()


def rouge(predicted: list[str], wanted: list[list[str]], kind: str) -> float:
    """The mean F1 of texts with their closest references, in words without endings (Porter's stemmer), 0 to 1.

    kind: rouge1 and rouge2 count words and pairs, rougeL the longest common subsequence, rougeLsum that line by line.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    scores = [scorer.score_multi(rs, text)[kind].fmeasure for text, rs in zip(predicted, wanted, strict=True)]
    return sum(scores) / len(scores)
