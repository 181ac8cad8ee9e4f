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
from adapters.context import ForwardContext
from adapters.methods.lora import LoRALinear
from adapters.methods.prompt_tuning import PromptTuning
from torch import nn
from torch_parts import Kept, Slot, Tensors, arrays, at_one_place, on_model, tensors, trained
from transformers.pytorch_utils import Conv1D

from refpeft.conformance.vectors import Arrays, Case

transformers.logging.set_verbosity_error()
logging.getLogger("adapters").setLevel(logging.ERROR)

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
NAME = "a"


class AdapterHub:
    name = "adapters"
    version = metadata.version("adapters")
    dtypes = ("float64", "float32")

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        if case.kind != "method" or case.name not in CONFIGS:
            raise NotImplementedError("not a method of adapters")
        if case.at in ("model", "train") and dtype == "float64":
            raise NotImplementedError("transformers computes norms in float32")
        refuse(case)
        torch.manual_seed(0)
        at = {"model": whole_model, "train": whole_model, "linear": site, "conv1d": site, "block": block}
        at |= {"attention": attention, "embedding": embedding}
        if case.at not in at:
            raise NotImplementedError(f"nothing of adapters stands at {case.at}")
        return arrays(at[case.at](case, tensors(given)))


def refuse(case: Case) -> None:
    """What its options cannot say."""
    config = case.config
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
    if case.name == "parallel" and case.at == "linear":
        raise NotImplementedError("its adapters stand at blocks as wide as the model, not at single layers")


# ---- its configs -----------------------------------------------------------------------------------------------


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
    letters = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "c_attn": "qkv"}
    targets = [target.rpartition(".")[2] for target in config.get("targets", ())]
    at_a_layer = {"selfattn_lora": bool(targets), "intermediate_lora": not targets}
    attention = sorted({letter for target in targets for letter in letters.get(target, "")})
    return kind(attn_matrices=attention, **(at_a_layer | more))


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


# ---- one place -------------------------------------------------------------------------------------------------


def tiny(width: int) -> nn.Module:
    """A GPT-2 of one layer, in which a case's place stands."""
    sizes = transformers.GPT2Config(n_embd=width, n_head=1, n_layer=1, n_positions=8, vocab_size=2)
    return transformers.GPT2LMHeadModel(sizes)


def adapted(model: nn.Module, config: adapters.AdapterConfig, t: Tensors, names: tuple[str, ...] = (NAME,)) -> None:
    """Adds what the config says, for training, in the dtype of the inputs."""
    for name in names:
        model.add_adapter(name, config=config)
    if len(names) > 1:
        fuse = adapters.composition.Fuse(*names)
        model.add_adapter_fusion(fuse, "dynamic")
        model.train_adapter_fusion(fuse)
        for parameter, value in model.named_parameters():
            if parameter.endswith(".key.bias"):
                value.data.zero_()  # it adds the same to all scores of a token
    else:
        model.train_adapter(names[0])
    model.to(t["g"].dtype if "g" in t else torch.float32).eval()


def within(model: nn.Module, layer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`layer` as it is called inside a forward pass of the model; the first input says how many rows there are."""

    def call(x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        with ForwardContext(model.base_model, input_ids=x):
            return layer(x, *more)

    return call


def site(case: Case, t: Tensors) -> Tensors:
    """A single layer: in place of the one that GPT-2's feed-forward part begins with."""
    model, conv = tiny(2), case.at == "conv1d"
    adapters.init(model)
    layer = base_layer(t, conv)
    first = model.transformer.h[0].mlp
    as_gpt2 = {"fan_in_fan_out": True, "no_init_bias": True} if conv else {}
    first.c_fc = LoRALinear.wrap(layer, "intermediate", model.config, model.adapters_config, **as_gpt2)
    adapted(model, CONFIGS[case.name](case.config, 0), t)
    lora = first.c_fc.loras[NAME]
    names = [name.removeprefix("grad.") for name in case.checks if name.startswith("grad.") and name != "grad.x"]
    slots = {name: lora_slot(lora, name) for name in names}
    constants = {name: shared_slot(model, name) for name in set(case.inputs) & {"A", "B"} - set(names)}
    fill(t, slots | constants)
    if "keep" in t:
        lora.lora_dropout = Kept(t["keep"], case.config["dropout"])
    found = at_one_place(t, slots, "x", within(model, first.c_fc))
    if "merged.weight" in case.checks:
        model.merge_adapter(NAME)
        found |= {f"merged.{name}": value for name, value in first.c_fc.named_parameters() if name in case.inputs}
    return found


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
    adapted(model, CONFIGS[case.name](case.config, model.config.n_embd, **more), t, names_of(case))
    around = model.transformer.h[0].output_adapters
    names = [name.removeprefix("grad.") for name in case.checks if name.startswith("grad.") and name != "grad.x"]
    slots = {name: bottleneck_slot(model, around, name) for name in names}
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


def names_of(case: Case) -> tuple[str, ...]:
    return tuple(case.config["adapters"]) if case.name == "adapterfusion" else (NAME,)


def attention(case: Case, t: Tensors) -> Tensors:
    """A prefix in the attention of a Llama of one layer, as that calls it where no row is padded."""
    (_, heads, _, dim), kv_heads = t["q"].shape, t["k"].shape[1]
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * dim}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=1, intermediate_size=2, vocab_size=2, **sizes)
    )
    adapters.init(model)
    adapted(model, CONFIGS[case.name](case.config, sizes["hidden_size"]), t)
    here = model.model.layers[0].self_attn
    names = [name.removeprefix("grad.") for name in case.checks if name.startswith("grad.")]
    slots = {name: prefix_slot(model, 0, name) for name in names if name not in "qkv"}
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


# ---- where tensors lie -----------------------------------------------------------------------------------------


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


def fill_fused(case: Case, t: Tensors, around: nn.Module, before: str = "") -> None:
    """The adapters of a fusion, which a case has one upon the other."""
    for number, name in enumerate(names_of(case) if case.name == "adapterfusion" else ()):
        for letter in ("down", "down_bias", "up", "up_bias"):
            bottleneck_slot(None, around, letter, name).fill(t[before + letter][number])


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


# ---- whole models ----------------------------------------------------------------------------------------------


def whole_model(case: Case, t: Tensors) -> Tensors:
    sizes = {name: value for name, value in case.config["model"].items() if name != "model_type"}
    family = case.config["model"]["model_type"]
    kind, settings = {
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    }[family]
    model = kind(settings(**sizes))
    model.load_state_dict({name: t[name] for name, _ in model.named_parameters() if name in t}, strict=False)
    adapters.init(model)
    adapted(model, CONFIGS[case.name](case.config, model.config.hidden_size), t, names_of(case))
    before = {"model": "grad.", "train": "after."}[case.at]
    slots = {name: model_slot(model, name) for name in (c.removeprefix(before) for c in case.checks if before in c)}
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
