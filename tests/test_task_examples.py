"""What each task makes of an item, and of what a model says, without a run and without files."""

import numpy as np
import pytest
import tiny
import tiny_tokenizers
from test_encoder import CONFIGS as ENCODERS

from refpeft import inputs, tasks
from refpeft.batches import IGNORE, Batch, Batches, split
from refpeft.config import RunConfig, Train
from refpeft.data import Data, Summary
from refpeft.errors import RefpeftError
from refpeft.examples import Answered, Asked, Example, Masked, Pair
from refpeft.formats import Items
from refpeft.items import Labelled, Plain, Tagged
from refpeft.models import heads
from refpeft.models.config import from_hf
from refpeft.rng import Stream
from refpeft.tasks.base import softmax
from refpeft.tasks.causal_lm import CausalLM
from refpeft.tasks.classify import Classify, balanced, labels_of, number_of
from refpeft.tasks.embed import Embed
from refpeft.tasks.mlm import MLM
from refpeft.tasks.regress import Regress
from refpeft.tasks.seq2seq import Seq2Seq
from refpeft.tasks.tag import Tag
from refpeft.tokenizer import Tokenizer

WORDS = ["good", "bad", "film", "a", "the", "is", "it", "was", "not", "very", "##s"]
BERT = Tokenizer(tiny_tokenizers.words(WORDS), {"eos_token": "[SEP]", "mask_token": "[MASK]"})
PLAIN = tiny_tokenizers.plain()


def encoder(task: str, labels: tuple[str, ...] = ()):
    """A tiny BERT with a head whose outputs are far from each other."""
    model = tiny.of(ENCODERS["bert"] | {"vocab_size": BERT.vocab_size})
    heads.put_on(model, task, labels)
    for name in model.new_head:
        array = model.frozen[name]()
        array[...] = np.random.default_rng(len(name)).normal(0, 0.5, array.shape)
    return model


def batches(examples, size: int = 2) -> Batches:
    return Batches(examples, size, 64, shuffle=False)


def tokens(ids) -> str:
    return " ".join(map(BERT.backend.id_to_token, map(int, ids)))


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_that_are_numbers_are_in_the_order_of_numbers():
    assert labels_of([Labelled("a", label=n) for n in (10, 9, 1)]) == ("1", "9", "10")
    assert labels_of([Labelled("a", label=n) for n in ("b", "a")]) == ("a", "b")


@pytest.mark.parametrize("label", [2, -1, "x"])
def test_a_label_that_there_is_none_of_is_named(label):
    with pytest.raises(RefpeftError, match=f"label '{label}' is unknown"):
        number_of(label, ("down", "up"))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.5], [0.0, 0.0]])
def test_weights_that_are_none_are_refused(weights):
    task = Classify(BERT, ("down", "up"))
    with pytest.raises(RefpeftError, match="expected one of 0 or more for each of the labels down, up"):
        task.weigh(weights)
    task.weigh([0.0, 1.0])
    assert task.weights.tolist() == [0, 1]


def test_balanced_weights_make_labels_count_the_same():
    items = [Tagged(["a", "film"], ["O", "B"]), Tagged(["a", "the"], ["O", "O"])]
    assert balanced(items, ("B", "O")).tolist() == pytest.approx([2, 2 / 3])
    with pytest.raises(RefpeftError, match="no row has the label 'C'"):
        balanced(items, ("B", "C", "O"))


def test_each_value_has_the_weight_of_its_label():
    classify, tag = Classify(BERT, ("down", "up")), Tag(BERT, ("B", "O"))
    for task in (classify, tag):
        task.weigh([1.0, 3.0])
    (example,) = classify.encode(Labelled("a film", label="up"), 7)
    assert example.weights.tolist() == [3] and example.line == 7
    (example,) = tag.encode(Tagged(["a", "films"], ["O", "B"]), 7)
    assert example.weights.tolist() == [3, 1] and example.at.tolist() == [1, 2]


def test_what_is_to_be_predicted_needs_no_label():
    assert Classify(BERT, ("x", "y")).encode(Labelled("a"), 1)[0].values.tolist() == [0]
    assert Tag(BERT, ("x", "y")).encode(Tagged(["a", "film"]), 1)[0].values.tolist() == [0, 0]
    (example,) = Regress(BERT).encode(Labelled("a"), 1)
    assert example.values.tolist() == [0] and example.values.dtype == np.float32


def test_rows_are_for_labels_where_some_have_one():
    read = Items([], [Labelled("a", "b"), Labelled("a", "b", "x")], "label", [], [])
    assert tasks.name_of(None, read, from_hf(ENCODERS["bert"])) == "classify"
    read = Items([], [Labelled("a", "b", 1), Labelled("a", "b", 0.5)], "label", [], [])
    assert tasks.name_of(None, read, from_hf(ENCODERS["bert"])) == "regress"


def test_weights_of_classes_are_for_tasks_with_labels():
    with pytest.raises(RefpeftError, match="class_weights has no effect: the task 'regress' has no labels"):
        tasks.make("regress", BERT, from_hf(ENCODERS["bert"]), class_weights=(1.0,))


@pytest.mark.parametrize("task", [Tag(BERT, ("x", "y")), Classify(PLAIN, ("x", "y")), Embed(PLAIN)])
def test_what_has_no_tokens_cannot_be_asked_about(task):
    item = Tagged(["a", "", "b"], ["x"] * 3) if task.name == "tag" else Labelled("")
    with pytest.raises(RefpeftError, match="the word '' has no tokens" if task.name == "tag" else "text has no tokens"):
        task.encode(item, 1)


# -- texts in fewer tokens ---------------------------------------------------------------------------------------------


def test_a_cut_text_keeps_its_line_and_its_special_tokens():
    long = Labelled("the film is very good", label=2)
    for task in (Classify(BERT, ("0", "2")), Regress(BERT)):
        (example,) = task.encode(long, 9)
        cut = task.cut(long, example, 4)
        assert tokens(cut.ids) == "[CLS] the film [SEP]" and cut.line == 9
        assert cut.values.tolist() == example.values.tolist()


def test_a_cut_source_and_cut_texts_of_a_pair_end_as_they_did():
    task = Seq2Seq(BERT, 0)
    item = Plain("the film is very good", "it was very good")
    (example,) = task.encode(item, 1)
    assert tokens(example.ids) == "the film is very good [SEP]" and task.wanted(example) == "it was very good"
    cut = task.cut(item, example, 3)
    assert tokens(cut.ids) == "the film [SEP]" and tokens(cut.answer) == "it was very"
    assert tokens(task.cut(item, example, 6).ids) == tokens(example.ids)
    pair = Labelled("the film is good", "a film")
    cut = Embed(BERT).cut(pair, Embed(BERT).encode(pair, 1)[0], 5)
    assert tokens(cut.a) == "[CLS] the film is [SEP]" and tokens(cut.b) == "[CLS] a film [SEP]"


@pytest.mark.parametrize("item", [Labelled("a", label="x"), Plain(" ", "a")])
def test_an_answer_needs_a_source(item):
    with pytest.raises(RefpeftError, match="expected a source and its target"):
        Seq2Seq(BERT, 0).encode(item, 1)


def test_a_text_of_which_nothing_would_be_hidden_is_dropped():
    for task, item in ((MLM(BERT), Plain("a film", "")), (Tag(BERT, ("B", "O")), Tagged(["a", "film"], ["O", "B"]))):
        (example,) = task.encode(item, 1)
        assert task.cut(item, example, 2) is None and task.cut(item, example, 3).targets == 1


# -- batches -----------------------------------------------------------------------------------------------------------


def test_of_an_example_the_targets_count_behind_its_first_token():
    ids = np.arange(4, dtype=np.int32)
    assert Example(ids, np.ones(4, bool), 1).targets == 3
    assert Masked(ids, np.arange(1, 3), 1, 3, 40).targets == 1  # one at least
    assert Masked(np.arange(30), np.arange(1, 12), 1, 3, 40).targets == 2
    assert Answered(ids, ids[:2], 0, 1).targets == 2


def test_the_length_of_an_example_is_that_of_its_longer_text():
    long, short = np.zeros(5, np.int32), np.zeros(2, np.int32)
    assert len(Answered(short, long, 0, 1)) == len(Answered(long, short, 0, 1)) == 5
    assert len(Pair(short, long, 1)) == len(Pair(long, short, 1)) == 5


def test_of_hidden_tokens_eight_in_ten_are_masks_and_one_in_ten_is_any_token():
    ids = np.full(20_000, 7, np.int32)
    batch = Masked.collate([[Masked(ids, np.arange(20_000), 1, mask=3, vocab=40, share=0.5)]], draw=Stream(0, "batch"))
    hidden = batch.targets[0] >= 0
    assert hidden.sum() == 10_000 and (batch.targets[0, hidden] == 7).all() and (batch.ids[0, ~hidden] == 7).all()
    assert 4_700 < hidden[:10_000].sum() < 5_300
    found = batch.ids[0, hidden]
    shares = np.bincount(found, minlength=40) / 10_000
    assert shares[3] == pytest.approx(0.8 + 0.1 / 40, abs=0.02) and shares[7] == pytest.approx(0.1 + 0.1 / 40, abs=0.02)
    others = np.delete(shares, [3, 7])
    assert others.sum() == pytest.approx(0.1, abs=0.02) and others.min() > 0


def test_answers_begin_with_the_start_token_and_values_stand_at_their_tokens():
    answers = [[Answered(np.array([5, 2]), np.array([6, 7, 2]), 9, 1)], [Answered(np.array([5]), np.array([2]), 9, 2)]]
    batch = Answered.collate(answers)
    assert batch.said.tolist() == [[9, 6, 7], [9, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 2], [2, IGNORE, IGNORE]]
    ids, types = np.arange(3, dtype=np.int32), np.array([0, 0, 1], np.int32)
    examples = [
        [Asked(ids, np.array([1, 2]), np.array([0, 4], np.int32), 1, types, np.array([0.5, 2], np.float32))],
        [Asked(ids[:2], np.array([0]), np.array([3], np.int32), 2, types[:2], np.array([4], np.float32))],
    ]
    batch = Asked.collate(examples)
    assert batch.targets.tolist() == [[IGNORE, 0, 4], [3, IGNORE, IGNORE]]
    assert batch.types.tolist() == [[0, 0, 1], [0, 0, 0]] and batch.segments.tolist() == [[0, 0, 0], [0, 0, -1]]
    assert batch.weights.tolist() == [[0, 0.5, 2], [4, 0, 0]]
    assert batch.denominator == 6.5 and batch.supervised == 3 and batch.asked.tolist() == [1, 2, 3]


def test_parts_of_a_batch_keep_pairs_together_and_cut_what_a_decoder_says():
    pairs = Pair.collate([[Pair(np.ones(n, np.int32), np.ones(2, np.int32), n, n / 8)] for n in (4, 3, 2)])
    assert pairs.targets[::2, 0].tolist() == [0.5, 0.375, 0.25] and np.isnan(pairs.targets[1::2]).all()
    assert [part.ids.shape for part in split(pairs, 2)] == [(4, 4), (2, 2)]
    assert all(part.rows_each == 2 for part in split(pairs, 2))
    weights = np.ones((2, 3), np.float32)
    said = np.array([[9, 6, 7], [9, 0, 0]])
    whole = Batch(np.ones((2, 4), int), np.array([[6, 7, 2], [2, IGNORE, IGNORE]]), said=said, weights=weights)
    first, second = split(whole, 1)
    assert first.said.shape == first.weights.shape == first.targets.shape == (1, 3)
    assert second.said.shape == second.weights.shape == second.targets.shape == (1, 1) and second.ids.shape == (1, 4)


def test_held_out_rows_are_batched_as_large_as_a_step_computes_at_a_time():
    rows = Data(
        [Example(np.zeros(3, np.int32), np.ones(3, bool), n) for n in range(8)], Summary(*"abc", 8, [], 0, 0, 0)
    )
    run = RunConfig(train=Train(batch=6, micro_batch=2))
    config = from_hf(tiny.LLAMA)
    assert [inputs.make_batches(run, rows, config, shuffle).batch for shuffle in (True, False)] == [6, 2]


# -- what models say ---------------------------------------------------------------------------------------------------


def test_a_measured_loss_is_the_mean_of_all_targets_by_weight():
    for task, items in (
        (Tag(BERT, ("B", "O")), [Tagged(["a"] * n, ["O"] + ["B"] * (n - 1)) for n in (5, 1, 2)]),
        (Classify(BERT, ("B", "O")), [Labelled("a film " * n, label="BO"[n % 2]) for n in (4, 1, 2)]),
        (Regress(BERT), [Labelled("a film " * n, label=n / 2) for n in (4, 1, 2)]),
    ):
        if task.labels:
            task.weigh([1.0, 3.0])
        model = encoder(task.name, task.labels)
        examples = [example for line, item in enumerate(items) for example in task.encode(item, line)]
        whole = float(model.loss(batches(examples, 3).at(0)).data)
        for size in (1, 2, 3):
            assert task.measure(model, batches(examples, size))["loss"] == pytest.approx(whole, rel=1e-9)


def test_predictions_are_the_largest_outputs_with_their_probabilities():
    items = [Labelled("a film " * n, label="x") for n in range(1, 7)]
    model, task = encoder("classify", ("x", "y")), Classify(BERT, ("x", "y"))
    examples = [task.encode(item, line)[0] for line, item in enumerate(items)]
    for line, told in task.predict(model, batches(examples)):
        batch = batches([examples[line]], 1).at(0)
        (p,) = softmax(model(batch.ids, types=batch.types).data)
        assert told["predicted"] == "xy"[p.argmax()]
        assert told["probability"] == pytest.approx(p.max()) and list(told["probabilities"]) == ["x", "y"]
        assert list(told["probabilities"].values()) == pytest.approx(p)
    model, task = encoder("tag", ("x", "y")), Tag(BERT, ("x", "y"))
    (example,) = task.encode(Tagged(["a", "films", "is"], ["x", "x", "y"]), 1)
    (said,) = model(example.ids[None]).data[:, [1, 2, 4]]
    model.head.bias[1] += np.median(said[:, 0] - said[:, 1]) + 1e-3  # some are x and some y
    (said,) = softmax(model(example.ids[None]).data)[:, [1, 2, 4]]
    ((_, told),) = task.predict(model, batches([example]))
    assert told["predicted"] == ["xy"[number] for number in said.argmax(axis=1)] and len(set(told["predicted"])) == 2
    assert told["probabilities"] == pytest.approx(said.max(axis=1))
    assert task.compared([next(task.told(model, batches([example])))]) == ([told["predicted"]], [["x", "x", "y"]])


def test_hidden_tokens_are_told_with_the_five_likeliest_and_their_probabilities():
    model, task = encoder("mlm"), MLM(BERT)
    (example,) = task.encode(Plain("a [MASK] is ", "[MASK]"), 4)
    assert (example.mask, example.vocab) == (BERT.mask_id, BERT.vocab_size)
    ((line, told),) = task.predict(model, batches([example]))
    (said,) = softmax(model(example.ids[None]).data)
    assert line == 4 and len(told["predicted"]) == 2
    for at, found in zip((2, 4), told["predicted"], strict=True):
        best = np.argsort(-said[at])[:5]
        assert list(found) == [BERT.backend.id_to_token(token) for token in best]
        assert list(found.values()) == pytest.approx(said[at, best])


def test_of_hidden_tokens_that_read_alike_the_likeliest_is_told():
    task = MLM(BERT)
    task.tokenizer = Tokenizer(tiny_tokenizers.words(WORDS), {})
    task.tokenizer.decode = lambda ids, **how: " alike "
    (example,) = task.encode(Plain("a [MASK] is", ""), 4)
    model = encoder("mlm")
    ((_, told),) = task.predict(model, batches([example]))
    assert told["predicted"] == [{"alike": pytest.approx(softmax(model(example.ids[None]).data)[0, 2].max())}]


def test_vectors_of_a_pair_are_told_with_their_cosine_and_that_of_a_text_alone():
    model, task = encoder("embed"), Embed(BERT, highest=5.0)
    items = [Labelled("a film", "the film is good", 4), Labelled("a film"), Plain("a ", "film")]
    examples = [task.encode(item, line)[0] for line, item in enumerate(items)]
    assert examples[0].score == 0.8 and examples[1].score is None
    told = dict(task.predict(model, batches(examples)))
    vectors = [model(task.encode(Plain(text, ""), 1)[0].a[None]).data[0] for text in ("a film", "the film is good")]
    assert told[0]["vector"] == pytest.approx(vectors[0]) and told[0]["vector_b"] == pytest.approx(vectors[1])
    assert told[0]["cosine"] == pytest.approx(vectors[0] @ vectors[1])
    assert list(told[1]) == list(told[2]) == ["vector"] and told[1]["vector"] == pytest.approx(vectors[0])


def test_scores_are_shares_of_the_highest_one_or_of_one():
    config = from_hf(ENCODERS["bert"])
    assert tasks.make("embed", BERT, config, [Labelled("a", "b", n) for n in (1, 5)]).highest == 5
    assert tasks.make("embed", BERT, config, [Labelled("a", "b", 0.2)]).highest == 1


def test_bits_are_of_the_bytes_that_are_learned():
    model, task = tiny.of(tiny.LLAMA | {"vocab_size": PLAIN.vocab_size}), CausalLM(PLAIN)
    examples = [task.encode(Plain("hello: ", answer), line)[0] for line, answer in enumerate((" yes", " no no"))]
    found = task.measure(model, batches(examples), ["bits_per_byte"])
    nats = found["loss"] * sum(example.targets for example in examples)
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(" yes no no"))


def test_answers_and_references_are_compared_without_the_spaces_around_them(monkeypatch):
    model, task = tiny.of(tiny.LLAMA | {"vocab_size": PLAIN.vocab_size}), CausalLM(PLAIN)
    examples = [task.encode(Plain("hello:", answer), line)[0] for line, answer in enumerate((" yes", " no"))]
    asked = []

    def generate(model, prompts, most, **how):
        asked.extend(prompts)
        return [PLAIN.encode("no\n")]

    monkeypatch.setattr("refpeft.tasks.texts.generate", generate)
    assert task.measure(model, batches(examples), ["exact_match"])["exact_match"] == 1  # one of two is right
    assert [PLAIN.decode(prompt) for prompt in asked] == ["hello:"]
    assert [told["predicted"] for _, told in task.predict(model, batches(examples[:1]))] == ["no"]


def test_each_answer_is_that_of_its_own_prompt_and_ends_with_the_decoders_choice(monkeypatch):
    task = CausalLM(PLAIN)
    given = {}

    def generate(model, prompts, most, **how):
        given.update(how, most=most, largest=max(given.get("largest", 0), len(prompts)))
        return [prompt[::-1] for prompt in prompts]

    monkeypatch.setattr("refpeft.tasks.texts.generate", generate)
    task.decoding = {"beams": 3}
    prompts = [np.array(PLAIN.encode("a" * (n % 5 + 1) + "bcdefghijklmnopqrst"[n])) for n in range(19)]
    said = task.answers(None, prompts, 9)
    assert said == [PLAIN.decode(prompt[::-1]) for prompt in prompts]
    assert given == {"stop": PLAIN.eos_ids, "beams": 3, "most": 9, "largest": 16}
    wanted = [Example(np.zeros(n, np.int32), np.ones(n, bool), 1) for n in (3, 6)]
    assert task.longest(wanted) == 5 + 8
    assert task.longest([Example(np.zeros(500, np.int32), np.ones(500, bool), 1)]) == 200
