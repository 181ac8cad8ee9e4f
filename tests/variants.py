"""Every method in several variants, attached to tiny models, and which quantizers can do what: what tests share."""

import numpy as np
import sources
import tiny

from refpeft import sites
from refpeft.quant import Quantizer, make_quantizer

# name: (method, options)
VARIANTS = {
    "full": ("full", {}),
    "lora": ("lora", {"r": 3}),
    "lora-everywhere": ("lora", {"targets": ["all-linear", "@embed", "@head"], "rslora": True, "init": "gaussian"}),
    "lora-fa": ("lora", {"freeze_A": True, "targets": ["@q", "@embed"]}),
    "lora-patterns": ("lora", {"targets": "all-linear", "rank_pattern": {"mlp.*": 2}, "alpha_pattern": {".*1.*": 3}}),
    "lora-saved": ("lora", {"targets": "all-linear", "modules_to_save": ["@norm", "@head", "@down"]}),
    "adalora": ("adalora", {"init_r": 4, "target_r": 2, "alpha": 6}),
    "adalora-official": ("adalora", {"init_r": 3, "target_r": 3, "targets": "all-linear", "compat": "official"}),
    "eva": ("eva", {"r": 3, "rslora": True, "alpha_pattern": {".*1.*": 3}}),
    "pissa": ("pissa", {"r": 3, "alpha_pattern": {".*1.*": 2}}),
    "olora": ("olora", {"r": 3, "rslora": True, "rank_pattern": {"v_proj|c_attn": 2}}),
    "vera": ("vera", {"r": 5, "d_initial": 0.5, "targets": ["@q", "@v", "@down"]}),
    "loha": ("loha", {"r": 2, "rank_pattern": {".*1.*": 3}, "alpha_pattern": {"v_proj|c_attn": 3}}),
    "loha-kaiming": ("loha", {"r": 5, "init": "kaiming", "targets": "all-linear"}),
    "lokr": ("lokr", {"r": 2, "alpha": 3.0}),
    "lokr-both": ("lokr", {"r": 1, "decompose_both": True, "factor": 6, "init": "peft", "targets": "all-linear"}),
    "krona": ("krona", {"scale": 2.0, "a_in": 3}),
    "krona-residual": ("krona", {"residual": True, "targets": ["@mlp_out"]}),
    "hira": ("hira", {"r": 3, "rank_pattern": {"v_proj|c_attn": 2}}),
    "delora": ("delora", {"r": 3, "lambda_initial": 0.5, "lambda_pattern": {".*1.*": 2}, "targets": "all-linear"}),
    "dora": ("dora", {"r": 3, "rslora": True, "alpha_pattern": {".*1.*": 3}}),
    "oft": ("oft", {"block_size": 4}),
    "oft-neumann": ("oft", {"block_size": 6, "cayley": "neumann", "block_share": True}),
    "boft": ("boft", {}),
    "boft-one": ("boft", {"block_size": 3, "butterfly_factors": 1, "targets": ["@q", "@o"]}),
    "hra": ("hra", {"r": 4}),
    "road": ("road", {"group_size": 4}),
    "road-four": ("road", {"numbers": 4, "group_size": 6, "targets": ["@q", "@o"]}),
    "c3a": ("c3a", {"block_size": 4, "block_size_pattern": {"mlp.*": 8}, "targets": "all-linear"}),
    "fourierft": ("fourierft", {"frequencies": 9, "scaling": 40}),
    "miss": ("miss", {"r": 7}),
    "miss-mini": ("miss", {"r": 8, "mini_r": 6, "dropout": 0.2, "targets": ["@q", "@o"]}),
    "vblora": ("vblora", {"vector_length": 6, "num_vectors": 5, "r": 2, "topk": 3}),
    "randlora": ("randlora", {"r": 5, "alpha": 10, "targets": ["@q", "@v", "@down"]}),
    "intrinsic_said": ("intrinsic_said", {"d": 60}),
    "intrinsic_said-did": ("intrinsic_said", {"d": 30, "said": False, "targets": ["all-linear", "@embed", "@head"]}),
    "loftq": ("loftq", {"r": 3, "iterations": 2}),
    "qdora": ("qdora", {"r": 3, "alpha_pattern": {".*1.*": 3}}),
    "ia3": ("ia3", {}),
    "ia3-other": ("ia3", {"targets": ["@q", "@up"], "feedforward": ["@up"]}),
    "bitfit-created": ("bitfit", {"create": True}),
    "ln_tuning": ("ln_tuning", {}),
    "houlsby": ("houlsby", {"size": 5}),
    "houlsby-relu": ("houlsby", {"size": 5, "activation": "relu", "norms": False, "layers": [1]}),
    "pfeiffer": ("pfeiffer", {"size": 5}),
    "pfeiffer-inside": ("pfeiffer", {"size": 5, "activation": "gelu", "targets": ["@mlp_out"]}),
    "parallel": ("parallel", {"size": 5}),
    "parallel-series": (
        "parallel",
        {"size": 5, "placement": "series", "learn_scale": True, "targets": ["@q"]},
    ),
    "lin": ("lin", {"size": 5}),
    "adapterdrop": ("adapterdrop", {"size": 5}),
    "adapterdrop-first": ("adapterdrop", {"size": 5, "robust": False, "drop": 1}),
    "sparse_adapter": ("sparse_adapter", {"size": 5, "prune": "random"}),
    "sparse_adapter-large": ("sparse_adapter", {"size": 20, "sparsity": 0.75, "prune": "magnitude"}),
    "adamix": ("adamix", {"size": 5}),
    "adamix-apart": ("adamix", {"size": 4, "modules": 3, "share": "none", "targets": ["@block_out"]}),
    "adapterfusion": ("adapterfusion", {"size": 5, "adapters": sources.bottlenecks(3)}),
    "compacter": ("compacter", {"size": 8, "rank": 2}),
    "compacter_pp": ("compacter_pp", {"size": 6, "n": 2, "norms": False}),
    "phm_adapter": ("phm_adapter", {"size": 6, "n": 3}),
    "top_layers": ("top_layers", {"count": 1}),
    "by_type": ("by_type", {}),
    "by_type-others": ("by_type", {"types": ["norm", "embedding", "head"]}),
    "rows": ("rows", {"rows": [7, 2], "targets": "all-linear"}),
    "rows-longest": ("rows", {"count": 3}),
    "shira": ("shira", {"r": 3}),
    "shira-magnitude": ("shira", {"r": 2, "mask": "magnitude", "targets": "all-linear"}),
    "fish_mask": ("fish_mask", {"share": 0.05}),
    "diff_pruning": ("diff_pruning", {"share": 0.1}),
    "diff_pruning-gated": ("diff_pruning", {"prune": False, "alpha": 0.3}),
    "diff_pruning-plain": ("diff_pruning", {"prune": False, "alpha": -0.2, "structured": False, "targets": ["@q"]}),
    "far": ("far", {"share": 0.2}),
    "lt_sft": ("lt_sft", {"share": 0.1, "l1": 0.1}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": [5, 2, 30]}),
    "prompt_tuning": ("prompt_tuning", {"tokens": 3}),
    "spot": ("spot", {"tokens": 3, "sources": sources.prompts(1)}),
    "spot-similar": ("spot", {"tokens": 3, "sources": sources.prompts(3), "task": sources.prompts(4)[3], "top": 2}),
    "multitask_prompt": ("multitask_prompt", {"tokens": 3, "tasks": 3, "task": 1, "ranks": 2}),
    "ipt": ("ipt", {"tokens": 3, "d": 5, "hidden": 7, "prompts": sources.prompts(3), "fit_steps": 20}),
    "ipt-random": ("ipt", {"tokens": 3, "d": 9, "hidden": 4}),
    "p_tuning": ("p_tuning", {"tokens": 3, "hidden": 5, "dropout": 0.2}),
    "p_tuning-mlp": ("p_tuning", {"tokens": 3, "encoder": "mlp"}),
    "p_tuning-none": ("p_tuning", {"tokens": 3, "encoder": "none"}),
    "p_tuning_v2": ("p_tuning_v2", {"tokens": 3, "dropout": 0.1}),
    "p_tuning_v2-mlp": ("p_tuning_v2", {"tokens": 3, "hidden": 5, "init_std": 0.3}),
    "prefix_tuning": ("prefix_tuning", {"tokens": 3, "init_std": 0.5}),
    "prefix_tuning-mlp": ("prefix_tuning", {"tokens": 3, "hidden": 5}),
    "prefix_tuning-zero": ("prefix_tuning", {"tokens": 3, "hidden": 4, "positions": "zero"}),
    "pre_embed": ("pre_embed", {"tokens": 3}),
    "pre_layer": ("pre_layer", {"tokens": 3, "init_std": 0.5}),
    "attention_fusion": ("attention_fusion", {}),
    "attention_fusion-add": ("attention_fusion", {"output": "add"}),
    "ladder_side": ("ladder_side", {"r": 3}),
    "ladder_side-drop": ("ladder_side", {"r": 1, "temperature": 1.0, "drop": [0]}),
    "llama_adapter": ("llama_adapter", {"tokens": 3}),
    "llama_adapter-peft": ("llama_adapter", {"tokens": 3, "count": 1, "compat": "peft"}),
    "mam": ("mam", {"tokens": 3, "hidden": 5, "size": 5}),
    "mam-flat": ("mam", {"tokens": 3, "hidden": 0, "size": 5, "layers": [1]}),
    "lora_bitfit": ("lora_bitfit", {"r": 3, "create": True}),
    "s4": ("s4", {"strategies": ["AL", "PBL"], "groups": [1, 1], "create": True}),
    "unipelt": ("unipelt", {"r": 3, "tokens": 3, "hidden": 5, "size": 5}),
    "unipelt-flat": (
        "unipelt",
        {"tokens": 2, "size": 5, "hidden": 0, "layers": [1], "targets": ["@attend", "@attn_out", "@k"]},
    ),
}
WITH_BIASES = {
    "bitfit": ("bitfit", {}),
    "lora-bias": ("lora", {"bias": "lora_only"}),
    "lora-all-biases": ("lora", {"bias": "all", "modules_to_save": ["@k"], "targets": ["@q", "@o"]}),
}
TO_FIT = {"trainable_tokens": {"token_indices": [5, 2]}, "oft": {"block_size": 4}, "road": {"group_size": 4}}
TO_FIT |= {"hira": {"r": 8}, "lokr": {"r": 2}}
TO_FIT |= {"miss": {"r": 5}, "vblora": {"vector_length": 4, "num_vectors": 7}}
TO_FIT |= {"randlora": {"r": 5}, "intrinsic_said": {"d": 60}}
TO_FIT |= {"adapterfusion": {"size": 5, "adapters": sources.bottlenecks(2)}}
TO_FIT |= {"mam": {"hidden": 6, "size": 5}}
TO_FIT |= {"lora_bitfit": {"create": True}, "s4": {"strategies": ["AP", "PBL"], "groups": [1, 1], "create": True}}
TO_FIT |= {"spot": {"tokens": 3, "sources": sources.prompts(1)}}
TO_FIT |= {"c3a": {"block_size": 4}, "fourierft": {"frequencies": 50}, "ladder_side": {"r": 1}}
"""Options without which a method's sizes do not fit tiny models."""
SIMPLER_IN_FILES = {"eva", "qdora", "lora-fa", "p_tuning", "p_tuning-mlp", "p_tuning_v2-mlp", "prefix_tuning-mlp"}
"""Variants whose files, in PEFT's form, have what a network gave, not the network, or not what made first values."""
FAMILIES = ("llama", "tied", "qwen2", "gpt2")
CASES = [(family, name) for family in FAMILIES for name in VARIANTS] + [
    (family, name)
    for family in ("qwen2", "gpt2")
    for name in WITH_BIASES
    if (family, name) != ("gpt2", "lora-all-biases")
]


def bare(family: str, name: str, **model):
    """The model that `attached` attaches to: quantized where the method asks for that."""
    return tiny.model(family, **({"quantizer": needed_quantizer((VARIANTS | WITH_BIASES)[name][0])} | model))


def attached(family: str, name: str, scramble: bool = True, **model):
    method, options = (VARIANTS | WITH_BIASES)[name]
    built = bare(family, name, **model)
    adapter = sites.attach(built, method, options)
    if scramble:
        tiny.scramble(adapter)
    return built, adapter


def needed_quantizer(method: str) -> Quantizer | None:
    """One that the method cannot do without; None of those that take dense weights."""
    return quantizer() if method in ("loftq", "qdora") else None


def quantizer(name: str = "nf4", double_quant: bool = True, **options) -> Quantizer:
    return make_quantizer(name, options, double_quant)


def has_constants(name: str, options: dict | None = None) -> bool:
    """Whether a quantizer has what double quantization quantizes: arrays of float32 constants."""
    parts = make_quantizer(name, options).pack(np.ones((1, 32), "f4"))
    return any(part.dtype == np.float32 and part.ndim for part in parts.values())
