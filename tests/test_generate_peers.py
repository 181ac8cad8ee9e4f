"""Greedy answers and beam search against transformers' generate, in float64."""

import numpy as np
import pytest
import test_t5
import tiny

from refpeft.generate import answers

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
from torch_float64 import Float64  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]  # of transformers, about itself


def pair(name: str):
    """A tiny model here and in transformers."""
    if name in tiny.CONFIGS:
        kind, config, state = transformers.AutoModelForCausalLM, tiny.CONFIGS[name], tiny.arrays(tiny.CONFIGS[name])
        ours = tiny.model(name)
    else:
        kind, config = transformers.AutoModelForSeq2SeqLM, test_t5.CONFIGS[name]
        ours, state = test_t5.built(name), tiny.drawn(config)
    with Float64():  # rotary frequencies, too
        theirs = kind.from_config(transformers.AutoConfig.for_model(**config)).double().eval()
    state = {key: torch.tensor(array).double() for key, array in state.items()}
    if "lm_head.weight" in state:  # transformers 5 ties T5's all the same
        theirs.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    return ours, theirs


def said(model, prompt: list[int], most: int, stop: list[int], beams: int, penalty: float, ngram: int):
    """(tokens with their stop token, score) of transformers."""
    options = {"num_beams": beams, "no_repeat_ngram_size": ngram, "do_sample": False}
    options |= {"length_penalty": penalty, "early_stopping": False} if beams > 1 else {}
    encodes = model.config.is_encoder_decoder
    with Float64():
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=most,
            eos_token_id=stop or None,
            pad_token_id=0,
            use_cache=not encodes,  # theirs would have too few layers: the encoder's number
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    start = 1 if encodes else len(prompt)
    return found.sequences[0, start:].tolist(), found.sequences_scores.item() if beams > 1 else None


SEARCHES = [  # tokens, beams, length penalty, n-gram
    (8, 1, 1.0, 0),
    (8, 1, 1.0, 2),
    (6, 2, 1.0, 0),
    (9, 3, 0.9, 2),
    (12, 4, 0.0, 3),
    (10, 10, 0.9, 4),  # as LoRA's paper decodes E2E
    (7, 5, -1.0, 1),
    (9, 4, 2.0, 0),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", *test_t5.CONFIGS])
def test_answers_and_scores_are_those_of_transformers(name):
    ours, theirs = pair(name)
    rng, ends = np.random.default_rng(0), set()
    for _ in range(5):
        prompt = rng.integers(3, 40, rng.integers(1, 9)).tolist()
        likely = answers(ours, [prompt], 8)[0].tokens
        stop = sorted({*rng.integers(1, 40, rng.integers(0, 3)).tolist(), *likely[rng.integers(2, 9) :][:1]})
        for most, beams, penalty, ngram in SEARCHES:
            options = {"beams": beams, "length_penalty": penalty, "no_repeat_ngram": ngram}
            [answer] = answers(ours, [prompt], most, stop=stop, **options)
            tokens, score = said(theirs, prompt, most, stop, beams, penalty, ngram)
            here = (prompt, stop, options)
            assert answer.stopped == (tokens[-1] in stop), here
            assert answer.tokens == (tokens[:-1] if answer.stopped else tokens), here
            if beams > 1:
                assert abs(answer.score(penalty) - score) < 1e-10 * max(1, abs(score)), here
            ends.add(answer.stopped)
    assert ends == {True, False}
