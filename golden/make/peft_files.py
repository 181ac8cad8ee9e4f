"""Adapters' files as PEFT 0.21 writes them: what a model computes with one.

PEFT's save_pretrained says which tensors there are, their shapes and adapter_config.json; the values are drawn, so that
none is a first value. Expected is what the methods' equations make of them; the witness is PEFT reading the file.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import encoders
import heads
import numpy as np
import peft
import peft_witness
import structured  # noqa: F401, in which PEFT gets more than one butterfly factor
import torch
from common import Case, Compute, Draw, Tensors, default_dtype
from encoders import BERT, DEBERTA, T5
from file_equations import by_equation
from methods import SMALL_GPT2, SMALL_LLAMA
from models import PADDED, draw_weights, precision, real_only, transformers_model
from safetensors.numpy import load_file, save_file

SEQ2SEQ = "ForConditionalGeneration"
TASKS = {
    None: "CAUSAL_LM",
    heads.SEQUENCE: "SEQ_CLS",
    heads.TOKENS: "TOKEN_CLS",
    heads.MASKED: None,
    SEQ2SEQ: "SEQ_2_SEQ_LM",
}
ONE = {"vocab_size": 12, "num_hidden_layers": 1}
SETTINGS = {
    "llama": SMALL_LLAMA | ONE,
    "qwen2": {k: v for k, v in SMALL_LLAMA.items() if k != "head_dim"} | ONE | {"tie_word_embeddings": True},
    "gpt2": SMALL_GPT2 | {"vocab_size": 12, "n_layer": 1},
    "bert": BERT | {"num_hidden_layers": 1, "num_labels": 3},
    "roberta": heads.ROBERTA | {"num_hidden_layers": 1, "num_labels": 3},
    "deberta-v2": DEBERTA | {"num_hidden_layers": 1, "num_labels": 3},
    "t5": T5 | {"num_layers": 1, "num_decoder_layers": 1},
}


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


def base_of(file: File) -> torch.nn.Module:
    """transformers' model, with a head for labels where the file is for one."""
    settings = SETTINGS[file.family] | file.settings
    if file.head == SEQ2SEQ:
        return encoders.transformers_model(file.family, settings)
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
    inputs = texts(file, draw)
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


def texts(file: File, draw: Draw) -> dict[str, np.ndarray]:
    """ids; of encoders with padding, and of T5 what its decoder has said."""
    if file.head == SEQ2SEQ:
        said = draw.integers(2, 12, 2, 6)
        said[:, 0] = 0
        return {"ids": draw.integers(2, 12, 2, 7), "said": said}
    if not file.head:
        return {"ids": draw.integers(1, 12, 2, 7)}
    real = np.int32(PADDED) >= 0
    pad = 1 if file.family == "roberta" else 0
    ids = draw.integers(1 + pad, 12, *real.shape)
    return {"ids": np.where(real, ids, pad).astype(np.int32), "segments": np.int32(PADDED)}


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
        given |= {"decoder_input_ids": t["said"].long()} if "said" in t else {}
        given |= {"task_ids": torch.zeros(len(t["ids"]), dtype=torch.long)} if "task" in file.variant else {}
        with precision():
            logits = adapted(input_ids=t["ids"].long(), **given).logits
        if logits.ndim == 3 and "said" not in t:
            logits = real_only(logits[:, -t["ids"].shape[1] :], t.get("segments"))
        return {"logits": logits}

    return compute


def as_written(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
