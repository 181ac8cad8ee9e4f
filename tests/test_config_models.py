import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refpeft.errors import RefpeftError
from refpeft.models.config import ModelConfig, RopeConfig, from_hf

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def config(family: str, **changes) -> dict:
    if family == "gpt2":
        return {"model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, **changes}
    return {"model_type": family, **SIZES, **changes}


# Configs as they stand on the hub, shortened in nothing.

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def test_smollm2_is_read_from_its_own_file():
    assert from_hf(SMOLLM2) == ModelConfig(
        family="llama",
        vocab=49152,
        dim=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ff=1536,
        norm_eps=1e-5,
        activation="silu",
        tied=True,
        context=8192,
        windows=(None,) * 30,
        use_rope=(True,) * 30,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeConfig(theta=100000.0, kind="default", factor=1.0, context=8192),
        bos_id=1,
        eos_ids=(2,),
        pad_id=2,
        raw={},
    )
    assert from_hf(SMOLLM2).raw == SMOLLM2


def test_llama_3_2_has_its_scaling_and_three_ends():
    model = from_hf(LLAMA32_1B)
    assert model.eos_ids == (128001, 128008, 128009) and model.bos_id == 128000 and model.pad_id is None
    assert model.rope == RopeConfig(
        theta=500000.0, kind="llama3", factor=32.0, context=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


def test_qwen2_has_qkv_biases_and_no_window_unless_it_asks_for_one():
    model = from_hf(QWEN25)
    assert model.qkv_bias and not model.o_bias and not model.mlp_bias and not model.qk_norm
    assert set(model.windows) == {None}
    assert from_hf(QWEN25 | {"use_sliding_window": True}).windows == (None,) * 21 + (32768,) * 3


def test_gpt2_is_read_from_its_own_file():
    model = from_hf(GPT2)
    assert (model.dim, model.ff, model.head_dim, model.kv_heads, model.context) == (768, 3072, 64, 12, 1024)
    assert model.activation == "gelu_tanh" and model.tied and model.rope is None and not any(model.use_rope)
    assert model.qkv_bias and model.o_bias and model.mlp_bias and model.norm_eps == 1e-5


def test_mistral_has_one_window_for_all_layers_and_none_for_null():
    assert from_hf(config("mistral", sliding_window=7)).windows == (7,) * 4
    assert from_hf(config("mistral", sliding_window=None)).windows == (None,) * 4
    assert from_hf(config("mistral")).windows == (4096,) * 4  # as transformers takes it where the key is missing


def test_qwen3_has_q_and_k_norms_and_layer_types_choose_the_windows():
    kinds = ["full_attention", "sliding_attention"] * 2
    model = from_hf(config("qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=5))
    assert model.qk_norm and not model.qkv_bias and model.head_dim == 128
    assert model.windows == (None, 5, None, 5)
    assert from_hf(config("qwen3", attention_bias=True)).o_bias


def test_smollm3_leaves_out_rotary_positions_in_every_fourth_layer():
    assert from_hf(config("smollm3", pretraining_tp=2, max_window_layers=28)).use_rope == (True, True, True, False)
    model = from_hf(config("smollm3", no_rope_layers=[0, 1, 1, 0, 1], use_sliding_window=True, sliding_window=8))
    assert model.use_rope == (False, True, True, False)
    assert model.windows == (8, None, None, 8)
    assert from_hf(config("smollm3", no_rope_layer_interval=2)).use_rope == (True, False, True, False)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("linear", {"factor": 2.0}),
        ("dynamic", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "truncate": False}),
        ("yarn", {"factor": None, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 0.8}),
        ("llama3", {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_type"}),
    ],
)
def test_rope_scaling_reads_alike_from_transformers_4_and_5(kind, numbers):
    old = config("llama", rope_theta=5e5, rope_scaling={"type": kind, **numbers})
    new = config("llama", rope_parameters={"rope_type": kind, "rope_theta": 5e5, **numbers}, dtype="bfloat16")
    assert from_hf(old) == from_hf(new)
    rope = from_hf(old).rope
    assert rope.kind == kind and rope.theta == 5e5 and rope.factor == (numbers["factor"] or 4.0)
    assert rope.context == numbers.get("original_max_position_embeddings", 2048)


def test_an_original_context_beside_the_scaling_goes_first():
    found = config("llama", original_max_position_embeddings=128, rope_scaling=LLAMA3_SCALING)
    assert from_hf(found).rope.context == 128


def test_token_ids_below_zero_mean_none():
    model = from_hf(config("llama", pad_token_id=-1, bos_token_id=None, eos_token_id=None))
    assert (model.bos_id, model.eos_ids, model.pad_id) == (None, (), None)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "model_type is None; refpeft has llama, mistral"),
        (config("mixtral"), "model_type is 'mixtral'"),
        (config(["llama"]), "model_type is"),
        ({"model_type": "llama"}, "config key vocab_size is missing; a llama model needs it"),
        (config("llama", pretraining_tp=2), "config key pretraining_tp = 2: for llama, refpeft has only 1"),
        (config("llama", attention_multiplier=0.1), "attention_multiplier"),
        (config("llama", logits_scaling=8.0), "logits_scaling"),
        (config("llama", partial_rotary_factor=0.5), "partial_rotary_factor"),
        (config("llama", rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (config("llama", rope_interleaved=True), "rope_interleaved"),
        (config("llama", sliding_window=4096), "sliding_window"),
        (config("qwen2", attention_bias=True), "attention_bias"),
        (config("mistral", mlp_bias=True), "mlp_bias"),
        (config("mistral", layer_types=["sliding_attention"] * 4), "'layer_types'"),
        (config("llama", num_local_experts=8), "num_local_experts"),
        (config("llama", brand_new=[1]), "config key 'brand_new' = [1] is not known for llama"),
        (config("llama", quantization_config={"bits": 4}), "quantized already"),
        (config("llama", auto_map={"AutoModel": "x.Y"}), "Python code"),
        (config("llama", architectures=["LlamaForTokenClassification"]), "LlamaForTokenClassification"),
        (config("llama", architectures=3), "architectures has 3"),
        (config("llama", pruned_heads={"0": [1]}), "pruned_heads"),
        (config("llama", hidden_act="gelu_fast"), "hidden_act = 'gelu_fast'; refpeft has silu"),
        (config("llama", num_hidden_layers=2**30), "refpeft takes at most 4096"),
        (config("llama", num_hidden_layers=True), "num_hidden_layers = True: expected a whole number"),
        (config("llama", num_attention_heads=3), "num_attention_heads = 3 is not a multiple"),
        (config("llama", hidden_size=30), "hidden_size = 30 is not a multiple"),
        (config("llama", head_dim=7), "even number"),
        (config("llama", rms_norm_eps=0), "rms_norm_eps = 0: expected a positive number"),
        (config("llama", rms_norm_eps=float("nan")), "rms_norm_eps"),
        (config("llama", tie_word_embeddings=1), "expected true or false"),
        (config("llama", eos_token_id="</s>"), "eos_token_id = '</s>': expected a token number"),
        (config("llama", rope_scaling={"type": "longrope"}), "'longrope'; refpeft has default, linear"),
        (config("llama", rope_scaling={"type": "linear"}), "key factor is missing"),
        (config("llama", rope_scaling={"type": "linear", "factor": 0}), "factor = 0"),
        (config("llama", rope_scaling={"type": "linear", "factor": 2.0, "alpha": 1}), "key 'alpha' = 1"),
        (config("llama", rope_theta=1, rope_scaling={"type": "yarn", "factor": 2.0}), "must be greater than 1"),
        (config("llama", rope_scaling=[2]), "expected an object"),
        (config("llama", rope_scaling={"factor": 2.0}, rope_parameters={"rope_theta": 1.0}), "keep one"),
        (config("qwen3", rope_parameters={"full_attention": {"rope_theta": 1e4}}), "key 'full_attention'"),
        (config("llama", rope_scaling=LLAMA3_SCALING | {"high_freq_factor": 1.0}), "greater than low_freq_factor"),
        (config("qwen2", layer_types=["full_attention"]), "list of 4 names"),
        (config("qwen2", layer_types=["chunked_attention"] * 4), "'chunked_attention'"),
        (config("qwen2", layer_types=["sliding_attention"] * 4), "is off"),
        (config("smollm3", no_rope_layers=[1, 0]), "no_rope_layers"),
        (config("gpt2", scale_attn_weights=False), "scale_attn_weights"),
        (config("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (config("gpt2", add_cross_attention=True), "add_cross_attention"),
        (config("gpt2", n_head=5), "n_embd = 32 is not a multiple of n_head = 5"),
        (config("gpt2", hidden_size=32), "'hidden_size'"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(found, message):
    with pytest.raises(RefpeftError) as error:
        from_hf(found)
    assert message in str(error.value) and "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WHOLE = [
    SMOLLM2,
    LLAMA32_1B,
    QWEN25,
    GPT2,
    config("mistral"),
    config("qwen3", layer_types=["full_attention"] * 4),
    config("smollm3", no_rope_layers=[1] * 4),
    config("llama", rope_parameters={"rope_type": "yarn", "factor": 2.0, "truncate": True}),
]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_json_in_a_config_gives_a_model_or_an_error_of_ours(data):
    found = copy.deepcopy(data.draw(st.sampled_from(WHOLE)))
    where = found
    if found.get("rope_parameters") and data.draw(st.booleans()):
        where = found["rope_parameters"]
    where[data.draw(st.sampled_from(sorted(where)) | st.text(max_size=5))] = data.draw(JSON)
    try:
        from_hf(found)
    except RefpeftError as error:
        assert "\n" not in str(error)


@pytest.mark.real
@pytest.mark.parametrize("found", WHOLE, ids=lambda found: found["model_type"])
def test_transformers_reads_the_same_numbers(found):
    transformers = pytest.importorskip("transformers")
    values = {key: value for key, value in copy.deepcopy(found).items() if key != "model_type"}
    theirs = transformers.AutoConfig.for_model(found["model_type"], **values)
    for again in (found, theirs.to_dict()):  # theirs.to_dict() is the layout of transformers 5
        ours = from_hf(again)
        assert ours.layers == theirs.num_hidden_layers and ours.dim == theirs.hidden_size
        assert ours.context == theirs.max_position_embeddings and ours.tied == theirs.tie_word_embeddings
        assert ours.heads == theirs.num_attention_heads
        if ours.family == "gpt2":
            continue
        assert ours.kv_heads == theirs.num_key_value_heads and ours.norm_eps == theirs.rms_norm_eps
        assert ours.rope.kind == theirs.rope_parameters["rope_type"]
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        if ours.family in ("qwen2", "qwen3", "smollm3"):
            assert [window is not None for window in ours.windows] == [
                kind == "sliding_attention" for kind in theirs.layer_types
            ]
