"""The cases of cpu.py: what is trained, over which batches, and how many operations a step of it takes."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import Turns

LR, CLIP = 1e-4, 1.0


@dataclass(frozen=True)
class Case:
    """LoRA, r = 8, on a model of a family: `rows` of `tokens` tokens, of which the last share is learned.

    A quantized case has its linear layers in NF4 with double quantization. A real one is of the model and the rows that
    are given: `tokens` is then the most that a row may have.
    """

    family: str
    rows: int
    tokens: int
    targets: str | tuple[str, ...] = ("@q", "@v")
    supervised: float = 1.0
    quantized: bool = False
    real: bool = False


CASES = {
    "gpt2": Case("gpt2", 4, 256),
    "gpt2-half": Case("gpt2", 4, 256, supervised=0.5),
    "gpt2-quarter": Case("gpt2", 4, 256, supervised=0.25),
    "smollm": Case("llama", 2, 512),
    "smollm-all": Case("llama", 2, 512, targets="all-linear"),
    "smollm-half": Case("llama", 2, 512, supervised=0.5),
    "minilm": Case("bert", 32, 64),
    "wikisql": Case("llama", 8, 512, real=True),
    "qlora": Case("llama", 2, 512, quantized=True),
}

_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "llama": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "bert": {
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
}
"""GPT-2 small, SmolLM2-135M, and all-MiniLM-L6."""

_TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 96, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}
    | {"bos_token_id": None, "eos_token_id": None},
    "llama": {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "bert": {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4},
}
_TINY_TOKENS = 24


@dataclass(frozen=True)
class Source:
    """Where real cases have their model and rows from, and whether the others are so small that a test can run them."""

    model: str | None = None
    data: Path | None = None
    tiny: bool = False


def prepare(turns: Turns, case: Case, source: Source, steps: int, folder: Path) -> None:
    """A worker that writes what all systems read into `folder`, for so many steps.

    model/            the model, as transformers writes it
    adapter/          the first values of what is trained, as PEFT writes them; B is not zero, so that A learns at once
    examples.pickle   the rows, for refpeft.batches.Batches
    batches.npz       the batches that refpeft makes of them, for transformers: 0.ids, 0.mask, 0.labels, 1.ids, ...

    It says how many operations each step takes, and the (rows, inner, columns) of typical products.
    """
    import refpeft
    from refpeft import adapters
    from refpeft.batches import Batches

    tokens = _TINY_TOKENS if source.tiny else case.tokens
    if case.real:
        write_real_model(refpeft.load(source.model), folder / "model")
    else:
        _write_random_model(case.family, source.tiny, folder / "model")
    model = refpeft.load(folder / "model")
    examples = _real_examples(source, model, tokens) if case.real else _random_examples(case, model, tokens)
    (folder / "examples.pickle").write_bytes(pickle.dumps(examples))
    batches = Batches(examples, case.rows, tokens)
    found = [batches.at(step) for step in range(steps)]
    np.savez(folder / "batches.npz", **_for_transformers(found, model.task))
    refpeft.attach(model, "lora", {"r": 8, "alpha": 16.0, "targets": case.targets})
    rng = np.random.default_rng(0)
    for name, value in model.trained():
        if name.endswith(".B"):
            value.data[...] = rng.normal(0, 0.02, value.shape)
    adapters.save(folder / "adapter", model)
    config = model.config
    at_once = min(512, case.rows * tokens // 2)
    turns.ready(
        flops=_operations(case, model, found),
        products=[
            (at_once, config.dim, config.ff),
            (at_once, config.ff, config.dim),
            (at_once, config.dim, config.dim),
        ],
    )


# ---- models ----------------------------------------------------------------------------------------------------------


def _write_random_model(family: str, tiny: bool, directory: Path) -> None:
    import tokenizers
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    shape = (_TINY if tiny else _SHAPES)[family]
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(config)
    elif family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, **none, num_labels=2))
    model.save_pretrained(directory)
    words = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(words).save(str(directory / "tokenizer.json"))  # no text is read with it


def write_real_model(model: Any, directory: Path) -> None:
    """A model that may be a GGUF file, in the form that transformers reads, in float32."""
    from refpeft import files

    directory.mkdir()
    for name, content in model.checkpoint.files().items():
        (directory / name).write_bytes(content)
    stored = model.checkpoint
    weights = {name: np.ascontiguousarray(stored.tensor(name), np.float32) for name in stored.names}
    files.write_safetensors(directory / "model.safetensors", weights, {"format": "pt"})


# ---- rows ------------------------------------------------------------------------------------------------------------


def _random_examples(case: Case, model: Any, tokens: int) -> list[Any]:
    """As many as a batch has, so that every step sees the same ones."""
    from refpeft.examples import Asked, Example

    rng = np.random.default_rng(0)
    rows = rng.integers(0, model.config.vocab, (case.rows, tokens), np.int32)
    if model.task == "classify":
        labels = rng.integers(0, len(model.labels), (case.rows, 1), np.int32)
        return [
            Asked(ids, np.array([0]), label, line) for line, (ids, label) in enumerate(zip(rows, labels, strict=True))
        ]
    learned = np.arange(tokens) >= round(tokens * (1 - case.supervised))
    return [Example(ids, learned, line) for line, ids in enumerate(rows)]


def _real_examples(source: Source, model: Any, tokens: int) -> list[Any]:
    from refpeft.data import load_data

    return load_data(source.data / "train.jsonl", model.tokenizer, length=tokens, overlong="drop").examples


def _for_transformers(batches: list[Any], task: str) -> dict[str, np.ndarray]:
    """Arrays by "step.name". In transformers a label stands at its own token, not at the one before."""
    found = {}
    for step, batch in enumerate(batches):
        labels = np.roll(batch.targets, 1, axis=1)
        labels[:, 0] = -100
        found[f"{step}.ids"] = batch.ids.astype(np.int64)
        found[f"{step}.mask"] = (np.ones_like(batch.ids) if batch.segments is None else batch.segments + 1).astype(
            np.int64
        )
        found[f"{step}.labels"] = (batch.targets[:, 0] if task == "classify" else labels).astype(np.int64)
    return found


# ---- operations ------------------------------------------------------------------------------------------------------


def _operations(case: Case, model: Any, batches: list[Any]) -> list[float]:
    """Operations of each step in products of matrices, as `refpeft plan` counts them, of what all have to compute.

    Frozen weights count twice, forward and for the gradient of their input, from the first trained value on; trained
    ones three times; attention by pairs of a query and a key that it sees, with the scores computed again. Padding does
    not count, and a language model's head only at tokens that are learned.
    """
    from refpeft import cost, memory, sites

    skeleton = memory.skeleton(model.checkpoint)
    sites.attach(skeleton, "lora", {"r": 8, "alpha": 16.0, "targets": case.targets})
    some = (16, 32, 64)
    of_row = np.polyfit(some, [cost.step(skeleton, 1, tokens).flops(recompute=False) for tokens in some], 2)

    def of(batch: Any) -> float:
        lengths = (np.ones_like(batch.ids) if batch.segments is None else batch.segments >= 0).sum(axis=1)
        spared = batch.tokens - batch.supervised if model.task == "causal-lm" else 0
        return float(np.polyval(of_row, lengths).sum()) - 4.0 * spared * model.config.dim * model.config.vocab

    return [of(batch) for batch in batches]
