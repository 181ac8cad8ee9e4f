"""LoRA and what PEFT keeps behind its config: the same file with a flag set."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from ..errors import RefpeftError
from ..sites import Adapter, Site
from ..targets import matcher
from .common import PREFIX, Entry, Format, Settings, module_names, present, renamed, targets_of, transposed

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
                entries.append(transposed(start + letter, key))
            else:
                entries.append(Entry(start + letter, (key,)))
    return entries


def _settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    """What all methods of this kind have."""
    cfg = adapter.cfg
    return {
        "r": cfg.r,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rslora,
        "rank_pattern": cfg.rank_pattern,
        "alpha_pattern": cfg.alpha_pattern,
        "target_modules": module_names(adapter.sites, model),
        "fan_in_fan_out": any(site.transposed for site in adapter.sites),
    }


def _options(config: Settings, model: Any) -> dict[str, Any]:
    layers = config.get("layers_to_transform")
    return {
        "r": config.need("r"),
        "alpha": config.need("lora_alpha"),
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        "rank_pattern": config.get("rank_pattern", {}),
        "alpha_pattern": config.get("alpha_pattern", {}),
        "targets": targets_of(config, model),
        "exclude": present(config.names("exclude_modules"), model),
        "layers": [layers] if isinstance(layers, int) else layers,
    }


def _lora_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    return _settings(adapter, model) | {
        "init_lora_weights": "gaussian" if cfg.init == "gaussian" else True,
        "bias": cfg.bias,
        "modules_to_save": sorted({layer.site.name for layer in adapter.layers if layer.part.name == "full"}) or None,
    }


def _lora_options(config: Settings, model: Any) -> dict[str, Any]:
    options, bias = _options(config, model), config.get("bias", "none")
    wanted = model.sites.values() if bias == "all" else _hit(options["targets"], model)
    init = _init(config)
    if bias in ("all", "lora_only") and all(site.bias is None for site in wanted):
        bias = "none"  # PEFT trains the biases that there are, and is content with none
    return options | {
        "init": "gaussian" if init == "gaussian" else "kaiming",
        "bias": bias,
        "modules_to_save": _saved(config.names("modules_to_save"), model),
    }


def _init(config: Settings) -> str | bool:
    """How first values were made, which is over; but some ways change the frozen weights, too."""
    init = config.get("init_lora_weights", True)
    if init not in _LORA_INITS:
        known = ", ".join(map(repr, _LORA_INITS))
        raise RefpeftError(f"init_lora_weights = {init!r} changes frozen weights too; refpeft knows {known}")
    return init


def _dora_options(config: Settings, model: Any) -> dict[str, Any]:
    _init(config)
    return _options(config, model)


def _saved(names: str | list[str], model: Any) -> list[str]:
    """The sites that modules_to_save means: those in modules whose names end so, also within a word, as in PEFT."""
    names = (names,) if isinstance(names, str) else tuple(names)

    def inside(site: Site) -> bool:
        return any(module.endswith(names) for module in accumulate(site.name.split("."), "{}.{}".format))

    return [site.name for site in model.sites.values() if site.weight and inside(site)] or [*names]


def _hit(targets: Any, model: Any) -> list[Site]:
    return [site for site in model.sites.values() if any(hits(site) for hits in matcher(targets).values())]


_ANY_VALUE = ("eva_config", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config")
_VALUES = {"layers_pattern": ("layers", "h")}

LORA = Format("LORA", _lora_entries, _lora_settings, _lora_options, any_value=_ANY_VALUE, values=_VALUES)

DORA = Format(
    "LORA",
    renamed({"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}),
    lambda adapter, model: _settings(adapter, model) | {"use_dora": True},
    _dora_options,
    means=lambda config: bool(config.get("use_dora")),
    any_value=_ANY_VALUE,
    values=_VALUES | {"use_dora": (True,), "bias": ("none",)},
)


def _factors(adapter: Adapter) -> list[Entry]:
    """A and B of every site, without what first values were."""
    return [
        Entry(f"{PREFIX}{site.name}.{_LORA_NAMES['linear'][letter]}", (f"{site.name}.{letter}",))
        for site in adapter.sites
        for letter in "AB"
    ]


def _of_weights(init: str) -> Format:
    """LoRA that starts from a decomposition of the weight, which PEFT repeats whenever it reads the file."""
    return Format(
        "LORA",
        _factors,
        _settings,
        _options,
        means=lambda config: config.get("init_lora_weights") == init and not config.get("use_dora"),
        any_value=_ANY_VALUE,
        values=_VALUES | {"init_lora_weights": (init,), "bias": ("none",)},
        fitted=True,
    )


def _eva_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    """Ranks, and alphas, as the data have made them. Such a file is read as LoRA's, which the function is."""
    cfg = adapter.cfg
    ranks = {layer.site: layer.p.A.shape[0] for layer in adapter.layers}
    alphas = {site: cfg.alpha_of(site, rank) for site, rank in ranks.items()}
    return _settings(adapter, model) | {
        "rank_pattern": {site.name: rank for site, rank in ranks.items() if rank != cfg.r},
        "alpha_pattern": {site.name: alpha for site, alpha in alphas.items() if alpha != cfg.alpha},
        "init_lora_weights": "eva",
        "eva_config": {"rho": cfg.rho, "tau": cfg.tau, "adjust_scaling_factors": cfg.adjust_scaling},
    }


EVA = Format("LORA", _factors, _eva_settings, _options, means=lambda config: False)

PISSA, OLORA = _of_weights("pissa"), _of_weights("olora")
