"""Other low-rank methods."""

from __future__ import annotations

from typing import Any

from ..sites import Adapter
from .common import Entry, Format, Settings, module_names, present, renamed, targets_of

_FITTED = ("init_weights", "runtime_config")  # how first values were made, which is over
_VALUES = {"layers_pattern": ("layers", "h")}


def _options(config: Settings, model: Any) -> dict[str, Any]:
    """What all have."""
    layers = config.get("layers_to_transform")
    return {
        "r": config.need("r"),
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
