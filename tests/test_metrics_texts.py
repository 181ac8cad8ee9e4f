"""Metrics of texts, by hand: those that need no library, and NIST of words."""

import math
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import metrics
from refpeft.errors import RefpeftError
from refpeft.metrics.e2e import nist_of_words
from refpeft.metrics.penn import content_words

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "."]), max_size=8).map(" ".join)
ROWS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=5)


def value(name, predicted, wanted):
    return metrics.METRICS[name](predicted, wanted)


def words(*rows):
    """Texts with their references as lists of words."""
    return [text.split() for text, _ in rows], [[reference.split() for reference in row] for _, row in rows]


def test_exact_match_is_with_any_reference_but_for_white_space_around():
    assert value("exact_match", [" a\n", "b", "A", "a  b"], [["x", "a "], ["a"], ["a"], ["a b"]]) == 1 / 4
    assert value("exact_match", [""], [[""]]) == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        # as Stanford's tokenizer 3.4.1 says, without punctuation
        (
            "It's £20-25, isn't it? (yes) \"Well\" -- I cannot... wanna go! Price range: less than £20.",
            "it 's # 20-25 is n't it -lrb- yes -rrb- well i can not wan na go price range less than # 20",
        ),
        (
            "Alimentum is not family-friendly, and is near the Burger King in the city centre.",
            "alimentum is not family-friendly and is near the burger king in the city centre",
        ),
        ("the vaults pub near Café Adriatic , 5 - star .", "the vaults pub near café adriatic 5 star"),
        (
            "hors d'oeuvres, at St. Ives in the U.S. and e.g. Rd. 3.5",
            "hors d'oeuvres at st. ives in the u.s. and e.g. rd. 3.5",
        ),
        ("They\u2019ll say \u201cwe\u2019ve\u201d \u2013 or not\u2026", "they 'll say we 've or not"),
        (" . ", ""),
    ],
)
def test_words_of_the_penn_treebank(text, expected):
    assert content_words(text) == expected.split()


def test_nist_by_hand():
    # each of the reference's words is log2(3) worth, its pairs nothing; 2/3 of its length halve that
    assert nist_of_words(*words(("a b", ["a b c"]))) == pytest.approx(math.log2(3) / 2)
    # words 1, 2, 1, 2 of 4; pairs "a b" and "a c" 1 each, "b a" 0, of 3; the rest 0
    assert nist_of_words(*words(("a b a c", ["a b a c"]))) == pytest.approx(6 / 4 + 2 / 3)


def test_nist_counts_what_any_reference_has_and_divides_by_their_mean_length():
    # 6 words in the references, a in 2 of them; the mean length 3 is that of the prediction
    of_words = math.log2(6 / 2) + 2 * math.log2(6 / 1)
    of_pairs = math.log2(2 / 1)  # "a b"
    assert nist_of_words(*words(("a b d", ["a b", "a c d e"]))) == pytest.approx(of_words / 3 + of_pairs / 2)


def test_nist_counts_a_word_as_often_as_one_reference_has_it_and_excuses_length():
    assert nist_of_words(*words(("a a", ["a b", "a c"]))) == pytest.approx(math.log2(4 / 2) / 2)
    assert nist_of_words(*words(("a b c d", ["a b"]))) == pytest.approx(2 * math.log2(2) / 4)


def test_nist_of_a_word_has_no_pairs():
    rows = ("a b c a b d", ["a b c a b d"]), ("x", ["x"])
    of_words = 4 * math.log2(7 / 2) + 3 * math.log2(7)  # a and b twice of 7 words, the others once
    # of 5 pairs "b c" and "b d", of 4 triples "a b c" and "a b d" are worth log2(2)
    assert nist_of_words(*words(*rows)) == pytest.approx(of_words / 7 + 2 / 5 + 2 / 4)


def test_nist_of_nothing_is_nought():
    assert nist_of_words([[]], [["a"]]) == 0
    assert nist_of_words([["a"]], [[[]]]) == 0
    assert nist_of_words([["x"]], [["a"]]) == 0


def test_cider_by_hand():
    # two rows that share nothing, so that every n-gram weighs log 2; in the first row words and pairs agree
    assert value("cider", ["a b", "x y"], [["a b"], ["c d"]]) == pytest.approx(10 * (2 / 4) / 2)
    # saying a twice gains nothing, and is one pair too many
    words, pairs = 2 / (math.sqrt(5) * math.sqrt(2)), 1 / math.sqrt(2)
    expected = 10 * (words + pairs) / 4 * math.exp(-1 / 72) / 2
    assert value("cider", ["a b a", "x y"], [["a b"], ["c d"]]) == pytest.approx(expected)
    # an n-gram is as rare as the rows that have it are few, however many references of a row do
    assert value("cider", ["a", "x"], [["a", "a"], ["c"]]) == pytest.approx(10 * (1 / 4) / 2)
    # the mean over references
    assert value("cider", ["a b", "x y"], [["a b", "e f"], ["c d"]]) == pytest.approx(10 * (2 / 4) / 2 / 2)


def test_cider_counts_nothing_that_all_rows_have():
    assert value("cider", ["a", "a"], [["a"], ["a"]]) == 0
    assert value("cider", ["a b c d e"], [["a b c d e"]]) == 0


def test_e2es_rouge_by_hand():
    precision, recall = 1, 3 / 6
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert value("e2e_rouge_l", ["the cat sat"], [["The cat sat on the mat."]]) == pytest.approx(expected)
    # precision of one reference, recall of the other
    assert value("e2e_rouge_l", ["the cat sat"], [["the cat sat on the mat", "the cat"]]) == pytest.approx(1)
    assert value("e2e_rouge_l", ["a x b y", "q"], [["a b"], ["p"]]) == pytest.approx(2.44 * 0.5 / (1 + 1.44 * 0.5) / 2)


@given(ROWS)
def test_texts_without_words_are_measured_too(rows):
    predicted, wanted = [text for text, _ in rows], [references for _, references in rows]
    found = metrics.evaluate(["exact_match", "cider", "e2e_rouge_l"], predicted, wanted)
    assert 0 <= found["exact_match"] <= 1
    assert 0 <= found["cider"] <= 10 * (1 + 1e-12)
    assert 0 <= found["e2e_rouge_l"] <= 1 + 1e-12
    assert nist_of_words(*words(*rows)) >= 0


@given(ROWS)
def test_the_order_of_rows_and_references_does_not_matter(rows):
    names = ["exact_match", "cider", "e2e_rouge_l"]
    there = metrics.evaluate(names, [text for text, _ in rows], [references for _, references in rows])
    back = metrics.evaluate(names, [text for text, _ in rows[::-1]], [references[::-1] for _, references in rows[::-1]])
    assert there == pytest.approx(back)


COUNTING = """import sys
for line in sys.stdin:
    kind, *fields = line.strip().split(" ||| ")
    if kind == "SCORE":
        assert fields in (["the reference", "b", "a café"], ["d", "c"]), fields
        print(2 * len(fields) - 2, flush=True)
    else:
        print(*fields, sum(map(float, fields)), sep="\\n", flush=True)
"""
"""A program for which every reference counts twice."""


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Puts a script in the place of Java, and an empty folder in that of METEOR's."""

    def install(script):
        (tmp_path / "pycocoevalcap" / "meteor").mkdir(parents=True)
        (tmp_path / "pycocoevalcap" / "__init__.py").touch()
        program = tmp_path / "java"
        program.write_text(f"#!{sys.executable}\n{script}")
        program.chmod(0o755)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install


def test_meteor_asks_for_counts_and_then_for_the_score_of_all(java):
    java(COUNTING)
    assert value("meteor", ["A Café.", "c"], [["The reference.", "b"], ["d"]]) == 4 + 2


@pytest.mark.parametrize("script", ["raise SystemExit(1)", "print(input())"])
def test_meteor_says_that_its_program_failed(java, script):
    java(script)
    with pytest.raises(RefpeftError, match="meteor: its Java program ended without a score"):
        value("meteor", ["a"] * 9, [["b"]] * 9)


def test_only_sacrebleus_metrics_have_a_signature():
    with pytest.raises(RefpeftError, match="no signature of 'nist'; it has of bleu, e2e_bleu, chrf, ter"):
        metrics.signature("nist")
