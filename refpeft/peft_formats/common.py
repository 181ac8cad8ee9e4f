"""What the formats of PEFT's methods have in common: the tensors of a file, settings, names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backend import Array
from ..errors import RefpeftError
from ..models.encoder_config import PREFIX as WITH_HEAD
from ..sites import Adapter, Site
from ..targets import matcher

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
    means      whether an adapter_config.json of this peft_type means this method, where several share the type
    any_value  keys of adapter_config.json that do not change the function
    values     keys that may, with the values with which they do not
    fitted     whether a file lacks values, which are fitted to the model's weights again; none such is written
    prefix     what stands before the names of a head's tensors
    """

    peft_type: str
    entries: Callable[[Adapter], list[Entry]]
    settings: Callable[[Adapter, Any], dict[str, Any]]
    options: Callable[[Settings, Any], dict[str, Any]]
    fits: Callable[[Adapter, Any], bool] = lambda adapter, model: True
    means: Callable[[dict[str, Any]], bool] = lambda config: True
    any_value: tuple[str, ...] = ()
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    fitted: bool = False
    prefix: str = PREFIX


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


def from_bare(config: dict[str, Any], tensors: dict[str, Array], model: Any) -> dict[str, Array]:
    """The tensors of PEFT's file by refpeft's names: an encoder without a head has modules as in one with a head."""
    start = PREFIX + _before(model)
    if config.get("task_type") != "FEATURE_EXTRACTION" or start == PREFIX:
        return tensors
    inside = {name for name in tensors if name.startswith(PREFIX) and not name.startswith(start)}
    return {start + name.removeprefix(PREFIX) if name in inside else name: array for name, array in tensors.items()}


def for_bare(
    settings: dict[str, Any], tensors: dict[str, Array], model: Any
) -> tuple[dict[str, Any], dict[str, Array]]:
    """(settings, tensors) of a file as PEFT has them where the model has no head: the reverse of `from_bare`."""
    before = _before(model)
    if model.task not in (None, "embed") or not before:
        return settings, tensors
    named = {
        key: [name.removeprefix(before) for name in value] if "modules" in key and isinstance(value, list) else value
        for key, value in settings.items()
    }
    return named, {name.replace(PREFIX + before, PREFIX, 1): array for name, array in tensors.items()}


def _before(model: Any) -> str:
    """What stands before the names of an encoder's modules, but in PEFT's files of a bare one."""
    return WITH_HEAD.get(model.config.family, "") if model.config else ""


def module_names(sites: Iterable[Site], model: Any) -> list[str]:
    """A short list for target_modules that selects just these sites: ends of names where that is possible."""
    names = {site.name for site in sites}
    there = [*model.sites, "pooler.dense"]  # PEFT's bare encoder may have it, and not be meant
    for depth in (1, 2):
        ends = {".".join(name.split(".")[-depth:]) for name in names}
        if {name for name in there if name.endswith(tuple("." + end for end in ends)) or name in ends} == names:
            return sorted(ends)
    return sorted(names)


def present(targets: str | list[str], model: Any) -> str | list[str]:
    """The targets without the names that the model does not have, or its head has, which PEFT ignores silently."""
    if isinstance(targets, str):
        return targets
    offered = [site for site in model.sites.values() if site.name not in model.trained_head]
    return [t for t, hits in matcher(targets).items() if any(map(hits, offered))] or targets


def targets_of(config: Settings, model: Any) -> str | list[str]:
    """What target_modules says."""
    config.need("target_modules")
    return present(config.names("target_modules"), model)


def transposed(name: str, key: str) -> Entry:
    """A tensor that files have transposed."""
    return Entry(name, (key,), lambda array: array.T, lambda array: (array.T,))


def renamed(names: dict[str, str]) -> Callable[[Adapter], list[Entry]]:
    """Entries of a method whose parameters are PEFT's tensors under other names."""

    def entries(adapter: Adapter) -> list[Entry]:
        return [
            Entry(f"{PREFIX}{layer.site.name}.{names[letter]}", (f"{layer.site.name}.{letter}",))
            for layer in adapter.layers
            for letter in layer.values
        ]

    return entries
