"""Methods whose matrices have a structure: rotations, reflections, circulants, blocks, few numbers."""

from __future__ import annotations

from typing import Any

from ..sites import Adapter
from .common import PREFIX, Entry, Format, Settings, module_names, present, targets_of

_ANY_VALUE = ("fan_in_fan_out", "init_weights", "runtime_config")
_VALUES = {"layers_pattern": ("layers", "h"), "bias": ("none",)}


def _settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    """What all of them have."""
    return {"target_modules": module_names(adapter.sites, model)}


def _transposed(adapter: Adapter) -> dict[str, Any]:
    return {"fan_in_fan_out": any(site.transposed for site in adapter.sites)}


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
    return (
        _settings(adapter, model)
        | _transposed(adapter)
        | {
            "r": 0,
            "oft_block_size": cfg.block_size,
            "block_share": cfg.block_share,
            "use_cayley_neumann": cfg.cayley == "neumann",
            "num_cayley_neumann_terms": cfg.terms,
        }
    )


def _oft_options(config: Settings, model: Any) -> dict[str, Any]:
    return _options(config, model) | {
        "block_size": config.need("oft_block_size"),
        "block_share": config.get("block_share", False),
        "cayley": "neumann" if config.get("use_cayley_neumann", False) else "exact",
        "terms": max(config.get("num_cayley_neumann_terms", 5), 4),  # PEFT computes the same for 3 as for 4
    }


OFT = Format(
    "OFT", _oft_entries, _oft_settings, _oft_options, any_value=(*_ANY_VALUE, "eps", "module_dropout"), values=_VALUES
)
