"""refpeft against the golden vectors, in float64 and float32, without torch: one driver for each kind of case."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from sources import write_prompt

from refpeft import fourier, fused, gates, learning, manager, ops, schedule
from refpeft.api import class_of
from refpeft.batches import Batch
from refpeft.config import plugin_options
from refpeft.conformance.compare import compare
from refpeft.conformance.vectors import Arrays, Case, cases
from refpeft.examples import Example
from refpeft.layers import Part, Train
from refpeft.models import heads
from refpeft.models.base import Frozen, Model
from refpeft.models.checkpoint import expected_tensors
from refpeft.models.config import from_hf
from refpeft.models.encoder_config import PREFIX
from refpeft.models.quantized_files import tensors_of
from refpeft.optim import OPTIMIZERS, SGD, AdamW, Flat
from refpeft.quant import Dense, Quantized, make_quantizer
from refpeft.rng import Stream, philox4x32
from refpeft.sites import Adapter, attach, merge, prepare, put_on
from refpeft.tensor import Tensor, parameter

# ---- operations ------------------------------------------------------------------------------------------------------


def gradients(y: Tensor, g: np.ndarray, leaves: dict[str, Tensor]) -> Arrays:
    """The answer of most cases: y, and the gradient of every leaf."""
    y.backward(g)
    return {"y": y.data, **{f"grad.{name}": leaf.grad for name, leaf in leaves.items()}}


def run_op(case: Case, given: Arrays, dtype: str) -> Arrays:
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in case.config.items()}
    if case.name == "getitem":
        options["key"] = tuple(slice(*part) if isinstance(part, list) else part for part in case.config["key"])
    constants = ("condition", "indices", "places", "signs", "order", "gauss", "u")
    options |= {name: given.pop(name) for name in constants if name in given}
    g = given.pop("g")
    leaves = {name: parameter(array) for name, array in given.items()}
    op = next(getattr(module, case.name) for module in (ops, fourier, gates) if hasattr(module, case.name))
    return gradients(op(*leaves.values(), **options), g, leaves)


def run_fused(case: Case, given: Arrays, dtype: str) -> Arrays:
    g, config = given.pop("g"), case.config
    names = ("weight", "segments", "targets", "ids", "cos", "sin", "rows", "columns")
    constants = {name: given.pop(name) for name in names if name in given}
    leaves = {name: parameter(array) for name, array in given.items()}
    arguments = list(leaves.values())
    if case.name in ("frozen_linear", "hadamard_linear"):
        y = getattr(fused, case.name)(*arguments, weight=lambda: constants["weight"])
    elif case.name == "linear_cross_entropy":
        options = {"targets": constants["targets"], **config}
        y = fused.linear_cross_entropy(*arguments, weight=lambda: constants["weight"], **options)
    elif case.name == "attention":
        mask = fused.Mask(keys=config["tokens"], window=config["window"], segments=constants.get("segments"))
        answer = gradients(fused.attention(*arguments, mask=mask, scale=config["scale"]), g, leaves)
        if "segments" in constants:
            answer["y"] = answer["y"] * (constants["segments"] >= 0)[:, None, config["tokens"] - g.shape[2] :, None]
        return answer
    elif case.name == "dropout":
        y = fused.dropout(*arguments, rate=config["rate"], stream=Stream(config["seed"], *config["purpose"]))
    else:
        y = getattr(fused, case.name)(*arguments, **constants, **config)
    return gradients(y, g, leaves)


def run_random(case: Case, given: Arrays, dtype: str) -> Arrays:
    if case.name == "philox4x32":
        counter = [np.array([c], "u4") for c in given["counter"]]
        words = philox4x32(*counter, *(int(k) for k in given["key"]))
        return {"words": np.concatenate(words).astype("i8")}
    want = case.expected()

    def fresh() -> Stream:
        return Stream(case.config["seed"], *case.config["purpose"])

    return {
        "bits": fresh().bits(want["bits"].size).astype("i8"),
        "uniform": fresh().uniform(size=want["uniform"].size),
        "normal": fresh().standard_normal(want["normal"].size),
        "permutation": fresh().permutation(want["permutation"].size),
    }


# ---- models ----------------------------------------------------------------------------------------------------------


def frozen(arrays: Arrays, dtype: str, absent: dict[str, tuple[int, ...]] | None = None) -> Callable[..., Dense]:
    """What a model asks for its weights; those of `absent` are zeros of that shape."""

    def weights(name: str, linear: bool = False, transposed: bool = False) -> Dense:
        array = arrays[name] if name in arrays else np.zeros(absent[name], dtype)
        return Dense(np.ascontiguousarray(array.T) if transposed else array, np.dtype(dtype))

    return weights


def model_of(config: dict, given: Arrays, dtype: str) -> Model:
    shape = from_hf(config)
    prefix = PREFIX.get(shape.family, "")  # cases of encoders are of models without a head, whose names lack it
    arrays = {prefix + name: array for name, array in given.items()}
    return class_of(shape)(shape, frozen(arrays, dtype, expected_tensors(shape)), np.dtype(dtype))


def set_values(adapter: Adapter, model: Model, given: Arrays) -> None:
    """Trained values as the case gives them; what stands in for a weight of a file has the file's layout there."""
    for name, tensor in (adapter.params | adapter.constants).items():
        if name in given:
            tensor.data[...] = as_in_file(model, name, given[name])


def as_in_file(model: Model, name: str, array: np.ndarray) -> np.ndarray:
    """A Conv1D weight (in, out) as (out, in), and the other way round; anything else unchanged."""
    site, _, letter = name.rpartition(".")
    return array.T if letter == "weight" and model.sites[site].transposed else array


def batch_of(given: Arrays, rows: slice | list[int] = slice(None)) -> Batch:
    names = ("ids", "targets", "positions", "segments")
    return Batch(*(given[name][rows] if name in given else None for name in names))


def logits_of(model: Model, given: Arrays) -> np.ndarray:
    """Logits, 0 at padding."""
    segments = given.get("segments")
    logits = model(given["ids"], given.get("positions"), segments).data
    return logits if segments is None else logits * (segments >= 0)[..., None]


def grads(adapter: Adapter, model: Model) -> Arrays:
    return {f"grad.{name}": as_in_file(model, name, t.grad) for name, t in adapter.params.items()}


def run_model(case: Case, given: Arrays, dtype: str) -> Arrays:
    if heads.read_from(case.config)[0]:
        return run_head(case, given, dtype)
    model = model_of(case.config, given, dtype)
    adapter = attach(model, "full")
    if model.config.family in (*PREFIX, "t5"):
        return run_encoder(case, given, model, adapter)
    loss = model.loss(batch_of(given))
    loss.backward()
    return {"logits": logits_of(model, given), "loss": loss.data, **grads(adapter, model)}


def run_encoder(case: Case, given: Arrays, model: Model, adapter: Adapter) -> Arrays:
    """An encoder's hidden states, or an encoder-decoder's logits and loss; the gradients that are asked for."""
    segments = given.get("segments")
    if "said" in given:
        logits, rows = model(given["ids"], given["said"], segments), given["targets"].reshape(-1)
        flat = logits.reshape(rows.size, -1)
        loss = fused.cross_entropy(flat, targets=rows, denominator=int((rows >= 0).sum()))
        loss.backward()
        answer = {"logits": logits.data, "loss": loss.data}
    else:
        hidden = model(given["ids"], segments=segments, types=given.get("types"))
        hidden.backward(given["g"])
        answer = {"hidden": hidden.data if segments is None else hidden.data * (segments >= 0)[..., None]}
    prefix = PREFIX.get(model.config.family, "")
    for name, tensor in adapter.params.items():
        if (output := f"grad.{name.removeprefix(prefix)}") in case.checks:
            answer[output] = tensor.grad.reshape(given[name.removeprefix(prefix)].shape)
    return answer


def run_head(case: Case, given: Arrays, dtype: str) -> Arrays:
    """A model with the head of a task, whose targets are one for each row, or one for each token."""
    shape = from_hf(case.config)
    model = class_of(shape)(shape, frozen(given, dtype), np.dtype(dtype))
    heads.put_on(model, *heads.read_from(case.config), stored=given.get)
    adapter, targets, real = attach(model, "full"), given["targets"], given["segments"] >= 0
    if targets.ndim == 1:
        place = 0 if model.read == "first" else real.sum(axis=1) - 1
        targets = np.full(real.shape, np.nan if targets.dtype.kind == "f" else -100, targets.dtype)
        targets[np.arange(len(targets)), place] = given["targets"]
    loss = model.loss(Batch(given["ids"], targets, segments=given["segments"], types=given.get("types")))
    loss.backward()
    more = {"types": given["types"]} if "types" in given else {}
    logits = model(given["ids"], segments=given["segments"], **more).data
    answer = {"logits": logits * real[..., None] if logits.ndim == 3 else logits, "loss": loss.data}
    for name, tensor in adapter.params.items():
        in_file = model.head_tensors.get(name, name)
        if f"grad.{in_file}" in case.checks:
            answer[f"grad.{in_file}"] = tensor.grad.reshape(given[in_file].shape)
    return answer


def run_block(case: Case, given: Arrays, dtype: str) -> Arrays:
    """One block as a model of one layer: x comes in as the embedding table, and leaves before the last norm."""
    x = given["x"]
    table = np.zeros((case.config["vocab_size"], x.shape[-1]), dtype)
    table[: x[..., 0].size] = x.reshape(-1, x.shape[-1])
    embed = "transformer.wte" if case.name == "gpt2" else "model.embed_tokens"
    model = model_of(case.config, given | {f"{embed}.weight": table}, dtype)
    adapter = attach(model, "full")
    ids = np.arange(x[..., 0].size).reshape(x.shape[:-1])
    segments = given.get("segments")
    y = model.trunk(ids, given.get("positions"), segments, None)
    y.backward(given["g"])
    answer = grads(adapter, model)
    answer["grad.x"] = answer[f"grad.{embed}.weight"][ids]
    return answer | {"y": y.data if segments is None else y.data * (segments >= 0)[..., None]}


def run_loss(case: Case, given: Arrays, dtype: str) -> Arrays:
    if case.name == "targets":
        rows = []
        for ids, learned, segments in zip(given["ids"], given["learned"], given["segments"], strict=True):
            documents = [segments == n for n in np.unique(segments[segments >= 0])]
            rows.append([Example(ids[here], learned[here].astype(bool), line=1) for here in documents])
        targets = np.full(given["ids"].shape, -100, np.int32)
        made = Example.collate(rows, packed=True).targets
        targets[:, : made.shape[1]] = made
        return {"targets": targets}
    model = model_of(case.config["model"], given, dtype)
    adapter = attach(model, "full")
    total = 0.0
    for rows in case.config["parts"]:
        loss = model.loss(batch_of(given, rows), denominator=batch_of(given).supervised)
        loss.backward()
        total += loss.data
    return {"loss": total, **grads(adapter, model)}


# ---- methods ---------------------------------------------------------------------------------------------------------


def run_method(case: Case, given: Arrays, dtype: str) -> Arrays:
    if case.at == "objective":
        return run_objective(case, given)
    if case.at == "steps":
        return run_steps(case, given, dtype)
    if case.at not in ("model", "train"):
        return run_site(case, given, dtype)
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in case.config.items()}
    config, train = options.pop("model"), options.pop("optimizer", None)
    model = model_of(config, given, dtype)
    adapter = attached(model, case.name, options)
    set_values(adapter, model, given)
    if train is None:
        loss = model.loss(batch_of(given))
        loss.backward()
        return {"logits": logits_of(model, given), "loss": loss.data, **grads(adapter, model)}
    flat = Flat(adapter.params.items(), learning.rates(model))
    optimizer = AdamW(flat, tuple(train["betas"]), train["eps"], train["weight_decay"])
    batch, losses = batch_of(given), []
    with as_drawn(model, given):
        for _ in range(train["steps"]):
            loss = learning.objective(model, batch, batch.supervised)
            loss.backward()
            optimizer.step(train["lr"])
            losses.append(loss.data)
    after = {f"after.{name}": as_in_file(model, name, t.data) for name, t in adapter.params.items()}
    return {"losses": np.array(losses), **after}


def attached(model: Model, method: str, options: dict) -> Adapter:
    """The method on the model; of adapters that it takes from directories the case has the values."""
    adapter = prepare(model, method, options, fit="adapters" not in options)
    put_on(model, adapter)
    return adapter


@contextlib.contextmanager
def as_drawn(model: Model, given: Arrays) -> Iterator[None]:
    """Within it the model trains where the case says what is drawn: masks of dropout, numbers in the order of draws."""
    draws = iter(given["draws"].ravel() if "draws" in given else ())
    uniform = iter([given[name] for name in ("u", "u_group") if name in given])

    def dropout(_: Train, x: Tensor, rate: float) -> Tensor:
        return x * given["keep"] * (1 / (1 - rate))

    def draw(_: Train, n: int, apart: bool = False) -> int:
        return int(next(draws))

    model.mode.training = bool({"keep", "draws", "u"} & given.keys())
    with mock.patch.multiple(Train, dropout=dropout, draw=draw, uniform=lambda _, like: Tensor(next(uniform))):
        yield
    model.mode.training = False


def run_objective(case: Case, given: Arrays) -> Arrays:
    """What a method minimises, from the logits of several passes: the inputs of single letters."""
    plugin = manager.load(case.name)
    part = Part(plugin, plugin_options(plugin, case.config))
    leaves = {name: parameter(array) for name, array in given.items() if len(name) == 1}
    count = len(given["targets"])
    loss = part.call(
        "peft_objective",
        logits=partial(next, iter(leaves.values())),
        loss=lambda z: fused.cross_entropy(z, targets=given["targets"], denominator=count),
        mean=ops.mean,
    )
    loss.backward()
    return {"loss": loss.data} | {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}


def run_steps(case: Case, given: Arrays, dtype: str) -> Arrays:
    """What a method does around steps of plain gradient descent, at two sites, with gradients that are given."""
    options = dict(case.config)
    total, lr = options.pop("steps"), options.pop("lr")
    shapes = {site: (len(given[f"{site}.P"]), given[f"{site}.Q"].shape[1]) for site in "ab"}
    model = Model(None, frozen({f"{site}.weight": np.zeros(s) for site, s in shapes.items()}, dtype), np.dtype(dtype))
    for site in shapes:
        model.linear(site, "q", bias=False)
    adapter = attached(model, case.name, options | {"targets": ("a", "b")})
    set_values(adapter, model, given)
    learning.states(model)
    flat = Flat(adapter.params.items())
    optimizer, trace = SGD(flat, momentum=0.0), {f"E.{site}": [] for site in shapes}
    for number in range(total):
        for name, tensor in adapter.params.items():
            tensor.grad[...] = given[f"grad.{name}"][number]
        learning.step(model, partial(optimizer.step, lr), number, total)
        for site in shapes:
            trace[f"E.{site}"].append(adapter.params[f"{site}.E"].data.copy())
    after = {f"after.{name}": tensor.data for name, tensor in adapter.params.items()}
    return {name: np.array(values) for name, values in trace.items()} | after


def run_site(case: Case, given: Arrays, dtype: str) -> Arrays:
    """A method on the only site of a model."""
    options = {name: v for name, v in case.config.items() if name not in ("norm", "eps")} | {"targets": ("site",)}
    if case.name == "ia3":
        options["feedforward"] = ("site",) if options["feedforward"] else ()
    weights = {f"site.{name}": given[name] for name in ("weight", "bias") if name in given}
    model = Model(None, frozen(weights, dtype), np.dtype(dtype))
    has_bias = "bias" in given
    if "sources" in given:
        return run_start(case.name, options, model, given)
    if "base" in case.checks:
        return run_first_values(case.name, options, weights, given, dtype)
    if case.at in ("linear", "conv1d"):
        site = model.linear("site", "q", bias=has_bias, transposed=case.at == "conv1d")
    elif case.at == "embedding":
        site = model.embedding("site", "embed")
    elif case.at == "norm":
        site = model.norm("site", case.config["eps"], "norm", bias=has_bias)
    elif case.at == "attention":
        shape = given["k"].shape[1], given["k"].shape[3]
        site = model.place_of("site", "attention", shape, "attend", fused.attention)
    else:
        site = model.place_of("site", "block", (given["x"].shape[-1],), "mlp_out", linear_block(given["weight"]))
    adapter = attached(model, case.name, options)
    values = {name.removeprefix("site."): t for name, t in adapter.params.items()}
    constants = {name.removeprefix("site.").removeprefix("shared."): t for name, t in adapter.constants.items()}
    given_constants = {name: t for name, t in constants.items() if name in given}  # the others are made of the weight
    for name, tensor in (given_constants | values).items():
        tensor.data[...] = given[name]
    leaves = {name: parameter(given[name]) for name in ("x", "q", "k", "v") if name in given}
    inputs = list(leaves.values()) or [given["ids"]]
    keywords = {"mask": fused.Mask(given["q"].shape[2])} if case.at == "attention" else {}
    with as_drawn(model, given):
        answer = gradients(site(*inputs, **keywords), given["g"], leaves | values)
    if "penalty" in case.checks:
        for tensor in values.values():
            tensor.node.grad = None
        (penalty,) = learning.penalties(model)
        penalty.backward()
        answer["penalty"] = penalty.data
        answer |= {f"penalty.grad.{name}": tensor.grad for name, tensor in values.items()}
    if any(name.startswith("merged.") for name in case.checks):
        merge(model)
        weight = site.weight()
        answer |= {"merged.weight": weight.T if case.at == "conv1d" else weight, "merged.bias": site.bias}
    return answer


def run_start(method: str, options: dict, model: Model, given: Arrays) -> Arrays:
    """A prompt that starts from those of other tasks, which are files."""
    site = model.embedding("site", "embed")
    with tempfile.TemporaryDirectory() as folder:
        names = [write_prompt(Path(folder) / str(number), rows) for number, rows in enumerate(given["sources"])]
        options |= {"sources": names}
        options |= {"task": write_prompt(Path(folder) / "task", given["task"])} if "task" in given else {}
        adapter = attach(model, method, options)
    return {"prompt": adapter.params["site.prompt"].data, "y": site(given["ids"]).data}


def run_first_values(method: str, options: dict, arrays: Arrays, given: Arrays, dtype: str) -> Arrays:
    """The frozen weight and the update of first values, and what they compute together."""
    dense, name = frozen(arrays, dtype), options.pop("quantizer", None)
    quantizer = make_quantizer(name, {"block": options.pop("block")}) if name else None

    def weights(name: str, linear: bool = False, transposed: bool = False) -> Frozen:
        array = dense(name, linear, transposed)
        return quantizer(array(), np.dtype(dtype)) if linear and quantizer else array

    model = Model(None, weights, np.dtype(dtype))
    site = model.linear("site", "q")
    (layer,) = attach(model, method, options).layers
    update = layer.merged(np.zeros_like(site.weight()), None)["weight"]
    return {"base": site.weight(), "update": update, "y": site(Tensor(given["x"])).data}


def linear_block(weight: np.ndarray) -> Callable[[Tensor], Tensor]:
    return lambda x: fused.frozen_linear(x, weight=lambda: weight)


# ---- optimizers and schedules ----------------------------------------------------------------------------------------


def run_optimizer(case: Case, given: Arrays, dtype: str) -> Arrays:
    config = case.config
    flat = Flat((name, parameter(given[name].copy())) for name in ("p0", "p1"))
    options = {name: value for name, value in config.items() if name not in ("lr", "clip", "block")}
    optimizer = OPTIMIZERS[case.name](flat, **options)
    path: dict[str, list[np.ndarray]] = {"path.p0": [], "path.p1": []}
    norms = []
    for step, lr in enumerate(config["lr"]):
        flat.grads[...] = np.concatenate([given["g0"][step].ravel(), given["g1"][step].ravel()])
        norms.append(flat.clip(config.get("clip", 0)))
        optimizer.step(lr)
        for name, tensor in flat.params.items():
            path[f"path.{name}"].append(tensor.data.copy())
    return {name: np.stack(steps) for name, steps in path.items()} | {"norms": np.stack(norms)}


def run_schedule(case: Case, given: Arrays, dtype: str) -> Arrays:
    steps, warmup = case.config["steps"], case.config["warmup"]
    return {"factors": np.array([schedule.factor(case.name, step, steps, warmup) for step in range(steps)])}


# ---- quantizers ------------------------------------------------------------------------------------------------------


CONSTANTS = {"nf4": "absmax", "fp4": "absmax", "affine": "scale", "int4": "scale", "int8": "scale"}
"""What double quantization quantizes, by quantizer."""

NESTED = {"nested_codes": "codes", "nested_absmax": "absmax", "offset": "offset", "nested_map": "levels"}
"""The cases' names of a quantized constant's parts -> refpeft's."""

NOT_OPTIONS = ("double_quant", "nested_block", "shape", "dtype")
"""Members of a quantizer's config that are no options of its plugin."""


def part_of(case: Case, name: str) -> str:
    """refpeft's name of a part, or of a map that is stored with it."""
    if name in NESTED and case.config.get("double_quant"):
        return f"{CONSTANTS[case.name]}.{NESTED[name]}"
    return "levels" if name in ("codebook", "map") else name


def run_quantizer(case: Case, given: Arrays, dtype: str) -> Arrays:
    options = {name: value for name, value in case.config.items() if name not in NOT_OPTIONS}
    quantizer = make_quantizer(case.name, options, case.config.get("double_quant", False))
    if case.at == "encode":
        parts = quantizer.pack(given["weight"])
        return {name: parts[part_of(case, name)] for name in case.checks}
    if case.at == "file":
        parts = {part_of(case, name): array for name, array in given.items()}
        weight = Quantized(quantizer, parts, case.config["shape"], np.dtype(dtype))
        return tensors_of("q_proj.weight", weight, case.config.get("dtype"))
    x = given.pop("x_codes") * given.pop("x_scale")[:, None] / 127 if case.at == "linear" else None
    built_in = ("codebook", "map", "nested_map") if case.level == "must" else ()  # files of others bring their own
    parts = {part_of(case, name): array for name, array in given.items() if name not in built_in}
    weight = quantizer.dense(parts, tuple(case.config["shape"]), np.dtype(case.config.get("dtype", dtype)))
    return {"weight": weight.astype(dtype)} if x is None else {"y": x @ weight.T}


DRIVERS: dict[str, Callable[[Case, Arrays, str], Arrays]] = {
    "op": run_op,
    "fused": run_fused,
    "random": run_random,
    "model": run_model,
    "block": run_block,
    "loss": run_loss,
    "method": run_method,
    "optimizer": run_optimizer,
    "schedule": run_schedule,
    "quantizer": run_quantizer,
}


def dtypes(case: Case) -> tuple[str, ...]:
    """Quantizers are defined in float32."""
    return ("float32",) if case.kind == "quantizer" else ("float64", "float32")


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in cases() for dtype in dtypes(case)]
)
@pytest.mark.filterwarnings("ignore::refpeft.errors.RefpeftWarning")
def test_case(case, dtype):
    answer = DRIVERS[case.kind](case, case.given(dtype), dtype)
    assert not [result.problem for result in compare(case, answer, dtype) if result.problem]
