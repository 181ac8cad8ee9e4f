"""Hugging Face PEFT as a second witness: the same tensors put into its layers, in float64."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from common import Compute, Tensors
from models import precision, real_only, transformers_model
from reference import mean_loss
from torch import nn
from transformers.pytorch_utils import Conv1D

VERSION = f"peft {peft.__version__}"


class OneSite(nn.Module):
    """A model of one layer, called `site`."""

    def __init__(self, site: nn.Module):
        super().__init__()
        self.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


def base_layer(t: Tensors, conv1d: bool) -> nn.Module:
    """The frozen layer that the inputs of a case describe; `conv1d` where its weight is (in, out)."""
    weight, bias = t["weight"], t.get("bias")
    if "ids" in t:
        return nn.Embedding.from_pretrained(weight.clone())
    if conv1d:
        layer = Conv1D(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({"bias": bias} if bias is not None else {}))
    return layer


def site(
    config: peft.PeftConfig,
    names: Callable[[str], str],
    letters: str,
    conv1d: bool = False,
    constants: dict[str, str] | None = None,
) -> Compute:
    """Outputs of a case at one site: y, gradients of x and of the letters, and the merged weight.

    `constants` has the names of PEFT's buffers, by letter.
    """

    def compute(t: Tensors) -> Tensors:
        with precision():
            return answer(t)

    def answer(t: Tensors) -> Tensors:
        model = peft.get_peft_model(OneSite(base_layer(t, conv1d)), config)
        parameters = {
            letter: model.get_parameter(f"base_model.model.site.{names(letter)}") for letter in letters.split()
        }
        for letter, parameter in parameters.items():
            parameter.data.copy_(t[letter].reshape(parameter.shape))
        for letter, name in (constants or {}).items():
            model.get_buffer(f"base_model.{name}").copy_(t[letter])
        x = t["ids"].long() if "ids" in t else t["x"].clone().requires_grad_()
        y = model(x)
        y.backward(t["g"])
        found = {"y": y, **{f"grad.{letter}": p.grad.reshape(t[letter].shape) for letter, p in parameters.items()}}
        if "x" in t:
            found["grad.x"] = x.grad
        merged = model.merge_and_unload().site
        found["merged.weight"] = merged.weight
        return found | ({"merged.bias": merged.bias} if t.get("bias") is not None else {})

    return compute


def lora_config(config: dict, targets: list[str]) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config["r"], lora_alpha=config["alpha"], use_rslora=config["rslora"], target_modules=targets
    )


def lora(config: dict, conv1d: bool = False) -> Compute:
    def compute(t: Tensors) -> Tensors:
        names = "lora_embedding_{}.default" if "ids" in t else "lora_{}.default.weight"
        return site(lora_config(config, ["site"]), names.format, "A B", conv1d)(t)

    return compute


def ia3(config: dict, conv1d: bool = False) -> Compute:
    settings = peft.IA3Config(target_modules=["site"], feedforward_modules=["site"] if config["feedforward"] else [])
    return site(settings, lambda _: "ia3_l.default", "gain", conv1d)


# ---- whole models ----------------------------------------------------------------------------------------------

TASK = {"task_type": "CAUSAL_LM"}
PEFT_LETTERS = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "gain": "ia3_l.default"}


def peft_config(method: str, options: dict) -> peft.PeftConfig:
    if method == "lora":
        return lora_config(options, options["targets"])
    if method == "ia3":
        return peft.IA3Config(target_modules=options["targets"], feedforward_modules=options["feedforward"])
    if method == "ln_tuning":
        names = ["input_layernorm", "post_attention_layernorm", "norm", "ln_1", "ln_2", "ln_f"]
        return peft.LNTuningConfig(target_modules=names)
    kind = {"prompt_tuning": peft.PromptTuningConfig, "prefix_tuning": peft.PrefixTuningConfig}[method]
    return kind(num_virtual_tokens=options["tokens"], **TASK)


def model(family: str, settings: dict, method: str, options: dict) -> Compute:
    """Logits, loss and gradients of a whole model with PEFT's own layers."""

    def compute(t: Tensors) -> Tensors:
        with precision():
            base = transformers_model(family, settings)
            base.load_state_dict({n: t[n] for n, _ in base.named_parameters()}, strict=False)
            adapted = peft.get_peft_model(base, peft_config(method, options)).to(torch.get_default_dtype())
            if method in ("prompt_tuning", "prefix_tuning"):
                logits, loss, grads = _virtual_tokens(adapted, t, method, options["tokens"])
            else:
                logits, loss, grads = _layers(adapted, t, method)
            return {"logits": logits, "loss": loss, **grads}

    return compute


def _layers(adapted: nn.Module, t: Tensors, method: str):
    parameters = {}
    for name in t:
        where, _, letter = name.rpartition(".")
        inner = f"ln_tuning_layers.default.{letter}" if method == "ln_tuning" else PEFT_LETTERS.get(letter)
        found = inner and dict(adapted.named_parameters()).get(f"base_model.model.{where}.{inner}")
        if found is not None and found is not False:
            found.data.copy_(t[name].reshape(found.shape))
            parameters[name] = found
    logits = adapted(input_ids=t["ids"].long()).logits
    loss = mean_loss(logits, t["targets"])
    loss.backward()
    return logits, loss, {f"grad.{name}": p.grad.reshape(t[name].shape) for name, p in parameters.items()}


def _virtual_tokens(adapted: nn.Module, t: Tensors, method: str, count: int):
    parameter = adapted.prompt_encoder["default"].embedding.weight
    names = [
        n for n in t if n.endswith((".prompt", ".attend.keys", ".attend.values"))
    ]  # in PEFT's order: layers, keys first

    def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
        """PEFT's matrix (virtual tokens, everything): for each layer the keys of all heads, then the values."""
        return torch.cat([x if x.dim() == 2 else x.transpose(0, 1).flatten(1) for x in tensors], dim=1)

    parameter.data.copy_(flat([t[n] for n in names]))
    logits, loss = _of_real_tokens(adapted, t)
    parts = parameter.grad.split([t[n].numel() // count for n in names], dim=1)
    shapes = {n: t[n].shape for n in names}
    grads = {
        f"grad.{n}": part if len(shapes[n]) == 2 else part.unflatten(1, (shapes[n][0], -1)).transpose(0, 1)
        for n, part in zip(names, parts, strict=True)
    }
    return logits, loss, grads


def _of_real_tokens(adapted: nn.Module, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and loss, after its backward pass."""
    ids = t["ids"].long()
    segments = t.get("segments")
    mask = torch.ones_like(ids) if segments is None else (segments >= 0).long()
    logits = real_only(adapted(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :], segments)
    loss = mean_loss(logits, t["targets"])
    loss.backward()
    return logits, loss


def prompt_encoder(family: str, settings: dict, config: peft.PeftConfig, parts: dict[str, list[str]]) -> Compute:
    """Outputs of a case on a model, from PEFT's network of virtual tokens.

    `parts` has for each of its parameters the case's tensors that make it up, one below the other.
    """

    def compute(t: Tensors) -> Tensors:
        with precision():
            base = transformers_model(family, settings)
            base.load_state_dict({n: t[n] for n, _ in base.named_parameters()}, strict=False)
            adapted = peft.get_peft_model(base, config).to(torch.get_default_dtype())
            parameters = dict(adapted.prompt_encoder["default"].named_parameters())
            for name, parameter in parameters.items():
                parameter.data.copy_(torch.cat([t[n] for n in parts[name]]))
            logits, loss = _of_real_tokens(adapted, t)
            found = {"logits": logits, "loss": loss}
            for name, parameter in parameters.items():
                pieces = parameter.grad.split([len(t[n]) for n in parts[name]])
                found |= {f"grad.{n}": piece for n, piece in zip(parts[name], pieces, strict=True)}
            return found

    return compute


def adaption_prompt(family: str, settings: dict, options: dict) -> Compute:
    """Outputs of a case on a model, from PEFT's LLaMA-Adapter."""
    config = peft.AdaptionPromptConfig(adapter_len=options["tokens"], adapter_layers=options["count"], **TASK)

    def compute(t: Tensors) -> Tensors:
        with precision():
            base = transformers_model(family, settings)
            base.load_state_dict({n: t[n] for n, _ in base.named_parameters()}, strict=False)
            adapted = peft.get_peft_model(base, config).to(torch.get_default_dtype())
            parameters = {
                name.removeprefix("base_model.model.").replace(".adaption_", ".attend."): parameter
                for name, parameter in adapted.named_parameters()
                if ".adaption_" in name
            }
            for name, parameter in parameters.items():
                parameter.data.copy_(t[name].reshape(parameter.shape))
            logits, loss = _of_real_tokens(adapted, t)
            grads = {f"grad.{name}": p.grad.reshape(t[name].shape) for name, p in parameters.items()}
            return {"logits": logits, "loss": loss, **grads}

    return compute
