"""T5: transformers' logits and gradients, padding that changes nothing, decoding with a cache, methods, files."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file
from test_memory import count_weights
from variants import quantizer

import refpeft
from refpeft import adapters, ops, sites
from refpeft.errors import RefpeftError
from refpeft.generate import generate
from refpeft.models.base import Cache
from refpeft.models.config import from_hf
from refpeft.models.relative import t5_buckets
from refpeft.models.t5 import T5
from refpeft.models.t5 import Attention as T5Attention
from refpeft.tensor import Tensor, no_grad

_T5 = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
CONFIGS = {
    "t5": _T5,
    "flan": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": _T5 | {"model_type": "mt5", "feed_forward_proj": "gated-silu", "tie_word_embeddings": True},
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def built(kind: str, packer=None) -> T5:
    return tiny.of(CONFIGS[kind], packer)


def rows() -> dict[str, np.ndarray]:
    """Two sources, the second with three tokens of padding, and what was said of them so far."""
    rng = np.random.default_rng(1)
    segments = np.where(np.arange(9) < [[9], [6]], 0, -1)
    ids = np.where(segments < 0, 0, rng.integers(3, 40, (2, 9)))
    return {"ids": ids, "said": rng.integers(3, 40, (2, 7)), "segments": segments}


def weigh(model: T5, given: dict[str, np.ndarray]) -> Tensor:
    """A number that depends on every logit."""
    logits = model(**given)
    return ops.sum(logits * np.random.default_rng(2).standard_normal(logits.shape))


@pytest.mark.real
@every_kind
def test_logits_and_all_gradients_are_those_of_transformers(kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from torch_float64 import Float64

    peer = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**CONFIGS[kind]))
    peer = peer.double().eval()
    state = {name: torch.tensor(array) for name, array in tiny.drawn(CONFIGS[kind]).items()}
    if "lm_head.weight" in state:  # transformers 5 ties it all the same
        peer.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in missing)
    given, model = rows(), built(kind)
    with Float64():
        theirs = peer(
            input_ids=torch.tensor(given["ids"]),
            attention_mask=torch.tensor((given["segments"] >= 0) * 1),
            decoder_input_ids=torch.tensor(given["said"]),
        ).logits
    ours = model(**given).data
    assert abs(ours - theirs.detach().numpy()).max() < 1e-12 * abs(ours).max()

    (theirs * torch.tensor(np.random.default_rng(2).standard_normal(ours.shape))).sum().backward()
    sites.attach(model, "full")
    weigh(model, given).backward()
    expected = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    found = {name: tensor.grad for name, tensor in model.trained()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert abs(gradient - expected[name]).max() <= 1e-10 * abs(expected[name]).max(), name


@pytest.mark.real
@pytest.mark.parametrize("both", [True, False])
def test_buckets_are_those_of_transformers_at_every_distance(both):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    relative = torch.arange(1000)[None, :] - torch.arange(1000)[:, None]
    for buckets, distance in ((32, 128), (8, 12), (16, 1000)):
        theirs = bucket(relative, bidirectional=both, num_buckets=buckets, max_distance=distance).numpy()
        assert np.array_equal(t5_buckets(range(1000), 1000, buckets, distance, both), theirs)


@every_kind
def test_padding_of_the_source_changes_no_logits(kind):
    model, given = built(kind), rows()
    whole = model(**given).data
    alone = model(given["ids"][1:, :6], given["said"][1:]).data
    assert np.allclose(alone, whole[1:], rtol=1e-12, atol=1e-13)
    given["ids"][1, 7] = 30
    assert np.array_equal(model(**given).data, whole)


@every_kind
def test_what_is_said_later_changes_no_earlier_logits(kind):
    model, given = built(kind), rows()
    before = model(**given).data
    given["said"][0, 4] = (given["said"][0, 4] + 1) % 37 + 3
    changed = (model(**given).data != before).any(axis=2)
    assert changed[0, 4:].all() and not changed[0, :4].any() and not changed[1].any()


METHODS = {
    "lora": {"targets": "all-linear"},
    "ia3": {},
    "ln_tuning": {},
    "houlsby": {"size": 5, "norms": False},
    "parallel": {"size": 5},
    "prefix_tuning": {"tokens": 3, "init_std": 0.5},
    "llama_adapter": {"tokens": 3},
    "unipelt": {"tokens": 3, "hidden": 0},
    "attention_fusion": {},
    "ladder_side": {"r": 5},
}


@pytest.mark.parametrize("method", [None, *METHODS])
@every_kind
def test_decoding_step_by_step_is_decoding_at_once(kind, method):
    model, given = built(kind), rows()
    if method:
        tiny.scramble(sites.attach(model, method, METHODS[method]))
    with no_grad():
        states, cache = model.encode(given["ids"], given["segments"]), Cache()
        whole = model.decode(given["said"], states, given["segments"]).data
        steps = [slice(0, 3), slice(3, 4), slice(4, 7)]
        parts = [model.decode(given["said"][:, at], states, given["segments"], cache).data for at in steps]
    assert abs(np.concatenate(parts, axis=1) - whole).max() < 1e-12 * abs(whole).max()


def said_by_hand(model: T5, source: list[int], count: int) -> list[int]:
    """Greedy tokens, each by a forward pass through the encoder and over all that was said."""
    said = [0]
    for _ in range(count):
        said.append(int(model(np.array([source]), np.array([said])).data[0, -1].argmax()))
    return said[1:]


SOURCES = [[5, 9, 2], [7, 1, 30, 22, 8, 3, 11], [4]]


@pytest.mark.parametrize("method", [None, *METHODS, "prompt_tuning"])
@every_kind
def test_answers_are_those_of_whole_forward_passes_for_sources_of_any_length(kind, method):
    model = built(kind)
    if method:
        tiny.scramble(sites.attach(model, method, METHODS.get(method)))
    assert generate(model, SOURCES, 6) == [said_by_hand(model, source, 6) for source in SOURCES]


def test_the_encoder_reads_a_source_once(monkeypatch):
    model, encoded, read = built("t5"), [], []
    encode, keys = T5.encode, T5Attention.keys_and_values
    monkeypatch.setattr(T5, "encode", lambda *args: encoded.append(args[1].shape) or encode(*args))
    monkeypatch.setattr(T5Attention, "keys_and_values", lambda *args: read.append(args[0].name) or keys(*args))
    generate(model, SOURCES, 6, beams=3)
    assert encoded == [(3, 7)]
    assert sum("EncDecAttention" in name for name in read) == 3  # the decoder's layers


@pytest.mark.parametrize("source", [[40], [-1]])
def test_tokens_that_are_none_of_the_model_s_are_an_error(source):
    with pytest.raises(RefpeftError, match=f"^token {source[0]} is not among the model's 40"):
        generate(built("t5"), [source])


@pytest.mark.parametrize("packer", [None, quantizer()])
@pytest.mark.parametrize("method", [*METHODS, "prompt_tuning", "full"])
@every_kind
def test_methods_at_its_sites_have_right_gradients(kind, method, packer):
    model, given = built(kind, packer), rows()
    plain = model(**given).data
    adapter = sites.attach(model, method, METHODS.get(method))
    tiny.scramble(adapter)
    tiny.assert_slope(adapter, lambda: weigh(model, given))
    sites.detach(model)
    assert np.array_equal(model(**given).data, plain)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(folder, kind: str, more: dict | None = None) -> None:
    save_file(tiny.drawn(CONFIGS[kind]) | (more or {}), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))


@every_kind
def test_files_load_and_a_table_that_is_there_again_is_the_same_one(kind, tmp_path):
    again = {"encoder.embed_tokens.weight": tiny.drawn(CONFIGS[kind])["shared.weight"]} if kind == "t5" else {}
    write(tmp_path, kind, again)
    model, given = refpeft.load(tmp_path, dtype="float64"), rows()
    assert np.array_equal(model(**given).data, built(kind)(**given).data)


def test_another_table_of_a_tied_model_is_refused(tmp_path):
    write(tmp_path, "t5", {"decoder.embed_tokens.weight": np.zeros((40, 24))})
    with pytest.raises(RefpeftError, match=r"'decoder.embed_tokens.weight' is not the embedding table"):
        refpeft.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-gelu-new"}, "feed_forward_proj = 'gated-gelu-new': expected an activation"),
        ({"feed_forward_proj": "tanh"}, "feed_forward_proj = 'tanh'; refpeft has"),
        (
            {"relative_attention_num_buckets": 30},
            "30 buckets for relative positions up to 12: expected a multiple of 4",
        ),
        ({"is_encoder_decoder": False}, "is_encoder_decoder = False: for t5, refpeft has only True"),
        ({"architectures": ["T5ForTokenClassification"]}, "has 'T5ForTokenClassification'; of t5, refpeft has"),
    ],
)
def test_a_config_that_asks_for_other_maths_is_refused(change, message):
    with pytest.raises(RefpeftError, match=message):
        from_hf(_T5 | change)


def test_layers_beside_a_site_are_those_of_its_own_half():
    model = built("t5")
    adapter = sites.attach(model, "llama_adapter", {"tokens": 2})
    beside = {layer.site.home: layer.near.site("k").name for layer in adapter.layers}
    assert all(name.startswith(f"{home}.layer.0.") for home, name in beside.items()) and len(beside) == 5


@pytest.mark.parametrize("output", ["replace", "add"])
def test_a_side_network_of_both_halves_runs_beside_the_model(output):
    """Its decoder reads its encoder, what was handed on goes with the encoder's states, and nothing runs backwards
    through the model."""
    model, given = tiny.of(CONFIGS["t5"] | {"d_kv": 12}), rows()
    adapter = sites.attach(model, "ladder_side", {"r": 3, "output": output, "drop": [1]})
    tiny.scramble(adapter)
    value, asked = weigh(model, given), count_weights(model)
    value.backward()
    assert not any(asked.values())
    own = [tensor.grad for name, tensor in adapter.params.items() if name.startswith("encoder.")]
    assert own and all(abs(gradient).max() > 0 for gradient in own)
    assert not any(".block.1." in name for name in adapter.params if "block_out.ladder" in name)
    whole = model(**given).data
    states = model.encode(given["ids"], given["segments"])
    model(**given | {"ids": given["ids"][::-1].copy()})
    for _ in range(2):
        hidden = model.decode(given["said"], states, given["segments"])
        assert np.array_equal(model.head(model.finish(hidden)).data, whole)
    assert not vars(adapter.parts[0].memo)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_side_network_reads_the_encoders_own_in_generation(beams):
    model = tiny.of(CONFIGS["t5"] | {"d_kv": 12})
    tiny.scramble(sites.attach(model, "ladder_side", {"r": 3}))
    prompts = [[5, 9, 2], [7, 1, 30, 22, 8, 3, 11], [4]]
    apart = [generate(model, [prompt], 5, beams=beams)[0] for prompt in prompts]
    assert generate(model, prompts, 5, beams=beams) == apart
    if beams == 1:
        for prompt, answer in zip(prompts, apart, strict=True):
            said = [0]
            for token in answer:
                assert int(model(np.array([prompt]), np.array([said])).data[0, -1].argmax()) == token
                said.append(token)


def test_what_goes_through_one_stack_of_layers_is_refused():
    with pytest.raises(RefpeftError, match=r"pre_layer goes through one stack of layers, .* an encoder and a decoder"):
        sites.attach(built("t5"), "pre_layer")


def test_an_open_gate_leaves_a_prefix_as_it_is_beside_scores_that_are_not_scaled():
    gated, plain = built("t5"), built("t5")
    options = {"tokens": 2, "hidden": 0}
    values = sites.attach(gated, "unipelt", options | {"targets": ["@attend", "@attn_out", "@cross_out"]})
    tiny.scramble(values)
    for name, tensor in values.params.items():
        if name.endswith("gate_bias"):
            tensor.data[...] = 1e3
    for name, tensor in sites.attach(plain, "prefix_tuning", options).params.items():
        tensor.data[...] = values.params[name].data
    assert np.allclose(gated(**rows()).data, plain(**rows()).data, rtol=0, atol=1e-12)
    assert not vars(values.parts[0].memo)  # it would hold the tape


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about themselves
def test_peft_reads_its_adapters(tmp_path):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    model, given = built("t5"), rows()
    tiny.scramble(sites.attach(model, "lora", {"r": 2}))
    adapters.save(tmp_path, model)
    peer = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**CONFIGS["t5"]))
    peer.load_state_dict({name: torch.tensor(array) for name, array in tiny.drawn(CONFIGS["t5"]).items()}, strict=False)
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path).eval()(
        input_ids=torch.tensor(given["ids"]),
        attention_mask=torch.tensor((given["segments"] >= 0) * 1),
        decoder_input_ids=torch.tensor(given["said"]),
    )
    assert abs(model(**given).data - theirs.logits.detach().numpy()).max() < 1e-5
