"""Prompts of other tasks, in PEFT's files, for methods that start from them."""

import tempfile
from pathlib import Path

import numpy as np

from refpeft import files

_FOLDER = tempfile.TemporaryDirectory()  # removed when Python ends


def write_prompt(directory: Path, rows: np.ndarray) -> str:
    """An adapter of PEFT's prompt tuning with these rows (tokens, dim); gives its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(directory / "adapter_model.safetensors", {"prompt_embeddings": rows.astype("f4")})
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(rows), "token_dim": rows.shape[1]}
    files.write_json(directory / "adapter_config.json", settings)
    return str(directory)


def prompts(count: int, tokens: int = 3, dim: int = 24) -> list[str]:
    """Directories with random prompts, of the size of tests/tiny.py's models: the same ones at every call."""
    return [
        write_prompt(
            Path(_FOLDER.name) / f"{tokens}-{dim}-{number}", np.random.default_rng(number).normal(size=(tokens, dim))
        )
        for number in range(count)
    ]
