"""Hugging Face PEFT 0.21 under test: its own configs, layers, optimizers and merges, with the values that a case gives.

PEFT has its methods in models of torch and transformers; a case at one layer is a model of that layer alone.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import bitsandbytes
import numpy as np
import peft
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.integrations import dequantize_module_weight
from peft_files import loaded, saved
from peft_methods import LORA, LORA_EMBEDDING, METHODS, NETWORKS, put
from peft_together import OneLayer, combined, linear, restored, two
from torch import nn
from torch_parts import Tensors, dtype_of, has_avx512
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel, logging
from transformers.modeling_outputs import CausalLMOutput

from refpeft.conformance.vectors import Arrays, Case

logging.set_verbosity_error()


class Peft:
    """PEFT, in float64 at one layer alone: on models transformers computes norms and the loss in float32."""

    name = "peft"
    version = peft.__version__
    dtypes = ("float64", "float32", "bfloat16")

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        if case.kind != "method":
            raise NotImplementedError("PEFT has methods alone")
        runner = RUNNERS.get(case.at)
        if case.name not in METHODS | NETWORKS.keys():
            raise NotImplementedError(MISSING.get(case.name, "not in PEFT"))
        if runner is None:
            raise NotImplementedError("PEFT has no function of this alone")
        if case.at in ("model", "train", "load") and dtype == "float64":
            raise NotImplementedError("transformers computes norms and the loss in float32 at most")
        t = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
        if dtype == "bfloat16":
            t = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in t.items()}
        with warnings.catch_warnings(), refused():
            warnings.simplefilter("ignore")
            answer = runner(case, t)
        return {name: numbers(tensor.detach()) for name, tensor in answer.items()}


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """As NumPy's, which has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


MISSING = {
    "bitfit": "PEFT trains biases beside LoRA alone, or moves those of linear layers (BEFT)",
    "full": "PEFT trains whole weights beside an adapter alone",
}


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What PEFT refuses by its own words is not implemented."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if any(word in str(error) for word in ("not supported", "Unsupported", "not compatible", "Please initialize")):
            said = re.sub(r"\(n.=.*?\)|<class '.*\.|'>", "", str(error))  # sizes of the layer, modules
            raise NotImplementedError(f"refused: {said.split('.')[0]}") from error
        raise


@dataclass(frozen=True)
class Trained:
    """A parameter of PEFT, and the case's tensors `names` that make it up: `pack` (tensors by name) joins these."""

    parameter: nn.Parameter
    names: tuple[str, ...]
    pack: Callable[[Tensors], torch.Tensor]

    def set(self, t: Tensors) -> None:
        put(self.parameter, self.pack(t), ", ".join(self.names))

    def unpacked(self, value: torch.Tensor, t: Tensors) -> Tensors:
        """A value or gradient of the parameter, by the names of the case. `pack` moves numbers, and changes none."""
        leaves = {name: t[name].detach().requires_grad_() for name in self.names}
        packed = self.pack(leaves).reshape(self.parameter.shape)
        return dict(zip(self.names, torch.autograd.grad(packed, list(leaves.values()), value), strict=True))


def places(case: Case, t: Tensors) -> list[str]:
    """The layers that the case adapts."""
    names = METHODS[case.name].names
    listed = case.config.get("targets") or [n.rpartition(".")[0] for n in case.checks if n.startswith("grad.")]
    found = [n.rpartition(".")[0] for n in t if n.rpartition(".")[2] in names and not n.startswith("shared.")]
    if case.name == "lora_bitfit":
        found = [n.removesuffix(".A") for n in t if n.endswith(".A")]
    if case.name == "ln_tuning":
        found = [n.removesuffix(".weight") for n in t if "norm" in n or ".ln_" in n or n == "site.weight"]
    return list(dict.fromkeys(found or listed))


def with_layers(case: Case, base: nn.Module, t: Tensors) -> tuple[peft.PeftModel, list[Trained]]:
    """The base with PEFT's layers, which have the values of the case, and what of it is trained."""
    method, targets = METHODS[case.name], places(case, t) or ["site"]
    config = method.config(case.config, targets, t)
    config.task_type = "CAUSAL_LM" if isinstance(base, PreTrainedModel) else None
    if any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in base.modules()):
        base.is_loaded_in_4bit = True  # as transformers says of what it loads; PEFT looks for it
    if case.at == "train" and case.name == "adalora":
        config.orth_reg_weight = 0.0  # the cases are without the penalty
    adapted = peft.get_peft_model(base, config).eval()
    if "rank_pattern" in case.config:  # AdaLoRA has left fewer triplets
        kept = {f"{n}.lora_E": [i < r for i in range(config.init_r)] for n, r in case.config["rank_pattern"].items()}
        adapted.base_model.resize_modules_by_rank_pattern(kept, "default")
    adapted.to(dtype_of(t))
    parameters, trained = dict(adapted.named_parameters(remove_duplicate=False)), []
    for name, tensor in t.items():
        where, _, letter = name.rpartition(".")
        if letter in method.constants and (where == "shared" or where in targets):
            with torch.no_grad():
                adapted.get_buffer(method.constants[letter]).copy_(tensor)
        elif letter in method.names and (where == "shared" or where in targets or letter == "bias"):
            here = f"base_model.model.{where.removesuffix('.attend')}"
            ways = [f"{here}.{method.names[letter]}", method.names[letter], f"{here}.{letter}"]
            ways += [f"{here}.{LORA_EMBEDDING[letter]}"] if method.names is LORA else []
            parameter = next((parameters[way] for way in ways if way in parameters), None)
            if parameter is not None:
                trained.append(Trained(parameter, (name,), lambda t, name=name: t[name]))
    for one in trained:
        one.set(t)
    return adapted, trained


# ---- at one layer ----------------------------------------------------------------------------------------------------


def layer(case: Case, t: Tensors) -> nn.Module:
    """The frozen layer, as torch and transformers have it."""
    weight = t["weight"]
    if case.at == "embedding":
        return nn.Embedding.from_pretrained(weight.clone())
    if case.at == "norm":
        kind = nn.LayerNorm if case.config["norm"] == "layer_norm" else nn.RMSNorm
        made = kind(weight.shape[0], eps=case.config["eps"]).to(weight.dtype)
        made.load_state_dict({name: t[name] for name in ("weight", "bias") if name in t})
        return made
    made = linear(t, case.at == "conv1d")
    if "quantizer" in case.config and "iterations" not in case.config:  # LoftQ's rounds begin with the weight itself
        return in_nf4(case, made)
    return made


def in_nf4(case: Case, dense: nn.Module) -> bitsandbytes.nn.Linear4bit:
    """A frozen layer as transformers makes it of a checkpoint's with bitsandbytes."""
    if not isinstance(dense, nn.Linear):
        raise NotImplementedError("bitsandbytes has no Conv1D")
    if dense.weight.dtype == torch.float64:
        raise NotImplementedError("bitsandbytes has no float64")
    if case.name not in ("olora", "pissa") and dense.in_features % case.config["block"] and has_avx512():
        raise NotImplementedError("with AVX-512 bitsandbytes decodes rows of less than a block wrongly")
    bias, settings = dense.bias is not None, {"compute_dtype": dense.weight.dtype, "compress_statistics": False}
    made = bitsandbytes.nn.Linear4bit(dense.in_features, dense.out_features, bias, quant_type="nf4", **settings)
    made.load_state_dict(dense.state_dict())
    return made.to("cpu")  # which quantizes


def at_layer(case: Case, t: Tensors) -> Tensors:
    if case.name in NETWORKS:
        return prompt_at_embedding(case, t)
    given = {f"site.{name.removeprefix('shared.')}": tensor for name, tensor in t.items()}
    adapted, trained = with_layers(case, OneLayer(layer(case, t)), given)
    if "base" in case.checks:
        return first_values(adapted, t)
    x = t["ids"].long() if case.at == "embedding" else t["x"].requires_grad_()
    with dropped(adapted, t.get("keep")):
        y = adapted(x)
        y.backward(t["g"])
    answer = {"y": y} | ({} if case.at == "embedding" else {"grad.x": x.grad})
    for one in trained:
        for name, gradient in one.unpacked(one.parameter.grad, given).items():
            letter = name.removeprefix("site.")
            answer[f"grad.{letter if letter in t else f'shared.{letter}'}"] = gradient
    if "penalty" in case.checks:
        answer |= penalty(adapted, trained)
    if "merged.weight" in case.checks:
        merged = adapted.merge_and_unload().site
        answer |= {"merged.weight": dequantize_module_weight(merged)}
        answer |= {} if getattr(merged, "bias", None) is None else {"merged.bias": merged.bias}
    return answer


def penalty(adapted: peft.PeftModel, trained: list[Trained]) -> Tensors:
    """AdaLoRA's, which PEFT adds to the loss of any model that gives one: here to 0."""
    adapted.zero_grad()
    site = adapted.base_model.model
    with mock.patch.object(
        site, "forward", lambda: SimpleNamespace(loss=torch.zeros((), dtype=site.site.weight.dtype))
    ):
        term = adapted.base_model().loss
    term.backward()
    found = {one.names[0].removeprefix("site."): one.parameter.grad for one in trained}
    return {"penalty": term} | {f"penalty.grad.{name}": grad for name, grad in found.items() if grad is not None}


@contextlib.contextmanager
def dropped(model: nn.Module, keep: torch.Tensor | None) -> Iterator[None]:
    """Within it the model trains, and torch's dropout keeps what the case says."""
    if keep is None:
        yield
        return

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return x * keep / (1 - p) if training else x

    model.train()
    with mock.patch.object(torch.nn.functional, "dropout", dropout):
        yield
    model.eval()


def first_values(adapted: peft.PeftModel, t: Tensors) -> Tensors:
    """The frozen weight and the update that PEFT begins with."""
    site = adapted.base_model.model.site
    return {
        "base": dequantize_module_weight(site.base_layer),
        "update": site.get_delta_weight("default"),
        "y": adapted(t["x"].requires_grad_()),  # bitsandbytes has another layout of weights where nothing is trained
    }


# ---- on models -------------------------------------------------------------------------------------------------------


def on_model(case: Case, t: Tensors) -> Tensors:
    """Logits, loss and gradients, or three steps of training, without dropout."""
    config = dict(case.config["model"])
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).to(dtype_of(t))
    base.load_state_dict({name: t[name] for name, _ in base.named_parameters()}, strict=False)
    if "quantizer" in case.config:
        for target in case.config["targets"]:
            base.set_submodule(target, in_nf4(case, base.get_submodule(target)))
    adapted, trained = (with_network if case.name in NETWORKS else with_layers)(case, base, t)
    if "quantizer" in case.config:
        adapted.train()  # bitsandbytes computes in bfloat16 where nothing is trained
    if "optimizer" in case.config:
        return trained_for_steps(case, adapted, trained, t)
    outputs = outputs_of(case, adapted, t)
    outputs.loss.backward()
    logits = outputs.logits[:, -t["ids"].shape[1] :]
    if "segments" in t:
        logits = logits * (t["segments"] >= 0)[..., None]
    answer = {"logits": logits, "loss": outputs.loss}
    for one in trained:
        if one.parameter.requires_grad:
            found = one.unpacked(one.parameter.grad, t)
            answer |= {f"grad.{name}": gradient for name, gradient in found.items()}
    return answer


def outputs_of(case: Case, adapted: peft.PeftModel, t: Tensors) -> CausalLMOutput:
    """Labels are targets that are not yet moved: transformers moves them, and PEFT puts virtual tokens before them."""
    ids, segments = t["ids"].long(), t.get("segments")
    labels = torch.cat([torch.full_like(ids[:, :1], -100), t["targets"].long()[:, :-1]], dim=1)
    more = {} if segments is None else {"attention_mask": (segments >= 0).long()}
    if "positions" in t:
        if case.name in NETWORKS:
            raise NotImplementedError("with virtual tokens PEFT takes no position_ids")
        more = {"attention_mask": of_documents(segments), "position_ids": t["positions"].long()}
    if case.name == "multitask_prompt":
        more["task_ids"] = torch.full((len(ids),), case.config["task"])
    return adapted(input_ids=ids, labels=labels, **more)


def of_documents(segments: torch.Tensor) -> torch.Tensor:
    """The additive mask of packed rows (batch, 1, time, time)."""
    same = (segments[:, :, None] == segments[:, None, :]).tril()
    return torch.where(same, 0.0, torch.finfo(torch.float32).min)[:, None]


def trained_for_steps(case: Case, adapted: peft.PeftModel, trained: list[Trained], t: Tensors) -> Tensors:
    optimizer, losses = optimizer_of(case, adapted, trained), []
    for _ in range(case.config["optimizer"]["steps"]):
        optimizer.zero_grad()
        loss = outputs_of(case, adapted, t).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    answer = {"losses": torch.stack(losses)}
    for one in trained:
        found = one.unpacked(one.parameter.detach(), t)
        answer |= {f"after.{name}": value for name, value in found.items()}
    return answer


def optimizer_of(case: Case, adapted: peft.PeftModel, trained: list[Trained]) -> torch.optim.Optimizer:
    """torch's AdamW, or PEFT's for LoRA+ and LoRA-FA."""
    given, c = case.config["optimizer"], case.config
    lr, decay = given["lr"], given["weight_decay"]
    betas_and_eps = {"betas": tuple(given["betas"]), "eps": given["eps"]}
    if "lr_ratio" in c:
        rates = {"lr": lr, "loraplus_lr_ratio": c["lr_ratio"], "loraplus_weight_decay": decay}
        return create_loraplus_optimizer(adapted, torch.optim.AdamW, **rates, **betas_and_eps)
    if "freeze_A" in c:
        optimizer = create_lorafa_optimizer(adapted, r=c["r"], lora_alpha=c["alpha"], lr=lr, weight_decay=decay)
        for group in optimizer.param_groups:
            group |= betas_and_eps
        return optimizer
    return torch.optim.AdamW([one.parameter for one in trained], lr=lr, weight_decay=decay, **betas_and_eps)


# ---- virtual tokens --------------------------------------------------------------------------------------------------


def with_network(case: Case, base: PreTrainedModel, t: Tensors) -> tuple[peft.PeftModel, list[Trained]]:
    """The base with PEFT's virtual tokens, which have the values of the case, and what of it is trained."""
    config, packs = NETWORKS[case.name](case.config, t)
    config.task_type = "CAUSAL_LM"
    adapted = peft.get_peft_model(base, config).eval().to(base.dtype)
    parameters = dict(adapted.prompt_encoder["default"].named_parameters())
    trained = [
        Trained(parameters[name], tuple(names), lambda t, names=names, pack=pack: pack([t[n] for n in names]))
        for name, (names, pack) in packs.items()
    ]
    for one in trained:
        one.set(t)
    return adapted, trained


class Rows(PreTrainedModel, GenerationMixin):
    """A model that gives what its layers would read: rows of its table, and PEFT's before them."""

    config_class = PretrainedConfig

    def __init__(self, table: torch.Tensor):
        vocab, dim = table.shape
        super().__init__(PretrainedConfig(vocab_size=vocab, hidden_size=dim, num_attention_heads=1, num_layers=1))
        self.table = nn.Embedding.from_pretrained(table)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, inputs_embeds: torch.Tensor, **_) -> CausalLMOutput:
        return CausalLMOutput(logits=inputs_embeds)


def prompt_at_embedding(case: Case, t: Tensors) -> Tensors:
    adapted, trained = with_network(case, Rows(t["weight"]), t)
    more = {"task_ids": torch.full((len(t["ids"]),), case.config["task"])} if "task" in case.config else {}
    y = adapted(input_ids=t["ids"].long(), **more).logits
    y.backward(t["g"])
    answer = {"y": y}
    for one in trained:
        answer |= {f"grad.{name}": grad for name, grad in one.unpacked(one.parameter.grad, t).items()}
    return answer


# ---- AdaLoRA's allocation --------------------------------------------------------------------------------------------


def allocations(case: Case, t: Tensors) -> Tensors:
    """Steps of plain gradient descent with gradients that are given, after each of which PEFT's allocator chooses."""
    c = case.config
    options = {name: c[name] for name in ("init_r", "target_r", "tinit", "tfinal", "beta1", "beta2")}
    config = peft.AdaLoraConfig(**options, deltaT=c["delta_t"], total_step=c["steps"], target_modules=["a", "b"])
    layers = {site: nn.Linear(t[f"{site}.Q"].shape[1], len(t[f"{site}.P"])) for site in "ab"}
    adapted = peft.get_peft_model(nn.ModuleDict(layers), config).to(t["a.P"].dtype)
    names = METHODS["adalora"].names
    there = {n: adapted.get_parameter(f"base_model.model.{n[0]}.{names[n[2]]}") for n in t if n[1:2] == "."}
    for name, parameter in there.items():
        parameter.data.copy_(t[name].reshape(parameter.shape))
    traces = {f"E.{site}": [] for site in "ab"}
    for number in range(c["steps"]):
        for name, parameter in there.items():
            parameter.grad = t[f"grad.{name}"][number].reshape(parameter.shape)
            parameter.data -= c["lr"] * parameter.grad
        adapted.base_model.update_and_allocate(number + 1)
        for name, trace in traces.items():
            trace.append(there[f"{name[2]}.E"].detach().flatten().clone())
    after = {f"after.{name}": parameter.detach().reshape(t[name].shape) for name, parameter in there.items()}
    return {name: torch.stack(trace) for name, trace in traces.items()} | after


RUNNERS: dict[str, Callable[[Case, Tensors], Tensors]] = {
    "linear": at_layer,
    "conv1d": at_layer,
    "embedding": at_layer,
    "norm": at_layer,
    "model": on_model,
    "train": on_model,
    "steps": allocations,
    "two": two,
    "restored": restored,
    "combined": combined,
    "load": loaded,
    "save": saved,
}
