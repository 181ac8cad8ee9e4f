"""Microsoft's loralib 0.1.2, the first implementation of LoRA, under test: its layers, merged as they merge themselves.

Its MergedLinear (queries, keys and values in one, each with an A of its own) and its convolutions have no cases.
"""

from __future__ import annotations

from importlib import metadata

import loralib
import torch
import transformers
from torch import nn
from torch_parts import Kept, Slot, Tensors, arrays, at_one_place, on_model, parts, tensors, trained

from refpeft.conformance.vectors import Arrays, Case

LETTERS = {"A": "lora_A", "B": "lora_B"}


class Loralib:
    name = "loralib"
    version = metadata.version("loralib")
    dtypes = ("float64", "float32")

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        if case.kind != "method" or case.name != "lora":
            raise NotImplementedError("loralib has LoRA alone")
        config = case.config
        if case.at not in PLACES:
            raise NotImplementedError(f"nothing of loralib is meant for {case.at}")
        if config["rslora"]:
            raise NotImplementedError("its scale is lora_alpha / r")
        if config.get("freeze_A") or config.get("lr_ratio"):
            raise NotImplementedError("it has neither LoRA-FA nor LoRA+")
        if "model" in config and dtype == "float64":
            raise NotImplementedError("transformers computes norms in float32")
        return arrays(PLACES[case.at](case, tensors(given)))


def linear(weight: torch.Tensor, bias: torch.Tensor | None, config: dict, conv: bool) -> nn.Module:
    """Its layer with a frozen weight; `conv` where that is (in, out)."""
    inputs, outputs = weight.shape if conv else weight.T.shape
    options = {"r": config["r"], "lora_alpha": config["alpha"], "lora_dropout": config["dropout"]}
    bias = {} if bias is None else {"bias": bias}
    here = loralib.Linear(inputs, outputs, **options, fan_in_fan_out=conv, bias=bool(bias), dtype=weight.dtype)
    here.load_state_dict({"weight": weight} | bias, strict=False)
    return here


def embedding(weight: torch.Tensor, config: dict) -> nn.Module:
    here = loralib.Embedding(*weight.shape, r=config["r"], lora_alpha=config["alpha"], dtype=weight.dtype)
    here.load_state_dict({"weight": weight}, strict=False)
    return here


def site(case: Case, t: Tensors) -> Tensors:
    if case.at == "embedding":
        here = embedding(t["weight"], case.config)
    else:
        here = linear(t["weight"], t.get("bias"), case.config, case.at == "conv1d" or case.config.get("conv1d", False))
    slots = fill(here, t)
    if "keep" in t:
        here.lora_dropout = Kept(t["keep"], case.config["dropout"])
    found = {} if case.at == "restored" else at_one_place(t, slots, "ids" if "ids" in t else "x", here)
    here.eval()  # which merges
    found |= parts("merged", here, t)
    if case.at == "restored":
        here.train()  # which takes it off again
        found |= parts("restored", here, t) | {"y": here(t["x"])}
    return found


def fill(here: nn.Module, t: Tensors, before: str = "") -> dict[str, Slot]:
    slots = {f"{before}{letter}": Slot(here.get_parameter(name)) for letter, name in LETTERS.items()}
    for name, slot in slots.items():
        slot.fill(t[name])
    return slots


def whole_model(case: Case, t: Tensors) -> Tensors:
    """A model of transformers, in which its layers stand in place of the targets."""
    sizes = {name: value for name, value in case.config["model"].items() if name != "model_type"}
    kind, settings = {
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    }[case.config["model"]["model_type"]]
    model = kind(settings(**sizes)).eval()
    model.load_state_dict({name: t[name] for name, _ in model.named_parameters()}, strict=False)
    slots = {}
    for target in case.config["targets"]:
        old = model.get_submodule(target)
        if isinstance(old, nn.Embedding):
            new = embedding(old.weight.detach(), case.config)
        else:
            new = linear(old.weight.detach(), old.bias, case.config, conv=not isinstance(old, nn.Linear))
        model.set_submodule(target, new)
        slots |= fill(new, t, f"{target}.")

    def logits() -> torch.Tensor:
        return model(input_ids=t["ids"]).logits

    if case.at == "model":
        return on_model(t, slots, logits)
    return trained(t, slots, logits, case.config["optimizer"])


PLACES = dict.fromkeys(("linear", "conv1d", "embedding", "restored"), site)
PLACES |= dict.fromkeys(("model", "train"), whole_model)
