"""What a model's `config.json` says, read completely or refused: ModelConfig, RopeConfig, from_hf.

Key names and defaults are those of the configuration classes of transformers 5.23; the layout of transformers 4
(`rope_theta` and `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`) are both read.
"""

import reprlib
from dataclasses import dataclass, field

from refpeft.errors import RefpeftError
from refpeft.models.quantized_files import check_method


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: its base, and how its frequencies are scaled (formulas: `refpeft.models.rope`)."""

    theta: float
    kind: str  # default, linear, dynamic, yarn or llama3
    factor: float  # by which the context is stretched; 1 for kind default
    context: int  # the length that the model knew before the stretching
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float = 32.0  # yarn, this and the following
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: follows from factor, mscale and mscale_all_dim
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, with nothing left to look up."""

    family: str  # llama, mistral, qwen2, qwen3, smollm3 or gpt2
    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    norm_eps: float
    activation: str  # silu, gelu (exact), gelu_tanh or relu
    tied: bool  # the head is the embedding table
    context: int  # the most positions the model was made for
    windows: tuple[int | None, ...]  # one a layer: how many positions a position sees, itself included; None: all
    use_rope: tuple[bool, ...]  # one a layer
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig | None  # None: learned positions (GPT-2)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    raw: dict = field(compare=False, repr=False)  # config.json as read, for writing it again


# Keys -----------------------------------------------------------------------------------------------------------------

_REQUIRED = object()

_LLAMA_SHAPED = {
    "vocab_size": _REQUIRED,
    "hidden_size": _REQUIRED,
    "intermediate_size": _REQUIRED,
    "num_hidden_layers": _REQUIRED,
    "num_attention_heads": _REQUIRED,
    "num_key_value_heads": _REQUIRED,  # null: as many as there are heads
    "head_dim": None,  # null: hidden_size / num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN = _LLAMA_SHAPED | {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

# For each family: the keys that are read, with the values that transformers takes where config.json has none.
_KEYS = {
    "llama": _LLAMA_SHAPED
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": _LLAMA_SHAPED
    | {"max_position_embeddings": 131072, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
    "smollm3": _LLAMA_SHAPED
    | {
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    "gpt2": {
        "vocab_size": _REQUIRED,
        "n_positions": 1024,
        "n_embd": _REQUIRED,
        "n_layer": _REQUIRED,
        "n_head": _REQUIRED,
        "n_inner": None,  # null: 4 n_embd
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
    },
}

# Keys that change the maths, and the one value with which it is the maths implemented here (null is taken as well).
# A key that a family reads (above) is not looked up here.
_ONLY = {
    "add_cross_attention": False,
    "attention_bias": False,
    "attention_multiplier": 1.0,
    "attn_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "is_encoder_decoder": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "mlp_bias": False,
    "num_experts": 0,
    "num_local_experts": 0,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "pruned_heads": {},
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "sliding_window": None,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "use_sliding_window": False,
}

# Keys that change nothing that is computed here: book-keeping, initialization, output options, dropout (off in a frozen
# base), classification heads (absent), and the generation options that transformers 4 kept in config.json.
_HARMLESS_KEYS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_pdrop bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_llama_config label2id length_penalty max_length max_new_tokens min_length
    model_type n_ctx n_special name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_scores predict_special_tokens prefix
    problem_type remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache
"""
_HARMLESS = frozenset(_HARMLESS_KEYS.split())
# SmolLM3's files carry these; its layers have never used them.
_HARMLESS_IN = {"smollm3": {"max_window_layers", "pretraining_tp"}}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# For each kind of rope scaling: the keys it must have, and those it may have.
_ROPE_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": ((), ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
# "finetuned" is a note in YaRN's first files; "partial_rotary_factor" is checked by value.
_ROPE_COMMON = {
    "rope_type",
    "type",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "finetuned",
}

_MAX_LAYERS = 4096  # so that a hostile file cannot ask for tuples that fill the memory


# Reading --------------------------------------------------------------------------------------------------------------


def from_hf(config: dict) -> ModelConfig:
    """The ModelConfig of a parsed `config.json`.

    Raises RefpeftError for an architecture, a key or a value that is not known to be computed exactly here: a key is
    read, or known to change nothing, or refused by name.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _KEYS:
        raise RefpeftError(f"model_type is {family!r}; refpeft has {', '.join(_KEYS)}")
    _refuse_unsupported(config, family)
    values = _KEYS[family] | {key: value for key, value in config.items() if key in _KEYS[family]}
    for key, value in values.items():
        if value is _REQUIRED:
            raise RefpeftError(f"config key {key} is missing; a {family} model needs it")
    if family == "gpt2":
        return _gpt2(values, raw=config)
    return _llama_shaped(family, values, raw=config)


def _refuse_unsupported(config: dict, family: str) -> None:
    if config.get("quantization_config") is not None:
        check_method(config["quantization_config"])
    if config.get("auto_map") is not None:
        raise RefpeftError("config key auto_map names Python code of the model's own, which refpeft never runs")
    known = _KEYS[family].keys() | _HARMLESS | _HARMLESS_IN.get(family, set()) | {"quantization_config", "auto_map"}
    for key, value in config.items():
        if key in known:
            continue
        if key not in _ONLY:
            raise RefpeftError(
                f"config key {key!r} = {reprlib.repr(value)} is not known for {family} and may change what is "
                "computed; if it does not, remove it from config.json"
            )
        if value is not None and value != _ONLY[key]:
            raise RefpeftError(f"config key {key} = {value!r}: for {family}, refpeft has only {_ONLY[key]!r}")
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not name.endswith(("ForCausalLM", "LMHeadModel", "Model")):
            raise RefpeftError(f"config key architectures has {name!r}; refpeft trains causal language models only")


def _gpt2(values: dict, raw: dict) -> ModelConfig:
    dim, heads, layers = _count(values, "n_embd"), _count(values, "n_head"), _layers(values, "n_layer")
    if dim % heads:
        raise RefpeftError(f"config key n_embd = {dim} is not a multiple of n_head = {heads}")
    return ModelConfig(
        family="gpt2",
        vocab=_count(values, "vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ff=4 * dim if values["n_inner"] is None else _count(values, "n_inner"),
        norm_eps=_positive(values, "layer_norm_epsilon"),
        activation=_activation(values, "activation_function"),
        tied=_flag(values, "tie_word_embeddings"),
        context=_count(values, "n_positions"),
        windows=(None,) * layers,
        use_rope=(False,) * layers,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        rope=None,
        **_special_ids(values),
        raw=raw,
    )


def _llama_shaped(family: str, values: dict, raw: dict) -> ModelConfig:
    dim, heads, layers = (
        _count(values, "hidden_size"),
        _count(values, "num_attention_heads"),
        _layers(values, "num_hidden_layers"),
    )
    kv_heads = heads if values["num_key_value_heads"] is None else _count(values, "num_key_value_heads")
    if heads % kv_heads:
        raise RefpeftError(
            f"config: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if values["head_dim"] is None and dim % heads:
        raise RefpeftError(f"config key hidden_size = {dim} is not a multiple of num_attention_heads = {heads}")
    head_dim = dim // heads if values["head_dim"] is None else _count(values, "head_dim")
    if head_dim % 2:
        raise RefpeftError(f"the heads have {head_dim} dimensions (head_dim); rotary positions need an even number")
    context = _count(values, "max_position_embeddings")
    attention_bias = "attention_bias" in values and _flag(values, "attention_bias")
    return ModelConfig(
        family=family,
        vocab=_count(values, "vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ff=_count(values, "intermediate_size"),
        norm_eps=_positive(values, "rms_norm_eps"),
        activation=_activation(values, "hidden_act"),
        tied=_flag(values, "tie_word_embeddings"),
        context=context,
        windows=_windows(family, values, layers),
        use_rope=_use_rope(values, layers) if family == "smollm3" else (True,) * layers,
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias="mlp_bias" in values and _flag(values, "mlp_bias"),
        qk_norm=family == "qwen3",
        rope=_rope(values, context),
        **_special_ids(values),
        raw=raw,
    )


def _windows(family: str, values: dict, layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        return (None if values["sliding_window"] is None else _count(values, "sliding_window"),) * layers

    window = None
    if _flag(values, "use_sliding_window") and values["sliding_window"] is not None:
        window = _count(values, "sliding_window")
    kinds = values["layer_types"]
    if kinds is None:
        if family == "smollm3":  # its layers without rotary positions are those that a window limits
            sliding = [not rope for rope in _use_rope(values, layers)]
        else:
            first = _count(values, "max_window_layers", least=0)
            sliding = [layer >= first for layer in range(layers)]
        return tuple(window if slides else None for slides in sliding)

    if not isinstance(kinds, list) or len(kinds) != layers:
        raise RefpeftError(f"config key layer_types must be a list of {layers} names, one a layer")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise RefpeftError(f"config key layer_types has {kind!r}; refpeft has full_attention and sliding_attention")
    if "sliding_attention" in kinds and window is None:
        raise RefpeftError(
            "config key layer_types has sliding_attention, but use_sliding_window or sliding_window is off"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _use_rope(values: dict, layers: int) -> tuple[bool, ...]:
    """SmolLM3: `no_rope_layers` has a 1 for each layer that has rotary positions (its name says the opposite)."""
    marks = values["no_rope_layers"]
    if marks is None:
        interval = _count(values, "no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(marks, list) or len(marks) < layers or any(mark not in (0, 1) for mark in marks):
        raise RefpeftError(f"config key no_rope_layers must be a list of {layers} times 0 or 1, one a layer")
    return tuple(bool(mark) for mark in marks[:layers])


def _rope(values: dict, context: int) -> RopeConfig:
    old, new = values["rope_scaling"], values["rope_parameters"]
    if old and new and old != new:
        raise RefpeftError("config.json has both rope_scaling and rope_parameters, and they differ; keep one")
    found = old or new or {}
    if not isinstance(found, dict):
        raise RefpeftError(f"config key rope_scaling = {found!r}: expected an object")
    kind = found.get("rope_type", found.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise RefpeftError(f"rope scaling of type {kind!r}; refpeft has {', '.join(_ROPE_KEYS)}")
    required, optional = _ROPE_KEYS[kind]
    for key in found:
        if key not in _ROPE_COMMON and key not in required + optional:
            raise RefpeftError(f"rope scaling {kind}: key {key!r} = {reprlib.repr(found[key])} is not known")
    if found.get("partial_rotary_factor") not in (None, 1):
        raise RefpeftError("rope scaling: partial_rotary_factor other than 1 is not supported")
    for key in required:
        if found.get(key) is None:
            raise RefpeftError(f"rope scaling {kind}: key {key} is missing")

    given = {key: value for key, value in found.items() if value is not None}
    if kind in ("yarn", "llama3"):
        if values["original_max_position_embeddings"] is not None:  # where it stands outside, it goes first
            given["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        given.setdefault("original_max_position_embeddings", context)
        original = _count(given, "original_max_position_embeddings")
    else:
        original = context
    if kind == "yarn":
        given.setdefault("factor", context / original)
    theta = _positive({"rope_theta": given.get("rope_theta", values["rope_theta"])}, "rope_theta")
    truncate = _flag(given, "truncate") if "truncate" in given else True
    numbers = {key: _positive(given, key) for key in required + optional if key in given and key != "truncate"}
    rope = RopeConfig(theta=theta, kind=kind, context=original, truncate=truncate, **({"factor": 1.0} | numbers))
    if kind == "yarn" and theta <= 1:
        raise RefpeftError(f"rope scaling yarn: rope_theta = {theta} must be greater than 1")
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise RefpeftError("rope scaling llama3: high_freq_factor must be greater than low_freq_factor")
    return rope


def _special_ids(values: dict) -> dict:
    """bos_id, eos_ids and pad_id. A negative number (Llama 1 had pad_token_id -1) means that there is none."""
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = values[key] if isinstance(values[key], list) else [values[key]]
        if any(value is not None and type(value) is not int for value in found):
            raise RefpeftError(f"config key {key} = {values[key]!r}: expected a token number")
        ids[key] = tuple(value for value in found if value is not None and value >= 0)
    bos, pad = ids["bos_token_id"], ids["pad_token_id"]
    return {
        "bos_id": bos[0] if bos else None,
        "eos_ids": ids["eos_token_id"],
        "pad_id": pad[0] if pad else None,
    }


def _count(values: dict, key: str, least: int = 1) -> int:
    value = values[key]
    if type(value) is not int or not least <= value < 2**31:
        raise RefpeftError(f"config key {key} = {value!r}: expected a whole number of at least {least}")
    return value


def _layers(values: dict, key: str) -> int:
    layers = _count(values, key)
    if layers > _MAX_LAYERS:
        raise RefpeftError(f"config key {key} = {layers}: refpeft takes at most {_MAX_LAYERS}")
    return layers


def _positive(values: dict, key: str) -> float:
    value = values[key]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise RefpeftError(f"config key {key} = {value!r}: expected a positive number")
    return float(value)


def _flag(values: dict, key: str) -> bool:
    if type(values[key]) is not bool:
        raise RefpeftError(f"config key {key} = {values[key]!r}: expected true or false")
    return values[key]


def _activation(values: dict, key: str) -> str:
    if not isinstance(values[key], str) or values[key] not in _ACTIVATIONS:
        raise RefpeftError(f"config key {key} = {values[key]!r}; refpeft has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[values[key]]
