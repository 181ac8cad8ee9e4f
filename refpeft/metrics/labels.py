"""Metrics of labels, numbers and losses, in NumPy. Where one is undefined its docstring says what it is then."""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import RefpeftError


def accuracy(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """The share of right labels, 0 to 1."""
    return float(np.mean(predicted == wanted))


def f1(predicted: np.ndarray, wanted: np.ndarray, labels: Sequence[str] | None = None) -> float:
    """F1 of label 1 of two, as GLUE's, 0 to 1: 2 hits / (times said + times right); 0 where neither ever is label 1.

    Raises RefpeftError if there are other labels.
    """
    most = max(predicted.max(), wanted.max())
    check_two(max(most + 1, 2) if labels is None else len(labels))
    return float(_f1s(predicted, wanted)[-1]) if most else 0.0


def check_two(count: int) -> None:
    """Raises RefpeftError unless there are two labels."""
    if count != 2:
        raise RefpeftError(f"f1 is of two labels, and there are {count}; f1_macro and f1_micro are of any number")


def f1_macro(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """The mean of the labels' F1, of those that occur, said or wanted; 0 to 1."""
    return float(_f1s(predicted, wanted).mean())


def f1_micro(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of all labels' hits together; with one label a row that is the accuracy."""
    return accuracy(predicted, wanted)


def _f1s(predicted: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """F1 of every label that occurs, in order."""
    hits, times = np.bincount(wanted[predicted == wanted]), np.bincount(np.concatenate((predicted, wanted)))
    hits = np.pad(hits, (0, len(times) - len(hits)))
    return 2 * hits[times > 0] / times[times > 0]


def matthews(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Matthews' correlation, -1 to 1, for any number of labels (Gorodkin 2004, R_K); 0 if either has one label only."""
    count = max(predicted.max(), wanted.max()) + 1
    said, right = np.bincount(predicted, minlength=count), np.bincount(wanted, minlength=count)
    n, hits = len(wanted), np.count_nonzero(predicted == wanted)
    # in whole numbers, which Python's never overflow
    between, of_said, of_right = (
        n * int(a) - int(b) for a, b in ((hits, said @ right), (n, said @ said), (n, right @ right))
    )
    return between / math.sqrt(of_said * of_right) if of_said and of_right else 0.0


def pearson(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's correlation, -1 to 1. 0 if either is constant, as Matthews' is (SciPy's is nan); nan if any number is
    not finite.
    """
    if not (np.isfinite(predicted).all() and np.isfinite(wanted).all()):
        return math.nan
    if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return 0.0
    a, b = _standard(predicted), _standard(wanted)
    return float(np.clip(a @ b, -1, 1))


def _standard(x: np.ndarray) -> np.ndarray:
    """x without its mean, of length 1; divided by its largest first, so that no square leaves the floats' range."""
    x = x / np.abs(x).max()
    x = x - x.mean()
    return x / np.linalg.norm(x)


def spearman(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's correlation of ranks, equal numbers sharing the mean of theirs; the same where it is undefined."""
    if np.isnan(predicted).any() or np.isnan(wanted).any():
        return math.nan
    return pearson(_ranks(predicted), _ranks(wanted))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, which, times = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[which]


def perplexity(loss: float, tokens: int) -> float:
    """exp of the mean loss of a token; from 1, lower is better. inf where floats end."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss / tokens))


def bits_per_byte(loss: float, tokens: int, bytes: int | None = None) -> float:
    """The loss in bits, a byte of the text that these tokens say: the same for every tokenizer. Lower is better.

    Raises RefpeftError without the number of bytes.
    """
    if not bytes:
        raise RefpeftError("bits_per_byte needs bytes=, the number of bytes of the text whose loss it is")
    return loss / math.log(2) / float(np.sum(bytes))
