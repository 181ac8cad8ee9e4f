"""Methods whose matrices have a structure: rotations, reflections, circulants, blocks, few numbers."""

from __future__ import annotations

from typing import Any

from ..sites import Adapter
from .common import PREFIX, Entry, Format, Settings, module_names, present, renamed, targets_of

_ANY_VALUE = ("fan_in_fan_out", "init_weights", "runtime_config")
_VALUES = {"layers_pattern": ("layers", "h"), "bias": ("none",)}


def _settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    """What all of them have."""
    return {"target_modules": module_names(adapter.sites, model)}


def _linear_only(adapter: Adapter, model: Any) -> bool:
    """Whether PEFT has the method at all of the sites: many of its classes refuse GPT-2's Conv1D."""
    return not any(site.transposed for site in adapter.sites)


def _options(config: Settings, model: Any) -> dict[str, Any]:
    layers = config.get("layers_to_transform")
    return {
        "targets": targets_of(config, model),
        "exclude": present(config.names("exclude_modules"), model),
        "layers": [layers] if isinstance(layers, int) else layers,
    }


# ---- OFT -------------------------------------------------------------------------------------------------------------


def _oft_entries(adapter: Adapter) -> list[Entry]:
    """PEFT's exact form is the rotation by -S, its series the one by S."""
    sign = 1 if adapter.cfg.cayley == "neumann" else -1

    def turned(array: Any) -> Any:
        return sign * array

    return [
        Entry(f"{PREFIX}{site.name}.oft_R.weight", (f"{site.name}.S",), turned, lambda array: (turned(array),))
        for site in adapter.sites
    ]


def _oft_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    cfg = adapter.cfg
    return _settings(adapter, model) | {
        "r": 0,
        "oft_block_size": cfg.block_size,
        "block_share": cfg.block_share,
        "use_cayley_neumann": cfg.cayley == "neumann",
        "num_cayley_neumann_terms": cfg.terms,
    }


def _oft_options(config: Settings, model: Any) -> dict[str, Any]:
    return _options(config, model) | {
        "block_size": config.need("oft_block_size"),
        "block_share": config.get("block_share", False),
        "cayley": "neumann" if config.get("use_cayley_neumann", False) else "exact",
        "terms": max(config.get("num_cayley_neumann_terms", 5), 4),  # PEFT computes the same for 3 as for 4
    }


OFT = Format(
    "OFT",
    _oft_entries,
    _oft_settings,
    _oft_options,
    fits=_linear_only,
    any_value=(*_ANY_VALUE, "eps", "module_dropout"),
    values=_VALUES,
)


# ---- BOFT ------------------------------------------------------------------------------------------------------------


def _boft_entries(adapter: Adapter) -> list[Entry]:
    def entries(name: str) -> list[Entry]:
        column = lambda array: array.reshape(-1, 1)  # noqa: E731
        start = f"{PREFIX}{name}."
        return [
            Entry(f"{start}boft_R", (f"{name}.A",)),
            Entry(f"{start}boft_s", (f"{name}.s",), column, lambda array: (array.reshape(-1),)),
        ]

    return [entry for site in adapter.sites for entry in entries(site.name)]


BOFT = Format(
    "BOFT",
    _boft_entries,
    lambda adapter, model: (
        _settings(adapter, model)
        | {"boft_block_size": adapter.cfg.block_size, "boft_n_butterfly_factor": adapter.cfg.butterfly_factors}
    ),
    lambda config, model: (
        _options(config, model)
        | {
            "block_size": config.need("boft_block_size"),
            "butterfly_factors": config.get("boft_n_butterfly_factor", 1),
        }
    ),
    fits=_linear_only,
    any_value=(*_ANY_VALUE, "boft_dropout"),
    values=_VALUES,
)


# ---- HRA -------------------------------------------------------------------------------------------------------------

HRA = Format(
    "HRA",
    renamed({"U": "hra_u"}),
    lambda adapter, model: _settings(adapter, model) | {"r": adapter.cfg.r},
    lambda config, model: _options(config, model) | {"r": config.need("r")},
    fits=_linear_only,
    any_value=_ANY_VALUE,
    values=_VALUES,
)
