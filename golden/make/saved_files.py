"""The tensors that adapters are written as in PEFT's files: names, shapes, and which letter each of them is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from adapter_files import files, lora
from common import Case, Compute, Draw, Tensors
from file_equations import FLAT, LETTERS, SHARED, START
from peft_files import File, given_model, written

LORA = {"r": 2, "alpha": 6.0}
OFT = {"block_size": 4, "block_share": False, "terms": 5}
OPTIONS: dict[str, dict] = {
    "lora-load-plain": LORA,
    "lora-load-layers": LORA,
    "lora-load-beside": LORA,
    "lora-load-patterns": LORA
    | {
        "rank_pattern": {r"mlp\..*": 3, "0.self_attn.k_proj": 1},
        "alpha_pattern": {"(gate|up)_proj": 1, "^model.layers.0.self_attn.q_proj": 2},
    },
    "lora-load-bias-all": LORA | {"bias": "all"},
    "lora-load-saved": LORA | {"modules_to_save": ["lm_head", "input_layernorm", "post_attention_layernorm", "norm"]},
    "lora-load-gpt2": LORA,
    "lora-load-tags": LORA,
    "lora-load-roberta": LORA,
    "lora-load-t5": LORA,
    "dora-load-plain": LORA,
    "adalora-load-plain": {"init_r": 4, "target_r": 2, "alpha": 6.0},
    "vera-load-plain": {"r": 3},
    "loha-load-patterns": LORA | {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 4}},
    "lokr-load-plain": {"r": 1, "alpha": 3.0},
    "lokr-load-both": {"r": 1, "alpha": 3.0, "decompose_both": True, "factor": 4},
    "hira-load-plain": {"r": 2},
    "delora-load-plain": {"r": 2},
    "ia3-load-plain": {"feedforward": ["model.layers.0.mlp.down_proj"]},
    "ia3-load-gpt2": {"feedforward": ["transformer.h.0.mlp.c_proj"]},
    "ln_tuning-load-gpt2": {},
    "shira-load-plain": {"r": 1},
    "trainable_tokens-load-tied": {"token_indices": [7, 3], "targets": ["model.embed_tokens", "lm_head"]},
    "prompt_tuning-load-plain": {"tokens": 3},
    "multitask_prompt-load-task": {"tokens": 3, "tasks": 3, "ranks": 2, "task": 0},
    "p_tuning-load-plain": {"tokens": 3, "encoder": "none"},
    "prefix_tuning-load-plain": {"tokens": 3},
    "llama_adapter-load-plain": {"tokens": 3, "count": 1, "compat": "peft"},
    "oft-load-series": OFT | {"cayley": "neumann"},
    "oft-load-exact": OFT | {"cayley": "exact"},
    "boft-load-plain": {"block_size": 2, "butterfly_factors": 3},
    "hra-load-plain": {"r": 2},
    "road-load-four": {"numbers": 4, "group_size": 4},
    "c3a-load-plain": {"block_size": 4},
    "fourierft-load-plain": {
        "frequencies": 7,
        "scaling": 150.0,
        "places_seed": 3,
        "frequencies_pattern": {"v_proj": 5},
    },
    "miss-load-mini": {"r": 2, "mini_r": 2},
    "vblora-load-plain": {"r": 2, "num_vectors": 5, "vector_length": 4, "topk": 2},
    "randlora-load-plain": {"r": 3, "alpha": 6.0},
}
"""By the case that reads such a file: the method's options beside its targets."""

NO_TARGETS = ("prompt_tuning", "multitask_prompt", "p_tuning", "prefix_tuning", "llama_adapter")


def cases() -> Iterator[Case]:
    warnings.simplefilter("ignore")
    for file in files():
        if file.id in OPTIONS:
            yield saved(file, file.variant, {})
        if file.id == "lora-load-layers":
            yield saved(file, "digits", {"adapter_name": "0"})
        if file.id == "lora-load-plain":
            yield saved(file, "zero", {"adapter_name": "0"})  # here the layer's number is the adapter's name, too
    both = lora("beside", "", BESIDE, settings={"num_hidden_layers": 2})
    yield saved(both, "beside", {"adapter_name": "0", "beside": "1"})


NAMED = "the adapter's name, a digit, is in no tensor's name"
BESIDE = "the names of both adapters are numbers of layers; PEFT 0.21 leaves the layer of the other's out"


def saved(file: File, variant: str, more: dict) -> Case:
    case_id = f"{file.method}-save-{variant}"
    draw, options = Draw(case_id), OPTIONS[file.id]
    base, model, _ = given_model(file, draw)
    _, tensors, _ = written(file, base, draw)
    letters: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        letters |= taken_apart(file, model, name, array)
    wrapped = [
        name.rpartition(".")[0] for name in letters if name.rpartition(".")[2] in LETTERS.get(file.method, {}).values()
    ]
    if not wrapped:  # tensors of the model's own
        wrapped = [name.rpartition(".")[0] for name in letters]
    targets = {} if file.method in NO_TARGETS or "targets" in options else {"targets": list(dict.fromkeys(wrapped))}
    return Case(
        id=case_id,
        kind="method",
        name=file.method,
        at="save",
        level="interop",
        comment=NAMED if more.keys() == {"adapter_name"} else file.comment,
        flags=("AdapterNames",) if more else tuple(flag for flag in file.flags.split() if flag in OF_NAMES),
        spec="files: PEFT 0.21.2; golden/README.md, Methods",
        config={"model": model, **options, **targets, **more},
        inputs=letters,
        compute=put_together(file, model, {name: array.shape for name, array in tensors.items()}),
        exact=tuple(f"file.{name}" for name in tensors),
    )


OF_NAMES = (
    "KeyNames",
    "TransposedFactor",
    "MagnitudeName",
    "ModulesToSave",
    "SavedBias",
    "RankPattern",
    "Ia3InputSide",
    "PrefixOrder",
    "OftDirection",
    "VeraShared",
    "TokensOfHead",
)


def place_of(method: str, name: str) -> tuple[str, str] | None:
    """(site, letter) of a tensor that is a letter of the method's own."""
    for end, letter in LETTERS.get(method, {}).items():
        if name.startswith(START) and name.endswith(f".{end}"):
            return name.removeprefix(START).removesuffix(f".{end}"), letter
    return None


def ours(file: File, model: dict, name: str) -> list[str]:
    """The names of what makes up a tensor of a file; several of a prefix."""
    gpt2 = model["model_type"] == "gpt2"
    embed = "transformer.wte" if gpt2 else "model.embed_tokens"
    if place := place_of(file.method, name):
        return [".".join(place)]
    if (shared := "base_model." + name.rpartition(".")[2]) in SHARED:
        return [f"shared.{SHARED[shared]}"]
    if name.endswith("trainable_tokens_delta"):
        return [f"{embed}.tokens"]
    if name == "prompt_embeddings" and file.method == "prefix_tuning":
        places = [f"model.layers.{i}.self_attn.attend" for i in range(model["num_hidden_layers"])]
        return [f"{place}.{letter}" for place in places for letter in ("keys", "values")]
    if name == "prompt_embeddings" and file.method == "p_tuning":
        return [f"{embed}.rows"]
    if name.startswith("prefix_task_"):  # a row for each task
        return [f"{embed}.{name.removeprefix('prefix_task_')}"]
    if name == "prompt_embeddings":
        return [f"{embed}.prompt"]
    if ".adaption_" in name:
        return [name.removeprefix(START).replace(".adaption_", ".attend.")]
    return [name.removeprefix(START).replace(".base_layer", "").replace(".ln_tuning_layers", "")]


def taken_apart(file: File, model: dict, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The letters in a tensor of a file."""
    names = ours(file, model, name)
    if len(names) > 1:
        heads = model["num_key_value_heads"]
        pairs = array.reshape(len(array), len(names), heads, -1).transpose(1, 2, 0, 3)
        return {name: np.ascontiguousarray(part) for name, part in zip(names, pairs, strict=True)}
    if name.startswith("prefix_task"):
        return {f"{names[0]}{number}": part for number, part in enumerate(array)}
    (own,) = names
    if own.rpartition(".")[2] in FLAT:
        array = array.reshape(-1)
    elif own.endswith(".attend.prompt"):
        array = array[0]
    return {own: array}


def put_together(file: File, model: dict, shapes: dict[str, tuple[int, ...]]) -> Compute:
    """The tensors of the file, and how many there are."""
    negated = file.method == "oft" and not file.config.use_cayley_neumann

    def tensor(t: Tensors, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        names = ours(file, model, name)
        if name.startswith("prefix_task_"):
            return torch.stack([t[f"{names[0]}{task}"] for task in range(shape[0])])
        parts = [t[own] for own in names]
        if len(parts) > 1:
            return torch.stack(parts).permute(2, 0, 1, 3).reshape(shape)
        return (-parts[0] if negated else parts[0]).reshape(shape)

    def compute(t: Tensors) -> Tensors:
        found = {f"file.{name}": tensor(t, name, shape) for name, shape in shapes.items()}
        return found | {"count": torch.tensor(len(found), dtype=torch.int32)}

    return compute
