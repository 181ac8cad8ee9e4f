"""What the `config.json` of DeBERTa v2 and v3 says, read completely or refused; the names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refpeft.errors import RefpeftError
from refpeft.models.config_keys import REQUIRED, activation, count, flag, positive, read
from refpeft.models.encoder_config import ARCHITECTURES, HARMLESS, EncoderConfig, in_common, tensors_of

FAMILY, PREFIX = "deberta-v2", "deberta."


@dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """An encoder whose attention has terms of content and of relative position apart (arXiv:2006.03654)."""

    longest: int  # the most tokens of a row
    width: int  # of the embeddings; where it is not `dim`, a linear layer follows them
    buckets: int  # of relative positions, in each direction, beyond the half of which they are logarithmic; 0: none
    distance: int  # the farthest relative position that is told apart
    content_to_position: bool
    position_to_content: bool
    shared_keys: bool  # whether positions go through the layers' own q and k
    norm_positions: bool  # whether the embeddings of relative positions are normalized
    conv_kernel: int  # width of the convolution beside the first layer; 0: none
    conv_activation: str

    @property
    def context(self) -> int:
        return self.longest

    @property
    def span(self) -> int:
        """Half of the rows of the table of relative positions."""
        return self.buckets or self.distance


_KEYS = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": REQUIRED,
    "max_relative_positions": -1,
    "position_buckets": -1,
    "position_biased_input": True,
    "pos_att_type": None,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "embedding_size": None,  # null: hidden_size
    "conv_kernel_size": 0,
    "conv_act": "tanh",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ONLY = {"relative_attention": True, "conv_groups": 1, "attention_head_size": None, "add_cross_attention": False}
_HARMLESS = ["legacy", "pooler_dropout", "pooler_hidden_act", "pooler_hidden_size", "summary_type"]


def from_hf(config: dict) -> DebertaConfig:
    """The DebertaConfig of a parsed `config.json`; raises RefpeftError as refpeft.models.config.from_hf does."""
    values = read(config, FAMILY, _KEYS, _ONLY, [*HARMLESS, *_HARMLESS], ARCHITECTURES)
    if not flag(values, "relative_attention"):
        raise RefpeftError("config key relative_attention = false: refpeft has DeBERTa with it alone")
    common = in_common(values)
    longest = count(values, "max_position_embeddings")
    kinds = _kinds(values["pos_att_type"])
    norms = _words(values["norm_rel_ebd"])
    if norms - {"none", "layer_norm"}:
        raise RefpeftError(f"config key norm_rel_ebd = {values['norm_rel_ebd']!r}: refpeft has none and layer_norm")
    kernel = count(values, "conv_kernel_size", least=0)
    if kernel and kernel % 2 == 0:
        raise RefpeftError(f"config key conv_kernel_size = {kernel}: expected an odd number")
    biased = flag(values, "position_biased_input")
    return DebertaConfig(
        family=FAMILY,
        norm_eps=positive(values, "layer_norm_eps"),
        positions=longest if biased else 0,
        types=count(values, "type_vocab_size", least=0),
        first_position=0,
        raw=config,
        longest=longest,
        width=common["dim"] if values["embedding_size"] is None else count(values, "embedding_size"),
        buckets=_or_none(values, "position_buckets") or 0,
        distance=_or_none(values, "max_relative_positions") or longest,
        content_to_position="c2p" in kinds,
        position_to_content="p2c" in kinds,
        shared_keys=flag(values, "share_att_key"),
        norm_positions="layer_norm" in norms,
        conv_kernel=kernel,
        conv_activation="tanh" if values["conv_act"] == "tanh" else activation(values, "conv_act"),
        **common,
    )


def _or_none(values: dict, key: str) -> int | None:
    """A count, or None where it is below 1."""
    return None if type(values[key]) is int and values[key] < 1 else count(values, key)


def _words(value: Any) -> set[str]:
    parts = value.split("|") if isinstance(value, str) else value or []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise RefpeftError(f"config: {value!r} is not a list of words")
    return {part.strip().lower() for part in parts}


def _kinds(value: Any) -> set[str]:
    kinds = _words(value)
    if kinds - {"c2p", "p2c"}:
        raise RefpeftError(f"config key pos_att_type = {value!r}: refpeft has c2p and p2c")
    return kinds


def tensors(config: DebertaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such a model without a head."""
    dim = config.dim
    own = {"encoder.rel_embeddings.weight": (2 * config.span, dim)}
    if config.width != dim:
        own["embeddings.embed_proj.weight"] = (dim, config.width)
    if config.norm_positions:
        own["encoder.LayerNorm.weight"] = own["encoder.LayerNorm.bias"] = (dim,)
    if config.conv_kernel:
        own["encoder.conv.conv.weight"] = (dim, dim, config.conv_kernel)
        own["encoder.conv.conv.bias"] = (dim,)
        own["encoder.conv.LayerNorm.weight"] = own["encoder.conv.LayerNorm.bias"] = (dim,)
    if not config.shared_keys:
        places = {"pos_key_proj": config.content_to_position, "pos_query_proj": config.position_to_content}
        for name in (name for name, there in places.items() if there):
            for layer in range(config.layers):
                start = f"encoder.layer.{layer}.attention.self.{name}"
                own[f"{start}.weight"], own[f"{start}.bias"] = (dim, dim), (dim,)
    return tensors_of(config, config.width) | {PREFIX + name: shape for name, shape in own.items()}
