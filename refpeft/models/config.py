"""What a model's `config.json` says, read completely or refused: ModelConfig, RopeConfig, from_hf.

Key names and defaults are those of the configuration classes of transformers 5.23; the layout of transformers 4
(`rope_theta` and `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`) are both read.
"""

import reprlib
from dataclasses import dataclass, field

from refpeft.errors import RefpeftError
from refpeft.models import albert_config, deberta_config, encoder_config, t5_config
from refpeft.models.config_keys import REQUIRED, activation, count, flag, layer_count, positive, read, special_ids
from refpeft.models.encoder_config import EncoderConfig
from refpeft.models.t5_config import T5Config


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
    tied: bool  # the head is the embedding table, or there is none, for the model was made to classify
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


AnyConfig = ModelConfig | EncoderConfig | T5Config

# Keys -----------------------------------------------------------------------------------------------------------------

_LLAMA_SHAPED = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_key_value_heads": REQUIRED,  # null: as many as there are heads
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
        "vocab_size": REQUIRED,
        "n_positions": 1024,
        "n_embd": REQUIRED,
        "n_layer": REQUIRED,
        "n_head": REQUIRED,
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

# SmolLM3's files carry these; its layers have never used them.
_HARMLESS_IN = {"smollm3": {"max_window_layers", "pretraining_tp"}}

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

# Reading --------------------------------------------------------------------------------------------------------------


def from_hf(config: dict) -> AnyConfig:
    """The ModelConfig, EncoderConfig or T5Config of a parsed `config.json`.

    Raises RefpeftError for an architecture, a key or a value that is not known to be computed exactly here: a key is
    read, or known to change nothing, or refused by name.
    """
    family = config.get("model_type")
    known = [*_KEYS, *encoder_config.NAMES, *t5_config.FAMILIES]
    if not isinstance(family, str) or family not in known:
        raise RefpeftError(f"model_type is {family!r}; refpeft has {', '.join(known)}")
    if family == deberta_config.FAMILY:
        return deberta_config.from_hf(config)
    if family == albert_config.FAMILY:
        return albert_config.from_hf(config)
    if family in t5_config.FAMILIES:
        return t5_config.from_hf(config)
    if family in encoder_config.NAMES:
        return encoder_config.from_hf(config)
    values = read(config, family, _KEYS[family], _ONLY, _HARMLESS_IN.get(family, ()))
    if family == "gpt2":
        return _gpt2(values, raw=config)
    return _llama_shaped(family, values, raw=config)


def _gpt2(values: dict, raw: dict) -> ModelConfig:
    dim, heads, layers = count(values, "n_embd"), count(values, "n_head"), layer_count(values, "n_layer")
    if dim % heads:
        raise RefpeftError(f"config key n_embd = {dim} is not a multiple of n_head = {heads}")
    return ModelConfig(
        family="gpt2",
        vocab=count(values, "vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ff=4 * dim if values["n_inner"] is None else count(values, "n_inner"),
        norm_eps=positive(values, "layer_norm_epsilon"),
        activation=activation(values, "activation_function"),
        tied=flag(values, "tie_word_embeddings") or _classifies(raw),
        context=count(values, "n_positions"),
        windows=(None,) * layers,
        use_rope=(False,) * layers,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        rope=None,
        **special_ids(values),
        raw=raw,
    )


def _llama_shaped(family: str, values: dict, raw: dict) -> ModelConfig:
    dim, heads, layers = (
        count(values, "hidden_size"),
        count(values, "num_attention_heads"),
        layer_count(values, "num_hidden_layers"),
    )
    kv_heads = heads if values["num_key_value_heads"] is None else count(values, "num_key_value_heads")
    if heads % kv_heads:
        raise RefpeftError(
            f"config: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    if values["head_dim"] is None and dim % heads:
        raise RefpeftError(f"config key hidden_size = {dim} is not a multiple of num_attention_heads = {heads}")
    head_dim = dim // heads if values["head_dim"] is None else count(values, "head_dim")
    if head_dim % 2:
        raise RefpeftError(f"the heads have {head_dim} dimensions (head_dim); rotary positions need an even number")
    context = count(values, "max_position_embeddings")
    attention_bias = "attention_bias" in values and flag(values, "attention_bias")
    return ModelConfig(
        family=family,
        vocab=count(values, "vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ff=count(values, "intermediate_size"),
        norm_eps=positive(values, "rms_norm_eps"),
        activation=activation(values, "hidden_act"),
        tied=flag(values, "tie_word_embeddings") or _classifies(raw),
        context=context,
        windows=_windows(family, values, layers),
        use_rope=_use_rope(values, layers) if family == "smollm3" else (True,) * layers,
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias="mlp_bias" in values and flag(values, "mlp_bias"),
        qk_norm=family == "qwen3",
        rope=_rope(values, context),
        **special_ids(values),
        raw=raw,
    )


def _windows(family: str, values: dict, layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        return (None if values["sliding_window"] is None else count(values, "sliding_window"),) * layers

    window = None
    if flag(values, "use_sliding_window") and values["sliding_window"] is not None:
        window = count(values, "sliding_window")
    kinds = values["layer_types"]
    if kinds is None:
        if family == "smollm3":  # its layers without rotary positions are those that a window limits
            sliding = [not rope for rope in _use_rope(values, layers)]
        else:
            first = count(values, "max_window_layers", least=0)
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
        interval = count(values, "no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(marks, list) or len(marks) < layers or any(mark not in (0, 1) for mark in marks):
        raise RefpeftError(f"config key no_rope_layers must be a list of {layers} times 0 or 1, one a layer")
    return tuple(bool(mark) for mark in marks[:layers])


def _classifies(config: dict) -> bool:
    """Whether the files are of a model that classifies, which have no head for tokens."""
    names = config.get("architectures") or [""]
    return str(names if isinstance(names, str) else names[0]).endswith("ForSequenceClassification")


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
        original = count(given, "original_max_position_embeddings")
    else:
        original = context
    if kind == "yarn":
        given.setdefault("factor", context / original)
    theta = positive({"rope_theta": given.get("rope_theta", values["rope_theta"])}, "rope_theta")
    truncate = flag(given, "truncate") if "truncate" in given else True
    numbers = {key: positive(given, key) for key in required + optional if key in given and key != "truncate"}
    rope = RopeConfig(theta=theta, kind=kind, context=original, truncate=truncate, **({"factor": 1.0} | numbers))
    if kind == "yarn" and theta <= 1:
        raise RefpeftError(f"rope scaling yarn: rope_theta = {theta} must be greater than 1")
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise RefpeftError("rope scaling llama3: high_freq_factor must be greater than low_freq_factor")
    return rope
