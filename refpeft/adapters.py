"""Adapters as files: directories with `adapter_config.json` and `adapter_model.safetensors`, as Hugging Face PEFT has.

What PEFT can express is written in its form and read from it (`refpeft.peft_formats`). Anything else has the peft_type
REFPEFT, the method's name and options in the config, and its tensors under refpeft's own names. Directories of
AdapterHub's library are read, too (`refpeft.adapterhub`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import adapterhub, manager, survey
from . import config as runs
from .backend import Array, bfloat16, to_host
from .errors import RefpeftError
from .files import expanded, read_json, read_safetensors, write_json, write_safetensors
from .models.base import Frozen, Model
from .models.quantized_files import own_quantizer, own_scheme, parts_of
from .peft_formats import FORMATS, PREFIX, Entry, Format, Settings, heads
from .peft_formats.common import for_bare, from_bare
from .peft_formats.prompts import first_rows
from .quant import Quantized, Quantizer
from .sites import Adapter, Site, detach, prepare, put_on
from .tensor import Tensor

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OWN = "REFPEFT"
PEFT_VERSION = "0.21.2"

_OF_EVERY_METHOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
_SIDES = ("r", "tokens", "size", "rank", "n", "tasks", "ranks", "hidden", "modules")  # options: sides of tensors
_NOTHING = (None, False, 0, "", [], {})  # values of keys that are unknown and say that they are not used


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(
    directory: str | Path, model: Model, adapter: Adapter | None = None, quantizer: Quantizer | None = None
) -> None:
    """Writes one adapter into `directory`, or, without `adapter`, all that are attached to the model.

    Several adapters get a directory each inside of it, in the order of attaching: `1-lora`, `2-prefix_tuning`. With
    `quantizer`, what is trained is written in its format, which only refpeft reads.
    """
    directory = Path(directory)
    if adapter is None and not model.adapters:
        raise RefpeftError("there is no adapter to save")
    if adapter is None and len(model.adapters) > 1:
        for number, one in enumerate(model.adapters, 1):
            save(directory / f"{number}-{one.name}", model, one, quantizer)
        return
    adapter = adapter or model.adapters[0]
    entries, settings = _written(adapter, model, quantizer)
    values = {name: to_host(tensor.data) for name, tensor in _values(adapter).items()}
    tensors = {entry.name: entry.pack(*(values[name] for name in entry.params)) for entry in entries}
    if quantizer:
        for name, weight in packed(adapter, quantizer).items():
            del tensors[PREFIX + name]
            tensors |= {f"{PREFIX}{name}.{part}": to_host(array) for part, array in weight.parts.items()}
    common = dict.fromkeys(_OF_EVERY_METHOD) | {
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        "task_type": model.task_type,
    }
    directory.mkdir(parents=True, exist_ok=True)
    if "method" not in settings:
        settings, tensors = for_bare(settings, tensors, model)
    write_safetensors(directory / TENSORS, tensors, {"format": "pt"})
    write_json(directory / CONFIG, dict(sorted((common | settings).items())))  # last: with it the adapter is there


def nbytes(adapter: Adapter, model: Model) -> int:
    """Bytes of the values in the file that `save` writes."""
    values = _values(adapter)
    return sum(values[name].data.nbytes for entry in _written(adapter, model, None)[0] for name in entry.params)


def _written(adapter: Adapter, model: Model, quantizer: Quantizer | None) -> tuple[list[Entry], dict[str, Any]]:
    """The tensors and the settings of an adapter: in PEFT's form where it has one, else in refpeft's own."""
    inside = [part for part in adapter.parts if not part.is_recipe]
    if len(inside) == 1:  # a recipe of one method is written as that method
        adapter = replace(adapter, parts=inside)
    form = FORMATS.get(adapter.parts[0].name)
    rest, head = heads.apart(adapter, model, form)
    if form is not None and not form.fitted and quantizer is None and form.fits(rest, model):
        settings = {"peft_type": form.peft_type} | form.settings(rest, model)
        if head:
            settings["modules_to_save"] = sorted({*(settings.get("modules_to_save") or ()), *heads.modules(model)})
        return form.entries(rest) + head, settings
    settings = {
        "peft_type": OWN,
        "method": adapter.parts[0].name,
        "options": asdict(adapter.cfg) if adapter.cfg is not None else {},
    }
    changed = _changed_weights(adapter)
    if changed:
        settings["base"] = own_scheme(changed[0].quantizer) if isinstance(changed[0], Quantized) else None
    if quantizer:
        settings["quantizer"] = own_scheme(quantizer)
    if decided := survey.shapes(adapter):
        settings["shapes"] = decided
    return _own_entries(adapter), settings


def _changed_weights(adapter: Adapter) -> list[Frozen]:
    """The frozen weights that the method changes, quantized ones first."""
    weights = [one.site.weight for one in adapter.layers if manager.hook(one.part.plugin, "peft_base")]
    return sorted(weights, key=lambda weight: not isinstance(weight, Quantized))


def _own_entries(adapter: Adapter) -> list[Entry]:
    return [Entry(PREFIX + name, (name,)) for name in _values(adapter)]


def _values(adapter: Adapter) -> dict[str, Tensor]:
    """All that a file must hold: what is trained, and the constants."""
    return adapter.constants | adapter.params


# ---- in a quantizer's format -----------------------------------------------------------------------------------------


def packed(adapter: Adapter, quantizer: Quantizer) -> dict[str, Quantized]:
    """What an adapter trains, by name, in a quantizer's format.

    Raises RefpeftError, naming the tensor, where the format has no place for its shape.
    """
    return {name: quantizer(value.data, value.dtype, name) for name, value in adapter.params.items()}


def quantize(model: Model, quantizer: Quantizer) -> float:
    """Gives what is trained the values that a file in the quantizer's format has; the relative error (RMS) over all."""
    error = size = 0.0
    for adapter in model.adapters:
        for name, weight in packed(adapter, quantizer).items():
            value, now = adapter.params[name].data, weight()
            error, size = error + float(((now - value) ** 2).sum()), size + float((value**2).sum())
            value[...] = now
    return math.sqrt(error / size) if size else 0.0


def _unpacked(tensors: dict[str, Array], adapter: Adapter, quantizer: Quantizer) -> dict[str, Array]:
    """`tensors` with dense ones in place of what `packed` made of them. Raises RefpeftError where that is not whole."""
    found = dict(tensors)
    for name, value in adapter.params.items():
        parts = {}
        for part, (shape, dtype) in parts_of(quantizer, value.shape).items():
            full = f"{PREFIX}{name}.{part}"
            parts[part] = found.pop(full, None)
            if parts[part] is None:
                raise RefpeftError(f"tensor {full!r} is missing")
            if (parts[part].shape, parts[part].dtype) != (shape, dtype):
                raise RefpeftError(
                    f"tensor {full!r} is {parts[part].dtype} {list(parts[part].shape)}: expected {dtype} {list(shape)}"
                )
        found[PREFIX + name] = quantizer.dense(parts, value.shape, np.dtype("f4"))
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------


def directories(directory: str | Path) -> list[Path]:
    """The adapters in a directory, innermost first: itself, or those inside that `save` numbered."""
    directory = Path(directory)
    if (directory / CONFIG).is_file():
        return [directory]
    numbered = [file.parent for file in directory.glob(f"*-*/{CONFIG}") if file.parent.name.partition("-")[0].isdigit()]
    if not numbered:
        raise RefpeftError(f"{directory} holds no adapter: expected {CONFIG} in it")
    return sorted(numbered, key=lambda inside: int(inside.name.partition("-")[0]))


def task_of(directory: str | Path) -> tuple[str | None, tuple[str, ...]]:
    """(task, labels) that the adapters in a directory were trained for, by their run or by PEFT's task_type.

    (None, ()) where neither says more than the model itself does. Labels that have no names are called LABEL_0, ...
    """
    if run := runs.run_of(directory):
        return run.task, run.labels
    one = directories(directory)[0]
    config = read_json(one / CONFIG)
    return (
        heads.task_in(config, read_safetensors(one / TENSORS)) if config.get("task_type") in heads.TASKS else (None, ())
    )


def load(model: Model, directory: str | Path) -> list[Adapter]:
    """Attaches the adapter, or the adapters, of a directory to the model, innermost first.

    Raises RefpeftError, and leaves the model as it was, for a setting that refpeft does not compute, and for a tensor
    that is missing, unexpected or of another shape.
    """
    loaded: list[Adapter] = []
    try:
        for one in directories(directory):
            loaded.append(_load_one(model, one))
    except RefpeftError:
        for adapter in loaded:
            detach(model, adapter)
        raise
    return loaded


def stored(directory: str | Path, sites: Iterable[Site]) -> Adapter:
    """What `directory` holds, for methods that start from other adapters: an Adapter that is on no model.

    Its .plugin and .cfg are the method and its options, .layers have its values at each site, .params and .constants
    all of them by name ("model.embed_tokens.prompt"), in float64 on the host. `sites` are those that it may act on.
    Raises RefpeftError as `load` does, where it acts on others, and where there are several adapters.
    """
    return _read(_Apart(sites), _single(directory))


def own_values(directory: str | Path) -> tuple[str, dict[str, Any], dict[str, Array]]:
    """(method, options, values by name) of an adapter in refpeft's own form, of whatever model: nothing is checked."""
    directory = _single(directory)
    config = read_json(directory / CONFIG)
    method, options = config.get("method"), config.get("options")
    if config.get("peft_type") != OWN or "quantizer" in config or not isinstance(options, dict):
        kind = "in a quantizer's format" if "quantizer" in config else f"of peft_type {config.get('peft_type')!r}"
        raise RefpeftError(
            f"{directory} holds an adapter {kind}: expected one in refpeft's own form, in floating point"
        )
    tensors = read_safetensors(directory / TENSORS)
    return method, options, {name.removeprefix(PREFIX): array for name, array in tensors.items()}


def _single(directory: str | Path) -> Path:
    """The directory of the one adapter in `directory`. Raises RefpeftError where there are several."""
    found = directories(expanded(directory))
    if len(found) > 1:
        names = ", ".join(str(one) for one in found)
        raise RefpeftError(f"{directory} holds {len(found)} adapters: name one of {names}")
    return found[0]


class _Apart(Model):
    """Sites without the rest of their model, to make adapters for them that are not put on."""

    def __init__(self, sites: Iterable[Site]):
        super().__init__(None, self._refuse, np.dtype("f8"))
        self.sites = {site.name: site for site in sites}

    def place(self, array: Array, dtype: np.dtype | None = None) -> Array:
        return super().place(to_host(array), dtype)

    def _refuse(self, name: str, linear: bool, transposed: bool) -> Frozen:
        raise RefpeftError("it lacks values, which are fitted to the model's weights: load it, save it, and take that")


def _load_one(model: Model, directory: Path) -> Adapter:
    adapter = _read(model, directory)
    try:
        put_on(model, adapter)
    except RefpeftError as error:
        raise RefpeftError(f"{directory / TENSORS}: {error}") from None
    return adapter


def _read(model: Model, directory: Path) -> Adapter:
    """The adapter of a directory, made for the model and not put on it."""
    config, file = read_json(directory / CONFIG), directory / TENSORS
    if adapterhub.is_config(config):
        (config, tensors), file = adapterhub.read(directory), directory / adapterhub.TENSORS
    else:
        tensors = read_safetensors(file)
    try:
        if isinstance(model, _Apart):
            config, tensors = heads.without(config, tensors)
        else:
            heads.check_task(config, model)
        method, form, options = _understood(config, model)
        _refuse_sizes(options, tensors)
        if form:
            tensors = first_rows(config, from_bare(config, tensors, model))
        adapter = prepare(model, method, options, fit=form is not None and form.fitted)
        _refuse_other_base({"base": None} if form else config, adapter)  # PEFT's weights were dense
        quantizer = own_quantizer(config["quantizer"], "quantizer") if not form and "quantizer" in config else None
        if not form and survey.shapes(adapter):
            survey.reshape(adapter, config.get("shapes"), 2 * sum(array.nbytes for array in tensors.values()))
    except RefpeftError as error:
        raise RefpeftError(f"{directory / CONFIG}: {error}{_other_model(config, model)}") from None
    try:
        rest, head = heads.apart(adapter, model, form)
        entries = form.entries(rest) + head if form else _own_entries(adapter)
        tensors = _unpacked(tensors, adapter, quantizer) if quantizer else heads.once(tensors)
        heads.check(tensors, {entry.name for entry in entries}, head, model)
        _fill(_values(adapter), entries, _without_base(tensors, adapter, model), model)
        for layer in adapter.layers:
            layer.part.call("peft_check_values", site=layer.site, p=layer.arrays)
        adapter.settled = True
    except RefpeftError as error:
        raise RefpeftError(f"{file}: {error}{_other_model(config, model)}") from None
    return adapter


def _other_model(config: dict[str, Any], model: Model) -> str:
    """A hint that ends a message, where the adapter says that it was made for a model of another name."""
    base = config.get("base_model_name_or_path")
    return f"; it was made for {base}, and this is {model.name}" if base and model.name and base != model.name else ""


def _understood(config: dict[str, Any], model: Model) -> tuple[str, Format | None, dict[str, Any]]:
    """The method, PEFT's format of it (None for refpeft's own) and the plugin's options that a config means."""
    kind = config.get("peft_type")
    if kind == OWN:
        method, options = config.get("method"), config.get("options")
        if not isinstance(method, str) or not isinstance(options, dict):
            raise RefpeftError("expected 'method', a name, and 'options', an object")
        manager.path_of(method, "method")  # a name that is known: a file of others names no path
        return method, None, options
    for method, form in (*FORMATS.items(), *adapterhub.FORMATS.items()):
        if form.peft_type == kind and form.means(config):
            saved = config.get("modules_to_save")
            if isinstance(saved, list):  # the head comes with the task
                of_head = ["classifier", "score", *heads.modules(model)]  # no set: names may be anything yet
                config = config | {"modules_to_save": [name for name in saved if name not in of_head]}
            settings = Settings(config)
            options = form.options(settings, model)
            _refuse_unsupported(config, form, settings.read)
            return method, form, options
    known = ", ".join(dict.fromkeys(form.peft_type for form in FORMATS.values()))
    raise RefpeftError(f"peft_type is {kind!r}; refpeft reads {known}")


def _refuse_unsupported(config: dict[str, Any], form: Format, read: set[str]) -> None:
    """Raises RefpeftError for a key that may change the function and that nothing here has read."""
    for key, value in config.items():
        if key in read or key in _OF_EVERY_METHOD or key in form.any_value or value in _NOTHING:
            continue
        if key not in form.values:
            raise RefpeftError(f"{key} = {value!r} is not something that refpeft computes for {form.peft_type}")
        if value not in form.values[key]:
            known = ", ".join(map(repr, form.values[key]))
            raise RefpeftError(f"{key} = {value!r}; for {form.peft_type} refpeft knows {known}")


def _refuse_other_base(config: dict[str, Any], adapter: Adapter) -> None:
    """Raises RefpeftError where the method changes frozen weights, and those of the file were kept in another form."""
    changed = _changed_weights(adapter)
    if not changed:
        return
    if "base" not in config:
        raise RefpeftError("expected 'base', the quantizer of the weights that the adapter was fitted to, or null")
    was = "dense" if config["base"] is None else str(own_quantizer(config["base"], "base"))
    now = str(changed[0].quantizer) if isinstance(changed[0], Quantized) else "dense"
    if was != now:
        raise RefpeftError(f"the adapter was fitted to weights that were {was}, and these are {now}: load the model so")


def _refuse_sizes(options: dict[str, Any], tensors: dict[str, Array]) -> None:
    """Raises RefpeftError for a rank or a length beyond any tensor of the file, before anything of its size is made."""
    patterns = options.get("rank_pattern")
    asked = {name: options.get(name) for name in _SIDES} | (patterns if isinstance(patterns, dict) else {})
    largest = max((side for array in tensors.values() for side in array.shape), default=0)
    for name, size in asked.items():
        if isinstance(size, int) and size > largest:
            raise RefpeftError(f"{name} = {size}, but no tensor in {TENSORS} has a side of more than {largest}")
    d, most = options.get("d"), 2 * sum(array.nbytes for array in tensors.values())  # of 4 bits, at least
    if isinstance(d, int) and d > most:
        raise RefpeftError(f"d = {d}, but {TENSORS} has no more than {most} numbers")


def _without_base(tensors: dict[str, Array], adapter: Adapter, model: Model) -> dict[str, Array]:
    """`tensors` without the frozen weights that PEFT adds where an embedding is a target, if they are this model's."""
    kept = dict(tensors)
    for site in adapter.sites:
        frozen = kept.pop(f"{PREFIX}{site.name}.base_layer.weight", None)
        if frozen is None:
            continue
        own = to_host(site.weight())
        own = own.T if site.transposed else own
        if frozen.shape != own.shape or not np.allclose(frozen.astype(own.dtype), own, rtol=1e-2, atol=1e-5):
            raise RefpeftError(
                f"the frozen weight of {site.name} in it is not this model's: it belongs to another model"
            )
    return kept


def _fill(values: dict[str, Tensor], entries: list[Entry], tensors: dict[str, Array], model: Model) -> None:
    """Puts the tensors of a file into `values`. Raises RefpeftError unless they are exactly those of `entries`."""
    expected = {entry.name for entry in entries}
    for names, what in ((expected - tensors.keys(), "is missing"), (tensors.keys() - expected, "is not expected")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise RefpeftError(f"tensor {min(names)!r} {what}{more}")
    for entry in entries:
        array, shape = tensors[entry.name], entry.pack(*(to_host(values[name].data) for name in entry.params)).shape
        if array.shape != shape:
            raise RefpeftError(f"tensor {entry.name!r} has shape {array.shape}: expected {shape}")
        if any(values[name].dtype.kind == "i" for name in entry.params):
            if not (array % 1 == 0).all():  # PEFT writes integers as float32 on Windows
                raise RefpeftError(f"tensor {entry.name!r} is of {array.dtype}: expected integers")
        elif array.dtype.kind != "f" and array.dtype != bfloat16:
            raise RefpeftError(f"tensor {entry.name!r} is of {array.dtype}: expected floating-point numbers")
        for name, part in zip(entry.params, entry.unpack(array), strict=True):
            values[name].data[...] = model.place(part, values[name].dtype)
