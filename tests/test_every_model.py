"""Every method on every kind of encoder and on T5: gradients, padding, files, merging; or why it is not there."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_encoder
import test_heads
import test_t5
import tiny
from test_merged_weights import BESIDE_PARTS, MERGING
from test_plugins import CHANGE_AT_THE_START, NEARLY_AS_IT_WAS
from test_published import planned
from variants import SIMPLER_IN_FILES, VARIANTS, WITH_BIASES, needed_quantizer

from refpeft import adapters, files, manager, ops, sites
from refpeft.batches import Batch
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.models import heads
from refpeft.models.base import Model
from refpeft.survey import Survey, settle
from refpeft.tensor import Tensor

_T5 = test_t5.CONFIGS["t5"] | {"d_kv": 12}
KINDS = {name: test_encoder.CONFIGS[name] for name in ("bert", "roberta", "distilbert", "deberta-v3", "deberta-apart")}
KINDS |= {"albert": test_encoder.CONFIGS["bert"] | {"model_type": "albert", "embedding_size": 24}, "t5": _T5}
KINDS |= {"flan": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2}}
T5S = ("t5", "flan")

_VALUES = "value|v_lin|value_proj|v"  # what the projections of values are called
_LINEAR_AND_EMBED = ["all-linear", "@embed"]
INSTEAD = {
    "lora-patterns": {"targets": "all-linear", "rank_pattern": {_VALUES: 2}, "alpha_pattern": {".*": 3}},
    "eva": {"r": 3, "rslora": True, "alpha_pattern": {_VALUES: 3}},
    "pissa": {"r": 3, "alpha_pattern": {_VALUES: 2}},
    "olora": {"r": 3, "rslora": True, "rank_pattern": {_VALUES: 2}},
    "loha": {"r": 2, "rank_pattern": {".*": 3}, "alpha_pattern": {_VALUES: 3}},
    "hira": {"r": 3, "rank_pattern": {_VALUES: 2}},
    "delora": {"r": 3, "lambda_initial": 0.5, "lambda_pattern": {_VALUES: 2}, "targets": "all-linear"},
    "dora": {"r": 3, "rslora": True, "alpha_pattern": {_VALUES: 3}},
    "qdora": {"r": 3, "alpha_pattern": {_VALUES: 3}},
    "c3a": {"block_size": 4, "block_size_pattern": {_VALUES: 8}, "targets": "all-linear"},
    "intrinsic_said": {"d": 90},
    "s4": {"strategies": ["AL", "PBL"], "groups": [1, 1], "create": True, "tokens": 3},
    "unipelt-flat": {"tokens": 2, "size": 5, "hidden": 0, "targets": ["@attend", "@attn_out", "@cross_out", "@k"]},
}
"""Options in place of those of VARIANTS, which are for names and sizes of decoders."""
ON_ENCODERS = {
    "lora-everywhere": {"targets": _LINEAR_AND_EMBED, "rslora": True, "init": "gaussian"},
    "lora-saved": {"targets": "all-linear", "modules_to_save": ["@norm", "@down"]},
    "intrinsic_said-did": {"d": 30, "said": False, "targets": _LINEAR_AND_EMBED},
    "by_type-others": {"types": ["norm", "embedding"]},
    "unipelt-flat": {"tokens": 2, "size": 5, "hidden": 0, "targets": ["@attend", "@attn_out", "@k"]},
}
ON_ALBERT = {"houlsby-relu": {"layers": [0]}, "mam-flat": {"layers": [0]}}
"""Its layers are one layer, with the number 0."""

_ONE_STACK = "goes through one stack of layers, and this model has an encoder and a decoder"
_ONE_LAYER = "treats a model's layers differently, and this model runs one 2 times"
_NO_BIASES = r"bitfit trains biases, and none of the \d+ layers that it was pointed at has one"
REFUSED = [
    (T5S, ("pre_layer",), _ONE_STACK),
    (("albert",), ("pre_layer", "ladder_side", "ladder_side-drop", "adapterdrop", "adapterdrop-first"), _ONE_LAYER),
    (("albert",), ("attention_fusion", "attention_fusion-add"), _ONE_LAYER),
    (T5S, ("bitfit", "lora-bias", "lora-all-biases"), _NO_BIASES),
    (("t5",), ("s4",), r"groups layers by their numbers, and this model has stacks of \[2, 3\]"),
    (("albert",), ("s4",), "expected sizes that add up to the model's 1 layers"),
]
"""Kinds of model, variants of methods, and why these have nothing to do there."""
REASONS = {(kind, name): reason for kinds, names, reason in REFUSED for kind in kinds for name in names}

ALL = VARIANTS | WITH_BIASES
CASES = [(kind, name) for kind in KINDS for name in ALL]
WORKING = [case for case in CASES if case not in REASONS]
IN_FILES = [case for case in WORKING if case[1] not in SIMPLER_IN_FILES]
MERGED = [(kind, name) for kind, name in WORKING if ALL[name][0] in MERGING and name not in BESIDE_PARTS]
_FOLDER = tempfile.TemporaryDirectory()  # removed when Python ends


def options_of(kind: str, name: str) -> dict:
    found = INSTEAD.get(name, ALL[name][1])
    if kind not in T5S:
        found = ON_ENCODERS.get(name, found)
    if name == "adapterfusion":
        found = found | {"adapters": bottlenecks(kind)}
    return found | (ON_ALBERT.get(name, {}) if kind == "albert" else {})


def bottlenecks(kind: str) -> list[str]:
    """Directories of two trained pfeiffer adapters of such a model."""
    found = []
    for seed in (1, 2):
        folder = Path(_FOLDER.name) / f"{kind}-{seed}"
        if not folder.is_dir():
            model = tiny.of(KINDS[kind])
            tiny.scramble(sites.attach(model, "pfeiffer", {"size": 5}), seed)
            adapters.save(folder, model)
        found.append(str(folder))
    return found


def bare(kind: str, name: str) -> Model:
    return tiny.of(KINDS[kind], needed_quantizer(ALL[name][0]))


def attached(kind: str, name: str, scramble: bool = True) -> tuple[Model, sites.Adapter]:
    model = bare(kind, name)
    adapter = sites.attach(model, ALL[name][0], options_of(kind, name))
    if scramble:
        tiny.scramble(adapter)
    return model, adapter


def rows(kind: str) -> dict[str, np.ndarray]:
    """Two rows, the second with three tokens of padding."""
    return test_t5.rows() if kind in T5S else test_encoder.rows(kind)


def real(kind: str, model: Model) -> np.ndarray:
    """Logits of T5, of encoders the hidden states of real tokens."""
    given = rows(kind)
    out = model(**given).data
    return out if kind in T5S else out[given["segments"] >= 0]


def weigh(kind: str, model: Model) -> Tensor:
    return (test_t5 if kind in T5S else test_encoder).weigh(model, rows(kind))


@pytest.mark.filterwarnings("ignore:bitfit. create has no effect")
@pytest.mark.parametrize(("kind", "name"), WORKING)
def test_gradients_are_finite_differences_and_detaching_restores_every_bit(kind, name, monkeypatch):
    monkeypatch.setattr(ops, "detach", lambda x: x)
    model, adapter = attached(kind, name)
    tiny.assert_slope(adapter, lambda: weigh(kind, model))
    sites.detach(model)
    assert np.array_equal(real(kind, model), real(kind, bare(kind, name)))


@pytest.mark.filterwarnings("ignore:bitfit. create has no effect")
@pytest.mark.parametrize(("kind", "name"), WORKING)
def test_first_values_leave_the_model_as_it_was_where_that_is_promised(kind, name):
    before = real(kind, bare(kind, name))
    model, adapter = attached(kind, name, scramble=False)
    change = abs(real(kind, model) - before).max()
    if adapter.name in CHANGE_AT_THE_START:
        assert change > 1e-4
    else:
        assert change <= 5 * NEARLY_AS_IT_WAS.get(adapter.name, 0)


@pytest.mark.filterwarnings("ignore:bitfit. create has no effect")
@pytest.mark.parametrize(("kind", "name"), WORKING)
def test_padding_changes_nothing(kind, name):
    model, _ = attached(kind, name)
    whole, given = model(**rows(kind)).data, rows(kind)
    alone = {key: array[1:] if key == "said" else array[1:, :6] for key, array in given.items() if key != "segments"}
    expected = whole[1:] if kind in T5S else whole[1:, :6]
    assert np.allclose(model(**alone).data, expected, rtol=1e-11, atol=1e-12)
    given["ids"][1, 7] = 30
    again = model(**given).data
    assert np.array_equal(again[1] if kind in T5S else again[1, :6], expected[0])


@pytest.mark.filterwarnings("ignore:bitfit. create has no effect")
@pytest.mark.parametrize(("kind", "name"), IN_FILES)
def test_what_is_saved_comes_back_exactly(kind, name, tmp_path):
    model, adapter = attached(kind, name)
    adapters.save(tmp_path, model)
    other = bare(kind, name)
    (loaded,) = adapters.load(other, tmp_path)
    assert loaded.params.keys() == adapter.params.keys()
    assert np.array_equal(real(kind, other), real(kind, model))


@pytest.mark.filterwarnings("ignore:bitfit. create has no effect")
@pytest.mark.parametrize(("kind", "name"), MERGED)
def test_the_merged_model_says_the_same(kind, name):
    model, _ = attached(kind, name)
    before = real(kind, model)
    sites.merge(model)
    assert not model.adapters
    assert abs(real(kind, model) - before).max() < 1e-12 * max(1, abs(before).max())


@pytest.mark.parametrize(("kind", "name"), REASONS)
def test_a_method_with_nothing_to_do_on_a_model_says_why(kind, name):
    with pytest.raises(RefpeftError, match=REASONS[kind, name]):
        attached(kind, name)


# ---- beside a task's head --------------------------------------------------------------------------------------------

TASKS = {"bert": "classify", "roberta": "tag", "distilbert": "regress", "deberta-v3": "mlm", "albert": "classify"}
DECODERS = {"llama": "classify", "gpt2": "regress"}
BESIDE = [case for case in WORKING if case[0] in TASKS] + [
    (kind, name) for kind in DECODERS for name, (_, options) in VARIANTS.items() if "head" not in str(options)
]
TASKS |= DECODERS


def headed(kind: str, name: str, seed: int) -> Model:
    model = tiny.of((test_heads.CONFIGS | KINDS)[kind], needed_quantizer(ALL[name][0]))
    labels = test_heads.LABELS if TASKS[kind] in ("classify", "tag") else ()
    heads.put_on(model, TASKS[kind], labels, seed, lambda name: None)
    return model


@pytest.mark.filterwarnings("ignore:bitfit. create has no effect")
@pytest.mark.parametrize(("kind", "name"), BESIDE)
def test_beside_a_head_gradients_are_those_of_the_loss_and_both_come_back_from_files(kind, name, monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "detach", lambda x: x)
    model, batch = headed(kind, name, 0), test_heads.asked(kind, TASKS[kind])
    adapter = sites.attach(model, ALL[name][0], VARIANTS[name][1] if kind in DECODERS else options_of(kind, name))
    tiny.scramble(adapter)
    tiny.assert_slope(adapter, lambda: model.loss(batch))
    adapters.save(tmp_path, model)
    other = headed(kind, name, 1)
    adapters.load(other, tmp_path)
    assert np.array_equal(other.loss(batch).data, model.loss(batch).data)


# ---- what T5 gets ----------------------------------------------------------------------------------------------------

_ENCODER, _DECODER = "encoder.block.1.layer", "decoder.block.1.layer"
_OF_ATTENTION = (f"{_ENCODER}.0.SelfAttention.", f"{_DECODER}.0.SelfAttention.", f"{_DECODER}.1.EncDecAttention.")


def in_every_attention(*letters: str) -> set[str]:
    return {before + letter for before in _OF_ATTENTION for letter in letters}


PLACES = {
    "lora": in_every_attention("q", "v"),
    "ia3": in_every_attention("k", "v") | {f"{_ENCODER}.1.DenseReluDense.wo", f"{_DECODER}.2.DenseReluDense.wo"},
    "prefix_tuning": in_every_attention("attend"),
    "llama_adapter": in_every_attention("attend"),
    "houlsby": {f"{side}.block.1.{place}" for side in ("encoder", "decoder") for place in ("attn_out", "mlp_out")},
    "pfeiffer": {f"{side}.block.1.block_out" for side in ("encoder", "decoder")},
    "ln_tuning": {
        *(f"{_ENCODER}.{number}.layer_norm" for number in range(2)),
        *(f"{_DECODER}.{number}.layer_norm" for number in range(3)),
    },
    "far": {
        f"{at}.DenseReluDense.{name}" for at in (f"{_ENCODER}.1", f"{_DECODER}.2") for name in ("wi_0", "wi_1", "wo")
    },
}


@pytest.mark.parametrize("method", PLACES)
def test_both_halves_of_t5_get_what_a_method_has(method):
    adapter = sites.attach(tiny.of(KINDS["flan"]), method)
    own = {layer.site.name for layer in adapter.layers if layer.part is adapter.parts[0]}
    assert {name for name in own if ".block.1." in name} == PLACES[method]


@pytest.mark.parametrize(("count", "layers"), [(1, ["decoder.block.2"]), (4, ["encoder.block.1", "decoder.block"])])
def test_the_last_layers_of_t5_are_the_decoders(count, layers):
    for method in ("top_layers", "llama_adapter"):
        adapter = sites.attach(tiny.of(KINDS["t5"]), method, {"count": count})
        assert all(any(layer.site.home.startswith(one) for one in layers) for layer in adapter.layers)
        assert len({layer.site.home for layer in adapter.layers}) == count


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "pre_embed", "multitask_prompt", "ipt"])
def test_rows_before_the_text_are_read_by_t5s_encoder_alone(name):
    """As in prompt tuning's paper: the decoder reads the encoder's states of them, and says no token more."""
    model, plain, given = attached("t5", name)[0], tiny.of(KINDS["t5"]), rows("t5")
    states = model.encode(given["ids"], given["segments"])
    assert states.shape[1] == given["ids"].shape[1] + 3
    assert model(**given).shape == plain(**given).shape
    apart = plain.encode(given["ids"], given["segments"])
    decoded = [one.decode(given["said"], apart, given["segments"]).data for one in (model, plain)]
    assert np.array_equal(*decoded)


def test_prompts_in_cross_attention_are_keys_of_cross_attention():
    model = tiny.of(KINDS["t5"])
    adapter = sites.attach(
        model, "llama_adapter", {"tokens": 1, "targets": ["decoder.block.2.*EncDecAttention.attend"]}
    )
    (layer,) = adapter.layers
    keys, _ = layer.near.keys_and_values(layer.p.prompt, layer.site)
    weight = model.frozen["decoder.block.2.layer.1.EncDecAttention.k.weight"]()
    assert np.allclose(keys.data.reshape(-1), weight @ layer.p.prompt.data[0], rtol=1e-12)


_AT_MLP = "--set 'pfeiffer.targets=[\"@mlp_out\"]'"


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ("--method houlsby --set houlsby.size=24", "0.832"),
        (f"--method pfeiffer --set pfeiffer.size=24 {_AT_MLP} --method ln_tuning", "0.427"),
        ("--method phm_adapter --set phm_adapter.n=12", "0.179"),
        ("--method compacter", "0.073"),
        ("--method compacter_pp", "0.047"),
        ("--method prompt_tuning --set prompt_tuning.tokens=100", "0.034"),
    ],
)
def test_the_share_of_t5_base_that_is_trained_is_that_of_compacters_table(options, share):
    """Karimi Mahabadi et al., 2021, table 1: in percent; adapters are behind self-attention and the MLP of both."""
    found = planned("t5-base", options)
    assert f"{100 * found['trained'] / found['parameters']:.3f}" == share


# ---- what PEFT's files have otherwise --------------------------------------------------------------------------------


def test_files_of_a_bare_encoder_have_names_without_what_stands_before_them_in_one_with_a_head(tmp_path):
    model, _ = attached("bert", "lora-saved")
    adapters.save(tmp_path, model)
    names = files.read_safetensors(tmp_path / "adapter_model.safetensors")
    config = files.read_json(tmp_path / "adapter_config.json")
    assert config["task_type"] == "FEATURE_EXTRACTION" and not any(".bert." in name for name in names)
    assert not any(name.startswith("bert.") for name in config["target_modules"] + config["modules_to_save"])
    assert "dense" not in config["target_modules"]  # which PEFT's model has in its pooler, too


def test_rows_that_peft_has_for_t5s_decoder_and_does_not_use_are_left_out(tmp_path):
    model, adapter = attached("t5", "prompt_tuning")
    adapters.save(tmp_path, model)
    rows = files.read_safetensors(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    config = files.read_json(tmp_path / "adapter_config.json")
    assert rows.shape == (3, 24) and config["num_transformer_submodules"] == 1
    twice = np.concatenate([rows, np.ones((3, 24), rows.dtype)])
    files.write_safetensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": twice})
    files.write_json(tmp_path / "adapter_config.json", config | {"num_transformer_submodules": 2})
    (loaded,) = adapters.load(tiny.of(KINDS["t5"]), tmp_path)
    assert np.array_equal(loaded.params["shared.prompt"].data, adapter.params["shared.prompt"].data)
    with pytest.raises(RefpeftError, match="num_transformer_submodules = 2: expected 1, for a model with one stack"):
        adapters.load(tiny.model(), tmp_path)
    files.write_json(tmp_path / "adapter_config.json", config)
    with pytest.raises(RefpeftError, match=r"'prompt_embeddings' has shape \(6, 24\): expected \(3, 24\)"):
        adapters.load(tiny.of(KINDS["t5"]), tmp_path)


# ---- types of layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_of_one_type(kind):
    by_type = manager.load("by_type")
    for site in tiny.of(KINDS[kind]).sites.values():
        if site.weight:
            assert sum(by_type.is_of(name, site) for name in by_type.ROLES) == 1, site.name


# ---- what the data decide --------------------------------------------------------------------------------------------

SURVEYED = {
    "eva": {"r": 3, "targets": "all-linear"},
    "fish_mask": {"share": 0.05},
    "far": {"share": 0.2},
    "lt_sft": {"share": 0.1},
    "diff_pruning": {"share": 0.1},
    "sparse_adapter": {"size": 5, "prune": "snip"},
}


def surveyed(kind: str, method: str) -> tuple[Model, sites.Adapter, Batch]:
    """A model with a method that its data have decided on, and these: the only batch that there is."""
    model = tiny.of(KINDS[kind]) if kind in T5S else headed(kind, "lora", 0)
    adapter, given = sites.attach(model, method, SURVEYED[method]), rows(kind)
    if kind in T5S:
        targets = np.where(np.arange(7) < [[7], [4]], given["said"], -100).astype("i4")
        batch = Batch(given["ids"], targets, segments=given["segments"], said=given["said"])
    else:
        batch = test_heads.asked(kind, TASKS[kind])
    settle(model, SimpleNamespace(at=lambda step: batch, rows=[0, 1], steps_per_epoch=1, longest=9), Train(steps=2), 0)
    return model, adapter, batch


@pytest.mark.parametrize("kind", ["bert", "deberta-v3", "albert", *T5S])
@pytest.mark.parametrize("method", SURVEYED)
def test_the_data_of_a_task_decide_what_a_method_leaves_to_them(kind, method):
    model, adapter, batch = surveyed(kind, method)
    assert adapter.settled
    tiny.scramble(adapter)
    tiny.assert_slope(adapter, lambda: model.loss(batch))


@pytest.mark.parametrize("kind", ["deberta-v3", "deberta-apart", "flan"])
def test_what_layers_read_is_looked_at_where_there_is_a_token(kind):
    """Not at distances, which a shared projection of DeBERTa reads too; in a decoder at what is said."""
    model = tiny.of(KINDS[kind])
    every = [site for site in model.sites.values() if site.kind == "linear" and "head" not in site.roles]
    given, said = rows(kind), np.arange(7) < [[7], [4]]
    if kind not in T5S:
        heads.put_on(model, "tag", test_heads.LABELS, 0, lambda name: None)
    more = {"said": given["said"]} if kind in T5S else {}
    targets = np.where(said, 1, -100) if kind in T5S else np.where(given["segments"] < 0, -100, 1)
    batch = Batch(given["ids"], targets.astype("i4"), segments=given["segments"], **more)
    (found,) = Survey(model, None, SimpleNamespace(at=lambda step: batch), None, 0).inputs(every, 1)
    text = int((given["segments"] >= 0).sum())
    for site in every:
        asks = site.name.startswith("decoder.") and site.roles[0] not in ("cross_k", "cross_v")
        rows_read = int(said.sum()) if asks else text
        if site.roles[0] in ("pos_k", "pos_q"):
            rows_read = 2 * model.config.span
        assert found[site.name].shape == (rows_read, site.shape[1]), site.name
