"""AdapterHub's adapters 1.3 under test: its configs, its layers, its merging, filled with a case's tensors.

It wants transformers 4.57, so it runs in an environment of its own, as a program:
PYTHONPATH=... python -m refpeft.conformance.serve tests/peers/adapterhub_1_3.py:AdapterHub
A single place is a layer inside a tiny GPT-2 of one layer, whose adapters it then is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import metadata

import adapters
import torch
import transformers
from adapterhub_parts import CONFIGS, NAME, bottleneck_slot, fill, lora_slot, model_slot, prefix_slot, shared_slot
from adapters.composition import Average, Fuse, Stack
from adapters.context import ForwardContext
from adapters.methods.lora import LoRALinear
from adapters.methods.prompt_tuning import PromptTuning
from torch import nn
from torch_parts import Kept, Slot, Tensors, arrays, at_one_place, dtype_of, on_model, parts, tensors, trained
from transformers.pytorch_utils import Conv1D

from refpeft.conformance.vectors import Arrays, Case

transformers.logging.set_verbosity_error()
logging.getLogger("adapters").setLevel(logging.ERROR)

ATTENTION = "sdpa"  # what transformers takes, too, where nothing is asked for


class AdapterHub:
    name = "adapters"
    version = metadata.version("adapters")
    dtypes = ("float64", "float32")

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        if case.kind != "method":
            raise NotImplementedError("adapters has methods alone")
        for config in (case.config, *together(case).values()):
            refuse(case, config)
        if "model" in case.config and dtype == "float64":
            raise NotImplementedError("transformers computes norms in float32")
        torch.manual_seed(0)
        return arrays(PLACES[case.at](case, tensors(given)))


def together(case: Case) -> dict[str, dict]:
    """The options of several adapters on one layer, by name."""
    return {name: own for name, own in case.config.items() if name in ("first", "second", "third")}


def refuse(case: Case, config: dict) -> None:
    """What its options cannot say."""
    if config.get("method", case.name) not in CONFIGS:
        raise NotImplementedError("not a method of adapters")
    if case.at not in PLACES:
        raise NotImplementedError("its files have a format of its own")
    if config.get("rslora"):
        raise NotImplementedError("it has no rsLoRA")
    if config.get("freeze_A") or config.get("lr_ratio"):
        raise NotImplementedError("it has neither LoRA-FA nor LoRA+")
    if config.get("feedforward") is True:
        raise NotImplementedError("its (IA)3 scales what a layer gives, not what it reads")
    if case.at == "embedding" and case.name != "prompt_tuning":
        raise NotImplementedError("it has no LoRA at embeddings")
    if case.name == "prompt_tuning" and case.at != "embedding":
        raise NotImplementedError("it has no prompt tuning for Llama and GPT-2")
    if case.name == "parallel" and case.at in ("linear", "conv1d"):
        raise NotImplementedError("its adapters stand at blocks as wide as the model, not at single layers")


# ---- one place -------------------------------------------------------------------------------------------------------


def tiny(width: int) -> nn.Module:
    """A GPT-2 of one layer, in which a case's place stands."""
    sizes = transformers.GPT2Config(n_embd=width, n_head=1, n_layer=1, n_positions=8, vocab_size=2)
    return transformers.GPT2LMHeadModel(sizes)


def adapted(model: nn.Module, configs: dict[str, adapters.AdapterConfig], t: Tensors) -> None:
    """Adds adapters, and activates and trains them, one upon the other; in the dtype of the inputs."""
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    model.train_adapter(Stack(*configs))
    model.to(dtype_of(t)).eval()


def fused(model: nn.Module, names: list[str]) -> None:
    model.add_adapter_fusion(Fuse(*names), "dynamic")
    model.train_adapter_fusion(Fuse(*names))
    for parameter, value in model.named_parameters():
        if parameter.endswith(".key.bias"):
            value.data.zero_()  # it adds the same to all scores of a token
    model.eval()


def within(model: nn.Module, layer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`layer` as it is called inside a forward pass of the model; the first input says how many rows there are."""

    def call(x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        with ForwardContext(model.base_model, input_ids=x):
            return layer(x, *more)

    return call


def site(case: Case, t: Tensors) -> Tensors:
    model, layer = at_a_layer(case, t, case.at == "conv1d", {NAME: case.config})
    lora = layer.loras[NAME]
    slots = {name: lora_slot(lora, name) for name in trained_in(case) if name != "x"}
    constants = {name: shared_slot(model, name) for name in set(case.inputs) & {"A", "B"} - set(slots)}
    fill(t, slots | constants)
    if "keep" in t:
        lora.lora_dropout = Kept(t["keep"], case.config["dropout"])
    found = at_one_place(t, slots, "x", within(model, layer))
    if "merged.weight" in case.checks:
        model.merge_adapter(NAME)
        found |= parts("merged", layer, t)
    return found


def at_a_layer(case: Case, t: Tensors, conv: bool, configs: dict[str, dict]) -> tuple[nn.Module, LoRALinear]:
    """A single layer, in place of the one that GPT-2's feed-forward part begins with, and its adapters."""
    model = tiny(2)
    adapters.init(model)
    first = model.transformer.h[0].mlp
    as_gpt2 = {"fan_in_fan_out": True, "no_init_bias": True} if conv else {}
    layer = base_layer(t, conv)
    first.c_fc = LoRALinear.wrap(layer, "intermediate", model.config, model.adapters_config, **as_gpt2)
    adapted(model, {name: CONFIGS[own.get("method", case.name)](own, 0) for name, own in configs.items()}, t)
    return model, first.c_fc


def trained_in(case: Case) -> list[str]:
    """What the case asks gradients of, and what is trained."""
    return [name.partition(".")[2] for name in case.checks if name.startswith(("grad.", "after."))]


def base_layer(t: Tensors, conv: bool) -> nn.Module:
    weight = t["weight"]
    layer = Conv1D(weight.shape[1], weight.shape[0]) if conv else nn.Linear(*weight.T.shape, bias="bias" in t)
    layer.load_state_dict({name: t[name] for name in ("weight", "bias") if name in t})
    return layer


def block(case: Case, t: Tensors) -> Tensors:
    """A bottleneck around x @ weight.T, behind which nothing of the residual stream comes."""
    model = tiny(t["weight"].shape[0])
    adapters.init(model)
    more = {"original_ln_after": False} if beside(case) else {}  # so that the stream, which it reads, is not added
    config = CONFIGS[case.name](case.config, model.config.n_embd, **more)
    adapted(model, dict.fromkeys(names_of(case), config), t)
    around = model.transformer.h[0].output_adapters
    if case.name == "adapterfusion":
        fused(model, names_of(case))
        model.to(t["weight"].dtype)
    slots = {name: bottleneck_slot(model, around, name) for name in trained_in(case) if name != "x"}
    fill(t, slots)
    fill_fused(case, t, around)

    def forward(x: torch.Tensor) -> torch.Tensor:
        h = x @ t["weight"].T
        return around(h, x if beside(case) else torch.zeros_like(h), None)

    found = at_one_place(t, slots, "x", within(model, forward))
    if "penalty" in case.checks:
        value = slots["value"].parameter
        value.grad = None
        penalty = model.get_fusion_regularization_loss()
        penalty.backward()
        found |= {"penalty": penalty, "penalty.grad.value": value.grad}
    return found


def beside(case: Case) -> bool:
    return case.name == "parallel" and case.config.get("placement") != "series"


def names_of(case: Case) -> list[str]:
    return case.config["adapters"] if case.name == "adapterfusion" else [NAME]


def attention(case: Case, t: Tensors) -> Tensors:
    """A prefix in the attention of a Llama of one layer, as that calls it where no row is padded."""
    (_, heads, _, dim), kv_heads = t["q"].shape, t["k"].shape[1]
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * dim}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=1, intermediate_size=2, vocab_size=2, **sizes)
    )
    adapters.init(model)
    adapted(model, {NAME: CONFIGS[case.name](case.config, sizes["hidden_size"])}, t)
    here = model.model.layers[0].self_attn
    slots = {name: prefix_slot(model, 0, name) for name in trained_in(case) if name not in "qkv"}
    fill(t, slots)
    if "keep" in t:
        pool = model.model.prefix_tuning.prefix_tunings[NAME]["self_prefix"]
        pool.dropout = Kept(t["keep"].permute(0, 3, 1, 2, 4), case.config["dropout"])
    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values, mask = here.prefix_tuning(k, v, None, None)
        return attend(here, q, keys, values, mask, dropout=0.0, scaling=here.scaling)[0].transpose(1, 2)

    return at_one_place(t, slots, "q k v", within(model, forward))


def embedding(case: Case, t: Tensors) -> Tensors:
    """Rows before the embeddings. Its models of Llama and GPT-2 do not have it: this is its layer alone."""
    table = nn.Embedding.from_pretrained(t["weight"])
    sizes = transformers.GPT2Config(n_embd=t["weight"].shape[1])
    layer = PromptTuning(NAME, CONFIGS[case.name](case.config, 0), sizes, table)
    layer.to(t["g"].dtype)
    slots = {"prompt": Slot(layer.prompt_embedding.weight)}
    fill(t, slots)
    return at_one_place(t, slots, "ids", lambda ids: layer(table(ids))[0])


def fill_fused(case: Case, t: Tensors, around: nn.Module, before: str = "") -> None:
    """The adapters of a fusion, which a case has one upon the other."""
    for number, name in enumerate(names_of(case) if case.name == "adapterfusion" else ()):
        for letter in ("down", "down_bias", "up", "up_bias"):
            bottleneck_slot(None, around, letter, name).fill(t[before + letter][number])


# ---- several adapters on a layer -------------------------------------------------------------------------------------


def two(case: Case, t: Tensors) -> Tensors:
    """One upon the other: its Stack. It merges one adapter alone."""
    model, layer = at_a_layer(case, t, False, together(case))
    slots = several(case, t, layer)
    found = at_one_place(t, slots, "x", within(model, layer))
    for name in together(case):
        model.set_active_adapters(name)
        found[f"alone.{name}"] = within(model, layer)(t["x"])
    return found


def several(case: Case, t: Tensors, layer: LoRALinear) -> dict[str, Slot]:
    names = [name for name in t if name.partition(".")[0] in together(case)]
    slots = {name: lora_slot(layer.loras[name.partition(".")[0]], name.partition(".")[2]) for name in names}
    fill(t, slots)
    return slots


def combined(case: Case, t: Tensors) -> Tensors:
    """One new adapter, where their configs are equal; else the average of what they give."""
    if case.name == "parallel":
        return combined_beside(case, t)
    model, layer = at_a_layer(case, t, False, together(case))
    several(case, t, layer)
    names, weights = list(together(case)), case.config["weights"]
    if any(own != case.config["first"] for own in together(case).values()):
        model.set_active_adapters(Average(*names, weights=weights, normalize_weights=False))
        return {"y": within(model, layer)(t["x"])}
    model.average_adapter("sum", names, weights=weights, normalize_weights=False, set_active=True)
    model.to(t["weight"].dtype)
    y = within(model, layer)(t["x"])
    model.merge_adapter("sum")
    return {"y": y} | parts("merged", layer, t)


def combined_beside(case: Case, t: Tensors) -> Tensors:
    weight, bias = t["weight"], t["bias"]
    model = tiny(square(weight))
    adapters.init(model)
    options = {"original_ln_after": False}
    adapted(model, {n: CONFIGS["parallel"](own, len(weight), **options) for n, own in together(case).items()}, t)
    around = model.transformer.h[0].output_adapters
    for name in (name for name in t if name.partition(".")[0] in together(case)):
        adapter, _, letter = name.partition(".")
        bottleneck_slot(model, around, letter, adapter).fill(t[name])
    model.set_active_adapters(Average(*together(case), weights=case.config["weights"], normalize_weights=False))
    forward = within(model, lambda x: around(x @ weight.T + bias, x, None))
    return {"y": forward(t["x"])}


def square(weight: torch.Tensor) -> int:
    if weight.shape[0] != weight.shape[1]:
        raise NotImplementedError("its adapters stand at blocks as wide as the model, not at single layers")
    return len(weight)


def restored(case: Case, t: Tensors) -> Tensors:
    model, layer = at_a_layer(case, t, case.config["conv1d"], {NAME: case.config})
    slots = {name: lora_slot(layer.loras[NAME], name) for name in case.inputs if name not in ("x", "weight", "bias")}
    fill(t, slots)
    model.merge_adapter(NAME)
    found = parts("merged", layer, t)
    model.reset_adapter()
    return found | parts("restored", layer, t) | {"y": within(model, layer)(t["x"])}


# ---- whole models ----------------------------------------------------------------------------------------------------


def whole_model(case: Case, t: Tensors) -> Tensors:
    sizes = {name: value for name, value in case.config["model"].items() if name != "model_type"}
    family = case.config["model"]["model_type"]
    kind, settings = {
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    }[family]
    model = kind(settings(**sizes, attn_implementation=ATTENTION))
    model.load_state_dict({name: t[name] for name, _ in model.named_parameters() if name in t}, strict=False)
    adapters.init(model)
    adapted(model, dict.fromkeys(names_of(case), CONFIGS[case.name](case.config, model.config.hidden_size)), t)
    if case.name == "adapterfusion":
        fused(model, names_of(case))
    slots = {name: model_slot(model, name) for name in trained_in(case)}
    fill(t, slots)
    if case.name == "vera":
        fill(
            {letter: t[f"shared.{letter}"] for letter in "AB"}, {letter: shared_slot(model, letter) for letter in "AB"}
        )
    for name, module in model.named_modules():
        if case.name == "adapterfusion" and name.endswith("output_adapters"):
            fill_fused(case, t, module, name.removesuffix("output_adapters") + "block_out.")
    positions = t["positions"] if "positions" in t else torch.arange(t["ids"].shape[1]).expand(t["ids"].shape)
    inputs = {"position_ids": positions + case.config.get("tokens", 0)}
    if "positions" in t:
        inputs["use_cache"] = False  # else transformers does not look for the documents of a row
    elif "segments" in t:
        inputs["attention_mask"] = (t["segments"] >= 0).long()

    def logits() -> torch.Tensor:
        return model(input_ids=t["ids"], **inputs).logits

    if case.at == "model":
        return on_model(t, slots, logits)
    return trained(t, slots, logits, case.config["optimizer"])


PLACES: dict[str, Callable[[Case, Tensors], Tensors]] = {
    "linear": site,
    "conv1d": site,
    "block": block,
    "attention": attention,
    "embedding": embedding,
    "two": two,
    "combined": combined,
    "restored": restored,
    "model": whole_model,
    "train": whole_model,
}
