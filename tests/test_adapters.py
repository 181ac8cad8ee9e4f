"""Adapter directories: what is written, what comes back, and every file that does not fit refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from variants import CASES, SIMPLER_IN_FILES, VARIANTS, attached, bare, quantizer

from refpeft import adapters, files, manager, sites
from refpeft.errors import RefpeftError


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def change(folder: Path, **entries) -> None:
    files.write_json(folder / "adapter_config.json", config(folder) | entries)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in files.read_safetensors(folder / "adapter_model.safetensors").items()}


def replace(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    files.write_safetensors(folder / "adapter_model.safetensors", arrays)


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] not in SIMPLER_IN_FILES])
def test_what_is_saved_comes_back_exactly(family, name, tmp_path):
    model, adapter = attached(family, name)
    adapters.save(tmp_path / "a", model)
    other = bare(family, name)
    (loaded,) = adapters.load(other, tmp_path / "a")
    assert loaded.params.keys() == adapter.params.keys()
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)
    ours, theirs = tiny.gradients(model, tiny.batch()), tiny.gradients(other, tiny.batch())
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    adapters.save(tmp_path / "b", other)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] in SIMPLER_IN_FILES])
def test_what_files_of_peft_do_not_say_comes_back_as_the_same_function(family, name, tmp_path):
    model, adapter = attached(family, name)
    adapters.save(tmp_path / "a", model)
    other = bare(family, name)
    (loaded,) = adapters.load(other, tmp_path / "a")
    assert loaded.plugin is not adapter.plugin or loaded.params.keys() != adapter.params.keys()
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)
    adapters.save(tmp_path / "b", other)
    a, b = (tmp_path / folder / "adapter_model.safetensors" for folder in "ab")
    assert a.read_bytes() == b.read_bytes()


# ---- for methods that start from other adapters ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in SIMPLER_IN_FILES])
def test_what_a_directory_holds_is_known_without_putting_it_on(name, tmp_path):
    model, adapter = attached("llama", name)
    adapters.save(tmp_path, model)
    other = bare("llama", name)
    found = adapters.stored(tmp_path, other.sites.values())
    assert found.params.keys() == adapter.params.keys()
    for key, tensor in (found.params | found.constants).items():
        assert np.array_equal(tensor.data, (adapter.params | adapter.constants)[key].data), key
    assert not other.adapters and not any(site.layers for site in other.sites.values())


def test_what_is_stored_in_a_quantizers_format_is_dense_again(tmp_path):
    model, adapter = attached("llama", "houlsby")
    adapters.save(tmp_path, model, quantizer=quantizer(double_quant=False))
    adapters.quantize(model, quantizer(double_quant=False))
    found = adapters.stored(tmp_path, tiny.model().sites.values()).params
    assert all(np.allclose(found[key].data, tensor.data, atol=1e-6) for key, tensor in adapter.params.items())


def test_what_stands_elsewhere_than_asked_or_is_not_one_adapter_is_not_taken(tmp_path):
    model, _ = attached("llama", "prompt_tuning")
    adapters.save(tmp_path / "one", model)
    embed, head = model.embed, model.head
    assert [layer.site for layer in adapters.stored(str(tmp_path / "one"), [embed]).layers] == [embed]
    with pytest.raises(RefpeftError, match=r"one/adapter_config.json: target '@embed' matches no site"):
        adapters.stored(tmp_path / "one", [head])
    sites.attach(model, "lora")
    adapters.save(tmp_path / "two", model)
    with pytest.raises(RefpeftError, match=r"two holds 2 adapters: name one of .*1-prompt_tuning, .*two/2-lora"):
        adapters.stored(tmp_path / "two", [embed])
    with pytest.raises(RefpeftError, match="holds no adapter"):
        adapters.stored(tmp_path, [embed])


# ---- files that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a - 1,
            r"indices of model.layers.0.self_attn.q_proj are outside of its weight \(24, 24\), or there tw",
        ),
        (lambda a: a + 12, "are outside of its weight"),
        (lambda a: a * 0, "or there twice"),
        (lambda a: a.astype("f4") + np.float32(0.5), "is of float32: expected integers"),
        (lambda a: a.astype("f4") * np.float32(np.nan), "is of float32: expected integers"),
    ],
)
def test_places_of_a_file_that_cannot_be_are_refused(change, message, tmp_path):
    model, _ = attached("llama", "shira")
    adapters.save(tmp_path, model)
    replace(tmp_path, {name: change(a) if "indices" in name else a for name, a in tensors(tmp_path).items()})
    with pytest.raises(RefpeftError, match=message):
        adapters.load(tiny.model(), tmp_path)


def test_places_that_a_file_has_as_floats_are_read(tmp_path):
    model, _ = attached("llama", "shira")
    adapters.save(tmp_path, model)
    replace(tmp_path, {name: array.astype("f4") for name, array in tensors(tmp_path).items()})
    other = tiny.model()
    adapters.load(other, tmp_path)
    assert abs(other(tiny.ids()).data - model(tiny.ids()).data).max() < 1e-5


def test_several_adapters_have_a_folder_each_and_keep_their_order(tmp_path):
    model, _ = attached("llama", "prefix_tuning")
    for method in ("lora", "ia3"):
        tiny.scramble(sites.attach(model, method))
    adapters.save(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-prefix_tuning", "2-lora", "3-ia3"]
    other = tiny.model()
    assert [adapter.name for adapter in adapters.load(other, tmp_path)] == ["prefix_tuning", "lora", "ia3"]
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)


def test_the_tenth_adapter_comes_after_the_second(tmp_path):
    for name in ("10-lora", "2-lora", "1-lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    assert [path.name for path in adapters.directories(tmp_path)] == ["1-lora", "2-lora", "10-lora"]


def test_one_of_several_is_saved_alone(tmp_path):
    model, first = attached("llama", "lora")
    sites.attach(model, "ia3")
    adapters.save(tmp_path, model, first)
    assert config(tmp_path)["peft_type"] == "LORA"


def test_a_loss_of_precision_is_that_of_the_type_alone(tmp_path):
    model, _ = attached("llama", "lora")
    adapters.save(tmp_path, model)
    replace(tmp_path, {name: array.astype("f2") for name, array in tensors(tmp_path).items()})
    (loaded,) = adapters.load(tiny.model(), tmp_path)
    for name, tensor in loaded.params.items():
        assert np.array_equal(tensor.data, model.adapters[0].params[name].data.astype("f2").astype("f8"))


def test_what_peft_cannot_express_is_in_a_form_of_our_own(tmp_path):
    for name in ("houlsby", "bitfit-created", "full", "prefix_tuning-zero"):
        model, adapter = attached("llama", name)
        adapters.save(tmp_path, model)
        assert config(tmp_path)["peft_type"] == "REFPEFT"
        assert config(tmp_path)["method"] == adapter.name
        assert set(tensors(tmp_path)) == {f"base_model.model.{key}" for key in adapter.params}


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, ["q_proj", "v_proj"]),
        ("gpt2", {}, ["c_attn"]),
        ("gpt2", {"targets": ["@down"]}, ["mlp.c_proj"]),
        ("llama", {"targets": ["@q"], "layers": [1]}, ["model.layers.1.self_attn.q_proj"]),
        ("llama", {"targets": ["@embed", "@head"]}, ["embed_tokens", "lm_head"]),
    ],
)
def test_target_modules_are_as_short_as_is_exact(family, options, expected, tmp_path):
    model = tiny.model(family)
    sites.attach(model, "lora", options)
    adapters.save(tmp_path, model)
    assert config(tmp_path)["target_modules"] == expected
    assert config(tmp_path)["fan_in_fan_out"] == (family == "gpt2")
    assert config(tmp_path)["task_type"] == "CAUSAL_LM"


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model, _ = attached("llama", "lora")
    adapters.save(tmp_path, model)
    return tmp_path


def refused(folder: Path, message: str, family: str = "llama") -> None:
    """Loading fails with one line that names the file, and the model stays as it was."""
    model = tiny.model(family)
    with pytest.raises(RefpeftError, match=message) as caught:
        adapters.load(model, folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not model.adapters and not any(site.layers for site in model.sites.values())


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_a_missing_tensor_is_named(saved):
    arrays = tensors(saved)
    del arrays[A0]
    replace(saved, arrays)
    refused(saved, f"tensor '{A0}' is missing")


def test_an_unexpected_tensor_is_named(saved):
    replace(saved, tensors(saved) | {"base_model.model.lm_head.lora_A.weight": np.ones((8, 24), "f4")})
    refused(saved, r"tensor 'base_model.model.lm_head.lora_A.weight' is not expected")


def test_another_shape_is_named(saved):
    replace(saved, tensors(saved) | {A0: np.ones((4, 24), "f4")})
    refused(saved, rf"tensor '{A0}' has shape \(4, 24\): expected \(3, 24\)")


def test_a_tensor_of_integers_is_refused(saved):
    replace(saved, tensors(saved) | {A0: np.ones((3, 24), "i4")})
    refused(saved, rf"tensor '{A0}' is of int32: expected floating-point numbers")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"use_qalora": True}, "use_qalora = True is not something that refpeft computes for LORA"),
        ({"lora_bias": True}, "lora_bias = True is not"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"something_new": 3}, "something_new = 3 is not"),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights = 'corda' changes frozen weights too; refpeft knows True, False, 'gaussian'",
        ),
        ({"r": None}, "r is missing, which LORA needs"),
        ({"r": 10**9}, r"r = 1000000000, but no tensor in adapter_model.safetensors has a side of more than 24"),
        ({"rank_pattern": {"q_proj": 10**9}}, "q_proj = 1000000000, but no tensor"),
        ({"r": "eight"}, 'r is "eight": expected an integer'),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["nonsense"]}, "target 'nonsense' matches no site"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": [["q_proj"]]}, "target_modules"),
        ({"bias": "some"}, "bias"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"modules_to_save": 3}, "modules_to_save"),
        ({"peft_type": "XLORA"}, "peft_type is 'XLORA'; refpeft reads LORA, "),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": "REFPEFT"}, "expected 'method', a name"),
        ({"peft_type": "REFPEFT", "method": "../../evil.py", "options": {}}, r"no method is named '../../evil.py'"),
        ({"peft_type": "REFPEFT", "method": "nf4", "options": {}}, "'nf4' is not a method"),
        ({"peft_type": "REFPEFT", "method": "houlsby", "options": {"width": 3}}, "unknown key 'houlsby.width'"),
    ],
)
def test_a_setting_that_is_not_understood_is_refused(saved, entries, message):
    change(saved, **entries)
    refused(saved, message)


@pytest.mark.parametrize(
    "entries",
    [
        {"something_new": None},
        {"use_dora": False, "eva_config": {}, "layer_replication": []},
        {"init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj", "v_proj", "query"]},
        {"peft_version": "9.9", "inference_mode": False, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"bias": "lora_only"},
    ],
)
def test_settings_that_change_nothing_are_read(saved, entries):
    change(saved, **entries)
    adapters.load(tiny.model(), saved)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
KEYS = """
r lora_alpha lora_dropout use_rslora bias rank_pattern alpha_pattern modules_to_save target_modules exclude_modules
layers_to_transform layers_pattern init_lora_weights feedforward_modules num_virtual_tokens peft_type method options
use_dora other
"""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    st.dictionaries(st.sampled_from(KEYS.split()), VALUES, min_size=1, max_size=3),
    st.sampled_from(["LORA", "IA3", "PREFIX_TUNING", "REFPEFT"]),
)
def test_any_config_is_read_or_refused_in_a_sentence(saved, entries, kind):
    change(saved, **({"peft_type": kind, "num_virtual_tokens": 3, "method": "lora", "options": {}} | entries))
    model = tiny.model()
    try:
        adapters.load(model, saved)
    except RefpeftError:
        assert not model.adapters


def test_an_adapter_of_another_model_is_refused(saved):
    refused(saved, "target 'q_proj' matches no site", "gpt2")


def test_the_second_of_two_that_fails_takes_the_first_with_it(tmp_path):
    model, _ = attached("llama", "ia3")
    sites.attach(model, "lora")
    adapters.save(tmp_path, model)
    change(tmp_path / "2-lora", use_qalora=True)
    refused(tmp_path, "use_qalora")


@pytest.mark.parametrize("what", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_broken_file_is_named(saved, what):
    (saved / what).write_bytes(b"{")
    refused(saved, what)
    (saved / what).unlink()
    refused(saved, what if what.endswith("safetensors") else "holds no adapter")


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(RefpeftError, match="no adapter to save"):
        adapters.save(tmp_path, tiny.model())


def test_frozen_weights_that_peft_adds_must_be_the_models(tmp_path):
    model = tiny.model()
    tiny.scramble(sites.attach(model, "lora", {"targets": ["@embed"]}))
    adapters.save(tmp_path, model)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    table = model.embed.weight().astype("f2")
    replace(tmp_path, tensors(tmp_path) | {name: table})
    adapters.load(tiny.model(), tmp_path)
    replace(tmp_path, tensors(tmp_path) | {name: table + np.float16(0.5)})
    refused(tmp_path, "the frozen weight of model.embed_tokens in it is not this model's")


def test_constants_that_a_method_draws_for_all_sites_are_in_the_file(tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "projected.py").write_text(
        '''"""y = W x + b A x with A one random matrix for all sites (as VeRA, arXiv:2310.11454)."""
from dataclasses import dataclass

import numpy as np

from refpeft import Tensor, hookimpl, ops


@dataclass(frozen=True)
class Config:
    targets: tuple[str, ...] = ("@q",)


@hookimpl
def peft_shared(sites, rng):
    return {"A": Tensor(rng.standard_normal((2, sites[0].shape[1])))}


@hookimpl
def peft_params(site):
    return {"b": np.zeros((site.shape[0], 2))}


@hookimpl
def peft_linear(x, base, p, shared):
    return base(x) + ops.linear(ops.linear(x, shared.A), p.b)
'''
    )
    plugin = manager.load(folder / "projected.py")
    model = tiny.model()
    tiny.scramble(sites.attach(model, plugin, seed=5))
    adapters.save(tmp_path, model)
    other = tiny.model()
    adapters.load(other, tmp_path)
    assert np.array_equal(other(tiny.ids()).data, model(tiny.ids()).data)


@pytest.mark.parametrize(
    ("method", "options", "more"),
    [("ipt", {"tokens": 3, "d": 5, "hidden": 4}, {"d": 10**12}), ("adamix", {"size": 3}, {"modules": 10**12})],
)
def test_a_file_of_refpeft_asks_for_no_more_memory_than_it_has_numbers(tmp_path, method, options, more):
    model = tiny.model()
    sites.attach(model, method, options)
    adapters.save(tmp_path, model)
    written = config(tmp_path)
    written["options"] |= more
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(RefpeftError, match="= 1000000000000, but"):
        adapters.load(tiny.model(), tmp_path)


def test_an_adapter_of_another_model_says_whose_it_is(tmp_path):
    model, other = tiny.model(), tiny.model("gpt2")
    model.name, other.name = "one", "other"
    sites.attach(model, "lora", {"targets": ["v_proj"]})
    adapters.save(tmp_path, model)
    with pytest.raises(RefpeftError, match=r"; it was made for one, and this is other$"):
        adapters.load(other, tmp_path)
