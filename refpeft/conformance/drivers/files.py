"""Adapters' files: what a model computes with one that PEFT wrote, and the tensors that an adapter is written as."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from refpeft import adapters
from refpeft.files import read_safetensors, write_json, write_safetensors

from ..vectors import Arrays, Case
from .models import at_tokens, model_with_head
from .places import attached, set_values

_FILE = "file."
"""What stands before the names of a file's tensors in a case."""

_OF_THE_CASE = ("model", "adapter_name", "beside")
"""Members of its config that are no options of the method; adapters have no names in refpeft."""


def run_load(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    model, segments = model_with_head(case.config["model"], given, dtype, xp), given.get("segments")
    tensors = {name.removeprefix(_FILE): array for name, array in given.items() if name.startswith(_FILE)}
    stored = {name: array.astype("f4") if array.dtype.kind == "f" else array for name, array in tensors.items()}
    config = case.config["adapter_config"]
    if "task" in case.config:  # which PEFT is told in each call
        config = config | {"refpeft_task": case.config["task"]}
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(Path(folder) / adapters.TENSORS, stored, {"format": "pt"})
        write_json(Path(folder) / adapters.CONFIG, config)
        adapters.load(model, folder)
    if "said" in given:
        return {"logits": model(given["ids"], given["said"]).data}
    logits = model(given["ids"], segments=segments).data
    return {"logits": at_tokens(logits, segments) if logits.ndim == 3 else logits}


def run_save(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    """What is written does not depend on the model's weights, of which a case has none: they are zeros."""
    options = {name: value for name, value in case.config.items() if name not in _OF_THE_CASE}
    model = model_with_head(case.config["model"], given, dtype, xp)
    adapter = attached(model, case.name, options)
    set_values(adapter, model, given)
    if "beside" in case.config:
        attached(model, case.name, options)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(folder, model, adapter)
        tensors = read_safetensors(Path(folder) / adapters.TENSORS)
    return {f"{_FILE}{name}": array for name, array in tensors.items()} | {"count": np.array(len(tensors))}
