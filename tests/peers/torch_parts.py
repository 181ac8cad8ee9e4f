"""What peers on torch share: where a case's tensors lie in their parameters, gradients, and steps of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from refpeft.conformance.vectors import Arrays

Tensors = dict[str, torch.Tensor]


def tensors(given: Arrays) -> Tensors:
    """A case's inputs; integers as int64, as torch wants them."""
    found = {name: torch.from_numpy(np.array(array)) for name, array in given.items()}
    return {name: t if t.is_floating_point() else t.long() for name, t in found.items()}


def dtype_of(t: Tensors) -> torch.dtype:
    """What a case is computed in."""
    return next(tensor.dtype for tensor in t.values() if tensor.is_floating_point())


def has_avx512() -> bool:
    """Whether bitsandbytes takes its kernels for AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def arrays(found: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.detach().contiguous().numpy() for name, tensor in found.items()}


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a case lies. `view` gives a view of a tensor that is like `parameter`, in the case's layout.

    A view with one more axis, in front, is of copies: a parameter that stands there several times.
    """

    parameter: torch.Tensor
    view: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    def fill(self, value: torch.Tensor) -> None:
        there = self.view(self.parameter.data)
        if there.shape[there.ndim - value.ndim :] != value.shape:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} does not fit in one of {tuple(there.shape)}")
        there.copy_(value)

    def value(self, like: torch.Tensor) -> torch.Tensor:
        there = self.view(self.parameter.data)
        if there.ndim > like.ndim:
            raise NotImplementedError("it has several parameters in place of one, which training takes apart")
        return there

    def grad(self, like: torch.Tensor) -> torch.Tensor:
        if self.parameter.grad is None:
            return torch.zeros_like(like)
        there = self.view(self.parameter.grad)
        return there.sum(0) if there.ndim > like.ndim else there


class Kept(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, keep: torch.Tensor, rate: float):
        super().__init__()
        self.keep, self.rate = keep, rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep / (1 - self.rate)


def at_one_place(t: Tensors, slots: dict[str, Slot], inputs: str, call: Callable[..., torch.Tensor]) -> Tensors:
    """y of `call(inputs)`, and the gradients of float inputs and of what the slots hold."""
    leaves = {name: t[name].clone() for name in inputs.split()}
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    y = call(*leaves.values())
    y.backward(t["g"])
    found = {"y": y} | {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found | {f"grad.{name}": slot.grad(t[name]) for name, slot in slots.items()}


def parts(kind: str, layer: nn.Module, t: Tensors) -> Tensors:
    """The weight and the bias, where the case has one, as they are now."""
    return {f"{kind}.{name}": layer.get_parameter(name).clone() for name in ("weight", "bias") if name in t}


def loss_of(logits: torch.Tensor, t: Tensors) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), t["targets"].flatten(), ignore_index=-100)


def on_model(t: Tensors, slots: dict[str, Slot], logits: Callable[[], torch.Tensor]) -> Tensors:
    """Logits, loss, and the gradients of what the slots hold."""
    said = logits()
    loss = loss_of(said, t)
    loss.backward()
    real = t["segments"].unsqueeze(-1) >= 0 if "segments" in t else 1
    return {"logits": said * real, "loss": loss} | {f"grad.{n}": slot.grad(t[n]) for n, slot in slots.items()}


def trained(t: Tensors, slots: dict[str, Slot], logits: Callable[[], torch.Tensor], options: dict) -> Tensors:
    """The losses before steps of torch's AdamW, and what the slots hold after them."""
    for name, slot in slots.items():
        slot.value(t[name])  # refuses copies
    parameters = list({id(slot.parameter): slot.parameter for slot in slots.values()}.values())
    settings = {name: options[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(parameters, betas=tuple(options["betas"]), **settings)
    losses = []
    for _ in range(options["steps"]):
        optimizer.zero_grad()
        loss = loss_of(logits(), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | {f"after.{n}": slot.value(t[n]).clone() for n, slot in slots.items()}


def path(t: Tensors, config: dict, optimizer_of: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Tensors:
    """The parameters after each step of an optimizer on given gradients, and the norms where torch clips these."""
    params = [t["p0"].clone().requires_grad_(), t["p1"].clone().requires_grad_()]
    optimizer, norms = optimizer_of(params), []
    after: dict[str, list[torch.Tensor]] = {"path.p0": [], "path.p1": []}
    for step, lr in enumerate(config["lr"]):
        for i, p in enumerate(params):
            p.grad = t[f"g{i}"][step].clone()
        if config.get("clip"):
            norms.append(nn.utils.clip_grad_norm_(params, config["clip"]))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for values, p in zip(after.values(), params, strict=True):
            values.append(p.detach().clone())
    found = {name: torch.stack(values) for name, values in after.items()}
    return found | ({"norms": torch.stack(norms)} if norms else {})
