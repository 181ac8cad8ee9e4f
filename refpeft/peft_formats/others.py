"""Gains, norms, and what comes before the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..sites import Adapter, Site
from .common import PREFIX, Entry, Format, Settings, module_names, present, renamed, targets_of

# ---- (IA)^3 and norms ------------------------------------------------------------------------------------------------


def _ia3_entries(adapter: Adapter) -> list[Entry]:
    def entry(site: Site) -> Entry:
        shape = (1, -1) if adapter.cfg.at_input(site) else (-1, 1)
        key = f"{site.name}.gain"
        return Entry(f"{PREFIX}{site.name}.ia3_l", (key,), lambda a: a.reshape(shape), lambda a: (a.reshape(-1),))

    return [entry(site) for site in adapter.sites]


def _ia3_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    inside = [site for site in adapter.sites if adapter.cfg.at_input(site)]
    outside = [site for site in adapter.sites if not adapter.cfg.at_input(site)]
    feedforward = module_names(inside, model)
    return {
        "target_modules": sorted({*module_names(outside, model), *feedforward}),
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(site.transposed for site in adapter.sites),
    }


def _ia3_options(config: Settings, model: Any) -> dict[str, Any]:
    return {
        "targets": targets_of(config, model),
        "feedforward": present(config.names("feedforward_modules"), model),
        "exclude": present(config.names("exclude_modules"), model),
    }


def _norm_options(config: Settings, model: Any) -> dict[str, Any]:
    return {
        "targets": targets_of(config, model),
        "exclude": present(config.names("exclude_modules"), model),
    }


IA3 = Format(
    "IA3", _ia3_entries, _ia3_settings, _ia3_options, any_value=("fan_in_fan_out", "init_ia3_weights", "runtime_config")
)

LN_TUNING = Format(
    "LN_TUNING",
    renamed({"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}),
    lambda adapter, model: {"target_modules": module_names(adapter.sites, model)},
    _norm_options,
)


# ---- prompts ---------------------------------------------------------------------------------------------------------

_PROMPT_KEYS = ("num_attention_heads", "num_layers", "token_dim")  # PEFT's, derived from the model; shapes are checked


def _virtual_tokens(adapter: Adapter, model: Any, heads: int, dim: int) -> dict[str, Any]:
    return {
        "num_virtual_tokens": adapter.cfg.tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.config.layers,
        "num_attention_heads": heads,
        "token_dim": dim,
    }


def _prefix_entries(adapter: Adapter) -> list[Entry]:
    """prompt_embeddings (tokens, layers * 2 * kv_heads * head_dim): key then value, layer after layer."""
    keys = tuple(f"{site.name}.{letter}" for site in adapter.sites for letter in ("keys", "values"))
    heads, head_dim = adapter.sites[0].shape

    def pack(*arrays: np.ndarray) -> np.ndarray:
        return np.stack(arrays).transpose(2, 0, 1, 3).reshape(arrays[0].shape[1], -1)

    def unpack(array: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(array.reshape(len(array), len(keys), heads, head_dim).transpose(1, 2, 0, 3))

    return [Entry("prompt_embeddings", keys, pack, unpack)]


def _prefix_fits(adapter: Adapter, model: Any) -> bool:
    everywhere = [site for site in model.sites.values() if site.kind == "attention"]
    return adapter.cfg.positions == "after" and adapter.sites == everywhere


PROMPT_TUNING = Format(
    "PROMPT_TUNING",
    lambda adapter: [Entry("prompt_embeddings", (f"{adapter.sites[0].name}.prompt",))],
    lambda adapter, model: _virtual_tokens(adapter, model, model.config.heads, model.config.dim),
    lambda config, model: {"tokens": config.need("num_virtual_tokens"), "init": "random"},
    fits=lambda adapter, model: adapter.sites == [model.embed],
    any_value=(
        *_PROMPT_KEYS,
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    ),
    values={"num_transformer_submodules": (1,)},
)

PREFIX_TUNING = Format(
    "PREFIX_TUNING",
    _prefix_entries,
    lambda adapter, model: _virtual_tokens(
        adapter, model, model.config.kv_heads, model.config.kv_heads * model.config.head_dim
    ),
    lambda config, model: {"tokens": config.need("num_virtual_tokens")},
    fits=_prefix_fits,
    # the encoder of prefix_projection is not in the file: what is there are the keys and values that it gave
    any_value=(*_PROMPT_KEYS, "encoder_hidden_size", "prefix_projection", "init_weights"),
    values={"num_transformer_submodules": (1,)},
)
