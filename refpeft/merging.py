"""`refpeft merge`: an adapter folded into weights, and what that changes, measured on the very files that are written.

An adapter belongs to the weights that it was trained on. Of a run on quantized weights there are three sets to fold it
into: those weights as dense numbers (`dequantized`), the model's own as they were before quantizing (`original`), and
the first, quantized once more (`requantized`). Only the first computes what the run computed. The second is another
base; and quantizing again rounds most of a small change away, because the weights that it is added to lie exactly on
the quantizer's levels. So the merged model is compared with the run before it gets its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refpeft import api, config, files, fused, inputs, report, run, sites
from refpeft.backend import blas_threads
from refpeft.batches import Batch, Batches, split
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.models import saving
from refpeft.models.base import Model
from refpeft.quant import Dense, Quantized
from refpeft.rng import Stream
from refpeft.tensor import Tensor, no_grad

LIMIT = 1e-3
"""The most nats a token that a merge may cost: text of the run is then less likely by a thousandth a token, at most.
Rounding SmolLM2-135M to bfloat16 costs a tenth of it, quantizing a model to NF4 again 50 times as much and more."""

SHARE = 0.01
"""The most that it may cost of what the adapter does itself. A divergence goes with the square of a small difference,
so a hundredth of it is a tenth of the adapter's change of the logits."""

_ROUNDING = 1e-8  # nats a token: what float32 makes of models that are the same, with room
_INEXACT = 1e-3  # of the largest logit: more than float32's rounding explains
_ROWS, _TOKENS = 64, 2048  # the most that is measured on


@dataclass(frozen=True)
class Measured:
    """How far a merged model is from its run.

    difference  the largest difference of a logit, over the largest logit
    kl          the mean of KL(run with its adapter || merged), nats a token
    effect      the mean of KL(run with its adapter || run without it), nats a token: what the adapter does

    Of a task with labels it is nats a target; where outputs are no probabilities, the mean square of differences over
    the mean square of outputs takes the place of KL.
    """

    difference: float
    kl: float
    effect: float
    tokens: int

    @property
    def changed(self) -> bool:
        """Whether the merged model is another one than the run."""
        return not (self.kl <= LIMIT and self.kl <= SHARE * self.effect + _ROUNDING)  # NaN is a change

    @property
    def lost(self) -> float:
        """kl as a share of effect."""
        return self.kl / self.effect if self.effect else 0.0


@dataclass(frozen=True)
class Merged:
    """What a merge wrote, and how it was measured."""

    model: str
    adapter: str
    out: str
    into: str
    dtype: str
    base: str  # the weights that the adapter is now in, in words
    rows: str  # what was measured on, in words
    measured: Measured
    changed: bool  # whether it is another model than the run's, written because that was asked for

    def lines(self) -> list[str]:
        """For people."""
        found = self.measured
        rows = [
            ("  logits differ by at most", f"{found.difference:.2g} of the largest"),
            ("  KL divergence from the run with its adapter", f"{found.kl:.2g} nats a token"),
            ("  that of the run without its adapter", f"{found.effect:.2g} nats a token"),
        ]
        head = f"{self.model} with {self.adapter} merged, in {self.out}: {self.base}; numbers are {self.dtype}"
        warning = ["this is another model than the run's, written because of --force"] if self.changed else []
        measured_on = f"over {found.tokens:,} tokens of {self.rows}"
        return [head, measured_on, *report.table(rows, right=False), *warning]


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    into: str | None = None,
    dtype: str = "float32",
    data: str | None = None,
    force: bool = False,
) -> Merged:
    """Folds the adapter of a directory into its model and writes the model directory `out`, of `dtype` numbers.

    `model` says where the run's model is now, `data` on which rows the result is measured instead of the run's own.
    At most two models are in memory at a time. Raises RefpeftError, and leaves no `out`, for a method without a merged
    form, for a plugin whose merged form is not what it computes, and, unless `force`, where another model comes out.
    """
    if Path(out).exists():
        raise RefpeftError(f"{out} exists: merged models are not written over anything; choose another --out")
    name, how = model or run.base_model(adapter), run.how_kept(adapter)
    load = partial(api.load, name, adapter, dtype=how["dtype"])
    as_trained = partial(api.load, name, adapter, **how)
    trained = as_trained()
    packed = {key: weight for key, weight in trained.frozen.items() if isinstance(weight, Quantized)}
    into = into or ("dequantized" if packed else "original")
    if into != "original" and not packed:
        raise RefpeftError(f"--into {into} is for runs on quantized weights, and this one's are dense: --into original")
    batches, rows = _batches(adapter, data, trained)
    with files.replace_directory(out) as folder:
        merged = load() if into == "original" else as_trained()
        if into == "original" and any(isinstance(weight, Quantized) for weight in merged.frozen.values()):
            raise RefpeftError(f"the weights in {name} are themselves quantized: --into dequantized")
        _fold(merged, batches.at(0))
        _store(merged, packed if into == "requantized" else {})
        saving.save(merged, folder, dtype)
        del merged
        again = api.load(folder, dtype=dtype, task=trained.task, labels=trained.labels)
        measured = measure(trained, again, batches)
        if measured.changed and not force:
            raise RefpeftError(f"{_what_changed(measured, into, rows)}; nothing was written: {_advice(into, dtype)}")
    quantizer = next(iter(packed.values())).quantizer if packed else None
    base = _base(into, quantizer)
    return Merged(name, str(adapter), str(out), into, dtype, base, rows, measured, measured.changed)


def _fold(model: Model, batch: Batch) -> None:
    """Merges what is attached. Raises RefpeftError where logits are then others: not by rounding, by a wrong plugin."""
    batch = split(batch, 1)[0]
    with no_grad():
        before = _outputs(model, _states(model, batch))
        sites.merge(model)
        difference = np.abs(_outputs(model, _states(model, batch)) - before).max() / np.abs(before).max()
    if not difference < _INEXACT:
        raise RefpeftError(
            f"merging changes the logits by {difference:.1e} of the largest, so a plugin's peft_merge is not what its "
            "forward pass computes; nothing was written"
        )


def _store(model: Model, packed: dict[str, Quantized]) -> None:
    """Makes the frozen weights that are written: quantized as in `packed`, and all others dense."""
    for name, weight in model.frozen.items():
        if name in packed and not isinstance(weight, Quantized):  # what the adapter left alone is still as it was
            model.frozen[name] = packed[name].like(weight(), name)
        elif name not in packed and isinstance(weight, Quantized):
            model.frozen[name] = Dense(weight(), model.dtype)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(trained: Model, merged: Model, batches: Batches) -> Measured:
    """The difference of `merged` from `trained`, which has its adapter attached, over all real tokens of `batches`.

    Of tasks other than causal language modelling it is over their targets.
    """
    difference, largest, kl, effect, tokens = 0.0, 0.0, 0.0, 0.0, 0
    size = max(1, fused.LOGITS_AT_ONCE // trained.config.vocab)
    apart = _squares if trained.task in ("regress", "embed") else _kl
    with no_grad(), blas_threads(trained.parameters()):
        for batch in batches:
            run_states, merged_states = _states(trained, batch), _states(merged, batch)
            with sites.bypassed(trained):
                bare_states = _states(trained, batch)
            for at in range(0, len(run_states.data), size):
                part = slice(at, at + size)
                wanted, found = _outputs(trained, run_states[part]), _outputs(merged, merged_states[part])
                with sites.bypassed(trained):
                    bare = _outputs(trained, bare_states[part])
                difference = np.maximum(difference, np.abs(found - wanted).max())  # not max(): NaN stays NaN
                largest = np.maximum(largest, np.abs(wanted).max())
                kl, effect = kl + apart(wanted, found), effect + apart(wanted, bare)
            tokens += len(run_states.data)
    return Measured(float(difference / largest), float(kl / tokens), float(effect / tokens), tokens)


def _states(model: Model, batch: Batch) -> Tensor:
    """What is measured of a batch, before the head: at real tokens, or at the targets of a task that has others."""
    if model.task == "embed":
        return model(batch.ids, segments=batch.segments)
    if model.task != "causal-lm":
        return model.states(batch, batch.asked)
    real = np.arange(batch.ids.size) if batch.segments is None else np.flatnonzero(batch.segments >= 0)
    return model.states(batch, real)


def _outputs(model: Model, states: Tensor) -> np.ndarray:
    """What the head says; a sentence's vector is what there is."""
    return states.data if model.task == "embed" else model.head(states).data


def _kl(wanted: np.ndarray, found: np.ndarray) -> float:
    """The sum over rows of KL(softmax(wanted) || softmax(found))."""
    log_p = _log_softmax(wanted)
    return (np.exp(log_p) * (log_p - _log_softmax(found))).sum()


def _squares(wanted: np.ndarray, found: np.ndarray) -> float:
    """The squared difference over the mean square of a row."""
    return ((found - wanted) ** 2).sum() / max((wanted**2).sum() / len(wanted), 1e-30)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype("f8")
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _batches(adapter: str | Path, file: str | None, model: Model) -> tuple[Batches, str]:
    """What is measured on, and the words for it: `file`, or the run's held-out or training rows, or random tokens."""
    configured = config.run_of(adapter)
    training, held_out = inputs.data_files(configured) if configured else ([], [])
    configured = configured or config.RunConfig()
    if file or (held_out and all(one.is_file() for one in held_out)):
        alone = {"file": file or list(map(str, held_out)), "eval_file": None, "eval_share": 0.0, "overlong": "truncate"}
        alone |= {"mix": None, "replay": None, "earlier": None}
        configured = configured.model_copy(update={"data": configured.data.model_copy(update=alone)})
    elif not (training and all(one.is_file() for one in training)):
        if model.task != "causal-lm":
            raise RefpeftError("the run's rows are not there to measure the merged model on: give --data FILE")
        length = min(128, model.config.context)
        ids = Stream(0, "merging").uniform(0, model.config.vocab, (8, length)).astype(np.int32)
        return Batches([_example(row) for row in ids], 8, length), "random tokens, for there are no rows (--data FILE)"
    read = inputs.read(configured, model.config, model.tokenizer)
    chosen = read.held_out or read.rows
    examples = _first(chosen.examples) if model.task == "causal-lm" else chosen.examples[:_ROWS]
    words = f"{len(examples)} rows of {chosen.summary.file}"
    return Batches(examples, 8, max(map(len, examples)), shuffle=False), words


def _first(examples: list[Example]) -> list[Example]:
    """The first of them, within the limits; the last one may be cut."""
    kept, left = [], _TOKENS
    for example in examples[:_ROWS]:
        if left:
            kept.append(_example(example.ids[:left]))
            left -= len(kept[-1])
    return kept


def _example(ids: np.ndarray) -> Example:
    return Example(ids, np.ones(len(ids), bool), 0)


# ---- words -----------------------------------------------------------------------------------------------------------


def _base(into: str, quantizer: Any) -> str:
    """The weights merged into, in words."""
    if quantizer is None:
        return "its weights"
    name = quantizer.name + (" with double quantization" if quantizer.constants else "")
    return {
        "dequantized": f"its weights as the run had them, {name} made dense",
        "requantized": f"its weights as the run had them, {name}, quantized again",
        "original": f"its own weights; those of the run were {name}",
    }[into]


def _what_changed(measured: Measured, into: str, rows: str) -> str:
    of_effect = f", which is {measured.lost:.2g} of what the adapter itself does" if measured.effect else ""
    return (
        f"merging into {into} weights changes the model: a KL divergence of {measured.kl:.2g} nats a token "
        f"from the run with its adapter{of_effect}, and logits by up to {measured.difference:.2g} of the largest, over "
        f"{measured.tokens:,} tokens of {rows} (allowed: {LIMIT:g} nats, and {SHARE:g} of what the adapter does)"
    )


def _advice(into: str, dtype: str) -> str:
    others = []
    if into in ("original", "requantized"):
        others.append("--into dequantized")
    elif dtype != "float32":
        others.append("--dtype float32")
    return ", ".join(["keep the adapter unmerged", *others, "or --force if this is what you want"])
