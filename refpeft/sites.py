"""Sites: the named places of a model where methods act, and the attaching, detaching and merging of adapters.

A method wraps a site's function in another: `f(x, base, p)`. No module is replaced and no base weight is renamed, so
that several adapters nest on one site and detaching restores the base exactly.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from . import manager
from .backend import Array
from .errors import RefpeftError
from .layers import Layer, Lazy, Near, Part
from .lowrank import Ranked
from .quant import Dense
from .targets import check_patterns, select
from .tensor import Tensor, astype, parameter

_WHOLE = "full"  # the method that trains what a task's head needs


class Site:
    """A place where adapters may act; calling it runs the adapters' functions around the frozen one.

    name    the checkpoint's module path ("model.layers.0.self_attn.q_proj"), or a place beside them ("....mlp_out")
    kind    linear, embedding, norm, attention or block
    shape   linear (out, in), embedding (vocab, dim), norm and block (dim,), attention (kv_heads, head_dim)
    roles   what it does, in words that all models share: q k v o gate up down head embed position norm qk_norm attend
            attn_out mlp_out block_out
    weight  () -> frozen dense array, or None
    bias    frozen array, or None
    tied    the name of the site whose weight this one shares, or None
    transposed  whether the checkpoint has the weight as (in, out), as GPT-2's linear layers do
    runs    how often a forward pass calls it: more than once where layers share their weights (ALBERT)
    result  the dtype of what it gives, or None: that of its input
    """

    def __init__(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        roles: tuple[str, ...],
        base: Callable[..., Tensor],
        weight: Callable[[], Array] | None = None,
        bias: Array | None = None,
        tied: str | None = None,
        transposed: bool = False,
    ):
        self.name, self.kind, self.shape, self.roles = name, kind, shape, roles
        self.base, self.weight, self.bias, self.tied, self.transposed = base, weight, bias, tied, transposed
        self.runs = 1
        self.result: np.dtype | None = None
        self.layers: list[Layer] = []
        self._call = base

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        y = self.as_computed(*args, **keywords)
        return y if self.result is None else astype(y, self.result)

    def as_computed(self, *args: Any, **keywords: Any) -> Tensor:
        """The same, in the dtype of its input, where `result` is another one."""
        return self._call(*args, **keywords)

    def __repr__(self) -> str:
        return f"<{self.kind} site {self.name} {self.shape}>"

    @property
    def quantized(self) -> bool:
        """Whether its frozen weight is kept quantized, or will be where a run is only planned."""
        return getattr(self.weight, "quantized", False)

    @property
    def index(self) -> int | None:
        """The number of the layer that this site is in, or None."""
        return int(self.home.rpartition(".")[2]) if self.home else None

    @property
    def home(self) -> str:
        """The name of the layer that this site is in, such as "model.layers.0"; empty elsewhere."""
        parts = self.name.split(".")
        return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")

    def compose(self) -> None:
        """Makes calls go through `layers`, the last outermost."""
        self._call = self.base
        for layer in self.layers:
            self._call = layer.around(self._call)


@dataclass
class Adapter:
    """A method attached to a model: what it trains and what it keeps constant, by name, and where."""

    name: str
    positions: int = 0
    parts: list[Part] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    settled: bool = False  # whether the values that data decide (peft_survey) are there
    read_by_head: bool = False  # whether a head that reads the first position reads the first row before the text

    @property
    def plugin(self) -> ModuleType:
        return self.parts[0].plugin

    @property
    def cfg(self) -> Any:
        return self.parts[0].cfg

    @property
    def sites(self) -> list[Site]:
        """The sites that the method itself acts on; of a recipe those of its methods."""
        own = self.parts[0]
        return [layer.site for layer in self.layers if layer.part is own or own.is_recipe]

    def kind(self, value: Tensor) -> dict[str, Tensor]:
        """Where a value belongs: among those that are trained, or the constants."""
        return self.constants if value.node is None else self.params

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(t.data.size for t in self.params.values())


# ---- attaching -------------------------------------------------------------------------------------------------------


def attach(model: Any, method: str | ModuleType, config: Any = None, *, seed: int = 0) -> Adapter:
    """Puts a method on a model and returns its Adapter; base weights stay as they are, but for `peft_base`.

    `method` is a plugin's name, file or module; `config` its Config, or a dict of options that are not the defaults.
    Raises RefpeftError for an unknown method or option, and for targets that match nothing.
    """
    adapter = prepare(model, method, config, seed=seed)
    put_on(model, adapter)
    return adapter


def prepare(model: Any, method: str | ModuleType, config: Any = None, *, seed: int = 0, fit: bool = True) -> Adapter:
    """What `attach` returns, not yet on the model; without `fit` its values are not fitted to the model's weights."""
    from .config import plugin_options

    plugin = method if isinstance(method, ModuleType) else manager.load(method)
    cfg = plugin_options(plugin, config or {}) if config is None or isinstance(config, dict) else config
    part = Part(plugin, cfg)
    if not hasattr(cfg, "targets") and not part.is_recipe:
        raise RefpeftError(
            f"plugin '{part.name}' needs a dataclass Config with a field 'targets', the sites it acts on"
        )
    taken = {adapter.name for adapter in model.adapters}
    numbered = (f"{part.name}{number}" for number in itertools.count(2))
    name = part.name if part.name not in taken else next(other for other in numbered if other not in taken)
    adapter = Adapter(name)
    waiting = [part]
    while waiting:
        part = waiting.pop(0)
        adapter.parts.append(part)
        chosen = _add_part(model, adapter, part, seed, fit)
        adapter.positions += part.call("peft_positions") or 0
        adapter.read_by_head |= _read_by_head(model, part)
        companions = dict(part.call("peft_companions", sites=chosen) or {})
        if not waiting and (head := _head_to_train(model, adapter)):
            companions[_WHOLE] = {"targets": [*companions.get(_WHOLE, {}).get("targets", ()), *head]}
        for companion, options in companions.items():
            other = manager.load(companion)
            waiting.append(Part(other, plugin_options(other, options)))
    if not adapter.params:
        raise RefpeftError(f"method '{name}' trains nothing on this model: no matched site has what it changes")
    return adapter


def _read_by_head(model: Any, part: Part) -> bool:
    """Whether a prompt's `head_reads` says so. Raises RefpeftError for a model with another head, or none."""
    chosen = getattr(part.cfg, "head_reads", "text") == "prompt"
    if chosen and model.read != "first":
        raise RefpeftError(f"{part.name}.head_reads = 'prompt' is for encoders that classify texts: leave it out")
    return chosen


def _head_to_train(model: Any, adapter: Adapter) -> list[str]:
    """The sites of the task's head that nothing trains in full: they come with the first adapter (modules_to_save)."""
    layers = [layer for one in (*model.adapters, adapter) for layer in one.layers]
    there = {layer.site.name for layer in layers if layer.part.name == _WHOLE}
    return [name for name in model.trained_head if name not in there]


def put_on(model: Any, adapter: Adapter) -> None:
    """Puts an adapter that `prepare` made on its model, with the frozen weights that its values ask for."""
    if not model.weightless:
        for layer in adapter.layers:
            layer.frozen = _changed_base(model, layer)
    put_back(model, adapter)


def put_back(model: Any, adapter: Adapter) -> None:
    """Puts an adapter on its model whose layers have the frozen weights that they ask for already."""
    for layer in adapter.layers:
        layer.put_on(model)
    model.adapters.append(adapter)


def _has_hook(plugin: ModuleType) -> Callable[[Site], bool]:
    return lambda site: manager.hook(plugin, f"peft_{site.kind}") is not None


def _add_part(model: Any, adapter: Adapter, part: Part, seed: int, fit: bool) -> list[Site]:
    """Chooses the sites of `part` and makes its values; the layers are not yet on the sites. Returns the sites it has.

    A recipe has none of its own, and is given all of the model's.
    """
    if part.is_recipe:
        part.sites = list(model.sites.values())
        part.call("peft_check", fit=fit)
        return part.sites
    offered = [site for site in model.sites.values() if part.name == _WHOLE or site.name not in model.trained_head]
    part.sites = select(offered, part.cfg, _has_hook(part.plugin))
    check_patterns(part.name, part.cfg, part.sites)
    if isinstance(part.cfg, Ranked):
        part.cfg.check_sites(part.name, part.sites)
    part.call("peft_check", fit=fit)
    made: list[Site] = []
    shared = part.call("peft_shared", rng=model.stream(seed, "init", adapter.name, "shared")) or {}
    for key, first in shared.items():
        tensor = _value(model, first)
        setattr(part.shared, key, tensor)
        if adapter.kind(tensor).setdefault(f"shared.{key}", tensor) is not tensor:
            raise RefpeftError(f"two parts of method '{adapter.name}' share a value called {key!r}")
    references: list[tuple[Layer, str, str]] = []
    beside = neighbours(model)
    for site in part.sites:
        have = {
            "site": site,
            "rng": model.stream(seed, "init", adapter.name, site.name),
            "weight": Lazy(lambda site=site: site.weight() if site.weight else None),
        }
        near = beside[site.home]
        first = part.call("peft_params", bias=site.bias, near=near, **have)
        if first is None:
            continue
        made.append(site)
        values = {k: _value(model, v) for k, v in first.items() if not isinstance(v, str)}
        for key, value in values.items():
            if adapter.kind(value).setdefault(f"{site.name}.{key}", value) is not value:
                raise RefpeftError(f"two parts of method '{adapter.name}' train {key!r} at {site.name}")
        if fit and not model.weightless:
            more = {
                "tokenizer": model.tokenizer,
                "original": _original(model, site),
                "requantize": Lazy(lambda site=site: _requantize(site)),
            }
            for key, array in (part.call("peft_fit", **have, **more) or {}).items():
                values[key].data[...] = model.place(array)  # in the layout that a file's values have: equal bits
        layer = Layer(part, site, values, model.mode, adapter.name, near)
        adapter.layers.append(layer)
        references += [(layer, key, v) for key, v in first.items() if isinstance(v, str)]
    for layer, key, other in references:
        if other not in adapter.params:
            raise RefpeftError(f"plugin '{part.name}': {layer.site.name}.{key} refers to {other}, which is not trained")
        layer.values[key] = adapter.params[other]
        setattr(layer.p, key, adapter.params[other])
    return made


def neighbours(model: Any) -> dict[str, Near]:
    """The sites of each layer of the model, by the layer's name."""
    homes: dict[str, list[Site]] = {}
    for site in model.sites.values():
        homes.setdefault(site.home, []).append(site)
    return {home: Near(sites) for home, sites in homes.items()}


def _value(model: Any, first: Any) -> Tensor:
    """A first value where the model computes: trained, or the constant that a Tensor says it is, also of integers."""
    if isinstance(first, Tensor):
        return Tensor(model.place(first.data, first.data.dtype if first.data.dtype.kind == "i" else None))
    return parameter(model.place(first))


def _original(model: Any, site: Site) -> Lazy:
    return Lazy(lambda: model.original(site))


def _requantize(site: Site) -> Callable[[Array], Any]:
    return partial(site.weight.like, name=f"{site.name}.weight")


def _changed_base(model: Any, layer: Layer) -> Any:
    """The frozen weight that the plugin's `peft_base` asks for; None where it leaves that of the site.

    Raises RefpeftError where something else relies on that weight: what is attached already, or a tied layer.
    """
    site, name = layer.site, layer.part.name
    dense = layer.part.call("peft_base", site=site, p=layer.arrays, original=_original(model, site))
    if dense is None:
        return None
    what = f"method '{name}' changes the frozen weight of {site.name}"
    if site.layers:
        others = ", ".join(other.part.name for other in site.layers)
        raise RefpeftError(f"{what}, which {others} is on already: attach {name} before any other there")
    tied = [other.name for other in model.sites.values() if site.name == other.tied or other.name == site.tied]
    if tied:
        raise RefpeftError(f"{what}, which is that of {tied[0]} too: leave it out of the targets")
    return _requantize(site)(dense)


def detach(model: Any, adapter: Adapter | None = None) -> None:
    """Takes one adapter, or all, off the model, which then computes exactly what it did before."""
    gone = list(model.adapters) if adapter is None else [adapter]
    for one in gone:
        if one not in model.adapters:
            raise RefpeftError(f"adapter '{one.name}' is not attached to this model")
        model.adapters.remove(one)
        for layer in one.layers:
            layer.take_off(model)


@contextlib.contextmanager
def bypassed(model: Any) -> Iterator[None]:
    """Within it the model computes without what is attached to it."""
    attached = list(model.adapters)
    detach(model)
    try:
        yield
    finally:
        for adapter in attached:
            put_back(model, adapter)


@dataclass
class Merged:
    """The way back from `merge`: what it replaced and took off. Nothing is subtracted, so `undo` is exact.

    While this is kept, the replaced weights stay in memory beside the merged ones.
    """

    model: Any
    adapters: list[Adapter]
    frozen: dict[str, Any]  # of the model, before and after
    merged: dict[str, Any]
    sites: dict[str, tuple[Any, Array | None, str | None]]  # their weight, bias and `tied` before

    def undo(self) -> None:
        """Gives the model its weights back, bit for bit, quantized ones too, and attaches the adapters again.

        Raises RefpeftError where the model is no longer what `merge` left, as when it has another adapter.
        """
        now = self.model.frozen
        changed = now.keys() != self.merged.keys() or any(now[name] is not one for name, one in self.merged.items())
        if changed or self.model.adapters:
            raise RefpeftError("the model changed after this merge: detach adapters and undo merges that came later")
        for name, (weight, bias, tied) in self.sites.items():
            site = self.model.sites[name]
            site.weight, site.bias, site.tied = weight, bias, tied
        self.model.frozen = dict(self.frozen)
        for adapter in self.adapters:
            put_back(self.model, adapter)


def merge(model: Any) -> Merged:
    """Folds every attached adapter into the model's weights, which become dense, and detaches them.

    merge(model).undo() is the way back. Raises RefpeftError, and changes nothing, where a method has no merged form.
    """
    if not model.adapters:
        raise RefpeftError("there is no adapter to merge")
    merged: dict[str, dict[str, Array]] = {}
    for site in model.sites.values():
        now = {"weight": site.weight() if site.weight else None, "bias": site.bias}
        # What stands in for a frozen part reaches the frozen layer through all the others, so it comes first.
        for layer in sorted(site.layers, key=lambda layer: not layer.stands_in):
            now = layer.merged(**now)
        if site.layers:
            merged[site.name] = now
    adapters = list(model.adapters)
    detach(model)  # which gives weights back that peft_base had changed
    frozen = dict(model.frozen)
    before = {name: (site.weight, site.bias, site.tied) for name, site in model.sites.items()}
    for name, now in merged.items():
        site = model.sites[name]
        site.weight, site.bias = Dense(now["weight"], model.dtype), now["bias"]
        parts = {part: Dense(array, model.dtype) for part, array in now.items() if array is not None}
        model.frozen |= {f"{name}.{part}": frozen for part, frozen in parts.items()}
    for site in (site for site in model.sites.values() if site.tied):
        name, other = f"{site.name}.weight", model.sites[site.tied].weight
        if bool((site.weight() == other()).all()):
            site.weight = other
            model.frozen.pop(name, None)
        else:  # the two are no longer one
            site.tied = None
            model.frozen[name] = site.weight
    return Merged(model, adapters, frozen, dict(model.frozen), before)
