"""Tiny model directories and data files, for tests of what reads them."""

import json
from pathlib import Path

import tiny
import tiny_tokenizers

from refpeft import files

VOCABULARY = tiny_tokenizers.byte_level().get_vocab_size()


def write_model(directory: Path, name: str = "tied", template: str | None = None, **changes) -> Path:
    """A random model of tiny.CONFIGS with a byte-level tokenizer, as a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny.CONFIGS[name] | {"vocab_size": VOCABULARY} | changes
    files.write_json(directory / "config.json", config)
    files.write_safetensors(directory / "model.safetensors", tiny.arrays(config))
    tiny_tokenizers.byte_level().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    files.write_json(directory / "tokenizer_config.json", settings | ({"chat_template": template} if template else {}))
    return directory


def write_rows(path: Path, count: int = 12) -> Path:
    """Rows of prompt and completion: yes or no, by the parity of a number."""
    rows = [{"prompt": f"is {n} even?", "completion": " no" if n % 2 else " yes"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
