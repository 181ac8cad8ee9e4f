"""Adapters' files: what a model computes with one that PEFT wrote, and the tensors that an adapter is written as."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from refpeft import adapters
from refpeft.api import class_of
from refpeft.files import write_json, write_safetensors
from refpeft.models import heads
from refpeft.models.base import Model
from refpeft.models.checkpoint import expected_tensors
from refpeft.models.config import from_hf

from ..vectors import Arrays, Case
from .models import at_tokens, frozen

_FILE = "file."
"""What stands before the names of a file's tensors in a case."""


def run_load(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    model, segments = _model(case.config["model"], given, dtype, xp), given.get("segments")
    tensors = {name.removeprefix(_FILE): array for name, array in given.items() if name.startswith(_FILE)}
    stored = {name: array.astype("f4") if array.dtype.kind == "f" else array for name, array in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(Path(folder) / adapters.TENSORS, stored, {"format": "pt"})
        write_json(Path(folder) / adapters.CONFIG, case.config["adapter_config"])
        adapters.load(model, folder)
    logits = model(given["ids"], segments=segments).data
    return {"logits": at_tokens(logits, segments) if logits.ndim == 3 else logits}


def _model(config: dict, given: Arrays, dtype: str, xp: ModuleType) -> Model:
    """The model, with the head that its config.json names; without weights in the case they are zeros."""
    shape, (task, labels) = from_hf(config), heads.read_from(config)
    model = class_of(shape)(shape, frozen(given, dtype, xp, expected_tensors(shape)), np.dtype(dtype), xp)
    if task:
        heads.put_on(model, task, labels, stored=given.get)
    return model
