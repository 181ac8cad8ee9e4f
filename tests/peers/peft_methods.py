"""How PEFT is told of a case: its config, and the names of its parameters, for each method and for virtual tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import peft
import torch
from torch import nn
from torch_parts import Tensors


def put(parameter: torch.Tensor, value: torch.Tensor, name: str) -> None:
    """Fills PEFT's tensor with the case's numbers, in its own shape. Raises ValueError for more or fewer of them."""
    if parameter.numel() != value.numel():
        shapes = f"{tuple(parameter.shape)}, that of the case {tuple(value.shape)}"
        raise ValueError(f"PEFT's tensor has the shape {shapes}: {name}")
    with torch.no_grad():
        parameter.copy_(value.reshape(parameter.shape))


# ---- methods at layers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """`config` (case.config, targets, tensors) gives PEFT's; `names`: its parameters of a layer by the case's letter.

    A name that begins with "base_model." is one of the whole model, not of a layer. `constants`: buffers.
    """

    config: Callable[[dict, list[str], Tensors], peft.PeftConfig]
    names: dict[str, str]
    constants: dict[str, str] = field(default_factory=dict)


LORA = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
LORA_EMBEDDING = {"A": "lora_embedding_A.default", "B": "lora_embedding_B.default"}


def lora(**more) -> Callable[[dict, list[str], Tensors], peft.PeftConfig]:
    def config(c: dict, targets: list[str], t: Tensors) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=c["r"],
            lora_alpha=c["alpha"],
            use_rslora=c.get("rslora", False),
            lora_dropout=c.get("dropout", 0.0),
            rank_pattern=c.get("rank_pattern", {}),
            alpha_pattern=c.get("alpha_pattern", {}),
            target_modules=targets,
            modules_to_save=c.get("modules_to_save"),
            **{"bias": c.get("bias", "none")} | more,
        )

    return config


def loftq(c: dict, targets: list[str], t: Tensors) -> peft.LoraConfig:
    """First values, or LoRA on a base that is quantized already."""
    if "iterations" not in c:
        return lora()(c, targets, t)
    return lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_iter=c["iterations"]))(c, targets, t)


def adalora(c: dict, targets: list[str], t: Tensors) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=c["init_r"],
        target_r=c["target_r"],
        lora_alpha=c["alpha"],
        lora_dropout=c.get("dropout", 0.0),
        total_step=9,
        orth_reg_weight=c.get("gamma", 0.5),
        target_modules=targets,
    )


def ia3(c: dict, targets: list[str], t: Tensors) -> peft.IA3Config:
    inside = c["feedforward"]
    inside = inside if isinstance(inside, list) else targets if inside else []
    return peft.IA3Config(target_modules=targets, feedforward_modules=inside)


def llama_adapter(c: dict, targets: list[str], t: Tensors) -> peft.AdaptionPromptConfig:
    if c.get("compat") != "peft":
        raise NotImplementedError("PEFT has one gate for all heads, and no tanh")
    return peft.AdaptionPromptConfig(adapter_len=c["tokens"], adapter_layers=c["count"])


def shira(c: dict, targets: list[str], t: Tensors) -> peft.ShiraConfig:
    """Its places are those of a mask, for which PEFT asks layer by layer in the order of the model."""
    places = iter([tensor.long() for name, tensor in t.items() if name.endswith(".indices")])

    def mask(layer: nn.Linear, r: int, **_) -> torch.Tensor:
        chosen = torch.zeros_like(layer.weight)
        chosen[tuple(next(places))] = 1
        return chosen

    config = peft.ShiraConfig(r=c["r"], target_modules=targets)
    config.mask_fn = mask
    return config


METHODS: dict[str, Method] = {
    "lora": Method(lora(), LORA),
    "lora_bitfit": Method(lora(bias="all"), LORA | {"bias": "base_layer.bias"}),
    "eva": Method(lora(init_lora_weights="eva", eva_config=peft.EvaConfig()), LORA),
    "pissa": Method(lora(init_lora_weights="pissa"), LORA),
    "olora": Method(lora(init_lora_weights="olora"), LORA),
    "dora": Method(lora(use_dora=True), LORA | {"m": "lora_magnitude_vector.default.weight"}),
    "qdora": Method(lora(use_dora=True), LORA | {"m": "lora_magnitude_vector.default.weight"}),
    "loftq": Method(loftq, LORA),
    "adalora": Method(adalora, {"P": "lora_B.default", "E": "lora_E.default", "Q": "lora_A.default"}),
    "vera": Method(
        lambda c, targets, t: peft.VeraConfig(r=c["r"], vera_dropout=c.get("dropout", 0.0), target_modules=targets),
        {"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"},
        {"A": "base_model.vera_A.default", "B": "base_model.vera_B.default"},
    ),
    "loha": Method(
        lambda c, targets, t: peft.LoHaConfig(
            r=c["r"],
            alpha=c["alpha"],
            rank_pattern=c.get("rank_pattern", {}),
            alpha_pattern=c.get("alpha_pattern", {}),
            target_modules=targets,
        ),
        {f"{letter}{i}": f"hada_w{i}_{letter.lower()}.default" for i in "12" for letter in "AB"},
    ),
    "lokr": Method(
        lambda c, targets, t: peft.LoKrConfig(
            r=c["r"],
            alpha=c["alpha"],
            decompose_both=c.get("decompose_both", False),
            decompose_factor=c.get("factor", -1),
            target_modules=targets,
        ),
        {
            f"{name}{part}": f"lokr_w{i}{part and '_' + part}.default"
            for i, name in ((1, "C"), (2, "D"))
            for part in ("", "a", "b")
        },
    ),
    "hira": Method(
        lambda c, targets, t: peft.HiraConfig(r=c["r"], hira_dropout=c.get("dropout", 0.0), target_modules=targets),
        {"A": "hira_A.default", "B": "hira_B.default"},
    ),
    "delora": Method(
        lambda c, targets, t: peft.DeloraConfig(r=c["r"], module_dropout=c.get("dropout", 0.0), target_modules=targets),
        {"A": "delora_A.default", "B": "delora_B.default", "strength": "delora_lambda.default"},
        {"w": "delora_w_norm.default"},
    ),
    "oft": Method(
        lambda c, targets, t: peft.OFTConfig(
            oft_block_size=c["block_size"],
            block_share=c["block_share"],
            use_cayley_neumann=c["cayley"] == "neumann",
            num_cayley_neumann_terms=c["terms"],
            target_modules=targets,
        ),
        {"S": "oft_R.default.weight"},
    ),
    "boft": Method(
        lambda c, targets, t: peft.BOFTConfig(
            boft_block_size=c["block_size"], boft_n_butterfly_factor=c["butterfly_factors"], target_modules=targets
        ),
        {"A": "boft_R.default", "s": "boft_s.default"},
    ),
    "hra": Method(lambda c, targets, t: peft.HRAConfig(r=c["r"], target_modules=targets), {"U": "hra_u.default"}),
    "road": Method(
        lambda c, targets, t: peft.RoadConfig(
            variant=f"road_{c['numbers']}", group_size=c["group_size"], target_modules=targets
        ),
        {"theta": "road_theta.default", "alpha": "road_alpha.default"},
    ),
    "c3a": Method(
        lambda c, targets, t: peft.C3AConfig(block_size=c["block_size"], target_modules=targets),
        {"kernel": "c3a_kernel.default"},
    ),
    "fourierft": Method(
        lambda c, targets, t: peft.FourierFTConfig(
            n_frequency=c["frequencies"],
            scaling=c["scaling"],
            random_loc_seed=c["places_seed"],
            n_frequency_pattern=c.get("frequencies_pattern", {}),
            target_modules=targets,
        ),
        {"c": "fourierft_spectrum.default"},
    ),
    "miss": Method(
        lambda c, targets, t: peft.MissConfig(
            r=c["r"],
            mini_r=c["mini_r"] or 1,
            init_weights="mini" if c["mini_r"] else True,
            miss_dropout=c.get("dropout", 0.0),
            target_modules=targets,
        ),
        {"M": "miss_block.default"},
    ),
    "vblora": Method(
        lambda c, targets, t: peft.VBLoRAConfig(
            **{name: c[name] for name in ("r", "num_vectors", "vector_length", "topk")},
            vblora_dropout=c.get("dropout", 0.0),
            target_modules=targets,
        ),
        {
            "logits_A": "vblora_logits_A.default",
            "logits_B": "vblora_logits_B.default",
            "bank": "base_model.vblora_vector_bank.default",
        },
    ),
    "randlora": Method(
        lambda c, targets, t: peft.RandLoraConfig(
            r=c["r"], randlora_alpha=c["alpha"], randlora_dropout=c.get("dropout", 0.0), target_modules=targets
        ),
        {"L": "randlora_lambda.default", "G": "randlora_gamma.default"},
        {"A": "base_model.randlora_A.default", "B": "base_model.randlora_B.default"},
    ),
    "ia3": Method(ia3, {"gain": "ia3_l.default"}),
    "llama_adapter": Method(llama_adapter, {"prompt": "adaption_prompt", "gate": "adaption_gate"}),
    "ln_tuning": Method(
        lambda c, targets, t: peft.LNTuningConfig(target_modules=targets),
        {"weight": "ln_tuning_layers.default.weight", "bias": "ln_tuning_layers.default.bias"},
    ),
    "shira": Method(shira, {"values": "shira_weight.default"}),
    "trainable_tokens": Method(
        lambda c, targets, t: peft.TrainableTokensConfig(token_indices=c["token_indices"], target_modules=targets),
        {"tokens": "trainable_tokens_delta.default"},
    ),
}


# ---- virtual tokens --------------------------------------------------------------------------------------------------

Packs = dict[str, tuple[list[str], Callable[[list[torch.Tensor]], torch.Tensor]]]
"""By the name of a parameter of PEFT's network: the tensors of a case that make it up, and how."""


def named(t: Tensors, letter: str) -> list[str]:
    return [name for name in t if name.rpartition(".")[2] == letter]


def only(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def prompt_tuning(c: dict, t: Tensors) -> tuple[peft.PeftConfig, Packs]:
    return peft.PromptTuningConfig(num_virtual_tokens=c["tokens"]), {"embedding.weight": (named(t, "prompt"), only)}


def multitask_prompt(c: dict, t: Tensors) -> tuple[peft.PeftConfig, Packs]:
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=c["tokens"], num_tasks=c["tasks"], num_ranks=c["ranks"]
    )
    of_tasks = {part: [named(t, f"{part}{k}")[0] for k in range(c["tasks"])] for part in ("cols", "rows")}
    packs = {f"prefix_task_{part}": (names, torch.stack) for part, names in of_tasks.items()}
    return config, {"embedding.weight": (named(t, "prompt"), only)} | packs


def p_tuning(c: dict, t: Tensors) -> tuple[peft.PeftConfig, Packs]:
    if c["encoder"] == "none":
        raise NotImplementedError("PEFT's P-tuning has a network")
    if "keep" in t:
        raise NotImplementedError("torch's LSTM draws its dropout itself")
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=c["tokens"],
        encoder_reparameterization_type=c["encoder"].upper(),
        encoder_hidden_size=c["hidden"],
    )

    def in_peft(letter: str) -> str:
        if letter.startswith("mlp"):
            return f"mlp_head.{2 * int(letter[3])}.{'bias' if letter.endswith('_bias') else 'weight'}"
        return "embedding.weight" if letter == "rows" else f"lstm_head.{letter}"

    found = [n for n in t if n.rpartition(".")[2].startswith(("rows", "mlp", "weight_", "bias_"))]
    return config, {in_peft(name.rpartition(".")[2]): ([name], only) for name in found}


def prefix_tuning(c: dict, t: Tensors) -> tuple[peft.PeftConfig, Packs]:
    """PEFT's rows have for each layer the keys of all heads, then the values."""
    hidden = c.get("hidden")
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=c["tokens"], prefix_projection=bool(hidden), encoder_hidden_size=hidden
    )
    if hidden:
        outer, outer_bias = named(t, "outer"), named(t, "outer_bias")
        return config, {
            "embedding.weight": (["shared.rows"], only),
            "transform.0.weight": (["shared.inner"], only),
            "transform.0.bias": (["shared.inner_bias"], only),
            "transform.2.weight": (outer, torch.cat),
            "transform.2.bias": (outer_bias, torch.cat),
        }

    def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x.transpose(0, 1).flatten(1) for x in tensors], dim=1)

    return config, {"embedding.weight": ([n for n in t if n.endswith((".keys", ".values"))], flat)}


NETWORKS: dict[str, Callable[[dict, Tensors], tuple[peft.PeftConfig, Packs]]] = {
    "prompt_tuning": prompt_tuning,
    "pre_embed": prompt_tuning,
    "multitask_prompt": multitask_prompt,
    "p_tuning": p_tuning,
    "prefix_tuning": prefix_tuning,
    "p_tuning_v2": prefix_tuning,
}
