"""Methods made of others: what each part trains, where it stands, what cannot be merged; and gates."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_plugins import check_gradients

from refpeft import adapters, generate, manager, sites
from refpeft.errors import RefpeftError

SMALL = {
    "mam": {"tokens": 3, "hidden": 4, "size": 5},
    "lora_bitfit": {"r": 3},
    "s4": {"strategies": ["AL", "PB"], "groups": [1, 1], "size": 3, "tokens": 3},
    "unipelt": {"r": 3, "tokens": 3, "hidden": 4, "size": 5},
}
RECIPES = ("mam", "lora_bitfit", "s4")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_what_its_parts_train_and_computes_what_they_compute(name):
    recipe, apart = tiny.model("qwen2"), tiny.model("qwen2")
    adapter = sites.attach(recipe, name, SMALL[name])
    tiny.scramble(adapter)
    parts = [sites.attach(apart, part.name, part.cfg) for part in adapter.parts[1:]]
    assert adapter.size == sum(part.size for part in parts)
    assert len(adapter.params) == sum(len(part.params) for part in parts)
    for part in parts:
        for key, tensor in part.params.items():
            tensor.data[...] = adapter.params[key].data
    assert np.array_equal(recipe(tiny.ids()).data, apart(tiny.ids()).data)


PASSED_ON = {
    "mam": {"tokens": 3, "hidden": 7, "size": 5, "scale": 2.5, "layers": (1,)},
    "lora_bitfit": {"r": 3, "alpha": 5.0, "dropout": 0.25, "layers": (1,)},
    "s4": {"r": 3, "alpha": 5.0, "size": 6, "tokens": 4},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_hands_its_options_to_its_parts(name):
    adapter = sites.attach(tiny.model("qwen2"), name, SMALL[name] | PASSED_ON[name])
    handed = set()
    for part in adapter.parts[1:]:
        own = {key: value for key, value in PASSED_ON[name].items() if hasattr(part.cfg, key)}
        assert {key: getattr(part.cfg, key) for key in own} == own, part.name
        handed |= own.keys()
    assert handed == PASSED_ON[name].keys()
    assert "layers" not in handed or {layer.site.index for layer in adapter.layers} == {1}


@pytest.mark.parametrize("name", SMALL)
def test_a_file_of_several_methods_is_read_as_one(name, tmp_path):
    model = tiny.model("qwen2")
    tiny.scramble(sites.attach(model, name, SMALL[name]))
    adapters.save(tmp_path, model)
    other = tiny.model("qwen2")
    (loaded,) = adapters.load(other, tmp_path)
    assert loaded.name == name
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)


@pytest.mark.parametrize(
    ("name", "part"), [("mam", "prefix_tuning"), ("mam", "parallel"), ("s4", "prefix_tuning"), ("unipelt", "unipelt")]
)
def test_what_a_part_cannot_merge_is_refused_by_name(name, part):
    options = SMALL[name] | ({"layers": [1]} if part == "parallel" else {})
    model = tiny.model("qwen2")
    adapter = sites.attach(model, name, options)
    if part == "parallel":  # without the attention, which comes first
        for layer in [layer for layer in adapter.layers if layer.part.name == "prefix_tuning"]:
            layer.take_off(model)
    with pytest.raises(RefpeftError, match=rf"method '({part}|houlsby)' cannot be merged into weights"):
        sites.merge(model)


def test_lora_with_biases_merges():
    model = tiny.model("qwen2")
    tiny.scramble(sites.attach(model, "lora_bitfit", {"r": 3}))
    before = model(tiny.ids()).data
    sites.merge(model)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12


def test_two_parts_that_share_values_of_one_name_are_an_error(registered):
    both = {"prefix_tuning": {"hidden": 3}, "p_tuning_v2": {"hidden": 3}}
    recipe = registered(None, peft_companions=lambda: both)
    with pytest.raises(RefpeftError, match="two parts of method 'made_here' share a value called 'rows'"):
        sites.attach(tiny.model(), recipe)


# ---- S4's groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "groups"),
    [(4, [1, 1, 1, 1]), (12, [2, 4, 4, 2]), (13, [2, 4, 5, 2]), (24, [4, 8, 8, 4]), (32, [5, 11, 11, 5])],
)
def test_the_spindle_has_its_layers_in_the_middle(count, groups):
    s4 = manager.load("s4")
    homes = ["", *(f"layers.{number}" for number in range(count))]
    every = [SimpleNamespace(home=home, bias=None) for home in homes]
    starts = np.cumsum([0, *groups])
    layers = [list(range(*pair)) for pair in itertools.pairwise(starts)]
    cfg = s4.Config()
    assert s4.layers_of("A", every, cfg) == layers[0] + layers[1] + layers[2]
    assert s4.layers_of("L", every, cfg) == layers[0] + layers[3]
    assert s4.layers_of("P", every, cfg) == layers[1] + layers[2] + layers[3]
    assert s4.layers_of("B", every, cfg) == layers[2] + layers[3]


def test_a_group_has_the_methods_of_its_letters_alone():
    adapter = sites.attach(tiny.model("qwen2"), "s4", SMALL["s4"])
    where = {(layer.part.name, layer.site.index) for layer in adapter.layers}
    assert where == {("houlsby", 0), ("lora", 0), ("prefix_tuning", 1), ("bitfit", 1)}


@pytest.mark.parametrize(
    ("family", "name", "options", "message"),
    [
        ("qwen2", "s4", {}, r"s4.groups is \[1, 0, 0, 1\]: expected sizes that add up to the model's 2 layers"),
        ("qwen2", "s4", SMALL["s4"] | {"groups": [1, 2]}, r"groups is \[1, 2\]: expected sizes that add up to .* 2"),
        ("qwen2", "s4", {"strategies": ["AX", "L"], "groups": [1, 1]}, "expected strategies of the letters A"),
        ("qwen2", "s4", {"strategies": ["A", "L"]}, "2 strategies are for as many groups: give `groups`"),
        ("llama", "s4", SMALL["s4"], "s4 trains biases .*, and these layers have none: set s4.create = true"),
        ("llama", "lora_bitfit", {}, "this model has none: set lora_bitfit.create = true"),
        ("llama", "unipelt", {"targets": ["@q", "@attend"]}, "expected @attn_out, .* and @attend together"),
        ("llama", "unipelt", {"r": 0}, "expected r and size of at least 1"),
        ("llama", "mam", {"tokens": 0}, "tokens is 0: expected 1 or more"),
    ],
)
def test_recipes_that_cannot_be_are_errors(family, name, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(family), name, options)


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_wide", [True, False])
def test_open_gates_leave_the_parts_alone_and_closed_ones_nothing(open_wide):
    """g = 1: LoRA with alpha = r, the adapter inside the residual, prefix tuning. g = 0: keys and values of zeros."""
    model, parts = tiny.model(), tiny.model()
    values = sites.attach(model, "unipelt", SMALL["unipelt"])
    tiny.scramble(values, scale=0.3)
    for name, tensor in values.params.items():
        if name.endswith("gate_bias"):
            tensor.data[...] = 1e3 if open_wide else -1e3
    both = [
        sites.attach(parts, "lora", {"r": 3, "alpha": 3}),
        sites.attach(parts, "pfeiffer", {"size": 5, "targets": ["@mlp_out"]}),
        sites.attach(parts, "prefix_tuning", {"tokens": 3, "hidden": 4}),
    ]
    for adapter in both:
        for name, tensor in adapter.params.items():
            tensor.data[...] = values.params[name].data if open_wide else 0
    assert abs(model(tiny.ids()).data - parts(tiny.ids()).data).max() < 1e-12


@pytest.mark.parametrize(
    ("inner", "outer"),
    [("unipelt", "unipelt"), ("prefix_tuning", "unipelt"), ("unipelt", "mam"), ("llama_adapter", "unipelt")],
)
def test_gated_prefixes_go_with_other_prefixes_in_any_order(inner, outer):
    model = tiny.model()
    for number, name in enumerate((inner, outer)):
        tiny.scramble(sites.attach(model, name, SMALL.get(name, {"tokens": 2})), number)
    check_gradients(model)
    ids = tiny.ids(1, 8)
    before = model(ids).data
    ids[0, 5] = (ids[0, 5] + 1) % 40
    changed = (model(ids).data != before).any(axis=2)[0]
    assert changed[5:].all() and not changed[:5].any()


@pytest.mark.parametrize("other", ["prefix_tuning", "llama_adapter"])
def test_the_order_of_gated_prefixes_does_not_matter(other):
    """They all stand beside the text, whichever was attached first."""
    logits = []
    for order in ((other, "unipelt"), ("unipelt", other)):
        model = tiny.model()
        for name in order:
            options = SMALL.get(name, {"tokens": 2})
            tiny.scramble(sites.attach(model, name, options), len(name))
        logits.append(model(tiny.ids()).data)
    assert np.allclose(*logits, atol=1e-12)


def test_without_a_prefix_text_keeps_its_positions():
    assert sites.attach(tiny.model(), "unipelt", SMALL["unipelt"]).positions == 3
    assert sites.attach(tiny.model(), "unipelt", {"r": 3, "targets": ["@q", "@v"]}).positions == 0


@pytest.mark.parametrize("name", SMALL)
def test_generation_with_a_cache_is_generation_without_one(name):
    model = tiny.model("qwen2")
    tiny.scramble(sites.attach(model, name, SMALL[name]))
    ids = tiny.ids(1, 5)
    for token in generate.generate(model, [ids[0].tolist()], max_tokens=4)[0]:
        assert token == model(ids).data[0, -1].argmax()
        ids = np.append(ids, [[token]], axis=1).astype("i4")
