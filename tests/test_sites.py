"""Choosing sites, attaching and detaching; every mistake in an option is one clear sentence."""

from dataclasses import dataclass

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from variants import quantizer

from refpeft import manager, sites
from refpeft.errors import RefpeftError, RefpeftWarning
from refpeft.targets import select
from refpeft.tensor import Tensor


def chosen(targets, family: str = "llama", **more) -> list[str]:
    model = tiny.model(family)
    cfg = manager.load("lora").Config(targets=targets, **more)
    usable = {"linear", "embedding"}
    return [site.name for site in select(model.sites.values(), cfg, lambda site: site.kind in usable)]


Q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("@q",), Q),
        (("q_proj",), Q),
        (("self_attn.q_proj",), Q),
        ((Q[1],), Q[1:]),
        (("*.q_proj",), Q),
        (("*.0.*q_proj", "model.layers.1.self_attn.q_proj"), Q),
        ("@q", Q),
        ("q_proj", Q),
        (r".*\.q_proj", Q),
        (r"model\.layers\.1\.self_attn\.[q]_proj", Q[1:]),
        (("lm_head",), ["lm_head"]),
        (("embed_tokens",), ["model.embed_tokens"]),
    ],
)
def test_targets_are_roles_names_globs_and_in_one_string_a_regular_expression(targets, expected):
    assert chosen(targets) == expected


def test_a_regular_expression_matches_whole_names():
    with pytest.raises(RefpeftError, match="matches no site"):
        chosen(r"self_attn\.q_proj$")


def test_a_name_is_no_end_of_a_word():
    with pytest.raises(RefpeftError, match=r"target 'proj' matches no site of this model"):
        chosen(("proj",))


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_all_linear_is_every_linear_layer_but_the_head(family):
    model = tiny.model(family)
    linear = [site.name for site in model.sites.values() if site.kind == "linear" and site.name != "lm_head"]
    assert chosen(("all-linear",), family) == chosen("all-linear", family) == linear


def test_one_layer_may_have_several_roles():
    assert (
        chosen(("@k",), "gpt2")
        == chosen(("c_attn",), "gpt2")
        == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    )


def test_exclude_and_layers_take_away():
    assert chosen(("@q", "@k"), exclude=("@k",)) == Q
    assert chosen(("@q", "@k"), exclude=r".*k_proj", layers=(1,)) == Q[1:]
    with pytest.warns(RefpeftWarning, match="target 'lm_head' has no effect: it is in none of the layers"):
        assert chosen(("@q", "lm_head"), layers=(0,)) == Q[:1]


@pytest.mark.parametrize(
    ("targets", "more", "message"),
    [
        (
            ("q_porj",),
            {},
            r"target 'q_porj' matches no site of this model; did you mean 'q_proj'\?; there are .*k_proj",
        ),
        (("@Q",), {}, r"target '@Q' matches no site of this model; did you mean '@q'\?; there are @attend"),
        (("@q", "nonsense"), {}, "target 'nonsense' matches no site"),
        (("@norm",), {}, "target '@norm' matches 5 sites of kind norm, where this method has nothing to do"),
        ((r"*.layers.9.*",), {}, "matches no site"),
        ("(q", {}, r"'\(q' is not a regular expression: .*; a glob goes into a list"),
        (("@q",), {"exclude": ("nonsense",)}, "target 'nonsense' matches no site"),
        (("@q",), {"layers": (2,)}, "layers names 2: the model has layers 0 to 1"),
        (("@q",), {"exclude": ("@q",)}, "after 'exclude' and 'layers' no site is left"),
        ((), {}, "targets is empty: name at least one"),
    ],
)
def test_a_mistake_in_targets_is_said(targets, more, message):
    with pytest.raises(RefpeftError, match=message):
        chosen(targets, **more)


@given(st.text(max_size=12))
def test_any_text_as_a_target_is_sites_or_one_sentence(text):
    for targets in (text, (text,)):
        try:
            assert chosen(targets)
        except RefpeftError as error:
            assert "\n" not in str(error) or "\n" in text


def test_names_of_sites_are_the_checkpoints():
    model = tiny.model("gpt2")
    names = {f"{site.name}.weight" for site in model.sites.values() if site.weight and not site.tied}
    assert names == {name for name in tiny.arrays(tiny.GPT2_SMALL) if name.endswith("weight")}
    assert {site.index for site in model.sites.values()} == {None, 0, 1}


# ---- attaching -------------------------------------------------------------------------------------------------------


def test_several_of_a_kind_are_numbered():
    model = tiny.model()
    assert [sites.attach(model, "lora").name for _ in range(3)] == ["lora", "lora2", "lora3"]
    assert len(dict(model.trained())) == 3 * 8


def test_a_mistake_leaves_the_model_as_it_was():
    model = tiny.model()
    for options in ({"targets": ["nonsense"]}, {"rank": 4}, {"r": 0}, {"modules_to_save": ["nonsense"]}):
        with pytest.raises(RefpeftError):
            sites.attach(model, "lora", options)
    assert not model.adapters and not any(site.layers for site in model.sites.values())


def test_detaching_what_is_not_attached_is_an_error():
    model = tiny.model()
    adapter = sites.attach(model, "lora")
    sites.detach(model, adapter)
    with pytest.raises(RefpeftError, match="adapter 'lora' is not attached"):
        sites.detach(model, adapter)


def test_a_hook_gets_what_it_names(registered):
    seen = {}

    def peft_params(site, cfg, rng, bias):
        seen.update(name=site.name, bias=bias, targets=cfg.targets, draw=rng.uniform(0, 1, 2))
        return {"s": np.ones(site.shape[0])}

    def peft_shared(sites, rng):
        return {"c": Tensor(np.full(len(sites), 3.0)), "t": np.ones(1)}

    def peft_linear(x, base, p, shared, train):
        seen.update(train=train, weight=base.weight.shape, bias_of_base=base.bias)
        return base(x) * p.s * shared.c[:1] * shared.t

    model = tiny.model("qwen2")
    module = registered(peft_params=peft_params, peft_shared=peft_shared, peft_linear=peft_linear)
    adapter = sites.attach(model, module)
    model(tiny.ids())
    assert seen["name"] == Q[1] and seen["bias"].shape == (24,) and seen["targets"] == ("@q",) and seen["train"] is None
    assert seen["weight"] == (24, 24) and seen["bias_of_base"].shape == (24,)
    assert list(adapter.params) == ["shared.t", *(f"{name}.s" for name in Q)]
    model.mode.training, model.mode.step = True, 4
    model(tiny.ids())
    assert seen["train"].step == 4


@pytest.mark.parametrize(
    "below, above, alone",
    [(None, None, True), ("lora", None, False), (None, "lora", True), (None, "bitfit", False), ("bitfit", None, False)],
)
def test_a_hook_is_told_whether_its_base_is_the_frozen_layer_as_it_is(registered, below, above, alone):
    """Nothing is below, and nothing above stands in for a part, as a trained bias does."""
    told = []
    made_here = registered(
        peft_params=lambda site: {"s": np.ones(site.shape[0])},
        peft_linear=lambda x, base, p: told.append(base.is_frozen) or base(x) * p.s,
    )
    model = tiny.model("qwen2")
    for method in (below, made_here, above):
        if method:
            sites.attach(model, method, {"targets": ["@q"]} if isinstance(method, str) else None)
    model(tiny.ids())
    assert told == [alone] * len(Q)


def test_a_weight_that_no_hook_names_is_not_computed(registered):
    def peft_params(site):
        return {"s": np.ones(site.shape[0])}

    model = tiny.model()
    for site in model.sites.values():
        if "q" in site.roles:
            site.weight = None  # asking it would raise
    sites.attach(model, registered(peft_params=peft_params, peft_linear=lambda x, base, p: base(x) * p.s))


def test_a_method_that_finds_nothing_to_train_is_an_error(registered):
    module = registered(peft_params=lambda site: None, peft_linear=lambda x, base: base(x))
    with pytest.raises(RefpeftError, match="'made_here' trains nothing on this model"):
        sites.attach(tiny.model(), module)


def test_a_reference_to_what_is_not_trained_is_an_error(registered):
    module = registered(peft_params=lambda site: {"s": "lm_head.s"}, peft_linear=lambda x, base, p: base(x) * p.s)
    with pytest.raises(RefpeftError, match=r"q_proj.s refers to lm_head.s, which is not trained"):
        sites.attach(tiny.model(), module)


def test_a_hook_without_its_input_is_an_error(registered):
    module = registered(peft_params=lambda site: {"s": np.ones(1)}, peft_linear=lambda base, p: None)
    with pytest.raises(RefpeftError, match="'made_here': peft_linear does not take x"):
        sites.attach(tiny.model(), module)


def test_a_plugin_without_targets_is_an_error(registered):
    module = registered(peft_params=lambda site: {"s": np.ones(1)}, peft_linear=lambda x, base, p: base(x))
    module.Config = dataclass(frozen=True)(type("Config", (), {}))
    with pytest.raises(RefpeftError, match="'made_here' needs a dataclass Config with a field 'targets'"):
        sites.attach(tiny.model(), module)


# ---- methods that change the frozen weight ---------------------------------------------------------------------------


def pissa(original):
    """PiSSA (arXiv:2404.02948) of rank 2: the largest part of the weight is trained, the rest is frozen."""
    U, S, Vt = np.linalg.svd(original)
    A, B = Vt[:2], U[:, :2] * S[:2]
    return {"A": A, "B": B, "A0": A, "B0": B}


def zeros(site):
    A, B = np.zeros((2, site.shape[1])), np.zeros((site.shape[0], 2))
    return {"A": A, "B": B, "A0": sites.Tensor(A), "B0": sites.Tensor(B)}


PISSA = {
    "peft_params": zeros,
    "peft_fit": pissa,
    "peft_base": lambda original, p: original - p.B0 @ p.A0,
    "peft_linear": lambda x, base, p: base(x) + sites.Tensor(x.data @ p.A.data.T @ p.B.data.T),
    "peft_merge": lambda weight, p: weight + p.B @ p.A,
}


@pytest.mark.parametrize("packer", [None, quantizer()])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_changed_weight_is_the_frozen_one_while_the_method_is_attached(family, packer, registered):
    model, plain = (tiny.model(family, quantizer=packer) for _ in range(2))
    kept = dict(model.frozen)
    adapter = sites.attach(model, registered(**PISSA))
    for site in adapter.sites:
        A, B = (adapter.params[f"{site.name}.{name}"].data for name in "AB")
        residual = tiny.model(family).sites[site.name].weight() - B @ A
        expected = residual if packer is None else packer(residual, np.dtype("f8"))()
        assert np.array_equal(site.weight(), expected)
        assert type(site.weight) is type(kept[f"{site.name}.weight"]) is type(model.frozen[f"{site.name}.weight"])
    if packer is None:
        assert abs(model(tiny.ids()).data - plain(tiny.ids()).data).max() < 1e-12
    assert model.nbytes == plain.nbytes
    with sites.bypassed(model):
        assert np.array_equal(model(tiny.ids()).data, plain(tiny.ids()).data)
    assert not np.array_equal(model(tiny.ids()).data, plain(tiny.ids()).data)
    sites.detach(model)
    assert all(model.frozen[name] is weight for name, weight in kept.items())
    assert all(site.weight is kept.get(f"{site.name}.weight") for site in model.sites.values() if not site.tied)
    assert np.array_equal(model(tiny.ids()).data, plain(tiny.ids()).data)


@pytest.mark.parametrize("packer", [None, quantizer()])
def test_merging_keeps_a_changed_weight(packer, registered):
    model, plugin = tiny.model(quantizer=packer), registered(**PISSA)
    tiny.scramble(sites.attach(model, plugin))
    tiny.scramble(sites.attach(model, "lora", {"targets": ["@q", "@k"]}))
    before = model(tiny.ids()).data
    sites.merge(model)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12
    again = sites.attach(model, plugin)  # of the merged weight, not of the checkpoint's
    assert abs(model(tiny.ids()).data - before).max() < 1e-12
    sites.detach(model, again)
    assert abs(model(tiny.ids()).data - before).max() < 1e-12


def test_what_is_around_a_changed_weight_comes_off_in_any_order(registered):
    model, plugin = tiny.model(), registered(**PISSA)
    first = sites.attach(model, plugin)
    tiny.scramble(sites.attach(model, "lora"))
    sites.detach(model, first)
    alone = tiny.model()
    tiny.scramble(sites.attach(alone, "lora"))
    assert np.array_equal(model(tiny.ids()).data, alone(tiny.ids()).data)


@pytest.mark.parametrize("method", ["lora", "full", None])
def test_a_weight_that_something_attached_relies_on_is_not_changed(method, registered):
    model, plugin = tiny.model(), registered(**PISSA)
    sites.attach(model, method or plugin, {"targets": ["@q"]} if method else None)
    before = dict(model.frozen)
    with pytest.raises(
        RefpeftError,
        match=rf"'made_here' changes the frozen weight of {Q[0]}, which {method or 'made_here'} is on already: attach",
    ):
        sites.attach(model, plugin)
    assert len(model.adapters) == 1 and all(model.frozen[name] is weight for name, weight in before.items())


def test_a_tied_weight_is_not_changed(registered):
    plugin = registered(**PISSA)
    options = plugin.Config(targets=("lm_head",))
    with pytest.raises(RefpeftError, match=r"frozen weight of lm_head, which is that of model.embed_tokens too"):
        sites.attach(tiny.model("tied"), plugin, options)
    sites.attach(tiny.model("llama"), plugin, options)


def test_a_method_may_leave_the_weight_alone(registered):
    model = tiny.model()
    kept = dict(model.frozen)
    adapter = sites.attach(model, registered(**PISSA | {"peft_fit": lambda: None, "peft_base": lambda: None}))
    assert all(model.frozen[name] is weight for name, weight in kept.items())
    assert not any(tensor.data.any() for tensor in adapter.params.values())


def test_constants_are_neither_trained_nor_lost(registered):
    model = tiny.model()
    adapter = sites.attach(model, registered(**PISSA))
    assert list(adapter.params) == [f"{name}.{key}" for name in Q for key in "AB"]
    assert list(adapter.constants) == [f"{name}.{key}0" for name in Q for key in "AB"]
    assert adapter.size == 2 * 2 * (24 + 24)
    for name in Q:
        assert np.array_equal(adapter.params[f"{name}.A"].data, adapter.constants[f"{name}.A0"].data)


def test_a_plan_fits_nothing(registered):
    model = tiny.model()
    model.weightless = True
    refused = {"peft_fit": lambda original: 1 / 0, "peft_base": lambda original: 1 / 0}
    sites.attach(model, registered(**PISSA | refused))


def test_weights_that_the_files_have_quantized_cannot_be_read_as_they_were(registered):
    model, packer = tiny.model(quantizer=quantizer()), quantizer()
    model._weights = lambda name, linear, transposed: packer(np.ones((24, 24)), np.dtype("f8"), name)
    with pytest.raises(RefpeftError, match=rf"{Q[0]} is quantized in the model's files, and its weight from before"):
        sites.attach(model, registered(**PISSA))
