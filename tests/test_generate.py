"""Writing text: greedy and sampled, rows of different length side by side, stopping."""

import numpy as np
import pytest
import tiny

from refpeft import sites
from refpeft.errors import RefpeftError
from refpeft.generate import _pick, generate
from refpeft.rng import Stream

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
    assert [len(row) for row in generate(model, [[1] * (room - 2), [2]], 9)] == [3, 3]
    assert len(generate(model, [[1] * room], 9)[0]) == 1
    with pytest.raises(RefpeftError, match=rf"^a prompt has {room + 1} tokens, but the model has room for {room}$"):
        generate(model, [[1] * (room + 1)], 9)


def drawn(count: int = 4000, **options) -> np.ndarray:
    """How often each of four tokens with probabilities 0.5, 0.3, 0.15, 0.05 is drawn."""
    logits = np.log(np.array([[0.15, 0.5, 0.05, 0.3]]))
    stream = [Stream(0, "test")]
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    return np.bincount([_pick(logits, **options, streams=stream)[0] for _ in range(count)], minlength=4) / count


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


@pytest.mark.parametrize(("prompts", "options"), [([[]], {}), ([], {}), ([[1]], {"temperature": -1.0})])
def test_what_cannot_be_generated_from_is_refused(prompts, options):
    with pytest.raises(RefpeftError, match="expected"):
        generate(tiny.model(), prompts, 2, **options)
