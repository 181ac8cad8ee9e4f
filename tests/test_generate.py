"""Writing text: greedy and sampled, rows of different length side by side, stopping, what is refused."""

import numpy as np
import pytest
import tiny

from refpeft import sites
from refpeft.errors import RefpeftError
from refpeft.generate import answers, generate
from refpeft.rng import Stream
from refpeft.search import draw, repeating

PROMPTS = [[5, 9, 2], [7, 1, 30, 22, 8, 3, 11], [4]]


def by_hand(model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(np.array([ids])).data[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [None, "prefix_tuning", "prompt_tuning", "llama_adapter", "pre_embed", "pre_layer"])
def test_greedy_tokens_are_those_of_whole_forward_passes_for_prompts_of_any_length(name, method):
    model = tiny.model(name)
    if method:
        tiny.scramble(sites.attach(model, method, {"tokens": 3}))
    assert generate(model, PROMPTS, 6) == [by_hand(model, prompt, 6) for prompt in PROMPTS]


def test_a_row_ends_before_its_stop_token_and_others_go_on():
    model = tiny.model("llama")
    free = generate(model, PROMPTS, 8)
    stop = free[0][3]
    for row, tokens in zip(generate(model, PROMPTS, 8, stop={stop}), free, strict=True):
        assert row == (tokens[: tokens.index(stop)] if stop in tokens else tokens)


def test_sampled_tokens_of_a_row_depend_on_the_seed_and_not_on_its_neighbours():
    model = tiny.model("llama")
    together = generate(model, PROMPTS, 6, temperature=1.0, seed=4)
    alone = [generate(model, [prompt], 6, temperature=1.0, seed=4)[0] for prompt in PROMPTS]
    assert together == alone
    assert together != generate(model, PROMPTS, 6, temperature=1.0, seed=5)


@pytest.mark.parametrize("method", [None, "prefix_tuning", "prompt_tuning"])
def test_learned_positions_end_the_text(method):
    model = tiny.model("gpt2")
    if method:
        sites.attach(model, method, {"tokens": 3})
    room = 61 if method else 64
    assert model.room == room
    assert generate(model, [[1] * (room - 2), [2]], 9) == [by_hand(model, [1] * (room - 2), 3), by_hand(model, [2], 9)]
    assert len(generate(model, [[1] * room], 9)[0]) == 1
    with pytest.raises(RefpeftError, match=rf"^a prompt has {room + 1} tokens, but the model has room for {room}$"):
        generate(model, [[1] * (room + 1)], 9)


def drawn(count: int = 2000, **options) -> np.ndarray:
    """How often each of four tokens with probabilities 0.15, 0.5, 0.05, 0.3 is drawn."""
    logp, stream = np.log([0.15, 0.5, 0.05, 0.3]), Stream(0, "test")
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    return np.bincount([draw(logp, **options, stream=stream) for _ in range(count)], minlength=4) / count


def test_tokens_are_drawn_by_their_probabilities():
    assert drawn() == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=0.03)


def test_top_k_keeps_the_most_probable_tokens():
    assert drawn(top_k=2) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert drawn(top_k=1)[1] == 1.0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert drawn(top_p=0.7) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert drawn(top_p=0.4)[1] == 1.0
    assert drawn(top_p=0.0)[1] == 1.0


def test_temperature_sharpens_and_flattens():
    assert drawn(temperature=0.5)[1] == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)
    assert drawn(temperature=50.0) == pytest.approx([0.25] * 4, abs=0.04)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_log_probability_is_that_of_the_model_itself(temperature):
    model = tiny.model("llama")
    free = answers(model, PROMPTS, 6, temperature=temperature)
    stop = {free[1].tokens[2]}
    for some in (free, answers(model, PROMPTS, 6, temperature=temperature, stop=stop, no_repeat_ngram=2)):
        for prompt, answer in zip(PROMPTS, some, strict=True):
            said = [*answer.tokens, *stop] if answer.stopped else answer.tokens
            logits = model(np.array([prompt + said])).data[0, len(prompt) - 1 : -1]
            logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            assert answer.logprob == pytest.approx(logp[np.arange(len(said)), said].sum(), rel=1e-12)
            assert answer.score(0.5) == pytest.approx(answer.logprob / len(said) ** 0.5, rel=1e-15)
    assert some[1].stopped and not free[1].stopped


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_tokens_in_a_row_come_again(n):
    model = tiny.model("llama")
    prompts = [[5, 5, 5, 9], [1, 2, 1, 2, 1]]
    for options in ({}, {"temperature": 1.0}, {"beams": 3}):
        for prompt, tokens in zip(prompts, generate(model, prompts, 12, no_repeat_ngram=n, **options), strict=True):
            whole = prompt + tokens
            grams = [tuple(whole[i : i + n]) for i in range(len(whole) - n + 1)]
            new = grams[max(0, len(prompt) - n + 1) :]
            assert len(tokens) == 12 and len(set(new)) == len(new)
            assert not set(new) & set(grams[: len(grams) - len(new)])


def test_what_would_repeat_is_what_followed_the_same_tokens():
    assert repeating([1, 2, 3, 1, 2], 3).tolist() == [3]
    assert sorted(repeating([1, 2, 1, 3, 1], 2)) == [2, 3]
    assert sorted(repeating([4, 7], 1)) == [4, 7]
    assert repeating([1, 2], 3).size == repeating([], 1).size == 0
    assert repeating([5, 5], 2).tolist() == [5]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"beams": 3}])
def test_an_answer_ends_where_no_token_is_allowed(options):
    model = tiny.model("llama")
    [answer] = answers(model, [[0, 1]], 99, no_repeat_ngram=1, **options)
    assert sorted(answer.tokens) == list(range(2, 40)) and not answer.stopped
    [answer] = answers(model, [list(range(40))], 9, no_repeat_ngram=1, **options)
    assert answer.tokens == [] and answer.score() == 0


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "a prompt is empty: expected"),
        ([], {}, "a prompt is empty: expected"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0: expected 0 "),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0: expected 1 or more"),
        ([[1]], {"beams": 0}, "beams is 0: expected 1 or more"),
        ([[1]], {"no_repeat_ngram": -1}, "no_repeat_ngram is -1: expected 0 or more"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k is 0: expected 1 or more"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5: expected a probability"),
        ([[1]], {"top_k": 3}, "top_k and top_p say among which tokens to draw: set a temperature, too"),
        ([[1]], {"top_p": 0.5}, "top_k and top_p say among which tokens to draw: set a temperature, too"),
        ([[1]], {"temperature": 1.0, "beams": 2}, "a temperature draws tokens, and beam search draws none"),
        ([[1]], {"length_penalty": 0.9}, "length_penalty chooses among beams: set 2 beams or more, too"),
        ([[1]], {"length_penalty": float("nan"), "beams": 2}, "length_penalty is nan: expected a number from"),
        ([[1, 40]], {"beams": 2}, "token 40 is not among the model's 40"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, options, message):
    with pytest.raises(RefpeftError, match=f"^{message}"):
        generate(tiny.model(), prompts, **{"max_tokens": 2} | options)


def test_a_model_of_another_task_writes_no_text():
    model = tiny.model()
    model.task = "classify"
    with pytest.raises(RefpeftError, match=r"^a llama model for the task 'classify' writes no text: "):
        generate(model, [[1]])


def test_weights_that_are_no_numbers_are_an_error():
    model = tiny.model()
    model.embed.weight().fill(np.nan)
    with pytest.raises(RefpeftError, match="the logits are nan: weights of the model"):
        generate(model, [[1]], 2)
