"""A tiny random model with a head, and a batch with padding, for every task and kind of model."""

import numpy as np
import tiny
from test_encoder import CONFIGS as ENCODERS
from test_t5 import CONFIGS as ENCODER_DECODERS

from refpeft import sites
from refpeft.batches import Batch
from refpeft.examples import Answered, Asked, Masked, Pair
from refpeft.models import heads
from refpeft.models.base import Model
from refpeft.rng import Stream

LABELS = ("a", "b", "c")
_SHAPES = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2_SMALL, **ENCODERS, **ENCODER_DECODERS}
CASES = (
    [(family, task) for family in ENCODERS for task in ("classify", "regress", "tag", "mlm", "embed")]
    + [(family, task) for family in ("llama", "gpt2") for task in ("classify", "regress")]
    + [(family, "seq2seq") for family in ENCODER_DECODERS]
)


def model(family: str, task: str, xp=np) -> Model:
    """The model in float64, with what the task ends in, and LoRA beside its head."""
    built = tiny.of(_SHAPES[family], xp=xp)
    heads.put_on(built, task, LABELS if task in ("classify", "tag") else ())
    sites.attach(built, "lora", {"r": 2, "targets": ["@q", "@v"]}, seed=3)
    tiny.scramble(built.adapters[0])
    return built


def batch(family: str, task: str) -> Batch:
    """Three rows of different lengths."""
    texts = [tiny.ids(1, length, seed=length)[0] for length in (9, 5, 7)]
    last = family in ("llama", "gpt2")
    rows = [[_example(task, text, last)] for text in texts]
    return type(rows[0][0]).collate(rows, False, Stream(0, "batch"))


def _example(task: str, text: np.ndarray, last: bool):
    end = len(text) - 1
    if task == "seq2seq":
        return Answered(text, text[2:], 0, 1)
    if task == "mlm":
        return Masked(text, np.arange(1, end), 1, mask=3, vocab=40)
    if task == "embed":
        return Pair(text, text[::-1].copy(), 1, score=end / 10)
    at = np.arange(1, end) if task == "tag" else np.array([end if last else 0])
    values = (at + end) / 7 if task == "regress" else (at + end) % len(LABELS)
    weights = np.linspace(0.5, 2, len(at)).astype("f4") if task == "tag" else None
    return Asked(text, at, values.astype("f4" if task == "regress" else "i4"), 1, weights=weights)
