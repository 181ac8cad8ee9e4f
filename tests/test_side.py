"""Methods that read the layers from beside the model: what they keep and what runs back, generation, mistakes."""

import numpy as np
import pytest
import tiny
from test_memory import BATCH, SIZE, TIME, count_weights, loss_of

from refpeft import ops, sites
from refpeft.errors import RefpeftError
from refpeft.generate import generate
from refpeft.learning import refuse_recomputation
from refpeft.tensor import Tensor

PROMPTS = [[5, 9, 2], [7, 1, 30, 22, 8, 3, 11], [4]]
LADDERS = [{"r": 3}, {"r": 3, "output": "add"}, {"r": 3, "drop": [0]}, {"r": 3, "drop": [1]}]


def by_hand(model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(np.array([ids])).data[0, -1].argmax()))
    return ids[len(prompt) :]


# ---- nothing runs back through the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", LADDERS)
def test_the_tape_has_one_hidden_state_of_each_layer_that_is_read_and_backward_asks_for_no_weight(name, options):
    model = tiny.model(name, "float32")
    tiny.scramble(sites.attach(model, "ladder_side", options))
    asked = count_weights(model)
    loss, buffers = loss_of(model)
    read = 1 + model.config.layers - len(options.get("drop", ()))  # what the first layer reads, too
    whole = BATCH * TIME * model.config.dim * SIZE
    assert list(buffers.values()).count(whole) == read
    assert name == "gpt2" or max(buffers.values()) == whole  # GPT-2's feed-forward part is 4 times as wide
    before = dict(asked)
    loss.backward()
    assert asked == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_fusion_keeps_the_hidden_states_and_weights_and_backward_asks_for_no_weight(name):
    model = tiny.model(name, "float32")
    tiny.scramble(sites.attach(model, "attention_fusion"))
    asked = count_weights(model)
    loss, buffers = loss_of(model)
    states = 1 + model.config.layers
    sizes = sorted(buffers.values())[-2:]
    rows = tiny.batch().supervised * model.config.dim * SIZE  # of what the head reads: its norm, and its gradient
    assert sizes == [rows, BATCH * TIME * states * model.config.dim * SIZE]
    before = dict(asked)
    loss.backward()
    assert asked == before


def test_a_step_keeps_less_than_half_of_what_lora_keeps(monkeypatch):
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_hidden_layers": 4}
    monkeypatch.setitem(tiny.CONFIGS, "larger", tiny.LLAMA | shape)
    kept = {}
    for method, options in (("lora", {}), ("ladder_side", {"r": 8})):
        model = tiny.model("larger", "float32")
        sites.attach(model, method, options)
        kept[method] = sum(loss_of(model)[1].values())
    assert kept["ladder_side"] < kept["lora"] / 2


# ---- ladder side-tuning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", LADDERS)
@pytest.mark.parametrize("others", [(), ("prompt_tuning",), ("ladder_side",)])
def test_a_side_network_remembers_earlier_tokens_in_generation(name, options, others):
    model = tiny.model(name)
    for method in others:
        tiny.scramble(sites.attach(model, method, {"tokens": 3} if method == "prompt_tuning" else {"r": 3}), 5)
    tiny.scramble(sites.attach(model, "ladder_side", options))
    assert generate(model, PROMPTS, 4) == [by_hand(model, prompt, 4) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("name", "options", "layer", "layers"),
    [
        ("llama", {"r": 3}, 24 * 8 + 1 + 2 * 8 + 8 * (2 * 8 + 2 * 4 + 3 * 10), 2),
        ("gpt2", {"r": 3, "drop": [0]}, 24 * 8 + 1 + 2 * 8 + 8 * (4 * 8 + 2 * 32), 1),
    ],
)
def test_the_number_of_parameters_is_the_formula(name, options, layer, layers):
    first, norm, last = 8 * 24, 8, 24 * 8
    assert sites.attach(tiny.model(name), "ladder_side", options).size == first + layers * layer + norm + last


def test_a_side_network_that_is_added_leaves_the_model_as_it_was_at_first():
    model = tiny.model()
    before = model(tiny.ids()).data
    adapter = sites.attach(model, "ladder_side", {"r": 3, "output": "add"})
    assert np.array_equal(model(tiny.ids()).data, before)
    tiny.scramble(adapter)
    assert abs(model(tiny.ids()).data - before).max() > 1e-3


def test_what_reads_all_layers_refuses_recomputation():
    model = tiny.model()
    sites.attach(model, "ladder_side", {"r": 3})
    with pytest.raises(RefpeftError, match=r"checkpoint_activations .* ladder_side hands on .*: leave it out"):
        refuse_recomputation(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, "r is 4, and heads of 6 numbers have no r-th part of even width: r = 3 fits"),
        ({"r": 0}, "expected r of at least 1, and a temperature above 0"),
        ({"r": 3, "drop": [0, 1]}, r"drop names layers 0 to 1, but not all of them: it is \[0, 1\]"),
        ({"r": 3, "drop": [2]}, r"drop names layers 0 to 1, but not all of them: it is \[2\]"),
        ({"r": 3, "targets": ["0.block_out"]}, "ladder_side goes through all layers: leave its targets as they are"),
    ],
)
def test_a_side_network_that_cannot_be_is_an_error(options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), "ladder_side", options)


# ---- attention fusion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_all_weight_on_the_last_layer_attention_fusion_is_the_model(name, monkeypatch):
    model = tiny.model(name)
    before = model(tiny.ids()).data
    sites.attach(model, "attention_fusion")

    def last(x, axis):
        return Tensor(np.broadcast_to(np.arange(x.shape[axis])[:, None] == x.shape[axis] - 1, x.shape) * 1.0)

    monkeypatch.setattr(ops, "softmax", last)
    assert abs(model(tiny.ids()).data - before).max() < 1e-4  # eps is added twice


@pytest.mark.parametrize("output", ["replace", "add"])
def test_attention_fusion_in_generation_is_what_it_is_without_a_cache(output):
    model = tiny.model()
    tiny.scramble(sites.attach(model, "attention_fusion", {"output": output}), scale=1)
    assert generate(model, PROMPTS, 4) == [by_hand(model, prompt, 4) for prompt in PROMPTS]


def test_attention_fusion_trains_one_query():
    assert sites.attach(tiny.model(), "attention_fusion").size == 24


def test_attention_fusion_takes_no_other_targets():
    with pytest.raises(RefpeftError, match="attention_fusion goes through all layers: leave its targets as they are"):
        sites.attach(tiny.model(), "attention_fusion", {"targets": ["0.block_out"]})
