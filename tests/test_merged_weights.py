"""Merging: the model with dense weights computes what it computed with the adapter."""

import numpy as np
import pytest
import tiny
from variants import CASES, VARIANTS, WITH_BIASES, attached, bare, quantizer

from refpeft import manager, sites
from refpeft.errors import RefpeftError

BESIDE_PARTS = {"krona-residual"}
"""Variants at parts of layers, which have no weight, of methods that merge elsewhere."""

MERGING = {method for method, entry in manager.catalogue().items() if "peft_merge" in entry.hooks}
MERGED = [
    (family, name)
    for family, name in CASES
    if (VARIANTS | WITH_BIASES)[name][0] in MERGING and name not in BESIDE_PARTS
]


@pytest.mark.parametrize(("family", "name"), MERGED)
def test_the_merged_model_says_the_same_without_an_adapter(family, name):
    model, _ = attached(family, name)
    before = model(tiny.ids()).data
    assert abs(before - tiny.model(family)(tiny.ids()).data).max() > 1e-6
    sites.merge(model)
    assert not model.adapters and not any(site.layers for site in model.sites.values())
    assert abs(model(tiny.ids()).data - before).max() < 1e-12


@pytest.mark.parametrize("name", [name for family, name in MERGED if family == "llama"])
def test_every_method_merges_together_with_another_one(name):
    """The other is inside, unless the method changes frozen weights, which then must come first."""
    method, options = VARIANTS[name]
    model, order = bare("llama", name), [(method, options), ("lora", {"targets": "all-linear"})]
    first_only = "peft_base" in manager.catalogue()[method].hooks
    for one in order if first_only else order[::-1]:
        tiny.scramble(sites.attach(model, *one))
    before = model(tiny.ids()).data
    sites.merge(model)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12


@pytest.mark.parametrize("name", ["lora", "ia3", "ln_tuning"])
def test_quantized_weights_become_dense(name):
    model, _ = attached("llama", name, quantizer=quantizer())
    before = model(tiny.ids()).data
    sites.merge(model)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12


def test_several_adapters_merge_in_the_order_of_attaching():
    model, _ = attached("qwen2", "lora-bias")
    for method in ("ia3", "lora", "ln_tuning"):
        tiny.scramble(sites.attach(model, method))
    before = model(tiny.ids()).data
    sites.merge(model)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12


@pytest.mark.parametrize("outer", ["bitfit", "full"])
@pytest.mark.parametrize("inner", ["lora", "ia3"])
def test_what_stands_in_for_frozen_parts_is_folded_in_first(inner, outer):
    model, _ = attached("qwen2", inner)
    tiny.scramble(sites.attach(model, outer, {"targets": ["@q", "@k", "@v"]}))
    before = model(tiny.ids()).data
    sites.merge(model)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12


def test_a_method_without_a_merged_form_is_an_error_and_changes_nothing():
    model, _ = attached("llama", "lora")
    tiny.scramble(sites.attach(model, "prefix_tuning"))
    before = model(tiny.ids()).data
    with pytest.raises(RefpeftError, match=r"'prefix_tuning' cannot be merged into weights \(at model.layers.0"):
        sites.merge(model)
    assert len(model.adapters) == 2
    assert np.array_equal(model(tiny.ids()).data, before)


def test_without_an_adapter_there_is_nothing_to_merge():
    with pytest.raises(RefpeftError, match="no adapter to merge"):
        sites.merge(tiny.model())


def test_tied_weights_that_were_trained_as_one_stay_one():
    model, _ = attached("tied", "full")
    count = model.parameters()
    sites.merge(model)
    assert model.head.tied == "model.embed_tokens"
    assert model.head.weight is model.embed.weight
    assert model.parameters() == count


@pytest.mark.parametrize("targets", [["@embed"], ["@head"], ["@embed", "@head"]])
def test_tied_weights_that_became_two_are_no_longer_tied(targets):
    model = tiny.model("tied")
    tiny.scramble(sites.attach(model, "lora", {"targets": targets}))
    count = model.parameters()
    sites.merge(model)
    assert model.head.tied is None
    assert model.parameters() == count + model.head.weight().size
    assert np.array_equal(model.frozen["lm_head.weight"](), model.head.weight())


def test_frozen_weights_by_name_are_the_merged_ones():
    model, _ = attached("qwen2", "lora-bias")
    sites.merge(model)
    for site in model.sites.values():
        if site.weight and not site.tied:
            assert np.array_equal(model.frozen[f"{site.name}.weight"](), site.weight()), site.name
        if site.bias is not None:
            assert np.array_equal(model.frozen[f"{site.name}.bias"](), site.bias), site.name


def test_a_bias_that_was_added_is_there_after_merging():
    model, _ = attached("llama", "bitfit-created")
    sites.merge(model)
    assert model.sites["model.layers.0.mlp.up_proj"].bias.shape == (32,)


def test_a_merged_model_takes_another_adapter():
    model, _ = attached("llama", "lora")
    sites.merge(model)
    before = model(tiny.ids()).data
    sites.attach(model, "lora")
    assert np.array_equal(model(tiny.ids()).data, before)


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), MERGED)
def test_undone_the_base_has_every_bit_and_the_adapters_are_on_it_again(family, name):
    model, adapter = attached(family, name)
    plain, before, gradients = bare(family, name), model(tiny.ids()).data, tiny.gradients(model, tiny.batch())
    merge = sites.merge(model)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12
    merge.undo()
    assert model.adapters == [adapter]
    assert np.array_equal(model(tiny.ids()).data, before)
    again = tiny.gradients(model, tiny.batch())
    assert all(np.array_equal(again[key], gradients[key]) for key in gradients)
    sites.detach(model)
    assert model.frozen.keys() == plain.frozen.keys()
    for key, frozen in plain.frozen.items():
        assert np.array_equal(model.frozen[key](), frozen()), key
    for site, other in zip(model.sites.values(), plain.sites.values(), strict=True):
        assert site.tied == other.tied and (site.bias is None) == (other.bias is None)
        assert site.weight is None or site.weight is model.frozen[f"{site.tied or site.name}.weight"]
    assert np.array_equal(model(tiny.ids()).data, plain(tiny.ids()).data)


@pytest.mark.parametrize("name", ["lora", "ia3", "dora", "loftq"])
def test_undone_quantized_weights_are_the_same_codes(name):
    model, _ = attached("qwen2", name, quantizer=quantizer())
    packed = dict(model.frozen)
    sites.merge(model).undo()
    assert packed.keys() == model.frozen.keys() and all(model.frozen[key] is one for key, one in packed.items())


def test_merges_are_undone_one_after_the_other():
    model, _ = attached("tied", "lora-everywhere")
    one = sites.merge(model)
    between = model(tiny.ids()).data
    lora = sites.attach(model, "lora")
    tiny.scramble(lora)
    with pytest.raises(RefpeftError, match="the model changed after this merge: detach adapters and undo merges that"):
        one.undo()
    two = sites.merge(model)
    with pytest.raises(RefpeftError, match="the model changed after this merge"):
        one.undo()
    two.undo()
    sites.detach(model)
    assert np.array_equal(model(tiny.ids()).data, between)
    one.undo()
    with pytest.raises(RefpeftError, match="the model changed after this merge"):
        one.undo()
