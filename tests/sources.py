"""Adapters of other tasks, for methods that start from them."""

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


PLACES = [f"{layers}.{number}.block_out" for layers in ("model.layers", "transformer.h") for number in range(2)]


def write_bottlenecks(directory: Path, values: dict[str, np.ndarray], method: str = "pfeiffer", **options) -> str:
    """An adapter of bottlenecks with these values by name; gives its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": array.astype("f4") for name, array in values.items()}
    files.write_safetensors(directory / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "REFPEFT", "method": method, "options": {"activation": "relu"} | options}
    files.write_json(directory / "adapter_config.json", settings)
    return str(directory)


def bottlenecks(count: int, size: int = 5, dim: int = 24) -> list[str]:
    """Directories with random bottlenecks behind the layers of tests/tiny.py's models: the same ones at every call."""
    shapes = {"down": (size, dim), "down_bias": (size,), "up": (dim, size), "up_bias": (dim,)}
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        values = {f"{at}.{name}": rng.normal(0, 0.3, shape) for at in PLACES for name, shape in shapes.items()}
        found.append(write_bottlenecks(Path(_FOLDER.name) / f"bottlenecks-{size}-{dim}-{number}", values))
    return found
