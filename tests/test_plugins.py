"""Every method on every family: gradients, first values, sizes, nesting, detaching, quantized weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
from variants import CASES, VARIANTS, WITH_BIASES, attached, bare, needed_quantizer, quantizer

from refpeft import manager, ops, sites
from refpeft.errors import RefpeftError
from refpeft.rng import Stream

CHANGE_AT_THE_START = {
    "adapterfusion",
    "c3a",
    "fourierft",
    "prompt_tuning",
    "pre_embed",
    "pre_layer",
    "ladder_side",
    "attention_fusion",
    "spot",
    "multitask_prompt",
    "p_tuning",
    "p_tuning_v2",
    "prefix_tuning",
    "loftq",
    "ipt",
    "mam",
    "s4",
    "unipelt",
}
NEARLY_AS_IT_WAS = {
    "vblora": 0.01,
    "hra": 1e-12,
    "pissa": 1e-12,
    "olora": 1e-12,
    "houlsby": 1e-3,
    "pfeiffer": 0.03,
    "lin": 0.03,
    "adapterdrop": 0.03,
    "sparse_adapter": 0.1,
    "adamix": 0.03,
}
NEARLY_AS_IT_WAS |= dict.fromkeys(("compacter", "compacter_pp", "phm_adapter"), 1e-5)
"""By how much first values change logits at most, where small random weights are multiplied."""


def slope(model, name: str, direction: np.ndarray, step: float = 1e-5) -> float:
    """The derivative of the loss along `direction` of one parameter, by finite differences."""
    tensor = dict(model.trained())[name]
    here, losses = tensor.data, []
    for sign in (1, -1):
        tensor.data = here + sign * step * direction
        losses.append(float(model.loss(tiny.batch()).data))
    tensor.data = here
    return (losses[0] - losses[1]) / (2 * step)


def check_gradients(model) -> None:
    """Every parameter's gradient against finite differences along a random direction of its own."""
    gradients = tiny.gradients(model, tiny.batch())
    rng = np.random.default_rng(5)
    worst = max(np.sqrt((g * g).sum()) for g in gradients.values())
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        direction /= np.sqrt((direction * direction).sum())
        assert slope(model, name, direction) == pytest.approx(
            (gradient * direction).sum(), rel=1e-6, abs=1e-8 * worst
        ), name


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradients_are_finite_differences_of_the_loss(family, name, monkeypatch):
    """What a method counts as a constant in the backward pass is no constant here; golden cases hold it to that."""
    monkeypatch.setattr(ops, "detach", lambda x: x)
    model, _ = attached(family, name)
    check_gradients(model)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_first_values_leave_the_model_as_it_was(family, name):
    before = bare(family, name)(tiny.ids()).data
    model, adapter = attached(family, name, scramble=False)
    change = abs(model(tiny.ids()).data - before).max()
    if adapter.name in CHANGE_AT_THE_START:
        assert change > 1e-3
    elif adapter.name in NEARLY_AS_IT_WAS:
        assert 0 < change < NEARLY_AS_IT_WAS[adapter.name]
    else:
        assert change == 0


@pytest.mark.parametrize(("family", "name"), CASES)
def test_detaching_restores_every_bit_and_training_leaves_the_frozen_weights_alone(family, name):
    plain = bare(family, name)
    model, adapter = attached(family, name)
    before = {key: frozen() for key, frozen in model.frozen.items()}
    changed = model(tiny.ids()).data
    tiny.gradients(model, tiny.batch())
    assert abs(changed - plain(tiny.ids()).data).max() > 1e-6
    for key, frozen in model.frozen.items():
        assert np.array_equal(frozen(), before[key]), key
    sites.detach(model, adapter)
    assert not model.adapters
    for key, frozen in plain.frozen.items():
        assert np.array_equal(frozen(), model.frozen[key]()), key
    assert np.array_equal(model(tiny.ids()).data, plain(tiny.ids()).data)


@pytest.mark.parametrize("name", [*VARIANTS, *WITH_BIASES])
def test_the_seed_decides_the_first_values(name):
    method, options = (VARIANTS | WITH_BIASES)[name]
    values = []
    for seed in (3, 3, 4):
        model = bare("qwen2", name)
        values.append({k: t.data for k, t in sites.attach(model, method, options, seed=seed).params.items()})
    first, again, other = values
    assert all(np.array_equal(first[key], again[key]) for key in first)
    if method in ("lora", "houlsby", "prompt_tuning", "prefix_tuning"):
        assert any(not np.array_equal(first[key], other[key]) for key in first)


# ---- each method's own points ----------------------------------------------------------------------------------------


def test_tied_weights_stay_one_parameter_with_both_gradients():
    model = tiny.model("tied")
    sites.attach(model, "full")
    both = tiny.gradients(model, tiny.batch())
    assert "lm_head.weight" not in both
    apart = tiny.model("tied")
    sites.attach(apart, "full", {"tie": False})
    two = tiny.gradients(apart, tiny.batch())
    together = two["model.embed_tokens.weight"] + two["lm_head.weight"]
    assert np.allclose(both["model.embed_tokens.weight"], together, rtol=1e-12, atol=1e-15)


def test_full_of_a_tied_head_alone_says_what_to_do():
    with pytest.raises(
        RefpeftError, match=r"lm_head shares its weight with model.embed_tokens: target both, or set tie"
    ):
        sites.attach(tiny.model("tied"), "full", {"targets": ["lm_head"]})


def test_bitfit_without_a_bias_in_the_model_says_so():
    with pytest.raises(RefpeftError, match=r"none of the 20 layers .* has one .*create = true"):
        sites.attach(tiny.model("llama"), "bitfit")


def test_lora_patterns_choose_rank_and_scale():
    model = tiny.model("llama")
    options = {"targets": "all-linear", "r": 4, "alpha": 8, "rank_pattern": {"q_proj": 2, r"1\.mlp\..*": 5}}
    adapter = sites.attach(model, "lora", options | {"alpha_pattern": {"down_proj": 20}})
    assert adapter.params["model.layers.0.self_attn.q_proj.A"].shape == (2, 24)
    assert adapter.params["model.layers.1.mlp.down_proj.B"].shape == (24, 5)
    scales = {site.name: adapter.cfg.scale(site) for site in adapter.sites}
    assert scales["model.layers.0.self_attn.q_proj"] == 8 / 2
    assert scales["model.layers.0.self_attn.k_proj"] == 8 / 4
    assert scales["model.layers.1.mlp.down_proj"] == 20 / 5


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_an_error(name):
    with pytest.raises(RefpeftError, match=rf"lora.{name} has the key 'k_proj', which matches none of the targets"):
        sites.attach(tiny.model(), "lora", {name: {"k_proj": 2}})


@pytest.mark.filterwarnings("ignore::refpeft.errors.RefpeftWarning")  # many values tell more
def test_lora_first_values_have_the_distribution_that_is_said():
    model = tiny.model()
    kaiming = sites.attach(model, "lora", {"r": 64, "targets": ["@down"]}).params["model.layers.0.mlp.down_proj.A"].data
    assert abs(kaiming).max() <= 32**-0.5 < abs(kaiming).max() * 1.01
    sites.detach(model)
    gaussian = sites.attach(model, "lora", {"r": 64, "targets": ["@down"], "init": "gaussian"})
    assert gaussian.params["model.layers.0.mlp.down_proj.A"].data.std() == pytest.approx(1 / 64, rel=0.05)


def test_lora_drops_what_A_reads_in_training_alone():
    model = tiny.model()
    adapter = sites.attach(model, "lora", {"dropout": 0.5})
    tiny.scramble(adapter)
    evaluated = model(tiny.ids()).data
    assert np.array_equal(model(tiny.ids()).data, evaluated)
    model.mode.training = True
    first = model(tiny.ids()).data
    assert abs(first - evaluated).max() > 1e-3
    assert np.array_equal(model(tiny.ids()).data, first)  # seed and step decide
    model.mode.step = 1
    assert abs(model(tiny.ids()).data - first).max() > 1e-3
    check_gradients(model)


def test_a_feedforward_name_that_is_no_target_is_an_error():
    with pytest.raises(RefpeftError, match="ia3: feedforward names '@down', which is none of the targets"):
        sites.attach(tiny.model(), "ia3", {"targets": ["@k", "@v"]})


def test_adapterdrop_drops_in_training_from_a_random_layer_on_and_afterwards_from_the_one_that_is_asked_for():
    model = tiny.model()
    adapter = sites.attach(model, "adapterdrop", {"size": 5})
    tiny.scramble(adapter)
    without = tiny.model()(tiny.ids()).data
    whole = model(tiny.ids()).data
    model.mode.training = True
    seen = set()
    for model.mode.step in range(20):
        logits = model(tiny.ids()).data
        assert np.array_equal(model(tiny.ids()).data, logits)  # seed and step decide
        seen.add(logits.tobytes())
    model.mode.training = False
    dropped = tiny.model()
    tiny.scramble(sites.attach(dropped, "adapterdrop", {"size": 5, "drop": 1}))
    last = dropped(tiny.ids()).data
    assert seen == {whole.tobytes(), last.tobytes()}
    assert abs(last - whole).max() > 1e-3 and abs(last - without).max() > 1e-3


@pytest.mark.parametrize("drop", [0, -1])
def test_adapterdrop_that_drops_nothing_is_an_error(drop):
    with pytest.raises(RefpeftError, match=rf"drop is {drop}: expected 1 or more layers without adapters"):
        sites.attach(tiny.model(), "adapterdrop", {"robust": False, "drop": drop})


def test_adapterdrop_of_more_layers_than_there_are_is_an_error():
    with pytest.raises(RefpeftError, match="drop is 2, and the last of these layers is number 1: expected 1 or less"):
        sites.attach(tiny.model(), "adapterdrop", {"drop": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8, "n": 5}, "n is 5, which does not divide size, 8: n = 4 does"),
        ({"size": 20, "n": 10}, r"n is 10, which does not divide the width of model.layers.0.attn_out, 24: n = 4 does"),
        ({"size": 8, "n": 0}, "n is 0, which does not divide size, 8: n = 1 does"),
    ],
)
@pytest.mark.parametrize("method", ["compacter", "phm_adapter"])
def test_kronecker_factors_that_do_not_divide_a_side_are_an_error(method, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(), method, options)


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("llama", "top_layers", {"count": 3}, "count is 3: expected 1 to 2, the layers that there are"),
        ("tied", "top_layers", {"head": True}, "lm_head shares its weight with model.embed_tokens, which stays frozen"),
        ("tied", "by_type", {"types": ["head"]}, "lm_head shares its weight with model.embed_tokens: choose 'embedd"),
        ("llama", "by_type", {"types": ["head"], "targets": ["@q"]}, "none of the 2 layers .* is of type 'head'"),
        ("llama", "rows", {"rows": [3, 12]}, "names 12: model.layers.0.self_attn.v_proj has rows 0 to 11"),
        ("llama", "rows", {"count": 13}, "rows.count is 13: model.layers.0.self_attn.v_proj has 12 rows"),
        ("llama", "rows", {"rows": [3, 3]}, "expected rows to be named once"),
        ("llama", "shira", {"r": 9}, "more numbers than model.layers.0.self_attn.v_proj has: expected 8 or less"),
        ("llama", "trainable_tokens", {}, "token_indices is empty: name the tokens whose rows are trained"),
        ("llama", "trainable_tokens", {"token_indices": [40]}, "names 40: the model has tokens 0 to 39"),
        ("llama", "trainable_tokens", {"token_indices": [4, 4]}, "expected token_indices to name a token once"),
        ("tied", "trainable_tokens", {"token_indices": [4], "targets": ["@head"]}, "lm_head shares .*: target both"),
        ("llama", "trainable_tokens", {"token_indices": [4], "targets": ["@q"]}, "q_proj has no rows of tokens"),
    ],
)
def test_what_a_selection_cannot_choose_is_an_error(family, method, options, message):
    with pytest.raises(RefpeftError, match=message):
        sites.attach(tiny.model(family), method, options)


def test_only_the_chosen_tokens_change_and_all_others_keep_their_bits():
    model = tiny.model("llama")
    options = {"token_indices": [5, 2], "targets": ["@embed"]}
    before = model.embed(tiny.ids()).data
    tiny.scramble(sites.attach(model, "trainable_tokens", options))
    ids, after = tiny.ids(), model.embed(tiny.ids()).data
    chosen = np.isin(ids, [5, 2])
    assert chosen.any() and np.array_equal(after[~chosen], before[~chosen])
    assert (after[chosen] != before[chosen]).any(axis=-1).all()


@pytest.mark.parametrize(("size", "count"), [(100, 90), (2**17, 2**16), (2**17, 2**14)])
def test_places_drawn_at_random_are_distinct_and_spread(size, count):
    places = manager.load("shira")._random(Stream(0, "places"), size, count)
    assert len(np.unique(places)) == count and places.min() >= 0 and places.max() < size
    assert abs(places.mean() / size - 0.5) < 0.05


def test_places_by_magnitude_are_those_of_the_largest_numbers():
    model = tiny.model("llama")
    adapter = sites.attach(model, "shira", {"r": 2, "mask": "magnitude", "targets": ["0.self_attn.q_proj"]})
    (site,) = adapter.sites
    rows, columns = adapter.constants[f"{site.name}.indices"].data
    magnitudes = abs(site.weight())
    assert np.array_equal(np.sort(magnitudes[rows, columns]), np.sort(magnitudes.reshape(-1))[-2 * 48 :])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_sees_no_later_one_and_no_other_row(name):
    model, _ = attached("llama", name)
    ids = tiny.ids(2, 8)
    before = model(ids).data
    ids[0, 5] = (ids[0, 5] + 1) % 40
    changed = (model(ids).data != before).any(axis=2)
    assert changed[0, 5:].all() and not changed[0, :5].any() and not changed[1].any()


# ---- several on one model --------------------------------------------------------------------------------------------

PAIRS = [
    ("lora", "prefix_tuning"),
    ("lora", "ia3"),
    ("ia3", "lora"),
    ("full", "lora"),
    ("lora", "lora"),
    ("houlsby", "lora"),
    ("prompt_tuning", "prefix_tuning"),
    ("bitfit", "lora"),
    ("lora", "bitfit"),
]


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_two_methods_at_once_have_right_gradients_and_come_off_in_any_order(inner, outer):
    model = tiny.model("qwen2")
    plain = model(tiny.ids()).data
    first, second = sites.attach(model, inner), sites.attach(model, outer)
    tiny.scramble(first, 1)
    tiny.scramble(second, 2)
    check_gradients(model)
    sites.detach(model, first)
    alone = tiny.model("qwen2")
    tiny.scramble(sites.attach(alone, outer), 2)
    if inner != outer:  # the second of two of a kind is called lora2, and has first values of its own
        assert np.array_equal(model(tiny.ids()).data, alone(tiny.ids()).data)
    sites.detach(model, second)
    assert np.array_equal(model(tiny.ids()).data, plain)


def test_gains_around_lora_scale_its_update_too():
    model = tiny.model()
    site = model.sites["model.layers.0.self_attn.v_proj"]
    lora = sites.attach(model, "lora", {"targets": [site.name]})
    tiny.scramble(lora)
    ia3 = sites.attach(model, "ia3", {"targets": [site.name], "feedforward": []})
    tiny.scramble(ia3, 4)
    A, B, gain = (t.data for a in (lora, ia3) for t in a.params.values())
    x = np.random.default_rng(0).standard_normal((1, 2, 24))
    expected = gain * (x @ (site.weight() + 2.0 * B @ A).T)
    assert np.allclose(site(sites.Tensor(x)).data, expected, rtol=1e-13)


def test_two_methods_that_replace_one_bias_are_an_error():
    model = tiny.model("qwen2")
    sites.attach(model, "bitfit")
    sites.attach(model, "full", {"targets": ["@q"]})
    with pytest.raises(RefpeftError, match=r"two methods replace the bias of model.layers.0.self_attn.q_proj"):
        model(tiny.ids())


# ---- on quantized weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, (method, _) in VARIANTS.items() if not needed_quantizer(method)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_nf4_weights_a_method_is_what_it_is_on_their_dense_values(family, name):
    packed, _ = attached(family, name, quantizer=quantizer())
    dense, _ = attached(family, name)
    for site in dense.sites.values():
        if site.kind == "linear" and "head" not in site.roles:
            site.weight.array = packed.sites[site.name].weight()
    for source, copy in zip(packed.adapters, dense.adapters, strict=True):
        for key, tensor in (source.params | source.constants).items():  # some are made of the weights
            (copy.params | copy.constants)[key].data[...] = tensor.data
    assert np.allclose(packed(tiny.ids()).data, dense(tiny.ids()).data, rtol=0, atol=1e-12)
    ours, theirs = tiny.gradients(packed, tiny.batch()), tiny.gradients(dense, tiny.batch())
    assert all(np.allclose(ours[key], theirs[key], rtol=1e-9, atol=1e-12) for key in theirs)


def test_every_plugin_is_small_and_says_what_it_is():
    for name, listing in manager.catalogue().items():
        lines = Path(listing.path).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 80, name
        assert listing.summary.endswith("."), name
        text = "\n".join(lines)
        assert name == "full" or "arXiv:" in text or "https://" in text, name


def test_every_config_is_frozen_and_has_defaults():
    for name, listing in manager.catalogue().items():
        if not listing.options:
            continue
        config = manager.load(name).Config()
        field = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, None)
