"""Metrics against scikit-learn, SciPy, seqeval, sacrebleu, rouge-score, NLTK, and coco-caption with its Java programs.

Java is needed for METEOR and for coco-caption's words; what needs it is skipped elsewhere.
"""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from refpeft import metrics
from refpeft.metrics.e2e import nist_of_words
from refpeft.metrics.penn import content_words

pytestmark = pytest.mark.real

# What GEM's tests of its metrics measure, with the figures that they expect.
REFERENCES = [
    ["Alimentum is not family-friendly, and is near the Burger King in the city centre."],
    ["There is a place in the city centre, Alimentum, that is not family-friendly."],
    ["There is a house in New Orleans."],
]
PREDICTED = [
    "Alimentum is a non family-friendly restaurant near Burger King in the city centre.",
    "Alimentum is located in the city centre. It is not family-friendly.",
    "Or Orleans has a home.",
]


def value(name, *arguments):
    return metrics.METRICS[name](*arguments)


def e2e(rows: int | None = None) -> tuple[list[str], list[list[str]]]:
    """For each meaning of E2E's validation rows one of its texts, and the others as references; without texts alone."""
    file = Path(os.environ.get("REFPEFT_DATA", "/nowhere"), "e2e", "valid.txt")
    if not file.is_file():
        pytest.skip("needs E2E under REFPEFT_DATA")
    texts: dict[str, list[str]] = {}
    for line in file.read_text("utf-8").splitlines():
        meaning, _, text = line.partition("||")
        texts.setdefault(meaning, []).append(text.strip())
    several = [group for group in texts.values() if len(group) > 1][:rows]
    return [group[0] for group in several], [group[1:] for group in several]


@pytest.mark.parametrize("labels", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 10, 500])
def test_labels_against_scikit_learn(labels, rows):
    peer = pytest.importorskip("sklearn.metrics")
    for seed in range(20):
        predicted, wanted = np.random.default_rng(seed).integers(labels, size=(2, rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where a label never occurs
            expected = {
                "accuracy": peer.accuracy_score(wanted, predicted),
                "f1_macro": peer.f1_score(wanted, predicted, average="macro"),
                "f1_micro": peer.f1_score(wanted, predicted, average="micro"),
                "matthews": peer.matthews_corrcoef(wanted, predicted),
            }
            if labels == 2:
                expected["f1"] = peer.f1_score(wanted, predicted)
        assert metrics.evaluate(expected, predicted, wanted) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("rows", [2, 3, 10, 500])
@pytest.mark.parametrize("values", [3, 10**9])
def test_correlations_against_scipy(rows, values):
    peer = pytest.importorskip("scipy.stats")
    for seed in range(20):
        predicted, wanted = np.random.default_rng(seed).integers(values, size=(2, rows)) / 7
        if np.ptp(predicted) and np.ptp(wanted):
            assert value("pearson", predicted, wanted) == pytest.approx(peer.pearsonr(predicted, wanted)[0], abs=1e-13)
            assert value("spearman", predicted, wanted) == pytest.approx(
                peer.spearmanr(predicted, wanted)[0], abs=1e-13
            )


@pytest.mark.parametrize("places", ["BI", "BIES"])
def test_spans_against_seqeval(places):
    peer = pytest.importorskip("seqeval.metrics")
    tags = ["O", *(f"{place}-{kind}" for place in places for kind in ("PER", "LOC", "B-2"))]
    for seed in range(100):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 12, size=10)
        predicted, wanted = ([list(map(str, rng.choice(tags, size=n))) for n in lengths] for _ in range(2))
        wanted = [p if rng.random() < 0.5 else w for p, w in zip(predicted, wanted, strict=True)]
        assert value("span_f1", predicted, wanted) == pytest.approx(peer.f1_score(wanted, predicted))
        assert value("tag_accuracy", predicted, wanted) == pytest.approx(peer.accuracy_score(wanted, predicted))


def test_sacrebleus_metrics_with_as_many_references_as_there_are():
    peer = pytest.importorskip("sacrebleu")
    predicted, wanted = e2e(40)
    assert len(set(map(len, wanted))) > 1
    most = max(map(len, wanted))
    streams = [[row[i] if i < len(row) else None for row in wanted] for i in range(most)]
    expected = {
        "bleu": peer.corpus_bleu(predicted, streams, force=True).score,
        "e2e_bleu": peer.corpus_bleu(predicted, streams, force=True, lowercase=True).score,
        "chrf": peer.corpus_chrf(predicted, streams).score,
        "ter": peer.corpus_ter([text[:60] for text in predicted], streams[:1]).score,
    }
    found = metrics.evaluate(["bleu", "e2e_bleu", "chrf"], predicted, wanted)
    found["ter"] = value("ter", [text[:60] for text in predicted], [row[:1] for row in wanted])
    assert found == expected
    # a reference more, even of another text, is taken; one that a row lacks counts for nothing
    assert value("bleu", ["a b c d e"], [["x", "a b c d e"]]) == pytest.approx(100)
    assert value("bleu", ["a b c d e", "v w x y z"], [["a b c d e", "x"], ["v w x y z"]]) == pytest.approx(100)


def test_sacrebleus_figures_by_hand():
    pytest.importorskip("sacrebleu")
    # 5, 3, 2, 1 of 6, 5, 4, 3 n-grams; the reference is as long
    said, right = "the cat is on the mat", "the cat sat on the mat"
    assert value("bleu", [said], [[right]]) == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    assert value("ter", [said], [[right]]) == pytest.approx(100 / 6)
    assert value("ter", [said], [[said]]) == 0
    assert value("bleu", ["THE CAT IS ON"], [["the cat is on"]]) == 0
    assert value("e2e_bleu", ["THE CAT IS ON"], [["the cat is on"]]) == pytest.approx(100)


def test_signatures_name_what_counts():
    version = pytest.importorskip("sacrebleu").__version__
    assert metrics.signature("bleu") == f"nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert metrics.signature("e2e_bleu", 1) == f"nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:{version}"
    assert metrics.signature("chrf", 2).startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0")
    assert metrics.signature("ter", 2).startswith("nrefs:2|case:lc|tok:tercom")


def test_rouge_is_the_best_references_mean():
    peer = pytest.importorskip("rouge_score.rouge_scorer")
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = peer.RougeScorer(kinds, use_stemmer=True)
    predicted, wanted = e2e(20)
    for kind in kinds:
        best = [
            max(scorer.score(reference, text)[kind].fmeasure for reference in row)
            for text, row in zip(predicted, wanted, strict=True)
        ]
        assert value(kind, predicted, wanted) == pytest.approx(np.mean(best))
    assert value("rouge1", ["cats sat"], [["a cat"]]) == pytest.approx(1 / 2)  # of "cat sat" and "a cat"
    assert value("rouge1", ["!"], [["a"]]) == 0


def test_what_gem_measures_on_its_own_texts():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    found = metrics.evaluate(["bleu", "nist", "cider"], PREDICTED, REFERENCES)
    assert found == pytest.approx({"bleu": 32.56, "nist": 2.949, "cider": 1.89}, abs=0.005)
    same = [row[0] for row in REFERENCES]
    assert metrics.evaluate(["nist", "cider"], same, REFERENCES) == pytest.approx(
        {"nist": 5.346, "cider": 10}, abs=0.005
    )
    names = [name for name, metric in metrics.METRICS.items() if metric.of == "texts" and name not in ("meteor", "ter")]
    assert set(metrics.evaluate(names, ["", "", ""], REFERENCES).values()) == {0}


def test_nist_of_one_reference_is_nltks():
    peer = pytest.importorskip("nltk.translate.nist_score")
    predicted, wanted = e2e(100)
    said, references = [text.split() for text in predicted], [[row[0].split()] for row in wanted]
    assert nist_of_words(said, references) == pytest.approx(peer.corpus_nist(references, said), rel=1e-12)
    short = [words[:12] for words in said]
    assert nist_of_words(short, references) == pytest.approx(peer.corpus_nist(references, short), rel=1e-12)


def coco(predicted: list[str], wanted: list[list[str]]) -> tuple[dict, dict]:
    """Texts and references as coco-caption has them once they are words."""
    references = {i: [" ".join(content_words(text)) for text in row] for i, row in enumerate(wanted)}
    return references, {i: [" ".join(content_words(text))] for i, text in enumerate(predicted)}


def test_cider_and_rouge_l_are_coco_captions():
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    predicted, wanted = e2e(200)
    predicted[::7] = [text[: len(text) // 2] * 2 for text in predicted[::7]]
    words = coco(predicted, wanted)
    assert value("cider", predicted, wanted) == pytest.approx(cider.compute_score(*words)[0], rel=1e-12)
    assert value("e2e_rouge_l", predicted, wanted) == pytest.approx(rouge.compute_score(*words)[0], rel=1e-12)


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_words_are_those_of_stanfords_tokenizer(monkeypatch):
    stanford = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    texts = [text for row in e2e()[1] for text in row]
    tight = [
        text.replace(" - ", "-").replace(" ,", ",").replace(" .", ".").replace("£ ", "£").replace(" '", "'")
        for text in texts
    ]
    several = texts + tight + PREDICTED + [row[0] for row in REFERENCES]
    expected = stanford.tokenize({i: [{"caption": text}] for i, text in enumerate(several)})
    differing = [text for i, text in enumerate(several) if " ".join(content_words(text)) != expected[i][0]]
    assert len(differing) <= len(several) / 1000, differing[:5]


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_meteor_is_what_its_authors_program_says(monkeypatch):
    peer = pytest.importorskip("pycocoevalcap.meteor.meteor").Meteor
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    predicted, wanted = e2e(20)
    predicted.append("a ||| b")  # what separates texts on its input
    wanted.append(["a ||| b"])
    meteor = peer()
    expected, _ = meteor.compute_score(*coco(predicted, wanted))
    meteor.meteor_p.communicate()
    assert value("meteor", predicted, wanted) == pytest.approx(expected, rel=1e-12)
