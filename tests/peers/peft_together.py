"""PEFT's layers with two adapters, with one that is merged and taken off again, and with several put together."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft_methods import METHODS, put
from torch import nn
from torch_parts import Tensors, parts
from transformers.pytorch_utils import Conv1D

from refpeft.conformance.vectors import Case

PLACES = ("first", "second", "third")


class OneLayer(nn.Module):
    """A model of one layer, called `site`."""

    def __init__(self, site: nn.Module):
        super().__init__()
        self.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


def linear(t: Tensors, conv1d: bool = False) -> nn.Module:
    """The frozen layer, as torch and transformers have it."""
    weight, bias = t["weight"], t.get("bias")
    if conv1d:
        layer = Conv1D(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.to(weight.dtype).load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def config_of(options: dict[str, Any], t: Tensors) -> peft.PeftConfig:
    known = METHODS.get(options["method"])
    if known is None:
        raise NotImplementedError("not in PEFT")
    return known.config(options, ["site"], t)


def filled(adapted: nn.Module, options: dict[str, Any], t: Tensors, place: str, adapter: str) -> Tensors:
    """PEFT's parameters by the case's names, with the case's values."""
    prefix = f"{place}." if place else ""
    parameters, found = dict(adapted.named_parameters(remove_duplicate=False)), {}
    for letter, name in METHODS[options["method"]].names.items():
        if f"{prefix}{letter}" not in t:
            continue
        end = f".{name.replace('default', adapter)}"
        (there,) = {id(p): p for n, p in parameters.items() if n.endswith(end)}.values()
        put(there, t[f"{prefix}{letter}"], f"{prefix}{letter}")
        there.requires_grad_(True)
        found[f"{prefix}{letter}"] = there
    return found


def two(case: Case, t: Tensors) -> Tensors:
    """The second adapter is added to the first's model: of one type as another adapter, else by PEFT's mixed model."""
    options = [case.config[place] for place in PLACES[:2]]
    configs = [config_of(one, t) for one in options]
    mixed = configs[0].peft_type != configs[1].peft_type
    adapted = peft.get_peft_model(OneLayer(linear(t)), configs[0], adapter_name="first", mixed=mixed)
    adapted.add_adapter("second", configs[1])
    adapted.to(t["x"].dtype).eval()
    active = adapted if mixed else adapted.base_model
    active.set_adapter(["first", "second"])
    trained = filled(adapted, options[0], t, "first", "first") | filled(adapted, options[1], t, "second", "second")
    x = t["x"].clone().requires_grad_()
    y = adapted(x)
    y.backward(t["g"])
    answer = {"y": y, "grad.x": x.grad}
    answer |= {f"grad.{name}": p.grad.reshape(t[name].shape) for name, p in trained.items()}
    for place in PLACES[:2]:
        active.set_adapter(place)
        answer[f"alone.{place}"] = adapted(t["x"])
    active.set_adapter(["first", "second"])
    return answer | parts("merged", adapted.merge_and_unload().site, t)


def restored(case: Case, t: Tensors) -> Tensors:
    options = case.config | {"method": case.name}
    adapted = peft.get_peft_model(OneLayer(linear(t, options["conv1d"])), config_of(options, t))
    adapted.to(t["x"].dtype).eval()
    filled(adapted, options, t, "", "default")
    adapted.merge_adapter()
    answer = parts("merged", adapted.base_model.model.site.get_base_layer(), t)
    adapted.unmerge_adapter()
    answer["y"] = adapted(t["x"])
    return answer | parts("restored", adapted.unload().site, t)


def combined(case: Case, t: Tensors) -> Tensors:
    """By add_weighted_adapter; of LoRA with "cat", the exact one of its ways."""
    chosen = {place: case.config[place] for place in PLACES if place in case.config}
    adapted = None
    for place, options in chosen.items():
        config = config_of(options, t)
        if adapted is None:
            adapted = peft.get_peft_model(OneLayer(linear(t)), config, adapter_name=place)
        else:
            adapted.add_adapter(place, config)
    adapted.to(t["x"].dtype).eval()
    for place, options in chosen.items():
        filled(adapted, options, t, place, place)
    exact = {"combination_type": "cat"} if case.name == "lora" else {}
    adapted.add_weighted_adapter(list(chosen), case.config["weights"], "together", **exact)
    adapted.set_adapter("together")
    return {"y": adapted(t["x"])} | parts("merged", adapted.merge_and_unload().site, t)
