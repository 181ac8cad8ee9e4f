"""Adapters' files, read and written by PEFT itself."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft_methods import METHODS, NETWORKS, put
from safetensors.torch import load_file, save_file
from torch import nn
from torch_parts import Tensors, dtype_of

from refpeft.conformance.vectors import Case

TASKS = {
    "LMHead": "CAUSAL_LM",
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""By a part of the name of a model's class."""


def base_model(config: dict, t: Tensors) -> transformers.PreTrainedModel:
    """transformers' model of a config.json, with the weights that the case has."""
    settings = dict(config)
    (architecture,) = settings["architectures"]
    made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    base = getattr(transformers, architecture)(made).eval().to(dtype_of(t))
    base.load_state_dict({n: t[n] for n, _ in base.named_parameters() if n in t}, strict=False)
    return base


def loaded(case: Case, t: Tensors) -> Tensors:
    files = {name.removeprefix("file."): tensor for name, tensor in t.items() if name.startswith("file.")}
    base = base_model(case.config["model"], t)
    with tempfile.TemporaryDirectory() as folder:
        save_file(files, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
        (Path(folder) / "adapter_config.json").write_text(json.dumps(case.config["adapter_config"]))
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected) .*keys.*")
        adapted = peft.PeftModel.from_pretrained(base, folder).eval()
    ids, more = t["ids"].long(), {}
    if "segments" in t:
        more["attention_mask"] = (t["segments"] >= 0).long()
    if "task" in case.config:
        more["task_ids"] = torch.full((len(ids),), case.config["task"])
    if "said" in t:
        more["decoder_input_ids"] = t["said"].long()
    logits = adapted(input_ids=ids, **more).logits
    if logits.ndim == 3:
        read = t.get("said", t["ids"])
        logits = logits[:, -read.shape[1] :]
        logits = logits * (t["segments"] >= 0)[..., None] if "segments" in t and "said" not in t else logits
    return {"logits": logits}


def saved(case: Case, t: Tensors) -> Tensors:
    base = base_model(case.config["model"], t)
    name = case.config.get("adapter_name", "default")
    if case.name in NETWORKS:
        config, packs = NETWORKS[case.name](case.config, t)
    else:
        targets = case.config.get("targets", [])
        if case.name == "trainable_tokens":  # PEFT finds the tied head itself
            targets = [target for target in targets if f"{target}.tokens" in t]
        config, packs = METHODS[case.name].config(case.config, targets, t), {}
    config.task_type = next(task for word, task in TASKS.items() if word in type(base).__name__)
    adapted = peft.get_peft_model(base, config, adapter_name=name)
    if "beside" in case.config:
        adapted.add_adapter(case.config["beside"], copy.deepcopy(config))
    for inner, (names, pack) in packs.items():
        put(adapted.prompt_encoder[name].get_parameter(inner), pack([t[n] for n in names]), inner)
    if not packs:
        fill(adapted, case, t, name)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, selected_adapters=[name])
        (path,) = Path(folder).rglob("adapter_model.safetensors")
        files = load_file(path)
    return {f"file.{key}": tensor for key, tensor in files.items()} | {"count": torch.tensor(len(files))}


def fill(adapted: nn.Module, case: Case, t: Tensors, adapter: str) -> None:
    """The case's values into PEFT's layers, whole layers that it copies, and biases."""
    method = METHODS[case.name]
    there = dict(adapted.named_parameters(remove_duplicate=False)) | dict(adapted.named_buffers(remove_duplicate=False))
    for name, tensor in t.items():
        where, _, letter = name.rpartition(".")
        inner = (method.names | method.constants).get(letter, letter).replace("default", adapter)
        where = where.removesuffix(".attend")
        begin = f"base_model.model.{where}"
        ways = [inner, f"{begin}.{inner}", f"{begin}.base_layer.{letter}", *copies(name, adapter), f"{begin}.{letter}"]
        found = next((there[way] for way in ways if way in there), None)
        if found is not None:
            put(found, tensor, name)
        elif letter != "indices":  # SHiRA's are in its config
            raise ValueError(f"PEFT has no tensor for {name}")


def copies(name: str, adapter: str) -> list[str]:
    """Where PEFT has a tensor of a layer that it trains as a whole: behind this layer or one that it is a part of."""
    parts = name.split(".")
    return [
        ".".join(["base_model.model", *parts[:i], "modules_to_save", adapter, *parts[i:]]) for i in range(1, len(parts))
    ]
