"""Beam search: the best of all where it keeps all, its definition on tables, the same alone and in batches."""

import itertools

import numpy as np
import pytest
import test_t5
import tiny

from refpeft import sites
from refpeft.conformance import device
from refpeft.generate import answers
from refpeft.models.base import Model
from refpeft.models.cache import Cache
from refpeft.search import Beams, Single
from refpeft.tensor import Tensor

PROMPTS = [[5, 9, 2], [7, 1, 30, 22, 8, 3, 11], [4]]
OPTIONS = {"beams": 4, "length_penalty": 0.9, "no_repeat_ngram": 2}
MODELS = ["llama", "gpt2", "t5", "flan"]


def built(name: str, xp=np) -> Model:
    return tiny.of(test_t5.CONFIGS[name], xp=xp) if name in test_t5.CONFIGS else tiny.model(name, xp=xp)


def log_probabilities(model: Model, prompt: list[int], said: np.ndarray) -> np.ndarray:
    """log p(said | prompt) of rows `said` (rows, time), token by token, by one forward pass without a cache."""
    rows = len(said)
    if model.task == "seq2seq":
        logits = model(np.array([prompt] * rows), np.pad(said[:, :-1], ((0, 0), (1, 0)))).data
    else:
        logits = model(np.concatenate((np.array([prompt] * rows), said[:, :-1]), axis=1)).data[:, len(prompt) - 1 :]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logp, said[..., None], axis=-1)[..., 0]


# ---- the search, on tables of probabilities ----


def table(vocab: int, seed: int):
    """Log-probabilities of the next token that depend on all tokens before it."""

    def after(said: list[int]) -> np.ndarray:
        logits = np.random.default_rng([seed, *said]).normal(0, 2, vocab)
        return logits - np.log(np.exp(logits).sum())

    return after


def walked(walk: Single | Beams, after) -> Single | Beams:
    """A walk taken to its end."""
    while walk.said:
        assert len(walk.said) <= getattr(walk, "beams", 1)
        walk.step(np.stack([after(said) for said in walk.said]))
    return walk


def all_answers(after, vocab: int, most: int, stop: set[int]):
    """(tokens, with their stop token; log-probability) of every answer that there is."""
    others = [token for token in range(vocab) if token not in stop]
    for length in range(1, most + 1):
        for start in itertools.product(others, repeat=length - 1):
            for last in range(vocab) if length == most else sorted(stop):
                said = [*start, last]
                yield said, sum(after(said[:i])[token] for i, token in enumerate(said))


@pytest.mark.parametrize("length_penalty", [0.0, 0.9, 2.0, -1.0])
@pytest.mark.parametrize("stop", [set(), {1}, {0, 2}])
def test_beams_that_keep_everything_find_the_best_of_all_answers(stop, length_penalty):
    vocab, most = 4, 4
    for seed in range(5):
        after = table(vocab, seed)
        best, logprob = max(
            all_answers(after, vocab, most, stop), key=lambda found: found[1] / len(found[0]) ** length_penalty
        )
        answer = walked(Beams(most, stop, vocab**most, length_penalty), after).answer
        assert answer.tokens == (best[:-1] if answer.stopped else best)
        assert answer.stopped == (best[-1] in stop)
        assert answer.logprob == pytest.approx(logprob, rel=1e-12)
        assert answer.score(length_penalty) == pytest.approx(logprob / len(best) ** length_penalty, rel=1e-12)


def test_a_token_that_pays_off_later_is_found_by_two_beams_and_not_by_one():
    likely = {(): [0.6, 0.4], (0,): [0.5, 0.5], (1,): [0.1, 0.9]}

    def after(said):
        return np.log(likely[tuple(said)])

    assert walked(Single(2, ()), after).answer.logprob == pytest.approx(np.log(0.3))
    answer = walked(Beams(2, (), 2, 1.0), after).answer
    assert answer.tokens == [1, 1] and answer.logprob == pytest.approx(np.log(0.36))


def test_one_beam_is_the_greedy_answer_where_nothing_stops():
    for seed in range(5):
        after = table(6, seed)
        assert walked(Beams(7, (), 1, 1.0), after).answer == walked(Single(7, ()), after).answer


def test_the_search_ends_when_no_open_continuation_scores_better_at_its_present_length():
    stop, steps = 0, []

    def after(said):
        steps.append(len(said))
        return np.log([0.5, 0.3, 0.2])

    walk = walked(Beams(50, {stop}, 1, 0.0), after)
    assert walk.answer.tokens == [] and walk.answer.stopped
    assert max(steps) == 0  # 0.3 is less than 0.5 already
    steps.clear()
    walk = walked(Beams(50, {stop}, 2, 0.0), after)
    assert walk.answer.logprob == pytest.approx(np.log(0.5))
    assert max(steps) == 1  # 0.5 and 0.3 * 0.5 are finished, and 0.3 * 0.3 is open
    steps.clear()
    walk = walked(Beams(50, {stop}, 2, 2.0), after)
    assert walk.answer.tokens == [1] and max(steps) == 1  # though 50 tokens would have scored better than 2


def test_an_open_continuation_that_may_replace_the_worst_finished_one_goes_on():
    likely = {(): [0.5, 0.3, 0.2], (1,): [0.3, 0.65, 0.05], (2,): [0.2, 0.4, 0.4]}  # 0 stops
    steps = []

    def after(said):
        steps.append(len(said))
        return np.log(likely.get(tuple(said), [0.2, 0.4, 0.4]))

    assert walked(Beams(3, {0}, 2, 0.0), after).answer.tokens == []
    assert max(steps) == 2  # 0.5 and 0.3 * 0.3 are finished, and 0.3 * 0.65 is open


def test_what_stops_below_the_best_candidates_is_no_answer():
    likely = {(): [0.5, 0.4, 0.1], (0,): [0.8, 0.1, 0.1], (1,): [0.5, 0.4, 0.1]}
    walk = walked(Beams(2, {2}, 2, 0.0), lambda said: np.log(likely[tuple(said)]))
    assert walk.answer.tokens == [0, 0]
    assert [answer.stopped for answer in walk._finished] == [False, False]  # 0.1 was third


# ---- models ----


@pytest.mark.parametrize("name", MODELS)
def test_wide_beams_find_the_best_of_all_answers_of_a_model(name):
    model, stop = built(name), 7
    [found] = answers(model, [PROMPTS[0]], 2, stop={stop}, beams=80)  # all first tokens are kept
    pairs = np.array([[a, b] for a in range(40) for b in range(40)])
    logp = log_probabilities(model, PROMPTS[0], pairs)
    scores = {(a, b): score for (a, b), score in zip(pairs.tolist(), logp.mean(axis=1), strict=True) if a != stop}
    scores |= {(stop,): logp[40 * stop, 0]}
    best = max(scores, key=scores.get)
    assert (*found.tokens, *([stop] if found.stopped else [])) == best
    assert found.score() == pytest.approx(scores[best], rel=1e-12)


METHODS = [None, "lora", "prefix_tuning", "prompt_tuning", "ladder_side"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_answers_in_a_batch_are_those_alone_and_their_log_probability_is_a_forward_pass_s(name, method):
    model = built(name)
    if method == "ladder_side" and model.task == "seq2seq":
        pytest.skip("ladder_side goes through one stack of layers")
    if method:
        small = {"r": 3} if method == "ladder_side" else {"tokens": 3} if "tuning" in method else {}
        tiny.scramble(sites.attach(model, method, small))
    lengths = []
    free = answers(model, PROMPTS, 7, **OPTIONS)
    for stop in ((), *({token} for token in [*free[0].tokens[::3], free[1].tokens[2]])):
        together = answers(model, PROMPTS, 7, stop=stop, **OPTIONS)
        lengths.append({len(answer.tokens) for answer in together})
        for prompt, answer in zip(PROMPTS, together, strict=True):
            [alone] = answers(model, [prompt], 7, stop=stop, **OPTIONS)
            assert (alone.tokens, alone.stopped) == (answer.tokens, answer.stopped)
            said = np.array([[*answer.tokens, *stop] if answer.stopped else answer.tokens])
            assert alone.logprob == pytest.approx(answer.logprob, rel=1e-10)
            assert answer.logprob == pytest.approx(log_probabilities(model, prompt, said).sum(), rel=1e-10)
    assert max(map(len, lengths)) > 1  # some ended earlier than others


@pytest.mark.parametrize("options", [{}, OPTIONS])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_device_answers_are_those_of_the_host(name, options, monkeypatch):
    host, there = (built(name, xp) for xp in (np, device.install(monkeypatch)))
    stop = set(answers(host, PROMPTS, 6, **options)[1].tokens[2:3])
    found, expected = (answers(model, PROMPTS, 6, stop=stop, **options) for model in (there, host))
    assert found == expected


# ---- the cache ----


def test_a_cache_grows_and_its_rows_are_chosen_and_put_elsewhere():
    rng, cache, expected = np.random.default_rng(0), Cache(), {}
    rows = 2
    for step in range(150):
        for layer, width in ((0, 3), ("cross", 2), (("a", "b", "c"), 5)):
            if layer == "cross" and step:
                continue
            new = rng.normal(size=(2, rows, 2, 4 if step == 0 else 1, width))
            whole = new if step == 0 else np.concatenate((expected[layer], new), axis=3)
            k, v = cache.extend(layer, Tensor(new[0]), Tensor(new[1]))
            assert np.array_equal(k.data, whole[0]) and np.array_equal(v.data, whole[1])
            expected[layer] = whole
        if step == 3:
            chosen = np.array([0, 0, 1, 1])
            cache.take(chosen)
            expected, rows = {layer: whole[:, chosen] for layer, whole in expected.items()}, 4
        elif step > 3 and step % 3 == 0:
            source, to = np.array([1, 0, 3]), np.array([0, 1, 2])
            first = cache.layers[0][0].first
            for whole in expected.values():
                whole[:, to, :, first:] = whole[:, source, :, first:]
            cache.reorder(source, to)
    assert cache.layers[0][0].time == 153 and cache.layers["cross"][1].time == 4
