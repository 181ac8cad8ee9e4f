"""AdapterHub's adapters 1.3: the config that a case asks for, and where the tensors of a case lie in its layers."""

from __future__ import annotations

from collections.abc import Callable

import adapters
import torch
from torch import nn
from torch_parts import Slot, Tensors

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
NAME = "a"


# ---- its configs -----------------------------------------------------------------------------------------------------


def bottleneck(kind: type, config: dict, width: int, **more) -> adapters.BnConfig:
    activation = config.get("activation", "relu")
    reduction = width / (config["size"] + 0.5)  # they round down
    return kind(reduction_factor=reduction, non_linearity=ACTIVATIONS.get(activation, activation), **more)


def parallel(config: dict, width: int, **more) -> adapters.BnConfig:
    scaling = "learned" if config.get("learn_scale") else float(config["scale"])
    if config.get("placement") == "series":
        return bottleneck(adapters.DoubleSeqBnConfig, config, width, scaling=scaling)
    return bottleneck(adapters.ParBnConfig, config, width, scaling=scaling, **more)


def compacter(kind: type, config: dict, width: int, **more) -> adapters.BnConfig:
    return bottleneck(kind, config, width, phm_dim=config["n"], **more)


def low_rank(kind: type, config: dict, **more) -> adapters.LoRAConfig:
    """At the targets of a model, as they call these; of a single layer at the place of the first feed-forward layer."""
    letters = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "c_attn": "qkv"}
    at = {"down_proj": "intermediate_lora", "up_proj": "output_lora"}  # Llama's; of others it is the other way round
    targets = {target.rpartition(".")[2] for target in config.get("targets", ())}
    if targets - letters.keys() - at.keys():
        raise NotImplementedError(f"it has no place at {' and '.join(sorted(targets - letters.keys() - at.keys()))}")
    places = {option: name in targets for name, option in at.items()} if targets else {"intermediate_lora": True}
    attention = sorted({letter for target in targets for letter in letters.get(target, "")})
    return kind(attn_matrices=attention, selfattn_lora=bool(attention), **(places | more))


def prefix(config: dict, **more) -> adapters.PrefixTuningConfig:
    network = {"bottleneck_size": config["hidden"]} if "hidden" in config else {"flat": True}
    return adapters.PrefixTuningConfig(prefix_length=config["tokens"], dropout=config.get("dropout", 0.0), **network)


def unipelt(config: dict, width: int) -> adapters.AdapterConfig:
    """At a model all three of its parts. The adapter reads what the feed-forward part gives, as in the cases."""
    gated = {"use_gating": True}
    if not width:
        return low_rank(adapters.LoRAConfig, config, r=config["r"], **gated)
    adapter = bottleneck(adapters.SeqBnConfig, config, width, original_ln_before=False, **gated)
    if "model" not in config:
        return adapter
    queries = "c_attn" if config["model"]["model_type"] == "gpt2" else "q_proj v_proj"
    return adapters.UniPELTConfig(
        prefix(config), adapter, low_rank(adapters.LoRAConfig, {"targets": queries.split()}, r=config["r"])
    )


def mam(config: dict, width: int) -> adapters.AdapterConfig:
    return adapters.MAMConfig(prefix(config), parallel(config, width))


def lora(kind: type, config: dict, width: int, **more) -> adapters.LoRAConfig:
    return low_rank(kind, config, r=config["r"], alpha=config["alpha"], dropout=config["dropout"])


def ia3(config: dict) -> adapters.LoRAConfig:
    """Its default: keys and values, and what they call the intermediate layer."""
    if "targets" not in config:
        return adapters.IA3Config(selfattn_lora=False)
    fused = any(target.endswith("c_attn") for target in config["targets"])
    return adapters.IA3Config(attn_matrices=["q", "k", "v"] if fused else ["k", "v"])


CONFIGS: dict[str, Callable[[dict, int], adapters.AdapterConfig]] = {
    "houlsby": lambda config, width: bottleneck(adapters.DoubleSeqBnConfig, config, width),
    "pfeiffer": lambda config, width: bottleneck(adapters.SeqBnConfig, config, width),
    "adapterdrop": lambda config, width: bottleneck(
        adapters.SeqBnConfig, config, width, leave_out=list(range(config["drop"]))
    ),
    "adapterfusion": lambda config, width: bottleneck(adapters.SeqBnConfig, config, width),
    "lin": lambda config, width: bottleneck(adapters.SeqBnConfig, config, width, ln_before=True),
    "parallel": parallel,
    "compacter": lambda config, width: compacter(adapters.CompacterConfig, config, width, phm_rank=config["rank"]),
    "compacter_pp": lambda config, width: compacter(  # their default stands behind the whole layer
        adapters.CompacterPlusPlusConfig, config, width, phm_rank=config["rank"], original_ln_before=False
    ),
    "phm_adapter": lambda config, width: compacter(
        adapters.CompacterConfig, config, width, shared_phm_rule=False, factorized_phm_W=False
    ),
    "lora": lambda config, width: lora(adapters.LoRAConfig, config, width),
    "dora": lambda config, width: lora(adapters.DoRAConfig, config, width),
    "ia3": lambda config, width: ia3(config),
    "vera": lambda config, width: low_rank(  # the paper has no alpha / r
        adapters.VeraConfig, config, r=config["r"], alpha=config["r"], dropout=config["dropout"]
    ),
    "prefix_tuning": lambda config, width: prefix(config),
    "p_tuning_v2": lambda config, width: prefix(config),
    "prompt_tuning": lambda config, width: adapters.PromptTuningConfig(prompt_length=config["tokens"]),
    "mam": mam,
    "unipelt": unipelt,
}


# ---- where tensors lie -----------------------------------------------------------------------------------------------


def fill(t: Tensors, slots: dict[str, Slot]) -> None:
    for slot in slots.values():
        slot.parameter.data.zero_()
    for name, slot in slots.items():
        slot.fill(t[name])


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2)


def lora_slot(lora: nn.Module, letter: str, copies: int = 1) -> Slot:
    """Their fused layer of GPT-2 has `copies` of A and of the gate, one for each of queries, keys and values."""
    several = (lambda p: p.unflatten(0, (copies, -1))) if copies > 1 else (lambda p: p)
    if letter == "d":
        return Slot(lora.vera_D, torch.diagonal)
    if letter == "b":
        return Slot(lora.vera_B, torch.diagonal)
    column = {"m": lambda: lora.m.weight, "gain": lambda: lora.lora_B}
    if letter in column:
        return Slot(column[letter](), lambda p: p[:, 0])
    if letter == "B":
        return Slot(lora.lora_B)
    parameter = {"A": lambda: lora.lora_A, "gate": lambda: lora.gate.weight, "gate_bias": lambda: lora.gate.bias}
    return Slot(parameter[letter](), several)


def shared_slot(model: nn.Module, letter: str) -> Slot:
    name = {"rule": "phm_rule", "A": "lora_A", "B": "lora_B"}[letter]
    return Slot(model.base_model.shared_parameters[NAME][name], transposed if letter == "rule" else lambda p: p)


def bottleneck_slot(model: nn.Module, around: nn.Module, letter: str, name: str = NAME) -> Slot:
    if letter == "shared.rule":
        return shared_slot(model, "rule")
    (fusion,) = around.adapter_fusion_layer.values() or (None,)
    if fusion is not None and letter.removesuffix("_bias") in ("query", "key", "value"):
        return Slot(getattr(fusion.get_submodule(letter.removesuffix("_bias")), "bias" if "_" in letter else "weight"))
    adapter = around.adapters[name]
    *norm, down, _ = adapter.adapter_down
    if letter in ("gain", "shift"):
        return Slot(norm[0].weight if letter == "gain" else norm[0].bias)
    if letter == "scale":
        return Slot(adapter.scaling)
    layer = {"down": down, "up": adapter.adapter_up, "gate": getattr(adapter, "gate", None)}[letter.partition("_")[0]]
    factor = {"s": "W_right", "t": "W_left", "rule": "phm_rule"}.get(letter.partition("_")[2])
    if factor:
        return Slot(getattr(layer, factor), transposed)
    if letter.endswith("_bias"):
        return Slot(layer.b if hasattr(layer, "b") else layer.bias)
    return Slot(layer.W, transposed) if hasattr(layer, "W") else Slot(layer.weight)


def prefix_slot(model: nn.Module, layer: int, letter: str) -> Slot:
    """Keys, then values of a layer, layer by layer; a network may read rows that are wider than keys."""
    pool = model.base_model.prefix_tuning.prefix_tunings[NAME]["self_prefix"]
    if letter in ("keys", "values"):
        size = (pool.config.prefix_length, 2 * pool.n_layers, pool.n_heads, pool.n_embd_per_head)
        pair = 2 * layer + (letter == "values")
        return Slot(pool.control_trans, lambda p: p.view(size)[:, pair].transpose(0, 1))
    inner, _, outer = pool.control_trans
    width = pool.n_heads * pool.n_embd_per_head
    own = slice(2 * width * layer, 2 * width * (layer + 1))
    return {
        "shared.rows": Slot(pool.wte.weight, lambda p: p[:, :width]),
        "shared.inner": Slot(inner.weight, lambda p: p[:, :width]),
        "shared.inner_bias": Slot(inner.bias),
        "outer": Slot(outer.weight, lambda p: p[own]),
        "outer_bias": Slot(outer.bias, lambda p: p[own]),
    }[letter]


def model_slot(model: nn.Module, name: str) -> Slot:
    """Of <layer>.<place>.<letter>: a part of a layer, its attention, or a single layer."""
    where, _, letter = name.rpartition(".")
    if where == "shared":
        return shared_slot(model, "rule") if letter == "rule" else prefix_slot(model, 0, name)
    layer, _, place = where.rpartition(".")
    if place == "attn_out" and letter.startswith("gate"):
        attend = next(module for n, module in model.get_submodule(layer).named_modules() if n.endswith("attn"))
        return Slot(attend.prefix_tuning.prefix_gates[NAME].get_parameter("bias" if "_" in letter else "weight"))
    if place == "attend":
        return prefix_slot(model, int(layer.split(".")[2]), letter)
    around = {"attn_out": "attention_adapters", "mlp_out": "output_adapters", "block_out": "output_adapters"}
    if place in around:
        return bottleneck_slot(model, model.get_submodule(f"{layer}.{around[place]}"), letter)
    if letter == "gain" and place == "c_proj":
        where = f"{layer}.c_fc"  # the layer that they have (IA)3 at; of Llama it is the one of the case
    return lora_slot(model.get_submodule(where).loras[NAME], letter, 3 if place == "c_attn" else 1)
