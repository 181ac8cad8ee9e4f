"""Adapters' files as PEFT 0.21 writes them: what a model computes with one, and which tensors an adapter becomes.

PEFT's save_pretrained says which tensors there are, their shapes and adapter_config.json; the values are drawn, so that
none is a first value. Expected is what the methods' equations make of them; the witness is PEFT reading the file.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import heads
import numpy as np
import peft
import peft_witness
import structured  # noqa: F401, in which PEFT gets more than one butterfly factor
import torch
from common import Case, Compute, Draw, Tensors, default_dtype
from encoders import BERT
from file_equations import by_equation
from methods import SMALL_GPT2, SMALL_LLAMA
from models import PADDED, draw_weights, precision, real_only, transformers_model
from safetensors.numpy import load_file, save_file

TASKS = {None: "CAUSAL_LM", heads.SEQUENCE: "SEQ_CLS", heads.TOKENS: "TOKEN_CLS", heads.MASKED: None}
ONE = {"vocab_size": 12, "num_hidden_layers": 1}
SETTINGS = {
    "llama": SMALL_LLAMA | ONE,
    "qwen2": {k: v for k, v in SMALL_LLAMA.items() if k != "head_dim"} | ONE | {"tie_word_embeddings": True},
    "gpt2": SMALL_GPT2 | {"vocab_size": 12, "n_layer": 1},
    "bert": BERT | {"num_hidden_layers": 1, "num_labels": 3},
}
PRUNED = [True, False, True, False], [False, True, True, True]
QV, QDOWN = ["q_proj", "v_proj"], ["q_proj", "down_proj"]


@dataclass(frozen=True)
class File:
    """One adapter's file; `config` without its task_type."""

    method: str
    variant: str
    config: peft.PeftConfig
    family: str = "llama"
    settings: dict = field(default_factory=dict)
    flags: str = "KeyNames"
    comment: str = ""
    head: str | None = None
    agrees: bool = True  # PEFT computes the same
    left: dict[str, list[bool]] = field(default_factory=dict)  # which of AdaLoRA's triplets there are

    @property
    def id(self) -> str:
        return f"{self.method}-load-{self.variant}"


def lora(
    variant: str, flags: str, comment: str = "", family: str = "llama", method: str = "lora", **options: Any
) -> File:
    more = {name: options.pop(name) for name in ("settings", "head", "agrees") if name in options}
    options = {"r": 2, "lora_alpha": 6, "target_modules": QV} | options
    return File(method, variant, peft.LoraConfig(**options), family, flags=f"KeyNames {flags}", comment=comment, **more)


def files() -> Iterator[File]:
    yield lora("plain", "Scaling TransposedFactor")
    yield lora("rslora", "RsLoraScale", target_modules="all-linear", use_rslora=True)
    yield lora(
        "patterns",
        "RankPattern AlphaPattern",
        "keys are regular expressions for the ends of names, from a dot on",
        target_modules="all-linear",
        rank_pattern={r"mlp\..*": 3, "0.self_attn.k_proj": 1},
        alpha_pattern={"(gate|up)_proj": 1, "^model.layers.0.self_attn.q_proj": 2},
    )
    yield lora(
        "layers", "TargetNames", "the second layer alone", settings={"num_hidden_layers": 2}, layers_to_transform=[1]
    )
    yield lora(
        "excluded", "TargetNames", target_modules="all-linear", exclude_modules=["down_proj", "self_attn.v_proj"]
    )
    yield lora("expression", "TargetNames", "one regular expression", target_modules=r".*\.[0-9]+\.mlp\.(up|down)_proj")
    biased = {"attention_bias": True, "mlp_bias": True}
    yield lora("bias", "SavedBias", "biases of the targets are in the file", settings=biased, bias="lora_only")
    yield lora(
        "bias-all",
        "SavedBias",
        "every bias, in the file as base_layer.bias at targets",
        "gpt2",
        target_modules=["c_attn"],
        bias="all",
    )
    yield lora(
        "embedding",
        "EmbeddingFactors",
        "A is (r, vocab), B (dim, r); the table is in the file, too",
        target_modules=["embed_tokens", "v_proj"],
    )
    yield lora("saved", "ModulesToSave", "whole layers are in the file", modules_to_save=["lm_head", "norm"])
    yield lora("tied", "TiedEmbedding", "the head shares the table", "qwen2")
    yield lora(
        "gpt2",
        "FanInFanOut",
        "weights are (in, out), the file's factors as ever",
        "gpt2",
        target_modules=["c_attn", "c_proj"],
    )
    head = {"family": "bert", "target_modules": ["query", "value"]}
    yield lora(
        "classifier",
        "ModulesToSave Pooler",
        "the head comes with the file, the pooler with the model",
        head=heads.SEQUENCE,
        **head,
    )
    yield lora("tags", "ModulesToSave", "the head comes with the file", head=heads.TOKENS, **head)
    yield lora("plain", "DoraNormOfRows MagnitudeName", "alpha is not r", method="dora", use_dora=True)
    yield lora(
        "gpt2", "DoraNormOfRows MagnitudeName FanInFanOut", "", "gpt2", "dora", target_modules=["c_attn"], use_dora=True
    )
    fitted = "the frozen weight is without the first values, which a reader computes again"
    yield lora("plain", "PissaRank FittedAgain", fitted, method="pissa", init_lora_weights="pissa", agrees=False)
    yield lora("plain", "OloraScale FittedAgain", fitted, method="olora", init_lora_weights="olora", agrees=False)
    yield lora(
        "gpt2",
        "OloraScale FittedAgain FanInFanOut",
        fitted + "; PEFT 0.21 cannot here",
        "gpt2",
        "olora",
        target_modules=["c_attn"],
        init_lora_weights="pissa",
        agrees=False,
    )
    adalora = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9}
    yield File("adalora", "plain", peft.AdaLoraConfig(**adalora, target_modules=QV), flags="KeyNames AdaloraScale")
    left = {f"model.layers.0.self_attn.{name}.lora_E": flags for name, flags in zip(QV, PRUNED, strict=True)}
    yield File(
        "adalora",
        "pruned",
        peft.AdaLoraConfig(**adalora, target_modules=QV),
        flags="KeyNames AdaloraScale RankPattern",
        left=left,
        comment="rank_pattern has flags of triplets; the scale is that of init_r",
    )
    yield File(
        "vera",
        "plain",
        peft.VeraConfig(r=3, target_modules=QDOWN),
        flags="KeyNames VeraShared",
        comment="A and B of the largest sides, once",
    )
    drawn = peft.VeraConfig(r=3, target_modules=QDOWN, save_projection=False, projection_prng_key=11)
    yield File(
        "vera",
        "drawn",
        drawn,
        flags="DrawnAgain VeraShared",
        comment="A and B are what torch draws from the seed in the config, on a CPU",
    )
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 4}}
    yield File(
        "loha",
        "patterns",
        peft.LoHaConfig(r=2, alpha=6, target_modules=QV, **patterns),
        flags="KeyNames RankPattern AlphaPattern HadamardOfProducts",
    )
    yield File("lokr", "plain", peft.LoKrConfig(r=1, alpha=3, target_modules=QDOWN), flags="KeyNames KroneckerOrder")
    yield File(
        "lokr",
        "both",
        peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=QDOWN),
        flags="KeyNames KroneckerOrder",
    )
    yield File("hira", "plain", peft.HiraConfig(r=2, target_modules=QV))
    yield File(
        "delora",
        "plain",
        peft.DeloraConfig(r=2, target_modules=QV),
        flags="KeyNames DeloraNorms",
        comment="the norms of the frozen weight are those in the file",
    )
    yield File(
        "ia3",
        "plain",
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        flags="KeyNames Ia3InputSide",
        comment="(out, 1) or (1, in)",
    )
    yield File(
        "ia3",
        "gpt2",
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        "gpt2",
        flags="KeyNames Ia3InputSide FanInFanOut",
    )
    yield File("ln_tuning", "plain", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    yield File("ln_tuning", "gpt2", peft.LNTuningConfig(target_modules=["ln_1", "ln_f"]), "gpt2")
    yield File(
        "shira",
        "plain",
        peft.ShiraConfig(r=1, target_modules=["q_proj"]),
        flags="KeyNames SparseIndices",
        comment="places are in the file",
    )
    yield File(
        "trainable_tokens",
        "plain",
        peft.TrainableTokensConfig(token_indices=[7, 3]),
        flags="KeyNames TokensReplace",
        comment="rows in the order of token_indices",
    )
    yield File(
        "trainable_tokens",
        "tied",
        peft.TrainableTokensConfig(token_indices=[7, 3]),
        "qwen2",
        flags="KeyNames TokensReplace TokensOfHead",
        comment="the head, which is tied, has the rows as well",
    )
    yield File(
        "trainable_tokens",
        "masked",
        peft.TrainableTokensConfig(token_indices=[7, 3], target_modules=["word_embeddings"]),
        "bert",
        flags="KeyNames TokensReplace TokensOfHead",
        comment="the tied head has a bias, too; PEFT 0.21 leaves it out",
        head=heads.MASKED,
        agrees=False,
    )
    yield File("prompt_tuning", "plain", peft.PromptTuningConfig(num_virtual_tokens=3), flags="KeyNames PromptFirst")
    yield File(
        "multitask_prompt",
        "task",
        peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=2),
        flags="KeyNames PromptFirst TaskFactor",
        comment="the first of three tasks",
    )
    yield File(
        "p_tuning",
        "plain",
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5),
        flags="KeyNames PromptFirst",
        comment="the file has what the network gave",
    )
    yield File(
        "prefix_tuning",
        "plain",
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        settings={"num_hidden_layers": 2, "num_key_value_heads": 2},
        flags="KeyNames PrefixOrder PrefixPositions",
        comment="columns: layer by layer keys of all heads, then values",
    )
    yield File(
        "prefix_tuning",
        "gqa",
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        flags="KeyNames PrefixOrder PrefixGroupedQuery",
    )
    yield File(
        "prefix_tuning",
        "gpt2",
        peft.PrefixTuningConfig(num_virtual_tokens=3),
        "gpt2",
        flags="KeyNames PrefixOrder PrefixPositions",
    )
    yield File(
        "llama_adapter",
        "plain",
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
        settings={"num_hidden_layers": 2},
        flags="KeyNames AdaptionGate AdaptionSoftmax",
        comment="the last layer alone",
    )
    yield File(
        "oft", "series", peft.OFTConfig(oft_block_size=4, target_modules=QV), flags="KeyNames OftSeries OftDirection"
    )
    yield File(
        "oft",
        "exact",
        peft.OFTConfig(oft_block_size=4, target_modules=QV, use_cayley_neumann=False),
        flags="KeyNames OftDirection",
        comment="PEFT's exact form turns the other way than its series",
    )
    yield File(
        "oft",
        "share",
        peft.OFTConfig(oft_block_size=4, target_modules=QV, block_share=True),
        flags="KeyNames SharedBlocks",
    )
    yield File(
        "boft",
        "plain",
        peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=["q_proj"]),
        flags="KeyNames ButterflyOrder",
        comment="three factors; PEFT 0.21 computes one where it cannot compile for CUDA",
    )
    yield File("hra", "plain", peft.HRAConfig(r=2, target_modules=QV), flags="KeyNames ReflectionOrder")
    yield File(
        "road", "plain", peft.RoadConfig(variant="road_1", group_size=4, target_modules=QV), flags="KeyNames RoadPlanes"
    )
    yield File(
        "road", "four", peft.RoadConfig(variant="road_4", group_size=4, target_modules=QV), flags="KeyNames RoadPlanes"
    )
    yield File(
        "c3a",
        "plain",
        peft.C3AConfig(block_size=4, target_modules=QV),
        flags="KeyNames CirculantDirection CirculantScale",
    )
    yield File(
        "fourierft",
        "plain",
        peft.FourierFTConfig(n_frequency=7, random_loc_seed=3, n_frequency_pattern={"v_proj": 5}, target_modules=QV),
        flags="KeyNames DrawnAgain FourierPlaces",
        comment="places are what torch draws from the seed in the config",
    )
    yield File("miss", "plain", peft.MissConfig(r=2, target_modules=QV), flags="KeyNames MissShards")
    yield File(
        "miss",
        "mini",
        peft.MissConfig(r=2, mini_r=2, init_weights="mini", target_modules=QV),
        flags="KeyNames MissShards",
    )
    yield File(
        "vblora",
        "plain",
        peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=4, target_modules=QV),
        flags="KeyNames TopOfLogits",
        comment="the bank is there once",
    )
    yield File(
        "randlora",
        "plain",
        peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["q_proj"]),
        flags="KeyNames RandomColumns",
        comment="A and B are there once for the model, and again in every layer",
    )


def cases() -> Iterator[Case]:
    warnings.simplefilter("ignore")
    for file in files():
        yield loaded(file)


# ---- reading ---------------------------------------------------------------------------------------------------


def base_of(file: File) -> torch.nn.Module:
    """transformers' model, with a head for labels where the file is for one."""
    settings = SETTINGS[file.family] | file.settings
    if file.head:
        return heads.transformers_model(file.family, file.head, settings)
    return transformers_model(file.family, settings)


def given_model(file: File, draw: Draw) -> tuple[torch.nn.Module, dict, dict[str, np.ndarray]]:
    """(the model, its config.json, its weights)"""
    base = base_of(file)
    weights = draw_weights(draw, {name: tuple(p.shape) for name, p in base.named_parameters()})
    base.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False)
    base.config.architectures = [type(base).__name__]
    return base, json.loads(base.config.to_json_string()), weights


def loaded(file: File) -> Case:
    draw = Draw(file.id)
    base, model, weights = given_model(file, draw)
    config, tensors, buffers = written(file, base, draw)
    inputs = {"ids": draw.integers(1, 12, 2, 7)}
    if file.head:
        inputs["segments"] = np.int32(PADDED)
        inputs["ids"] = (inputs["ids"] * (inputs["segments"] >= 0)).astype(np.int32)
    ours = by_equation(file.method, model, config, buffers, file.head)
    return Case(
        id=file.id,
        kind="method",
        name=file.method,
        at="load",
        level="interop",
        comment=file.comment,
        flags=tuple(file.flags.split()),
        spec="files: PEFT 0.21.2; golden/README.md, Methods",
        config={"model": model, "adapter_config": config} | ({"task": 0} if file.variant == "task" else {}),
        inputs=inputs | weights | {f"file.{name}": array for name, array in tensors.items()},
        compute=ours,
        witnesses={peft_witness.VERSION: by_peft(file, config)} if file.agrees else {},
    )


def written(file: File, base: torch.nn.Module, draw: Draw) -> tuple[dict, dict[str, np.ndarray], Tensors]:
    """(adapter_config.json, the file with drawn values, the matrices that it leaves to a seed, by letter)."""
    torch.manual_seed(0)
    file.config.task_type = TASKS[file.head]
    adapted = peft.get_peft_model(base, file.config)
    if file.variant == "pruned":  # as after training
        adapted.peft_config["default"].rank_pattern = file.left
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    ends: dict[str, np.ndarray] = {}
    for name in sorted(tensors):
        end = name.rpartition(".")[2]
        if name.endswith("base_layer.weight"):  # frozen, and written nevertheless
            continue
        if end in ("randlora_A", "randlora_B", "trainable_tokens_delta"):  # one array, several times
            tensors[name] = ends.setdefault(end, some(draw, name, tensors[name]))
        else:
            tensors[name] = some(draw, name, tensors[name])
    if file.method == "olora":
        config["init_lora_weights"] = "olora"
    config = {
        key: sorted(value) if key.endswith("modules") and isinstance(value, list) else value
        for key, value in config.items()
    }
    drawn = {}
    if file.variant == "drawn":
        buffers = {name.rpartition(".vera_")[2]: buffer for name, buffer in adapted.named_buffers()}
        drawn = {letter: buffers[f"{letter}.default"].clone() for letter in "AB"}
    return config, tensors, drawn


def some(draw: Draw, name: str, array: np.ndarray) -> np.ndarray:
    """Random values in place of those in a file, such that every part matters."""
    if array.dtype.kind != "f":
        return array
    values = draw.normal(*array.shape, scale=0.3)
    if name.endswith(("magnitude_vector", "w_norm")):
        return np.abs(values) + np.float32(0.5)
    if name.endswith(("ia3_l", "boft_s", "road_alpha")) or (
        ("norm" in name or "ln_" in name) and name.endswith("weight")
    ):
        return values + np.float32(1)
    return values * np.float32(8 if name.endswith("c3a_kernel") else 3 if "logits" in name else 1)


def by_peft(file: File, config: dict) -> Compute:
    """The same by PEFT, which reads the file."""

    def compute(t: Tensors) -> Tensors:
        with tempfile.TemporaryDirectory() as folder:
            tensors = {n.removeprefix("file."): as_written(a) for n, a in t.items() if n.startswith("file.")}
            save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            with precision():
                base = base_of(file)
                base.load_state_dict({n: a for n, a in t.items() if not n.startswith("file.")}, strict=False)
            with default_dtype(torch.float32):  # in which matrices are drawn
                adapted = peft.PeftModel.from_pretrained(base, folder)
            adapted = adapted.to(torch.get_default_dtype()).eval()
        given = {"attention_mask": (t["segments"] >= 0).long()} if "segments" in t else {}
        given |= {"task_ids": torch.zeros(len(t["ids"]), dtype=torch.long)} if "task" in file.variant else {}
        with precision():
            logits = adapted(input_ids=t["ids"].long(), **given).logits
        if logits.ndim == 3:
            logits = real_only(logits[:, -t["ids"].shape[1] :], t.get("segments"))
        return {"logits": logits}

    return compute


def as_written(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
