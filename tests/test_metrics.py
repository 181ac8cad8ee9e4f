"""Metrics of labels, numbers, tags and losses: by hand, by properties, and what is refused."""

import importlib.util
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refpeft import metrics
from refpeft.errors import RefpeftError
from refpeft.metrics.tags import spans

LABELS = [1, 1, 0, 0, 1, 2], [1, 0, 0, 2, 1, 2]
"""Label 0: 1 hit, said 2 times, right 2 times; label 1: 2, 3, 2; label 2: 1, 1, 2."""


def value(name, predicted, wanted, **context):
    return metrics.METRICS[name](predicted, wanted, **context)


@st.composite
def pairs(draw, element):
    """Two equally long arrays."""
    n = draw(st.integers(1, 30))
    return tuple(np.array(draw(st.lists(element, min_size=n, max_size=n))) for _ in range(2))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("accuracy", 4 / 6),
        ("f1_micro", 4 / 6),
        ("f1_macro", (2 / 4 + 4 / 5 + 2 / 3) / 3),
        ("matthews", 12 / math.sqrt(22 * 24)),  # 6 * 4 - (4 + 6 + 2); 36 - (4 + 9 + 1); 36 - (4 + 4 + 4)
    ],
)
def test_three_labels_by_hand(name, expected):
    assert value(name, *LABELS) == pytest.approx(expected)


def test_two_labels_by_hand():
    predicted, wanted = [1, 1, 1, 0], [1, 1, 0, 0]  # 2 true positives, 1 false one, 1 true negative
    assert value("f1", predicted, wanted) == pytest.approx(4 / 5)
    assert value("f1", predicted, wanted, labels=["no", "yes"]) == pytest.approx(4 / 5)
    assert value("f1_macro", predicted, wanted) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert value("matthews", predicted, wanted) == pytest.approx(2 / math.sqrt(12))


@pytest.mark.parametrize(
    "predicted, wanted, f1, macro, matthews",
    [
        ([0, 0], [0, 0], 0, 1, 0),  # all right, but label 1 is never said nor wanted
        ([1, 1], [1, 1], 1, 1, 0),
        ([0, 0], [1, 1], 0, 0, 0),
        ([1, 1, 1, 1], [1, 1, 1, 0], 6 / 7, 3 / 7, 0),  # one label is always said
        ([1], [1], 1, 1, 0),
    ],
)
def test_where_a_label_never_occurs(predicted, wanted, f1, macro, matthews):
    found = metrics.evaluate(["f1", "f1_macro", "matthews"], predicted, wanted)
    assert found == pytest.approx({"f1": f1, "f1_macro": macro, "matthews": matthews})


def test_f1_is_of_two_labels():
    with pytest.raises(RefpeftError, match="f1 is of two labels, and there are 3; f1_macro and f1_micro"):
        value("f1", *LABELS)
    with pytest.raises(RefpeftError, match="there are 3"):
        value("f1", [0, 1], [0, 1], labels=["a", "b", "c"])


@given(pairs(st.integers(0, 4)))
def test_labels_are_measured_alike_in_any_order_of_rows_and_both_ways(arrays):
    predicted, wanted = arrays
    names = ["accuracy", "f1_macro", "f1_micro", "matthews"]
    found = metrics.evaluate(names, predicted, wanted)
    assert found == pytest.approx(metrics.evaluate(names, predicted[::-1], wanted[::-1]))
    assert found == pytest.approx(metrics.evaluate(names, wanted, predicted))
    assert all(0 <= found[name] <= 1 for name in names[:3])
    assert -1 <= found["matthews"] <= 1


@given(pairs(st.integers(0, 4)))
def test_right_labels_are_measured_as_right(arrays):
    _, wanted = arrays
    found = metrics.evaluate(["accuracy", "f1_macro", "matthews"], wanted, wanted)
    assert found == {"accuracy": 1, "f1_macro": 1, "matthews": float(len(set(wanted)) > 1)}


@given(pairs(st.integers(0, 1)))
def test_matthews_of_two_labels_is_pearsons_of_their_numbers(arrays):
    assert value("matthews", *arrays) == pytest.approx(value("pearson", *arrays), abs=1e-12)


def test_correlations_by_hand():
    assert value("pearson", [1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert value("spearman", [1, 20, 300], [1, 3, 2]) == pytest.approx(0.5)
    # equal numbers share the mean of their ranks: 1, 2.5, 2.5, 4
    assert value("spearman", [5, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_correlation_with_a_constant_is_nought():
    # the mean of these is not 0.1
    for constant in ([0.1] * 6, [0.0] * 6, [1e300] * 6):
        assert metrics.evaluate(["pearson", "spearman"], constant, range(6)) == {"pearson": 0, "spearman": 0}
        assert metrics.evaluate(["pearson", "spearman"], range(6), constant) == {"pearson": 0, "spearman": 0}
    assert metrics.evaluate(["pearson", "spearman"], [3.0], [4.0]) == {"pearson": 0, "spearman": 0}


def test_correlation_of_what_is_not_a_number_is_none():
    assert all(map(math.isnan, metrics.evaluate(["pearson", "spearman"], [1, math.nan, 3], [1, 2, 3]).values()))
    assert math.isnan(value("pearson", [1, math.inf, 3], [1, 2, 3]))
    assert value("spearman", [1, math.inf, 3], [1, 3, 2]) == 1


def test_correlation_of_numbers_at_the_ends_of_floats():
    x = np.array([1.0, 2.0, 4.0])
    for scale in (1e307, 1e-300):
        assert value("pearson", x * scale, [1, 3, 2]) == pytest.approx(value("pearson", x, [1, 3, 2]))


@given(pairs(st.integers(-1000, 1000)))
def test_spearmans_is_of_the_order_alone(arrays):
    predicted, wanted = arrays
    assert value("spearman", predicted**3, wanted) == value("spearman", predicted, wanted)
    assert value("spearman", -predicted, wanted) == pytest.approx(-value("spearman", predicted, wanted), abs=1e-12)


@given(pairs(st.floats(-1e300, 1e300)))
def test_correlations_stay_within_one(arrays):
    assert all(-1 <= found <= 1 for found in metrics.evaluate(["pearson", "spearman"], *arrays).values())


@given(pairs(st.floats(-1e6, 1e6)), st.floats(0.1, 10), st.floats(-10, 10))
def test_a_line_correlates_fully(arrays, slope, offset):
    x, _ = arrays
    assume(np.ptp(x) > 1e-3)
    assert value("pearson", slope * x + offset, x) == pytest.approx(1)
    assert value("pearson", -slope * x + offset, x) == pytest.approx(-1)


def test_losses_by_hand():
    assert value("perplexity", [3 * math.log(2), math.log(2)], [3, 1]) == pytest.approx(2)
    assert value("perplexity", 10 * math.log(5), 10) == pytest.approx(5)
    assert value("bits_per_byte", 8 * math.log(2), 3, bytes=4) == pytest.approx(2)
    assert value("bits_per_byte", [8 * math.log(2)], [3], bytes=[1, 3]) == pytest.approx(2)


def test_a_loss_without_bounds_is_a_perplexity_without_bounds():
    assert value("perplexity", 1e6, 1) == math.inf
    assert math.isnan(value("perplexity", math.nan, 1))


def test_bits_per_byte_needs_the_bytes():
    with pytest.raises(RefpeftError, match="bits_per_byte needs bytes="):
        value("bits_per_byte", 1.0, 3)


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("O B-PER I-PER O B-LOC", {("PER", 1, 3), ("LOC", 4, 5)}),
        ("I-PER I-PER B-PER O", {("PER", 0, 2), ("PER", 2, 3)}),  # IOB1: B only where spans of a type meet
        ("I-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
        ("B-PER O I-PER", {("PER", 0, 1), ("PER", 2, 3)}),
        ("S-PER B-LOC I-LOC E-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 4), ("LOC", 4, 5)}),
        ("B-PER S-PER S-PER E-PER", {("PER", 0, 1), ("PER", 1, 2), ("PER", 2, 3), ("PER", 3, 4)}),
        ("B I O B", {("", 0, 2), ("", 3, 4)}),  # one type without a name
        ("B-a-b I-a-b I-a", {("a-b", 0, 2), ("a", 2, 3)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_spans_of_tags(tags, expected):
    assert spans(tags.split()) == expected


def test_spans_count_only_if_words_and_type_are_right():
    wanted = [["B-PER", "I-PER", "O", "B-LOC", "O", "B-ORG"], ["O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-ORG", "O", "O"], ["O", "B-LOC"]]
    # 2 hits; 3 spans said, 4 wanted
    assert value("span_f1", predicted, wanted) == pytest.approx(4 / 7)
    assert value("tag_accuracy", predicted, wanted) == pytest.approx(6 / 8)
    assert value("span_f1", [["O", "O"]], [["B-PER", "I-PER"]]) == 0


def test_where_there_are_no_spans_or_words():
    assert value("span_f1", [["O"]], [["O"]]) == 0
    assert value("tag_accuracy", [[]], [[]]) == 0


@pytest.mark.parametrize("tag", ["NN", "X-PER", "O-PER", "b-PER", ""])
def test_tags_that_mark_no_spans_are_refused(tag):
    with pytest.raises(RefpeftError, match=r"is no tag of a span .* tag_accuracy takes any"):
        value("span_f1", [[tag]], [["O"]])
    assert value("tag_accuracy", [[tag]], [[tag]]) == 1


@pytest.mark.parametrize(
    "name, predicted, wanted, message",
    [
        ("accuracy", [], [], "accuracy: nothing to measure, there are no predictions"),
        ("accuracy", [1], [1, 2], "accuracy: 1 predictions for 2 rows"),
        ("accuracy", [[1, 0]], [1], r"one value a row, found an array of shape \(1, 2\)"),
        ("accuracy", [1, 0], [1, -100], "labels are whole numbers from 0, found int64 from -100"),
        ("matthews", [0.5], [1], "labels are whole numbers from 0, found float64 from 0.5"),
        ("pearson", [1.0, 2.0], [1.0], "pearson: 2 predictions for 1 rows"),
        ("span_f1", [], [], "nothing to measure"),
        ("span_f1", [["O"], ["O"]], [["O"], ["O", "O"]], "row 2 has 2 words, but 1 predicted tags"),
        ("perplexity", 0.0, 0, "perplexity: nothing to measure, there are no tokens"),
        ("exact_match", [], [], "nothing to measure"),
        ("exact_match", ["a", "b"], [["a"]], "2 predictions for 1 rows"),
        ("exact_match", ["a", "b"], [["a"], []], "row 2 has no reference"),
        ("exact_match", ["a"], ["a"], "row 1 is not a text and a list of references"),
        ("exact_match", [3], [["a"]], "row 1 is not a text and a list of references"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, predicted, wanted, message):
    with pytest.raises(RefpeftError, match=message):
        value(name, predicted, wanted)


def test_metrics_say_what_they_are():
    for name, metric in metrics.METRICS.items():
        assert metric.name == name
        assert metric.summary
    assert {name for name, metric in metrics.METRICS.items() if not metric.higher_is_better} == {
        "perplexity",
        "bits_per_byte",
        "ter",
    }


@pytest.mark.parametrize("name, good, bad", [("accuracy", 0.9, 0.8), ("perplexity", 5.0, 6.0)])
def test_better_is_what_the_metric_says_and_never_nan(name, good, bad):
    better = metrics.METRICS[name].better
    assert better(good, bad) and not better(bad, good) and not better(good, good)
    assert better(bad, math.nan) and not better(math.nan, bad) and not better(math.nan, math.nan)


@pytest.mark.parametrize(
    "names, of, message",
    [
        (
            ["accuracy", "mathews"],
            "labels",
            "there is no metric 'mathews'; did you mean 'matthews'.*of labels there are",
        ),
        (["pearson"], "labels", "pearson is a metric of numbers, not of labels; of labels there are accuracy, f1, "),
    ],
)
def test_names_are_checked(names, of, message):
    with pytest.raises(RefpeftError, match=message):
        metrics.check(names, of)


def test_what_can_be_evaluated_passes_the_check():
    metrics.check(["accuracy", "f1"], "labels", ["no", "yes"])
    metrics.check([], "texts")
    with pytest.raises(RefpeftError, match="there are 3"):
        metrics.check(["f1"], "labels", ["a", "b", "c"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("bleu", r"bleu needs sacrebleu, which is not installed: pip install 'refpeft\[metrics\]'"),
        ("rouge1", r"rouge1 needs rouge-score, which is not installed: pip install 'refpeft\[metrics\]'"),
        ("meteor", "meteor needs java, which is not installed: install a Java runtime"),
    ],
)
def test_what_is_missing_is_said_before_training_and_when_it_is_used(name, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(RefpeftError, match=message):
        metrics.check([name], "texts")
    with pytest.raises(RefpeftError, match=message):
        value(name, ["a"], [["a"]])


def test_importing_metrics_imports_no_library():
    code = "import sys, refpeft.metrics; print([m for m in ('sacrebleu', 'rouge_score', 'nltk') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
