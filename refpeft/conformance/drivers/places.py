"""Methods at one place, the only site of a model: cases of the kind `method`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import fused, learning
from refpeft.adapters import CONFIG, TENSORS
from refpeft.backend import Array
from refpeft.files import write_json, write_safetensors
from refpeft.models.base import Frozen, Model
from refpeft.sites import Adapter, Site, attach, merge, prepare, put_on
from refpeft.tensor import Tensor, parameter

from ..vectors import Arrays, Case
from .drawn import as_drawn
from .models import as_in_file, frozen, hidden_of, kept, made
from .operations import gradients, placed

_OF_NORMS = ("norm", "eps")
"""Members of a norm's config that are the place's, not the method's."""

_OF_DIRECTORIES = {"adapters", "sources"}
"""Options that name directories with values of other adapters."""

_INPUTS = ("x", "q", "k", "v")
"""Inputs of a place that have a gradient."""


def attached(model: Model, method: str, options: dict[str, Any]) -> Adapter:
    """The method on the model; a case has what comes from directories, and the base that LoftQ's values are for."""
    adapter = prepare(model, method, options, fit=not _OF_DIRECTORIES & options.keys() and method != "loftq")
    put_on(model, adapter)
    return adapter


def set_values(adapter: Adapter, model: Model, given: Arrays) -> None:
    """Values as the case gives them; what stands in for a weight of a file has the file's layout there."""
    for name, tensor in (adapter.params | adapter.constants).items():
        if name in given:
            tensor.data[...] = model.place(as_in_file(model, name, given[name]), tensor.dtype)


def at_site(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """A case's options of a method, at the only place, which is called `site`."""
    options = options | {"targets": ("site",)}
    if method == "ia3":
        options["feedforward"] = ("site",) if options["feedforward"] else ()
    return options


def weights_of(given: Arrays) -> Arrays:
    """The frozen tensors of the place by their names in the model."""
    return {f"site.{name}": given[name] for name in ("weight", "bias") if name in given}


def merged_at(site: Site) -> dict[str, Array]:
    """The weight, as a file has it, and the bias of a place after merging."""
    weight = site.weight()
    return {"merged.weight": weight.T if site.transposed else weight, "merged.bias": site.bias}


def run_place(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    options = at_site(case.name, case.config)
    if case.at == "norm":
        options = {name: value for name, value in options.items() if name not in _OF_NORMS}
    weights = kept(frozen(weights_of(given), dtype, xp), options, dtype)
    if "base" in case.checks:
        return _first_values(case, options, weights, given, dtype, xp)
    model = made(weights, dtype, xp)
    site, arrays = _site(case, model, given), placed(given, xp)
    if "sources" in given:
        return _prompt_of_others(case, options, model, given)
    adapter = attached(model, case.name, options)
    values = {name if name in given else name.removeprefix("site."): t for name, t in adapter.params.items()}
    constants = {name.removeprefix("site.").removeprefix("shared."): t for name, t in adapter.constants.items()}
    for name, tensor in (constants | values).items():
        if name in values or name in given:  # other constants are made of the weight
            tensor.data[...] = arrays[name]
    leaves = {name: parameter(hidden_of(given[name], model)) for name in _INPUTS if name in given}
    inputs = list(leaves.values()) or [arrays["ids"]]
    keywords = {"mask": fused.Mask(given["q"].shape[2])} if case.at == "attention" else {}
    with as_drawn(model, given):
        answer = gradients(site(*inputs, **keywords), hidden_of(given["g"], model), leaves | values)
    if "penalty" in case.checks:
        answer |= _penalty(model, values)
    if any(name.startswith("merged.") for name in case.checks):
        merge(model)
        answer |= merged_at(site)
    return answer


def _site(case: Case, model: Model, given: Arrays) -> Site:
    """The place, made on a model that has nothing else."""
    has_bias = "bias" in given
    if case.at in ("linear", "conv1d"):
        return model.linear("site", "q", bias=has_bias, transposed=case.at == "conv1d")
    if case.at == "embedding":
        return model.embedding("site", "embed")
    if case.at == "norm":
        return model.norm("site", case.config["eps"], "norm", bias=has_bias)
    if case.at == "attention":
        shape = given["k"].shape[1], given["k"].shape[3]
        return model.place_of("site", "attention", shape, "attend", fused.attention)
    if case.at == "block":
        weight = model.place(given["weight"])
        return model.place_of("site", "block", (weight.shape[1],), "mlp_out", _linear_block(weight))
    raise NotImplementedError(f"refpeft has no place {case.at!r}")


def _linear_block(weight: Array) -> Callable[[Tensor], Tensor]:
    return lambda x: fused.frozen_linear(x, weight=lambda: weight)


def _penalty(model: Model, values: dict[str, Tensor]) -> dict[str, Array]:
    for tensor in values.values():
        tensor.node.grad = None
    (penalty,) = learning.penalties(model)
    penalty.backward()
    return {"penalty": penalty.data} | {f"penalty.grad.{name}": tensor.grad for name, tensor in values.items()}


def _first_values(
    case: Case, options: dict[str, Any], weights: Callable[..., Frozen], given: Arrays, dtype: str, xp: ModuleType
) -> Arrays:
    """The frozen weight and the update of first values, and what they compute together."""
    model = made(weights, dtype, xp)
    site = model.linear("site", "q")
    (layer,) = attach(model, case.name, options).layers
    update = layer.merged(xp.zeros_like(site.weight()), None)["weight"]
    return {"base": site.weight(), "update": update, "y": site(Tensor(hidden_of(given["x"], model))).data}


# ---- prompts of other tasks, which methods read from files -----------------------------------------------------------


def _prompt_of_others(case: Case, options: dict[str, Any], model: Model, given: Arrays) -> Arrays:
    """A prompt that starts from those of other tasks."""
    with tempfile.TemporaryDirectory() as folder:
        names = [_write_prompt(Path(folder) / str(number), rows) for number, rows in enumerate(given["sources"])]
        options |= {"sources": names}
        if "task" in given:
            options |= {"task": _write_prompt(Path(folder) / "task", given["task"])}
        adapter = attach(model, case.name, options)
    y = model.sites["site"](model.xp.asarray(given["ids"]))
    return {"prompt": adapter.params["site.prompt"].data, "y": y.data}


def _write_prompt(directory: Path, rows: np.ndarray) -> str:
    """An adapter of PEFT's prompt tuning with these rows (tokens, dim), in float32; gives its directory."""
    directory.mkdir()
    write_safetensors(directory / TENSORS, {"prompt_embeddings": rows.astype("f4")})
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(rows), "token_dim": rows.shape[1]}
    write_json(directory / CONFIG, settings)
    return str(directory)
