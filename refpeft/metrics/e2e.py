"""The E2E challenge's metrics beside BLEU, by its own definitions: github.com/tuetschek/e2e-metrics.

NIST is that of its pymteval, on the tokens of mteval-v13a. CIDEr, ROUGE-L and METEOR are those of coco-caption, on
tokens of the Penn Treebank without punctuation, in lower case.
"""

import importlib.util
import math
import subprocess
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path

from ..errors import RefpeftError
from .penn import content_words

_ORDERS = range(1, 5)


def _grams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def nist(predicted: list[str], wanted: list[list[str]]) -> float:
    """NIST (Doddington 2002) of n-grams up to 5: their mean information where they match, times a penalty on brevity.

    From 0; good systems reach 8 on E2E. Where rows have unequal numbers of references the challenge's Perl script has
    another penalty: it divides the references' words by the largest number of them.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    references = [[tokenize(text.lower()).split() for text in row] for row in wanted]
    return nist_of_words([tokenize(text.lower()).split() for text in predicted], references)


def nist_of_words(said: list[list[str]], references: list[list[list[str]]]) -> float:
    """NIST of texts, and of their references, that are lists of words."""
    every = list(chain.from_iterable(references))
    times = Counter({(): sum(map(len, every))})
    for tokens in every:
        times.update(chain.from_iterable(_grams(tokens, n).elements() for n in range(1, 6)))
    total = 0.0
    for n in range(1, 6):
        information = grams = 0
        for tokens, row in zip(said, references, strict=True):
            allowed: Counter = Counter()
            for reference in row:
                allowed |= _grams(reference, n)
            matches = _grams(tokens, n) & allowed
            information += sum(count * math.log2(times[gram[:-1]] / times[gram]) for gram, count in matches.items())
            grams += max(len(tokens) - n + 1, 0)
        total += information / max(grams, 1)
    length = sum(map(len, said))
    usual = sum(sum(map(len, row)) / len(row) for row in references)
    return total * _brevity(length / usual) if usual else 0.0


def _brevity(ratio: float) -> float:
    """1/2 for a text of 2/3 of the references' length."""
    return 2 ** -((math.log(min(ratio, 1)) / math.log(1.5)) ** 2) if ratio else 0.0


def cider(predicted: list[str], wanted: list[list[str]]) -> float:
    """CIDEr-D (arXiv 1411.5726), 0 to 10: how alike a text and its references are in n-grams up to 4, rare ones
    counting more; the mean over n, references and rows. How rare they are, the references of all rows say: of one row
    alone it is 0.
    """
    references = [[content_words(text) for text in row] for row in wanted]
    rows_with = [
        Counter(chain.from_iterable({g for r in row for g in _grams(r, n)} for row in references)) for n in _ORDERS
    ]

    def weights(tokens: list[str]) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: times * math.log(len(wanted) / max(rows[gram], 1)) for gram, times in _grams(tokens, n).items()}
            for n, rows in zip(_ORDERS, rows_with, strict=True)
        ]

    total = 0.0
    for text, row in zip(predicted, references, strict=True):
        tokens = content_words(text)
        said = weights(tokens)
        for reference in row:
            # the lengths that coco-caption compares are numbers of pairs
            difference = max(len(tokens) - 1, 0) - max(len(reference) - 1, 0)
            alike = sum(map(_clipped_cosine, said, weights(reference))) / len(_ORDERS)
            total += alike * math.exp(-(difference**2) / 72) / len(row)
    return 10 * total / len(predicted)


def _clipped_cosine(said: dict[tuple[str, ...], float], right: dict[tuple[str, ...], float]) -> float:
    """The cosine of two weightings, where saying an n-gram more often than the reference gains nothing."""
    product = sum(min(weight, right[gram]) * right[gram] for gram, weight in said.items() if gram in right)
    lengths = math.hypot(*said.values()) * math.hypot(*right.values())
    return product / lengths if lengths else 0.0


def rouge_l(predicted: list[str], wanted: list[list[str]]) -> float:
    """The mean F of longest common subsequences, 0 to 1, recall weighing more (beta 1.2); precision and recall are each
    that of the best reference.
    """
    total = 0.0
    for text, row in zip(predicted, wanted, strict=True):
        said, references = content_words(text), [content_words(reference) for reference in row]
        common = [_common(said, reference) for reference in references]
        if any(common):
            precision = max(common) / len(said)
            recall = max(c / max(len(reference), 1) for c, reference in zip(common, references, strict=True))
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return total / len(predicted)


def _common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(b) + 1)  # of what was read of a, and the first words of b
    for word in a:
        before = 0  # of one word less of both
        for i, other in enumerate(b, 1):
            before, best[i] = best[i], before + 1 if word == other else max(best[i], best[i - 1])
    return best[-1]


def meteor(predicted: list[str], wanted: list[list[str]]) -> float:
    """METEOR 1.5 for English, 0 to 1: what its authors' Java program says, of which pycocoevalcap has a copy.

    Raises RefpeftError if the program ends without a score.
    """
    home = Path(importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0], "meteor")
    java = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", "meteor-1.5.jar"]
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}

    def ask(*words: str, answers: int = 1) -> str:
        """The last line of an answer."""
        program.stdin.write(" ||| ".join(words) + "\n")
        program.stdin.flush()
        return [program.stdout.readline().strip() for _ in range(answers)][-1]

    score = ""
    with suppress(BrokenPipeError), subprocess.Popen(java + options, cwd=home, encoding="utf-8", **streams) as program:
        counts = []
        for text, row in zip(predicted, wanted, strict=True):
            references = [" ".join(content_words(reference)) for reference in row]
            counts.append(ask("SCORE", *references, " ".join(content_words(text))))
        # the score of each row, and at last that of all together
        score = ask("EVAL", *counts, answers=len(predicted) + 1)
    if not score:
        raise RefpeftError(
            "meteor: its Java program ended without a score; it needs Java 8 or newer and 2 GB of memory"
        )
    return float(score)
