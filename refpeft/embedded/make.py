"""Make the embedded model and its fine-tuning set again: `python -m refpeft.embedded.make OUT [--device cuda]`.

Four stages, each from one seed: the tokenizer, the fine-tuning set, the first weights, and pre-training on the
corpus by refpeft's own Trainer (method full). The files are what ships in refpeft/embedded.
"""

import json
import math
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import click
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from refpeft import api, files, sites
from refpeft.backend import bfloat16, to_host
from refpeft.batches import Batches
from refpeft.choices import DEVICES
from refpeft.config import Train
from refpeft.data import load_data
from refpeft.embedded.corpus import Writer
from refpeft.embedded.records import records
from refpeft.models.base import Model
from refpeft.report import Progress
from refpeft.rng import Stream
from refpeft.trainer import Trainer

SEED = 2026
END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 1536
CONTEXT = 256
TOKENIZER_DOCUMENTS = 20_000
TRAIN_ROWS, HELD_OUT_ROWS = 1200, 120
DOCUMENTS = 400_000  # of the pre-training text: 19 million tokens
HELD_OUT_DOCUMENTS = 500
PRETRAINING = Train(
    lr=3e-3, batch=64, betas=(0.9, 0.98), weight_decay=0.01, warmup=100, schedule="cosine", log_every=50
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "torch_dtype": "bfloat16",
}


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE (Sennrich et al., 2015, arXiv:1508.07909) trained on the corpus; every digit is one token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(Writer(SEED), TOKENIZER_DOCUMENTS), trainer)
    return tokenizer


def first_weights() -> dict[str, np.ndarray]:
    """Random float32 weights under the checkpoint's names: N(0, 0.02), smaller where a layer adds to the residual."""
    dim, layers, ff = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], CONFIG["intermediate_size"]
    queries, keys = (CONFIG[key] * CONFIG["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, dim)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (dim,),
                "self_attn.q_proj": (queries, dim),
                "self_attn.k_proj": (keys, dim),
                "self_attn.v_proj": (keys, dim),
                "self_attn.o_proj": (dim, queries),
                "post_attention_layernorm": (dim,),
                "mlp.gate_proj": (ff, dim),
                "mlp.up_proj": (ff, dim),
                "mlp.down_proj": (dim, ff),
            }.items()
        }
    shapes["model.norm.weight"] = (dim,)
    return {name: _first(name, shape) for name, shape in shapes.items()}


def _first(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    deviation = 0.02
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation /= math.sqrt(2 * CONFIG["num_hidden_layers"])  # as many additions (GPT-2's initialization)
    return (deviation * Stream(SEED, "embedded", "weights", name).standard_normal(shape)).astype(np.float32)


def write_model(out: Path) -> None:
    """The model directory before pre-training: config.json, tokenizer files, random weights."""
    files.write_json(out / "config.json", CONFIG)
    files.write_text(out / "tokenizer.json", make_tokenizer().to_str(pretty=False))
    special = {"eos_token": END, "pad_token": PAD, "model_max_length": CONFIG["max_position_embeddings"]}
    files.write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    files.write_safetensors(out / "model.safetensors", first_weights(), metadata={"format": "pt"})


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSONL."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def pretrain(out: Path, documents: int, device: str) -> Model:
    """The model in `out` with its weights trained on the corpus, once through, in rows packed with documents."""
    model = api.load(out, device=device)
    sites.attach(model, "full")
    texts = ({"text": document} for document in Writer(SEED))
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "train.jsonl"), Path(folder, "held_out.jsonl")
        for path, count in zip(paths, (documents, HELD_OUT_DOCUMENTS), strict=True):
            write_rows(path, islice(texts, count))
        train, held_out = (load_data(path, model.tokenizer, length=CONTEXT).examples for path in paths)
    progress = Progress(PRETRAINING.log_every)
    trainer = Trainer(
        model,
        Batches(train, PRETRAINING.batch, CONTEXT, pack=True, seed=SEED),
        Batches(held_out, PRETRAINING.batch, CONTEXT, shuffle=False),
        PRETRAINING,
        listeners=(progress,),
        seed=SEED,
    )
    progress.steps = trainer.total
    summary = trainer.run()
    progress.close()
    click.echo(f"held-out text: loss {summary.before['loss']:.4f} before, {summary.after['loss']:.4f} after")
    sites.merge(model)
    return model


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@click.option("--documents", default=DOCUMENTS, show_default=True, help="Documents of the pre-training text.")
def main(out: Path, device: str, documents: int) -> None:
    """Makes the embedded model and its fine-tuning set in the directory OUT."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held_out"), records(SEED, TRAIN_ROWS, HELD_OUT_ROWS), strict=True):
        write_rows(out / f"{name}.jsonl", rows)
    write_model(out)
    model = pretrain(out, documents, device)
    weights = {name: to_host(weight()).astype(bfloat16) for name, weight in model.frozen.items()}
    files.write_safetensors(out / "model.safetensors", weights, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
