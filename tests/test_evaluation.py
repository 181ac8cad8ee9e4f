"""Evaluations: which is better, which metrics a run has, and what a mean loss is the mean of."""

import pytest
import tiny_tokenizers

from refpeft.errors import RefpeftError
from refpeft.evaluation import better, deciding, names_of
from refpeft.tasks.classify import Classify
from refpeft.tasks.mlm import MLM
from refpeft.tasks.seq2seq import Seq2Seq
from refpeft.tokenizer import Tokenizer

BERT = Tokenizer(tiny_tokenizers.words(["a"]), {"eos_token": "[SEP]"})
CLASSIFY, HIDDEN, ANSWER = Classify(BERT, ("x", "y")), MLM(BERT), Seq2Seq(BERT, 0)


@pytest.mark.parametrize(
    ("metric", "least", "best"), [("loss", 2.0, 1.0), ("accuracy", 0.1, 0.9), ("perplexity", 3.0, 2.0)]
)
def test_an_evaluation_is_better_in_the_metrics_own_direction_and_not_where_it_is_equal(metric, least, best):
    assert better(metric, {metric: best}, {metric: least}) and not better(metric, {metric: least}, {metric: best})
    assert not better(metric, {metric: best}, {metric: best})


def test_what_is_asked_for_decides_or_the_tasks_first_metric_or_the_loss():
    assert deciding(CLASSIFY, None, "f1") == "f1" and deciding(CLASSIFY, None, None) == "accuracy"
    assert deciding(ANSWER, None, None) == "loss"
    assert names_of(CLASSIFY, None, ["f1", "accuracy"], "matthews") == ["accuracy", "f1", "matthews"]
    assert names_of(ANSWER, None, ["perplexity"], "exact_match") == ["perplexity", "exact_match"]
    assert names_of(HIDDEN, None) == ["perplexity"] and names_of(ANSWER, None, asked="loss") == []


@pytest.mark.parametrize(("task", "name"), [(CLASSIFY, "perplexity"), (CLASSIFY, "exact_match"), (HIDDEN, "accuracy")])
def test_a_metric_of_other_outputs_is_refused(task, name):
    with pytest.raises(RefpeftError, match=f"{name} is a metric of"):
        names_of(task, None, asked=name)
