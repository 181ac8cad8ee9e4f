"""Methods: cases of the kind `method`, in models, around steps, and objectives. Those at one place: see `places`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import numpy as np

from refpeft import fused, learning, manager, ops
from refpeft.config import plugin_options
from refpeft.layers import Part
from refpeft.models.base import Model
from refpeft.optim import SGD, AdamW, Flat
from refpeft.sites import Adapter
from refpeft.tensor import parameter

from ..vectors import Arrays, Case
from .drawn import as_drawn
from .files import run_load, run_save
from .models import as_in_file, batch_of, frozen, gradients_of, logits_of, made, model_of
from .operations import placed
from .places import attached, run_place, set_values
from .together import run_combined, run_restored, run_two


def run_method(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    if case.name not in manager.find():
        raise NotImplementedError(f"refpeft has no method {case.name!r}")
    return _ELSEWHERE.get(case.at, run_place)(case, given, dtype, xp)


def _in_model(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> tuple[Model, Adapter]:
    """The case's model with the method on it, and its values as the case gives them."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in case.config.items()}
    options.pop("optimizer", None)
    model = model_of(options.pop("model"), given, dtype, xp, options)
    adapter = attached(model, case.name, options)
    set_values(adapter, model, given)
    return model, adapter


def _run_in_model(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    model, adapter = _in_model(case, given, dtype, xp)
    loss = model.loss(batch_of(given))
    loss.backward()
    return {"logits": logits_of(model, given), "loss": loss.data, **gradients_of(adapter, model)}


def _train(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    model, adapter = _in_model(case, given, dtype, xp)
    train = case.config["optimizer"]
    flat = Flat(adapter.params.items(), learning.rates(model))
    optimizer = AdamW(flat, tuple(train["betas"]), train["eps"], train["weight_decay"])
    batch, losses = batch_of(given), []
    with as_drawn(model, given):
        for _ in range(train["steps"]):
            loss = learning.objective(model, batch, batch.supervised)
            loss.backward()
            optimizer.step(train["lr"])
            losses.append(loss.data)
    after = {f"after.{name}": as_in_file(model, name, tensor.data) for name, tensor in adapter.params.items()}
    return {"losses": xp.stack(losses), **after}


def _run_objective(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    """What a method minimises, from the logits of several passes: the inputs of single letters."""
    plugin, arrays = manager.load(case.name), placed(given, xp)
    part = Part(plugin, plugin_options(plugin, case.config))
    targets = arrays["targets"]
    leaves = {name: parameter(array) for name, array in arrays.items() if len(name) == 1}
    loss = part.call(
        "peft_objective",
        logits=partial(next, iter(leaves.values())),
        loss=lambda logits: fused.cross_entropy(logits, targets=targets, denominator=len(targets)),
        mean=ops.mean,
    )
    loss.backward()
    return {"loss": loss.data} | {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}


def _run_steps(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    """What a method does around steps of plain gradient descent, at two sites, with gradients that are given."""
    options, arrays = dict(case.config), placed(given, xp)
    total, lr = options.pop("steps"), options.pop("lr")
    shapes = {site: (len(given[f"{site}.P"]), given[f"{site}.Q"].shape[1]) for site in "ab"}
    zeros = {f"{site}.weight": np.zeros(shape, dtype) for site, shape in shapes.items()}
    model = made(frozen(zeros, dtype, xp), dtype, xp)
    for site in shapes:
        model.linear(site, "q", bias=False)
    adapter = attached(model, case.name, options | {"targets": ("a", "b")})
    set_values(adapter, model, given)
    learning.states(model)
    optimizer = SGD(Flat(adapter.params.items()), momentum=0.0)
    trace = {f"E.{site}": [] for site in shapes}
    for number in range(total):
        for name, tensor in adapter.params.items():
            tensor.grad[...] = arrays[f"grad.{name}"][number]
        learning.step(model, partial(optimizer.step, lr), number, total)
        for site in shapes:
            trace[f"E.{site}"].append(adapter.params[f"{site}.E"].data.copy())
    after = {f"after.{name}": tensor.data for name, tensor in adapter.params.items()}
    return {name: xp.stack(values) for name, values in trace.items()} | after


_ELSEWHERE: dict[str, Callable[[Case, Arrays, str, ModuleType], Arrays]] = {
    "model": _run_in_model,
    "train": _train,
    "steps": _run_steps,
    "objective": _run_objective,
    "two": run_two,
    "restored": run_restored,
    "combined": run_combined,
    "load": run_load,
    "save": run_save,
}
"""Where a method acts, by the case's `at`, if not at a single place."""
