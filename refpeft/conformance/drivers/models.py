"""Models, their layers and losses: cases of the kinds `model`, `block` and `loss`.

Inputs stay on the host, as files and batches are there; models place them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import fused, ops
from refpeft.api import class_of
from refpeft.backend import COMPUTE_DTYPES, Array, bfloat16, cast, xp_of
from refpeft.batches import IGNORE, Batch
from refpeft.examples import Answered, Example
from refpeft.models import heads
from refpeft.models.base import Frozen, Model
from refpeft.models.checkpoint import expected_tensors
from refpeft.models.config import AnyConfig, from_hf
from refpeft.models.encoder_config import PREFIX
from refpeft.quant import Dense, make_quantizer
from refpeft.sites import Adapter, attach
from refpeft.tensor import parameter

from ..vectors import Arrays, Case

# ---- what other drivers need, too ------------------------------------------------------------------------------------


def frozen(
    arrays: Arrays, dtype: str, xp: ModuleType, absent: dict[str, tuple[int, ...]] | None = None
) -> Callable[..., Dense]:
    """What a model asks for its weights; those of `absent` are zeros of that shape."""

    compute = COMPUTE_DTYPES[dtype]

    def weights(name: str, linear: bool = False, transposed: bool = False) -> Dense:
        array = arrays[name] if name in arrays else np.zeros(absent[name], compute)
        placed = xp.asarray(np.ascontiguousarray(array.T) if transposed else array)
        return Dense(cast(placed, np.dtype(dtype) if array.ndim == 2 else compute), compute)

    return weights


def made(weights: Callable[..., Frozen], dtype: str, xp: ModuleType, of: AnyConfig | None = None) -> Model:
    """The model of a config, or one without any layers, with these weights.

    In bfloat16 it is as in a run on a GPU: hidden states and matrices have that dtype, values and losses are float32.
    """
    model = (class_of(of) if of else Model)(of, weights, COMPUTE_DTYPES[dtype], xp)
    model.activations = np.dtype(dtype)
    return model


def kept(weights: Callable[..., Dense], options: dict[str, Any], dtype: str) -> Callable[..., Frozen]:
    """The same, but a method's targets in the format of its case's `quantizer`, which leaves the options."""
    if "quantizer" not in options:
        return weights
    quantizer = make_quantizer(options.pop("quantizer"), {"block": options.pop("block")})
    names = {f"{target}.weight" for target in options["targets"]}

    def as_kept(name: str, linear: bool = False, transposed: bool = False) -> Frozen:
        array = weights(name, linear, transposed)
        return quantizer(array(), COMPUTE_DTYPES[dtype]) if linear and name in names else array

    return as_kept


def model_of(config: dict, given: Arrays, dtype: str, xp: ModuleType, options: dict[str, Any] | None = None) -> Model:
    """The model of a config.json; tensors that the case has not, as none of its outputs reads them, are zeros.

    `options` are those of the method that will be on it: see `kept`.
    """
    shape = from_hf(config)
    prefix = PREFIX.get(shape.family, "")  # cases of encoders are of models without a head, whose names lack it
    arrays = {prefix + name: array for name, array in given.items()}
    weights = kept(frozen(arrays, dtype, xp, expected_tensors(shape)), options or {}, dtype)
    return made(weights, dtype, xp, shape)


def model_with_head(config: dict, given: Arrays, dtype: str, xp: ModuleType) -> Model:
    """The model of a config.json with the head that it names, if any; tensors that the case has not are zeros."""
    shape = from_hf(config)
    model = made(frozen(given, dtype, xp, expected_tensors(shape)), dtype, xp, shape)
    heads.put_on(model, *heads.read_from(config), stored=given.get)
    return model


def hidden_of(array: np.ndarray, model: Model) -> Array:
    """Hidden states, or a gradient of some, where and as the model has its own."""
    return cast(model.xp.asarray(array), model.activations)


def as_in_file(model: Model, name: str, array: Array) -> Array:
    """A Conv1D weight (in, out) as (out, in), and the other way round; anything else unchanged."""
    site, _, letter = name.rpartition(".")
    return array.T if letter == "weight" and model.sites[site].transposed else array


def batch_of(given: Arrays, rows: slice | list[int] = slice(None)) -> Batch:
    """A batch of these rows of the case's."""
    names = ("ids", "targets", "positions", "segments")
    return Batch(*(given[name][rows] if name in given else None for name in names))


def at_tokens(array: Array, segments: np.ndarray | None) -> Array:
    """`array` (batch, time, ...), 0 at padding; of bfloat16 in float32, which can be multiplied on every device."""
    if segments is None:
        return array
    array = cast(array, np.dtype("f4")) if array.dtype == bfloat16 else array
    real = xp_of(array).asarray(segments >= 0)
    return array * real.reshape(real.shape + (1,) * (array.ndim - 2))


def logits_of(model: Model, given: Arrays) -> Array:
    """Logits, 0 at padding."""
    segments = given.get("segments")
    return at_tokens(model(given["ids"], given.get("positions"), segments).data, segments)


def gradients_of(adapter: Adapter, model: Model) -> dict[str, Array]:
    """The gradient of each trained tensor, in the layout of files."""
    return {f"grad.{name}": as_in_file(model, name, tensor.grad) for name, tensor in adapter.params.items()}


# ---- models ----------------------------------------------------------------------------------------------------------


def run_model(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    if heads.read_from(case.config)[0]:
        return _run_with_head(case, given, dtype, xp)
    model = model_of(case.config, given, dtype, xp)
    adapter = attach(model, "full")
    if "said" in given:
        return _run_encoder_decoder(case, given, model, adapter)
    if "g" in given:
        return _run_encoder(case, given, model, adapter)
    loss = model.loss(batch_of(given))
    loss.backward()
    return {"logits": logits_of(model, given), "loss": loss.data, **gradients_of(adapter, model)}


def _run_encoder(case: Case, given: Arrays, model: Model, adapter: Adapter) -> Arrays:
    """The hidden states of the last layer."""
    segments = given.get("segments")
    hidden = model(given["ids"], segments=segments, types=given.get("types"))
    hidden.backward(hidden_of(given["g"], model))
    prefix = PREFIX[model.config.family]
    names = {name: name.removeprefix(prefix) for name in adapter.params}
    return {"hidden": at_tokens(hidden.data, segments)} | _checked_gradients(case, given, adapter, names)


def _run_encoder_decoder(case: Case, given: Arrays, model: Model, adapter: Adapter) -> Arrays:
    logits = model(given["ids"], given["said"], given.get("segments"))
    targets = given["targets"].reshape(-1)
    loss = fused.cross_entropy(
        logits.reshape(targets.size, -1),
        targets=model.xp.asarray(targets),
        denominator=int((targets >= 0).sum()),
    )
    loss.backward()
    answer = {"logits": logits.data, "loss": loss.data}
    return answer | _checked_gradients(case, given, adapter, {name: name for name in adapter.params})


def _run_with_head(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    """A model with the head of a task, whose targets are one for each row, or one for each token."""
    model = model_with_head(case.config, given, dtype, xp)
    adapter, segments, more = attach(model, "full"), given["segments"], {}
    if "types" in given:
        more = {"types": given["types"]}
    loss = model.loss(Batch(given["ids"], _targets_at_tokens(model, given), segments=segments, **more))
    loss.backward()
    logits = model(given["ids"], segments=segments, **more).data
    answer = {"logits": at_tokens(logits, segments) if logits.ndim == 3 else logits, "loss": loss.data}
    in_file = {name: model.head_tensors.get(name, name) for name in adapter.params}
    return answer | _checked_gradients(case, given, adapter, in_file)


def _targets_at_tokens(model: Model, given: Arrays) -> np.ndarray:
    """Targets (batch, time), of which a row's one is at the token that the head reads."""
    targets, real = given["targets"], given["segments"] >= 0
    if targets.ndim == 2:
        return targets
    place = 0 if model.read == "first" else real.sum(axis=1) - 1
    spread = np.full(real.shape, np.nan if targets.dtype.kind == "f" else IGNORE, targets.dtype)
    spread[np.arange(len(targets)), place] = targets
    return spread


def _checked_gradients(case: Case, given: Arrays, adapter: Adapter, in_file: dict[str, str]) -> dict[str, Array]:
    """The gradients that the case asks for, in the shapes of its inputs; `in_file` are their names there."""
    return {
        f"grad.{in_file[name]}": tensor.grad.reshape(given[in_file[name]].shape)
        for name, tensor in adapter.params.items()
        if f"grad.{in_file[name]}" in case.checks
    }


def run_block(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    """One block as a model of one layer: x comes in as the embedding table, and leaves before the last norm."""
    x, segments = given["x"], given.get("segments")
    tokens = x[..., 0].size
    table = np.zeros((case.config["vocab_size"], x.shape[-1]), x.dtype)
    table[:tokens] = x.reshape(tokens, -1)
    embed = "transformer.wte" if case.name == "gpt2" else "model.embed_tokens"
    model = model_of(case.config, given | {f"{embed}.weight": table}, dtype, xp)
    adapter = attach(model, "full")
    inputs = (np.arange(tokens).reshape(x.shape[:-1]), given.get("positions"), segments)
    y = model.trunk(*(None if array is None else xp.asarray(array) for array in inputs), None)
    y.backward(hidden_of(given["g"], model))
    answer = gradients_of(adapter, model)
    answer["grad.x"] = answer[f"grad.{embed}.weight"][:tokens].reshape(x.shape)
    return answer | {"y": at_tokens(y.data, segments)}


# ---- losses ----------------------------------------------------------------------------------------------------------


def run_loss(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    if case.name in ("targets", "positions"):
        if xp is not np:
            raise NotImplementedError("batches are made on the host, also of training on a GPU")
        return {case.name: _packed(given)[case.name]}
    if case.name == "answers":
        return _answers(case, given)
    if case.name == "classes":
        return _classes(case, given, xp)
    if case.name != "accumulation":
        raise NotImplementedError(f"refpeft knows no loss {case.name!r}")
    model = model_of(case.config["model"], given, dtype, xp)
    adapter = attach(model, "full")
    total = 0.0
    for rows in case.config["parts"]:
        loss = model.loss(batch_of(given, rows), denominator=batch_of(given).supervised)
        loss.backward()
        total += loss.data
    return {"loss": total, **gradients_of(adapter, model)}


def _answers(case: Case, given: Arrays) -> Arrays:
    texts = [answer[:length] for answer, length in zip(given["answers"], given["lengths"], strict=True)]
    batch = Answered.collate([[Answered(text, text, case.config["start"], line=1)] for text in texts])
    return {"said": batch.said, "targets": batch.targets}


def _packed(given: Arrays) -> Arrays:
    """Targets and positions of packed rows, made of the documents that are in them."""
    segments = given["segments"]
    ids, learned = (given.get(name, np.zeros_like(segments)) for name in ("ids", "learned"))
    rows = []
    for row, numbers in enumerate(segments):
        documents = [numbers == number for number in np.unique(numbers[numbers >= 0])]
        rows.append([Example(ids[row, here], learned[row, here].astype(bool), line=1) for here in documents])
    made = Example.collate(rows, packed=True)
    answer = {"targets": np.full(segments.shape, IGNORE, np.int32), "positions": np.zeros(segments.shape, np.int32)}
    for name, array in answer.items():
        array[:, : made.ids.shape[1]] = getattr(made, name)  # it ends where the longest row does
    return answer


def _classes(case: Case, given: Arrays, xp: ModuleType) -> Arrays:
    """Labels of rows, which count by the weights of the labels."""
    targets = given["targets"]
    weights = given["weights"][np.where(targets >= 0, targets, 0)]
    total = Batch(targets[:, None], targets[:, None], weights=weights[:, None]).denominator
    logits, loss = parameter(xp.asarray(given["logits"])), 0.0
    for rows in case.config.get("parts", [list(range(len(targets)))]):
        counted = {"targets": xp.asarray(targets[rows]), "weights": xp.asarray(weights[rows])}
        part = fused.cross_entropy(ops.take(logits, indices=xp.asarray(rows)), denominator=total, **counted)
        part.backward()
        loss += part.data
    return {"loss": loss, "grad.logits": logits.grad}
