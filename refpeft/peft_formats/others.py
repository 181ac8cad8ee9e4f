"""Gains and norms."""

from __future__ import annotations

from typing import Any

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
