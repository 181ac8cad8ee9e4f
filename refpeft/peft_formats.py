"""How Hugging Face PEFT 0.21 writes methods down: settings, names and layouts of tensors, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import RefpeftError
from .sites import Adapter, Site
from .targets import matcher

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: made of these parameters by `pack`, and taken apart again by `unpack`."""

    name: str
    params: tuple[str, ...]
    pack: Callable[..., np.ndarray] = lambda array: array
    unpack: Callable[[np.ndarray], tuple[np.ndarray, ...]] = lambda array: (array,)


@dataclass(frozen=True)
class Format:
    """PEFT's form of one method.

    entries    the tensors of an adapter
    settings   what adapter_config.json says of it, beyond what it says of every method
    options    the reverse: the plugin's options from an adapter_config.json
    fits       whether PEFT can express the adapter at all
    any_value  keys of adapter_config.json that do not change the function
    values     keys that may, with the values with which they do not
    """

    peft_type: str
    entries: Callable[[Adapter], list[Entry]]
    settings: Callable[[Adapter, Any], dict[str, Any]]
    options: Callable[[Settings, Any], dict[str, Any]]
    fits: Callable[[Adapter, Any], bool] = lambda adapter, model: True
    any_value: tuple[str, ...] = ()
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)


class Settings:
    """An adapter_config.json that knows which of its keys were read, so that none is overlooked."""

    def __init__(self, values: dict[str, Any]):
        self._values = values
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; `default` where it is missing, null or empty."""
        self.read.add(key)
        value = self._values.get(key)
        return default if value in (None, [], {}, "") else value

    def names(self, key: str) -> str | list[str]:
        """Names of modules, or one regular expression; an empty list where the key is missing or null."""
        value = self.get(key, [])
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise RefpeftError(f"{key} is {value!r}: expected a list of names")

    def need(self, key: str) -> Any:
        """The value of a key that must be there."""
        value = self.get(key)
        if value is None:
            raise RefpeftError(f"{key} is missing, which {self._values['peft_type']} needs")
        return value


# ---- names of modules ------------------------------------------------------------------------------------------------


def module_names(sites: Iterable[Site], model: Any) -> list[str]:
    """A short list for target_modules that selects just these sites: ends of names where that is possible."""
    names = {site.name for site in sites}
    for depth in (1, 2):
        ends = {".".join(name.split(".")[-depth:]) for name in names}
        if {name for name in model.sites if name.endswith(tuple("." + end for end in ends)) or name in ends} == names:
            return sorted(ends)
    return sorted(names)


def present(targets: str | list[str], model: Any) -> str | list[str]:
    """The targets without the names that the model does not have, which PEFT ignores without a word."""
    if isinstance(targets, str):
        return targets
    return [t for t, hits in matcher(targets).items() if any(map(hits, model.sites.values()))] or targets


def _targets(config: Settings, model: Any) -> str | list[str]:
    config.need("target_modules")
    return present(config.names("target_modules"), model)


def _transposed(name: str, key: str) -> Entry:
    return Entry(name, (key,), lambda array: array.T, lambda array: (array.T,))


def _renamed(names: dict[str, str]) -> Callable[[Adapter], list[Entry]]:
    """Entries of a method whose parameters are PEFT's tensors under other names."""

    def entries(adapter: Adapter) -> list[Entry]:
        return [
            Entry(f"{PREFIX}{layer.site.name}.{names[letter]}", (f"{layer.site.name}.{letter}",))
            for layer in adapter.layers
            for letter in layer.values
        ]

    return entries


# ---- LoRA ------------------------------------------------------------------------------------------------------------

_LORA_NAMES = {
    "linear": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
}

_LORA_INITS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the frozen weights alone


def _lora_entries(adapter: Adapter) -> list[Entry]:
    wrapped = {site.name for site in adapter.sites}
    entries = []
    for layer in adapter.layers:
        site, part = layer.site, layer.part.name
        for letter in layer.values:
            key, start = f"{site.name}.{letter}", f"{PREFIX}{site.name}."
            if part == "lora":
                entries.append(Entry(start + _LORA_NAMES[site.kind][letter], (key,)))
            elif part == "bitfit" and site.name in wrapped:
                entries.append(Entry(f"{start}base_layer.bias", (key,)))
            elif letter == "weight" and site.transposed:
                entries.append(_transposed(start + letter, key))
            else:
                entries.append(Entry(start + letter, (key,)))
    return entries


def _lora_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    return {
        "r": cfg.r,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rslora,
        "init_lora_weights": "gaussian" if cfg.init == "gaussian" else True,
        "bias": cfg.bias,
        "rank_pattern": cfg.rank_pattern,
        "alpha_pattern": cfg.alpha_pattern,
        "modules_to_save": sorted({layer.site.name for layer in adapter.layers if layer.part.name == "full"}) or None,
        "target_modules": module_names(adapter.sites, model),
        "fan_in_fan_out": any(site.transposed for site in adapter.sites),
    }


def _lora_options(config: Settings, model: Any) -> dict[str, Any]:
    targets, layers = _targets(config, model), config.get("layers_to_transform")
    bias = config.get("bias", "none")
    wanted = model.sites.values() if bias == "all" else _hit(targets, model)
    init = config.get("init_lora_weights", True)
    if init not in _LORA_INITS:
        known = ", ".join(map(repr, _LORA_INITS))
        raise RefpeftError(f"init_lora_weights = {init!r} changes frozen weights too; refpeft knows {known}")
    if bias in ("all", "lora_only") and all(site.bias is None for site in wanted):
        bias = "none"  # PEFT trains the biases that there are, and is content with none
    return {
        "r": config.need("r"),
        "alpha": config.need("lora_alpha"),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        "init": "gaussian" if init == "gaussian" else "kaiming",
        "bias": bias,
        "rank_pattern": config.get("rank_pattern", {}),
        "alpha_pattern": config.get("alpha_pattern", {}),
        "modules_to_save": _saved(config.names("modules_to_save"), model),
        "targets": targets,
        "exclude": present(config.names("exclude_modules"), model),
        "layers": [layers] if isinstance(layers, int) else layers,
    }


def _saved(names: str | list[str], model: Any) -> list[str]:
    """The sites that modules_to_save means: PEFT takes every module whose name ends so, also within a word."""
    names = [names] if isinstance(names, str) else names
    return [site.name for site in model.sites.values() if site.weight and site.name.endswith(tuple(names))] or names


def _hit(targets: Any, model: Any) -> list[Site]:
    return [site for site in model.sites.values() if any(hits(site) for hits in matcher(targets).values())]


_LORA = Format(
    "LORA",
    _lora_entries,
    _lora_settings,
    _lora_options,
    any_value=("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    values={"layers_pattern": ("layers", "h")},
)


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
        "targets": _targets(config, model),
        "feedforward": present(config.names("feedforward_modules"), model),
        "exclude": present(config.names("exclude_modules"), model),
    }


def _norm_options(config: Settings, model: Any) -> dict[str, Any]:
    return {
        "targets": _targets(config, model),
        "exclude": present(config.names("exclude_modules"), model),
    }


_IA3 = Format(
    "IA3", _ia3_entries, _ia3_settings, _ia3_options, any_value=("fan_in_fan_out", "init_ia3_weights", "runtime_config")
)

_LN_TUNING = Format(
    "LN_TUNING",
    _renamed({"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}),
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


_PROMPT_TUNING = Format(
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

_PREFIX_TUNING = Format(
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

FORMATS = {
    "lora": _LORA,
    "ia3": _IA3,
    "ln_tuning": _LN_TUNING,
    "prompt_tuning": _PROMPT_TUNING,
    "prefix_tuning": _PREFIX_TUNING,
}
"""By the plugin's name."""
