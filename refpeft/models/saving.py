"""Writing a model as a Hugging Face directory."""

import json
from pathlib import Path

from refpeft import files
from refpeft.backend import bfloat16, to_host
from refpeft.errors import RefpeftError
from refpeft.models.base import Model

_DTYPES = {"float32": "f4", "float16": "f2", "bfloat16": bfloat16}
_HEAD = "lm_head.weight"


def save(model: Model, directory: str | Path, dtype: str = "float32") -> None:
    """Writes the model's weights as they are now, its config and its tokenizer files: what transformers loads.

    Raises RefpeftError while adapters are attached, and for weights that the config has no place for.
    """
    if model.adapters:
        names = ", ".join(adapter.name for adapter in model.adapters)
        raise RefpeftError(f"{names} is attached to the model: merge or detach it before the model is saved")
    known = set(model.checkpoint.names) | {_HEAD}
    if extra := [name for name in model.frozen if name not in known]:
        raise RefpeftError(f"the model cannot be saved: its architecture has no {', '.join(extra[:5])}")
    transposed = {f"{site.name}.weight" for site in model.sites.values() if site.transposed}
    arrays = {}
    for name, frozen in model.frozen.items():
        array = to_host(frozen()).astype(_DTYPES[dtype])
        arrays[name] = array.T if name in transposed else array
    companions = model.checkpoint.files()
    config = json.loads(companions.pop("config.json")) | {"dtype": dtype, "tie_word_embeddings": _HEAD not in arrays}
    config.pop("torch_dtype", None)
    with files.replace_directory(directory) as folder:
        for name, content in companions.items():
            (folder / name).write_bytes(content)
        files.write_json(folder / "config.json", config)
        files.write_safetensors(folder / "model.safetensors", arrays, metadata={"format": "pt"})
