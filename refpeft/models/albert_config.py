"""What ALBERT's `config.json` says, read completely or refused; the names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from refpeft.errors import RefpeftError
from refpeft.models.config_keys import count, positive, read
from refpeft.models.encoder_config import (
    ARCHITECTURES,
    BERT_ONLY,
    HARMLESS,
    NAMES,
    PREFIX,
    EncoderConfig,
    in_common,
    tensors_of,
)

FAMILY = "albert"
WIDEN = "encoder.embedding_hidden_mapping_in"


@dataclass(frozen=True)
class AlbertConfig(EncoderConfig):
    """An encoder whose layers share their weights, and whose embeddings have a width of their own."""

    width: int  # of the embeddings, which a linear layer brings to `dim`
    groups: int  # how many layers there are weights for

    @property
    def distinct(self) -> int:
        return self.groups

    @property
    def order(self) -> tuple[int, ...]:
        """For each layer that is run, whose weights it has."""
        return tuple(int(layer / (self.layers / self.groups)) for layer in range(self.layers))  # rounded as theirs


_KEYS = {
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_hidden_layers": 12,
    "num_hidden_groups": 1,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
# The first files also tell what their authors tried and left; transformers reads inner_group_num alone of these.
_ONLY = BERT_ONLY | {
    "inner_group_num": 1,
    "down_scale_factor": 1,
    "gap_size": 0,
    "layers_to_keep": [],
    "net_structure_type": 0,
    "num_memory_blocks": 0,
}


def from_hf(config: dict) -> AlbertConfig:
    """The AlbertConfig of a parsed `config.json`; raises RefpeftError as refpeft.models.config.from_hf does."""
    values = read(config, FAMILY, _KEYS, _ONLY, [*HARMLESS, "classifier_dropout_prob"], ARCHITECTURES)
    common, groups = in_common(values), count(values, "num_hidden_groups")
    if groups > common["layers"]:
        raise RefpeftError(
            f"config key num_hidden_groups = {groups}: there are only {common['layers']} layers to share their weights"
        )
    return AlbertConfig(
        family=FAMILY,
        norm_eps=positive(values, "layer_norm_eps"),
        positions=count(values, "max_position_embeddings"),
        types=count(values, "type_vocab_size"),
        first_position=0,
        raw=config,
        width=count(values, "embedding_size"),
        groups=groups,
        **common,
    )


def tensors(config: AlbertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such a model without a head."""
    norm, dim, width = NAMES[FAMILY]["norm"], config.dim, config.width
    own = {
        f"{norm}.weight": (width,),
        f"{norm}.bias": (width,),
        f"{WIDEN}.weight": (dim, width),
        f"{WIDEN}.bias": (dim,),
    }
    return tensors_of(config, width) | {PREFIX[FAMILY] + name: shape for name, shape in own.items()}
