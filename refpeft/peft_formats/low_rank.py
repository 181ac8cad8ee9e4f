"""Other low-rank methods."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..backend import to_host
from ..errors import RefpeftError
from ..sites import Adapter, Site
from .common import PREFIX, Entry, Format, Settings, module_names, present, renamed, targets_of

_FITTED = ("init_weights", "runtime_config")  # how first values were made, which is over
_VALUES = {"layers_pattern": ("layers", "h")}


def _options(config: Settings, model: Any) -> dict[str, Any]:
    """What all have."""
    return {"r": config.need("r")} | _where(config, model)


def _where(config: Settings, model: Any) -> dict[str, Any]:
    layers = config.get("layers_to_transform")
    return {
        "targets": targets_of(config, model),
        "exclude": present(config.names("exclude_modules"), model),
        "layers": [layers] if isinstance(layers, int) else layers,
    }


def _settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    return {"r": adapter.cfg.r, "target_modules": module_names(adapter.sites, model)}


def _transposed(adapter: Adapter) -> dict[str, Any]:
    return {"fan_in_fan_out": any(site.transposed for site in adapter.sites)}


# ---- VeRA ------------------------------------------------------------------------------------------------------------

_vera_gains = renamed({"d": "vera_lambda_d", "b": "vera_lambda_b"})


def _vera_entries(adapter: Adapter) -> list[Entry]:
    shared = [Entry(f"base_model.vera_{letter}", (f"shared.{letter}",)) for letter in "AB"]
    return (shared if adapter.cfg.torch_seed is None else []) + _vera_gains(adapter)


def _vera_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    more = {
        "vera_dropout": cfg.dropout,
        "d_initial": cfg.d_initial,
        "save_projection": cfg.torch_seed is None,
        "projection_prng_key": cfg.torch_seed or 0,
    }
    return _settings(adapter, model) | more | _transposed(adapter)


def _vera_options(config: Settings, model: Any) -> dict[str, Any]:
    drawn = not config.get("save_projection", True)
    return _options(config, model) | {
        "dropout": config.get("vera_dropout", 0.0),
        "d_initial": config.get("d_initial", 0.1),
        "torch_seed": config.get("projection_prng_key", 0) if drawn else None,
    }


VERA = Format(
    "VERA",
    _vera_entries,
    _vera_settings,
    _vera_options,
    any_value=(*_FITTED, "fan_in_fan_out", "projection_prng_key"),
    values=_VALUES | {"bias": ("none",)},
)


# ---- LoHa and LoKr ---------------------------------------------------------------------------------------------------


def _patterns(adapter: Adapter) -> dict[str, Any]:
    cfg = adapter.cfg
    return {"alpha": cfg.alpha, "rank_pattern": cfg.rank_pattern, "alpha_pattern": cfg.alpha_pattern}


def _lycoris_options(config: Settings, model: Any) -> dict[str, Any]:
    return _options(config, model) | {
        "alpha": config.need("alpha"),
        "rank_pattern": config.get("rank_pattern", {}),
        "alpha_pattern": config.get("alpha_pattern", {}),
    }


LOHA = Format(
    "LOHA",
    renamed({"A1": "hada_w1_a", "B1": "hada_w1_b", "A2": "hada_w2_a", "B2": "hada_w2_b"}),
    lambda adapter, model: _settings(adapter, model) | _patterns(adapter),
    lambda config, model: _lycoris_options(config, model) | {"init": "kaiming"},
    any_value=(*_FITTED, "use_effective_conv2d"),
    values=_VALUES,
)


def _lokr_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    return (
        _settings(adapter, model)
        | _patterns(adapter)
        | {
            "decompose_factor": cfg.factor,
            "decompose_both": cfg.decompose_both,
            "init_weights": "lycoris" if cfg.init == "lycoris" else True,
        }
    )


def _lokr_options(config: Settings, model: Any) -> dict[str, Any]:
    return _lycoris_options(config, model) | {
        "factor": config.get("decompose_factor", -1),
        "decompose_both": config.get("decompose_both", False),
        "init": "lycoris" if config.get("init_weights") == "lycoris" else "peft",
    }


_PARTS = {"": "", "a": "_a", "b": "_b"}

LOKR = Format(
    "LOKR",
    renamed({f"{name}{part}": f"lokr_w{i}{end}" for i, name in ((1, "C"), (2, "D")) for part, end in _PARTS.items()}),
    _lokr_settings,
    _lokr_options,
    any_value=("runtime_config", "use_effective_conv2d"),
    values=_VALUES,
)


# ---- HiRA and DeLoRA -------------------------------------------------------------------------------------------------


def _hira_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    return _settings(adapter, model) | {"hira_dropout": adapter.cfg.dropout} | _transposed(adapter)


def _hira_options(config: Settings, model: Any) -> dict[str, Any]:
    return _options(config, model) | {"dropout": config.get("hira_dropout", 0.0)}


HIRA = Format(
    "HIRA",
    renamed({"A": "hira_A", "B": "hira_B"}),
    _hira_settings,
    _hira_options,
    fits=lambda adapter, model: not adapter.cfg.rank_pattern,  # PEFT 0.21 has the key, and takes r all the same
    any_value=(*_FITTED, "fan_in_fan_out"),
    values=_VALUES,
)


def _delora_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    return _settings(adapter, model) | {
        "delora_lambda": cfg.lambda_initial,
        "module_dropout": cfg.dropout,  # of single inputs, whatever the name says
        "rank_pattern": cfg.rank_pattern,
        "lambda_pattern": cfg.lambda_pattern,
    }


def _delora_options(config: Settings, model: Any) -> dict[str, Any]:
    return _options(config, model) | {
        "lambda_initial": config.get("delora_lambda", 15.0),
        "dropout": config.get("module_dropout", 0.0),
        "rank_pattern": config.get("rank_pattern", {}),
        "lambda_pattern": config.get("lambda_pattern", {}),
    }


DELORA = Format(
    "DELORA",
    renamed({"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "w": "delora_w_norm"}),
    _delora_settings,
    _delora_options,
    any_value=_FITTED,
    values=_VALUES | {"bias": ("none",)},
)


# ---- AdaLoRA ---------------------------------------------------------------------------------------------------------


def _left(adapter: Adapter) -> dict[str, np.ndarray]:
    """Which triplets of each site a file has, by name: all until training has set some to 0, and then the others."""
    values = {layer.site.name: to_host(layer.p.E.data) for layer in adapter.layers}
    fresh = not any(E.any() for E in values.values())
    return {name: np.flatnonzero((E != 0) | fresh) for name, E in values.items()}


def _triplet_entries(adapter: Adapter) -> list[Entry]:
    entries, left = [], _left(adapter)
    for site in adapter.parts[0].sites:
        if site.name not in left:
            entries += _no_triplets(site)
            continue
        start, these = f"{PREFIX}{site.name}.lora_", left[site.name]
        entries += [
            Entry(f"{start}A", (f"{site.name}.Q",), lambda Q, these=these: Q[these]),
            Entry(f"{start}B", (f"{site.name}.P",), lambda P, these=these: P[:, these]),
            Entry(f"{start}E", (f"{site.name}.E",), lambda E, these=these: E[these, None], lambda E: (E[:, 0],)),
        ]
    return entries


def _no_triplets(site: Site) -> list[Entry]:
    """The tensors of a site that has lost all of them."""
    out, width = site.shape
    shapes = {"A": (0, width), "B": (out, 0), "E": (0, 1)}
    return [
        Entry(f"{PREFIX}{site.name}.lora_{letter}", (), lambda shape=shape: np.zeros(shape, "f4"), lambda array: ())
        for letter, shape in shapes.items()
    ]


def _adalora_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    """Which triplets are left, as PEFT says it; their order means nothing, so those that are left are the first."""
    cfg, left = adapter.cfg, _left(adapter)
    counts = {site.name: len(left.get(site.name, ())) for site in adapter.parts[0].sites}
    pattern = {f"{n}.lora_E": [True] * count + [False] * (cfg.init_r - count) for n, count in counts.items()}
    return {
        "init_r": cfg.init_r,
        "target_r": cfg.target_r,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "orth_reg_weight": cfg.gamma,
        "tinit": cfg.tinit,
        "tfinal": cfg.tfinal,
        "deltaT": cfg.delta_t,
        "beta1": cfg.beta1,
        "beta2": cfg.beta2,
        "total_step": cfg.tinit + cfg.tfinal + 1,  # which PEFT wants to be more than these two
        "rank_pattern": pattern if set(counts.values()) != {cfg.init_r} else None,
        "target_modules": module_names(adapter.parts[0].sites, model),
    } | _transposed(adapter)


def _adalora_options(config: Settings, model: Any) -> dict[str, Any]:
    init_r, target_r, pattern = config.need("init_r"), config.get("target_r", 8), config.get("rank_pattern", {})
    if not isinstance(pattern, dict) or not all(isinstance(flags, list) for flags in pattern.values()):
        raise RefpeftError(f"rank_pattern is {pattern!r}: expected a list of true and false for each module")
    above = isinstance(init_r, int) and isinstance(target_r, int) and target_r > init_r
    return _where(config, model) | {
        "init_r": init_r,
        "target_r": init_r if above else target_r,
        "alpha": config.need("lora_alpha"),
        "dropout": config.get("lora_dropout", 0.0),
        "gamma": config.get("orth_reg_weight", 0.5),
        "tinit": config.get("tinit", 0),
        "tfinal": config.get("tfinal", 0),
        "delta_t": config.get("deltaT", 1),
        "beta1": config.get("beta1", 0.85),
        "beta2": config.get("beta2", 0.85),
        "compat": "official",
        "rank_pattern": {re.escape(name.removesuffix(".lora_E")): sum(map(bool, f)) for name, f in pattern.items()},
    }


ADALORA = Format(
    "ADALORA",
    _triplet_entries,
    _adalora_settings,
    _adalora_options,
    any_value=(
        *_FITTED,
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "megatron_core",
        "qalora_group_size",
        "r",
        "total_step",
    ),
    values=_VALUES | {"bias": ("none",)},
)
