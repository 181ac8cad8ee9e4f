"""What an encoder's `config.json` says, read completely or refused; the names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from refpeft.errors import RefpeftError
from refpeft.models.config_keys import activation, count, layer_count, positive, read, special_ids


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, with nothing left to look up."""

    family: str  # bert, roberta, xlm-roberta, distilbert, deberta-v2 or albert
    vocab: int
    dim: int
    layers: int
    heads: int
    ff: int
    norm_eps: float
    activation: str  # gelu (exact), gelu_tanh, silu or relu
    positions: int  # rows of the table of positions
    types: int  # kinds of segment, which BERT tells apart by an embedding; 0: none
    first_position: int  # of a row's first token: RoBERTa's tables have two rows before it
    pad_id: int | None
    raw: dict = field(compare=False, repr=False)  # config.json as read, for writing it again

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def context(self) -> int:
        """The most tokens of a row."""
        return self.positions - self.first_position

    @property
    def distinct(self) -> int:
        """How many layers have weights of their own."""
        return self.layers


_BERT = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layer": "encoder.layer",
    "attention": "attention.self",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
_DISTILBERT = _BERT | {
    "layer": "transformer.layer",
    "attention": "attention",
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm2": "output_layer_norm",
}
_DEBERTA = _BERT | {
    letter: f"attention.self.{word}_proj" for letter, word in zip("qkv", ("query", "key", "value"), strict=True)
}
_ALBERT = _BERT | {
    "layer": "encoder.albert_layer_groups",
    "attention": "albert_layers.0.attention",
    "q": "albert_layers.0.attention.query",
    "k": "albert_layers.0.attention.key",
    "v": "albert_layers.0.attention.value",
    "o": "albert_layers.0.attention.dense",
    "norm1": "albert_layers.0.attention.LayerNorm",
    "up": "albert_layers.0.ffn",
    "down": "albert_layers.0.ffn_output",
    "norm2": "albert_layers.0.full_layer_layer_norm",
}
NAMES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "deberta-v2": _DEBERTA,
    "albert": _ALBERT,
}
"""What modules are called, by family."""

PREFIX = {
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "distilbert": "distilbert.",
    "deberta-v2": "deberta.",
    "albert": "albert.",
}
"""What stands before these names in a model that has a head."""


def tensors_of(config: EncoderConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such a model without a head; `width` is that of the embeddings."""
    name, dim, ff = NAMES[config.family], config.dim, config.ff
    tables = {"words": config.vocab, "positions": config.positions, "types": config.types}
    shapes = {f"{name[table]}.weight": (rows, width) for table, rows in tables.items() if rows}
    linears = {"q": (dim, dim), "k": (dim, dim), "v": (dim, dim), "o": (dim, dim), "up": (ff, dim), "down": (dim, ff)}
    norms = [name["norm"]]
    for layer in range(config.distinct):
        start = f"{name['layer']}.{layer}."
        for part, shape in linears.items():
            shapes[f"{start}{name[part]}.weight"], shapes[f"{start}{name[part]}.bias"] = shape, shape[:1]
        norms += [start + name["norm1"], start + name["norm2"]]
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (dim,)
    return {PREFIX[config.family] + key: shape for key, shape in shapes.items()}


# ---- reading ---------------------------------------------------------------------------------------------------------

_BERT_KEYS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ROBERTA_KEYS = _BERT_KEYS | {"vocab_size": 50265, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_KEYS = {
    "bert": _BERT_KEYS,
    "roberta": _ROBERTA_KEYS,
    "xlm-roberta": _ROBERTA_KEYS | {"vocab_size": 30522},
    "distilbert": {
        "vocab_size": 30522,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "activation": "gelu",
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
}
_IN_BERTS_WORDS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
_IN_BERTS_WORDS |= {"hidden_dim": "intermediate_size", "activation": "hidden_act"}
BERT_ONLY = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
# Dropout, off in a frozen base; how weights were first made; and what concerns heads.
HARMLESS = """
    attention_probs_dropout_prob classifier_dropout directionality dropout gradient_checkpointing hidden_dropout_prob
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type qa_dropout
    seq_classif_dropout sinusoidal_pos_embds tie_weights_ tie_word_embeddings
""".split()  # noqa: SIM905 (a list of so many words is no easier to read)
ARCHITECTURES = ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification")


def from_hf(config: dict) -> EncoderConfig:
    """The EncoderConfig of a parsed `config.json`; raises RefpeftError as refpeft.models.config.from_hf does."""
    family = config["model_type"]
    values = read(config, family, _KEYS[family], BERT_ONLY, HARMLESS, ARCHITECTURES)
    values = {_IN_BERTS_WORDS.get(key, key): value for key, value in values.items()}
    common = in_common(values)
    pad = common["pad_id"]
    first = (0 if pad is None else pad) + 1 if family in ("roberta", "xlm-roberta") else 0
    positions = count(values, "max_position_embeddings")
    if first >= positions:
        raise RefpeftError(f"config key pad_token_id = {pad}: positions begin behind it, and there are {positions}")
    return EncoderConfig(
        family=family,
        norm_eps=positive(values, "layer_norm_eps") if "layer_norm_eps" in values else 1e-12,
        positions=positions,
        types=count(values, "type_vocab_size") if "type_vocab_size" in values else 0,
        first_position=first,
        raw=config,
        **common,
    )


def in_common(values: dict) -> dict[str, Any]:
    """What all encoders say in the same words, as fields of EncoderConfig."""
    dim, heads = count(values, "hidden_size"), count(values, "num_attention_heads")
    if dim % heads:
        raise RefpeftError(f"config: the width, {dim}, is not a multiple of the number of heads, {heads}")
    return {
        "vocab": count(values, "vocab_size"),
        "dim": dim,
        "layers": layer_count(values, "num_hidden_layers"),
        "heads": heads,
        "ff": count(values, "intermediate_size"),
        "activation": activation(values, "hidden_act"),
        "pad_id": special_ids(values)["pad_id"],
    }
