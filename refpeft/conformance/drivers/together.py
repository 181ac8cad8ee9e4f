"""Adapters on one linear layer: two that nest, one that is merged and taken off again, several with weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from refpeft.models.base import Model
from refpeft.sites import Adapter, Site, detach, merge, put_on
from refpeft.tensor import Tensor, parameter

from ..vectors import Arrays, Case
from .models import frozen, hidden_of, made
from .operations import gradients
from .places import at_site, attached, merged_at, weights_of

_PLACES = ("first", "second", "third")


def run_two(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    model, site = _layer(given, dtype, xp)
    first, second = (_attached(model, case.config[place], given, place) for place in _PLACES[:2])
    leaves = {"x": parameter(hidden_of(given["x"], model))}
    leaves |= {f"first.{letter}": tensor for letter, tensor in _values(first).items()}
    leaves |= {f"second.{letter}": tensor for letter, tensor in _values(second).items()}
    answer = gradients(site(leaves["x"]), hidden_of(given["g"], model), leaves)
    merging = merge(model)
    answer |= merged_at(site)
    merging.undo()
    x = Tensor(leaves["x"].data)
    detach(model, second)
    answer["alone.first"] = site(x).data
    detach(model, first)
    put_on(model, second)
    return answer | {"alone.second": site(x).data}


def run_restored(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    transposed = case.config["conv1d"]
    options = {name: value for name, value in case.config.items() if name != "conv1d"} | {"method": case.name}
    model, site = _layer(given, dtype, xp, transposed)
    adapter = _attached(model, options, given)
    merging = merge(model)
    answer = merged_at(site)
    merging.undo()
    answer["y"] = site(Tensor(hidden_of(given["x"], model))).data
    detach(model, adapter)
    weight = site.weight()
    return answer | {"restored.weight": weight.T if transposed else weight, "restored.bias": site.bias}


def run_combined(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    """What adds something to the layer is attached once for each adapter, with its scale times the weight."""
    model, site = _layer(given, dtype, xp)
    chosen = [(place, weight) for place, weight in zip(_PLACES, case.config["weights"], strict=False)]
    if case.name == "ia3":
        gain = sum(weight * given[f"{place}.gain"] for place, weight in chosen)
        _attached(model, case.config["first"], {"gain": gain})
    else:
        scale = {"lora": "alpha", "parallel": "scale"}[case.name]
        for place, weight in chosen:
            options = case.config[place]
            _attached(model, options | {scale: weight * options[scale]}, given, place)
    y = site(Tensor(hidden_of(given["x"], model))).data
    if "merged.weight" not in case.checks:
        return {"y": y}
    merge(model)
    return {"y": y} | merged_at(site)


def _layer(given: Arrays, dtype: str, xp: ModuleType, transposed: bool = False) -> tuple[Model, Site]:
    model = made(frozen(weights_of(given), dtype, xp), dtype, xp)
    return model, model.linear("site", "q", bias="bias" in given, transposed=transposed)


def _attached(model: Model, options: dict[str, Any], given: Arrays, place: str = "") -> Adapter:
    """The method of `options` on the layer, with the values that the case has for `place`."""
    method = options["method"]
    options = {name: value for name, value in options.items() if name != "method"}
    adapter = attached(model, method, at_site(method, options))
    for letter, tensor in _values(adapter).items():
        tensor.data[...] = model.place(given[f"{place}.{letter}" if place else letter])
    return adapter


def _values(adapter: Adapter) -> dict[str, Tensor]:
    return {name.removeprefix("site."): tensor for name, tensor in adapter.params.items()}
