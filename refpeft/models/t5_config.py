"""What the `config.json` of T5, mT5 and Flan-T5 says, read completely or refused; names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from refpeft.errors import RefpeftError
from refpeft.models.config_keys import REQUIRED, activation, count, flag, layer_count, positive, read, special_ids

FAMILIES = ("t5", "mt5")


@dataclass(frozen=True)
class T5Config:
    """The shape of an encoder-decoder, with nothing left to look up."""

    family: str  # t5 or mt5
    vocab: int
    dim: int
    layers: int  # of the encoder
    decoder_layers: int
    heads: int
    head_dim: int
    ff: int
    norm_eps: float
    activation: str  # relu, gelu_tanh, gelu or silu
    gated: bool
    tied: bool  # the head is the embedding table
    scaled: bool  # the head reads states that are scaled by 1 / sqrt(dim)
    buckets: int  # of relative positions
    distance: int  # from which on they are all one
    eos_ids: tuple[int, ...]
    pad_id: int | None
    start_id: int  # with which the decoder begins
    raw: dict = field(compare=False, repr=False)  # config.json as read, for writing it again

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def context(self) -> int:
        """The most tokens of a row: positions are relative, so that any length goes."""
        return 1 << 20


_T5_KEYS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,  # null: as many as the encoder has
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,  # null: T5 does where its head is tied, mT5 does not
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": REQUIRED,
}
_KEYS = {
    "t5": _T5_KEYS,
    "mt5": _T5_KEYS
    | {
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "tie_word_embeddings": False,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
}
_ONLY = {"is_encoder_decoder": True, "is_decoder": False}
# Dropout, off in a frozen base; how weights were first made; what follows from `feed_forward_proj`; old names.
_HARMLESS = [
    "classifier_dropout",
    "dense_act_fn",
    "dropout_rate",
    "initializer_factor",
    "is_gated_act",
    "n_positions",
    "tokenizer_class",
]
_ARCHITECTURES = ("ForConditionalGeneration", "WithLMHeadModel")


def from_hf(config: dict) -> T5Config:
    """The T5Config of a parsed `config.json`; raises RefpeftError as refpeft.models.config.from_hf does."""
    family = config["model_type"]
    values = read(config, family, _KEYS[family], _ONLY, _HARMLESS, _ARCHITECTURES)
    layers = layer_count(values, "num_layers")
    gated, name = _feed_forward(values["feed_forward_proj"])
    ids = special_ids(values)
    tied, scaled = flag(values, "tie_word_embeddings"), values["scale_decoder_outputs"]
    buckets = count(values, "relative_attention_num_buckets", least=4)
    distance = count(values, "relative_attention_max_distance")
    if buckets % 4 or distance <= buckets // 2:
        raise RefpeftError(
            f"config: {buckets} buckets for relative positions up to {distance}: expected a multiple of 4, and a "
            "largest position of more than half of them"
        )
    return T5Config(
        family=family,
        vocab=count(values, "vocab_size"),
        dim=count(values, "d_model"),
        layers=layers,
        decoder_layers=layers if values["num_decoder_layers"] is None else layer_count(values, "num_decoder_layers"),
        heads=count(values, "num_heads"),
        head_dim=count(values, "d_kv"),
        ff=count(values, "d_ff"),
        norm_eps=positive(values, "layer_norm_epsilon"),
        activation="gelu_tanh"
        if gated and name == "gelu"
        else activation({"feed_forward_proj": name}, "feed_forward_proj"),
        gated=gated,
        tied=tied,
        scaled=tied and family == "t5" if scaled is None else flag(values, "scale_decoder_outputs"),
        buckets=buckets,
        distance=distance,
        eos_ids=ids["eos_ids"],
        pad_id=ids["pad_id"],
        start_id=count(values, "decoder_start_token_id", least=0),
        raw=config,
    )


def _feed_forward(value: object) -> tuple[bool, str]:
    """Whether the MLP has a gate, and its activation: "relu", "gated-gelu"."""
    first, _, rest = value.partition("-") if isinstance(value, str) else ("", "", "")
    if not first or (rest and first != "gated") or "-" in rest:
        raise RefpeftError(f"config key feed_forward_proj = {value!r}: expected an activation, or 'gated-' and one")
    return bool(rest), rest or first


def tensors(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such a model."""
    dim, ff, inner = config.dim, config.ff, config.heads * config.head_dim
    shapes = {"shared.weight": (config.vocab, dim)}
    attention = {"q": (inner, dim), "k": (inner, dim), "v": (inner, dim), "o": (dim, inner)}
    mlp = {"wi_0": (ff, dim), "wi_1": (ff, dim)} if config.gated else {"wi": (ff, dim)}
    sides = {
        "encoder": (config.layers, {"SelfAttention": attention, "DenseReluDense": mlp | {"wo": (dim, ff)}}),
        "decoder": (
            config.decoder_layers,
            {"SelfAttention": attention, "EncDecAttention": attention, "DenseReluDense": mlp | {"wo": (dim, ff)}},
        ),
    }
    for side, (layers, parts) in sides.items():
        for layer in range(layers):
            for number, (part, linears) in enumerate(parts.items()):
                start = f"{side}.block.{layer}.layer.{number}."
                shapes |= {f"{start}{part}.{name}.weight": shape for name, shape in linears.items()}
                if part == "SelfAttention" and layer == 0:
                    shapes[f"{start}{part}.relative_attention_bias.weight"] = (config.buckets, config.heads)
                shapes[f"{start}layer_norm.weight"] = (dim,)
        shapes[f"{side}.final_layer_norm.weight"] = (dim,)
    return shapes if config.tied else shapes | {"lm_head.weight": (config.vocab, dim)}
