"""Metrics by name, for what models predict: labels, numbers, tags, texts, losses.

Accuracies, F1 and exact match are fractions of 1, correlations from -1 to 1; BLEU, chrF and TER are on sacrebleu's
scale of 0 to 100. Those of labels, numbers, tags and losses need NumPy alone; the others say what they require.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ..errors import RefpeftError, nearest
from . import e2e, labels, tags, texts
from .base import Kind, Metric
from .texts import signature

__all__ = ["METRICS", "Metric", "check", "evaluate", "signature"]

_SACRE, _ROUGE, _METEOR = "sacrebleu", "rouge-score", "java and pycocoevalcap"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "labels", labels.accuracy, "share of right labels"),
        Metric("f1", "labels", labels.f1, "F1 of the second of two labels", context=("labels",)),
        Metric("f1_macro", "labels", labels.f1_macro, "mean of the labels' F1"),
        Metric("f1_micro", "labels", labels.f1_micro, "F1 of all labels together, which is the accuracy"),
        Metric("matthews", "labels", labels.matthews, "Matthews' correlation"),
        Metric("pearson", "numbers", labels.pearson, "Pearson's correlation"),
        Metric("spearman", "numbers", labels.spearman, "Spearman's correlation of ranks"),
        Metric("tag_accuracy", "tags", tags.tag_accuracy, "share of words with the right tag"),
        Metric("span_f1", "tags", tags.span_f1, "F1 of spans, as CoNLL counts them"),
        Metric("perplexity", "loss", labels.perplexity, "exp of the mean loss of a token", False),
        Metric("bits_per_byte", "loss", labels.bits_per_byte, "loss in bits a byte of text", False, context=("bytes",)),
        Metric("exact_match", "texts", texts.exact_match, "share of texts that equal a reference"),
        *(
            Metric(name, "texts", partial(texts.sacre, name=name), summary, better, _SACRE)
            for name, summary, better in (
                ("bleu", "BLEU, 0 to 100", True),
                ("chrf", "chrF2, 0 to 100", True),
                ("ter", "edits a word of the reference, in percent", False),
                ("e2e_bleu", "BLEU of lower case, as the E2E challenge's, 0 to 100", True),
            )
        ),
        *(
            Metric(kind, "texts", partial(texts.rouge, kind=kind), f"F1 of {what}", requires=_ROUGE)
            for kind, what in (
                ("rouge1", "words"),
                ("rouge2", "pairs of words"),
                ("rougeL", "longest common subsequences"),
                ("rougeLsum", "longest common subsequences, line by line"),
            )
        ),
        Metric("nist", "texts", e2e.nist, "information of matching n-grams, as the E2E challenge's", requires=_SACRE),
        Metric("cider", "texts", e2e.cider, "likeness in n-grams that are rare elsewhere, as the E2E challenge's"),
        Metric("e2e_rouge_l", "texts", e2e.rouge_l, "longest common subsequences, as the E2E challenge's"),
        Metric("meteor", "texts", e2e.meteor, "METEOR 1.5, as the E2E challenge's", requires=_METEOR),
    )
}


def check(names: Iterable[str], of: Kind, label_names: Sequence[str] | None = None) -> None:
    """Raises RefpeftError for what could not be evaluated later: a name that no metric has, a metric of something else,
    one that lacks what it requires, or is not of so many labels.
    """
    for name in names:
        if name not in METRICS:
            raise RefpeftError(f"there is no metric {name!r}{nearest(name, METRICS)}; of {of} there are {_listed(of)}")
        if METRICS[name].of != of:
            raise RefpeftError(
                f"{name} is a metric of {METRICS[name].of}, not of {of}; of {of} there are {_listed(of)}"
            )
        METRICS[name].check_installed()
        if name == "f1" and label_names is not None:
            labels.check_two(len(label_names))


def _listed(of: Kind) -> str:
    return ", ".join(name for name, metric in METRICS.items() if metric.of == of)


def evaluate(names: Iterable[str], predicted: Any, wanted: Any, **context: Any) -> dict[str, float]:
    """The values of these metrics, by name; raises RefpeftError as they do.

    context: what some take beside: `labels`, the labels' names, and `bytes`, how many the text has whose loss it is.
    """
    return {name: METRICS[name](predicted, wanted, **context) for name in names}
