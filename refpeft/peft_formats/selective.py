"""Methods that train chosen numbers of a weight: SHiRA, trainable tokens."""

from __future__ import annotations

from typing import Any

from ..sites import Adapter
from ..targets import matcher
from .common import PREFIX, Entry, Format, Settings, module_names, renamed, targets_of


def _shira_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    """However the places were chosen, PEFT has one word for it, and reads them from the file."""
    return {"r": adapter.cfg.r, "mask_type": "random", "target_modules": module_names(adapter.sites, model)}


SHIRA = Format(
    "SHIRA",
    renamed({"values": "shira_weight", "indices": "shira_indices"}),
    _shira_settings,
    lambda config, model: {"r": config.get("r", 32), "targets": targets_of(config, model)},
    fits=lambda adapter, model: not any(site.transposed for site in adapter.sites),  # which PEFT refuses
    any_value=("fan_in_fan_out", "init_weights", "mask_type", "random_seed", "runtime_config"),  # the file has indices
)


def _token_entries(adapter: Adapter) -> list[Entry]:
    """The rows of a tied head are there a second time."""
    return [
        Entry(f"{PREFIX}{site.name}.trainable_tokens_delta", (f"{site.tied or site.name}.tokens",))
        for site in adapter.sites
    ]


def _token_settings(adapter: Adapter, model: Any) -> dict[str, Any]:
    own = [site for site in adapter.sites if not site.tied]
    return {"token_indices": list(adapter.cfg.token_indices), "target_modules": module_names(own, model)}


def _token_options(config: Settings, model: Any) -> dict[str, Any]:
    """A head that is tied to the embedding goes with it, as in PEFT."""
    wanted = targets_of(config, model) if config.get("target_modules") else ["@embed"]
    targets = [site.name for site in model.sites.values() if any(hits(site) for hits in matcher(wanted).values())]
    targets += [name for name, site in model.sites.items() if site.tied in targets and name not in targets]
    return {"token_indices": config.need("token_indices"), "targets": targets or wanted}


TRAINABLE_TOKENS = Format(
    "TRAINABLE_TOKENS",
    _token_entries,
    _token_settings,
    _token_options,
    any_value=("init_weights",),
)
