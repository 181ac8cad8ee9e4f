"""Bottleneck adapters in files of AdapterHub's `adapters` 1.3: `adapter_config.json` and `adapter.safetensors`.

Their "seq_bn" is pfeiffer, "double_seq_bn" houlsby without trained normalizations, and both Compacters are compacter.
What computes something else, on models that normalize first, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Array, to_host
from .errors import RefpeftError
from .files import read_json, read_safetensors, write_json, write_safetensors
from .models.base import Model
from .peft_formats import Entry, Format, Settings
from .sites import Adapter

KIND, VERSION = "AdapterHub", "adapters.1.3.0"
CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"

_PLACES = {"attn_out": "attention_adapters", "mlp_out": "output_adapters", "block_out": "output_adapters"}
_LETTERS = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
_FACTORS = {  # of matrices (in, out): the two change places, and each is transposed
    "down_s": "adapter_down.0.W_right",
    "down_t": "adapter_down.0.W_left",
    "down_bias": "adapter_down.0.b",
    "up_s": "adapter_up.W_right",
    "up_t": "adapter_up.W_left",
    "up_bias": "adapter_up.b",
}
_INSIDE = ("adapters", "shared_parameters")  # what the adapter's name stands behind, in names of tensors
_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu"}
_ACTIVATIONS |= {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_OF_FACTORS = {"shared_phm_rule": True, "factorized_phm_W": True, "phm_bias": True}
_OF_EVERY_ONE = {"residual_before_ln": True, "original_ln_after": True, "scaling": 1.0, "is_parallel": False}
_IN_TRAINING = ("init_weights", "init_weights_seed", "hypercomplex_nonlinearity", "learn_phm")
_IN_TRAINING += ("phm_c_init", "phm_init_range", "inv_adapter_reduction_factor", "hidden_size")
_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_UNUSED = (*_OF_FACTORS, "phm_layer", "phm_dim", "phm_rank", "factorized_phm_rule", "shared_W_phm")


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_config(config: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's."""
    return "peft_type" not in config and "config" in config and "version" in config


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """(settings, tensors) of a directory: one flat dict of peft_type KIND, and names without that of the adapter."""
    given = read_json(directory / CONFIG)
    settings, name = given["config"], given.get("name")
    if not isinstance(settings, dict) or not isinstance(name, str):
        raise RefpeftError(f"{directory / CONFIG}: expected 'config', an object, and 'name', a string")
    if not (directory / TENSORS).is_file() and (directory / PICKLE).is_file():
        raise RefpeftError(
            f"{directory / PICKLE} is a pickle, which can run code and is not read: load it with the library "
            f"`adapters` and write it again by model.save_adapter(directory, {name!r}, use_safetensors=True)"
        )
    tensors = read_safetensors(directory / TENSORS)
    for inside in _INSIDE:
        tensors = {key.replace(f".{inside}.{name}.", f".{inside}.", 1): array for key, array in tensors.items()}
    return settings | {"peft_type": KIND, "hidden_size": given.get("hidden_size")}, tensors


def _options(config: Settings, model: Model) -> dict[str, Any]:
    if model.config and model.config.family not in _CLASSES:
        raise RefpeftError(f"AdapterHub's adapters are read for {', '.join(_CLASSES)}, not for {model.config.family}")
    if (other := config.get("architecture")) is not None:
        raise RefpeftError(f"architecture is {other!r}: of AdapterHub's adapters bottlenecks are read")
    if config.get("is_parallel", False):
        raise RefpeftError("is_parallel: it reads the residual stream before its normalization, as no method here does")
    for key, value in _OF_EVERY_ONE.items():
        if config.get(key, value) != value:
            raise RefpeftError(f"{key} is {config.get(key)}; refpeft computes bottlenecks where it is {value}")
    attention, output = bool(config.get("mh_adapter")), bool(config.get("output_adapter"))
    targets = ["@attn_out"] * attention + ["@mlp_out"] * output
    if config.get("original_ln_before", False):
        if attention:
            raise RefpeftError(
                "mh_adapter with original_ln_before reads the sum with the residual: no method here does"
            )
        targets = ["@block_out"] * output
    activation, factor, dim = (config.need(key) for key in ("non_linearity", "reduction_factor", "hidden_size"))
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise RefpeftError(f"non_linearity is {activation!r}; refpeft knows {', '.join(_ACTIVATIONS)}")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise RefpeftError(f"reduction_factor is {factor!r}: expected one number for all layers, above 0")
    left_out = config.get("leave_out", [])
    if type(dim) is not int or not isinstance(left_out, list):
        raise RefpeftError("expected hidden_size to be a whole number, and leave_out a list of them")
    layers = {site.index for site in model.sites.values()} - {None}
    used = sorted(layer for layer in layers if layer not in left_out)
    return {
        "size": int(dim // factor),
        "activation": _ACTIVATIONS[activation],
        "targets": targets,
        "layers": None if len(used) == len(layers) else used,
    }


def _factored_options(config: Settings, model: Model) -> dict[str, Any]:
    for key, value in _OF_FACTORS.items():
        if config.get(key, value) is not value:
            raise RefpeftError(f"{key} is {config.get(key)}; refpeft computes Compacter where it is {value}")
    sizes = {"n": config.need("phm_dim"), "rank": config.need("phm_rank")}
    return _options(config, model) | sizes | {"norms": False}


def _entries(adapter: Adapter) -> list[Entry]:
    def turned(array: np.ndarray) -> np.ndarray:
        return array.transpose(0, 2, 1) if array.ndim == 3 else array

    def entry(name: str, key: str) -> Entry:
        return Entry(name, (key,), turned, lambda array: (turned(array),))

    root = adapter.layers[0].site.name.partition(".")[0]
    rule = [entry(f"{root}.shared_parameters.phm_rule", "shared.rule")] if "shared.rule" in adapter.params else []
    letters = _FACTORS if rule else _LETTERS
    found = list(rule)
    for layer in adapter.layers:
        before, _, place = layer.site.name.rpartition(".")
        stem = f"{before}.{_PLACES[place]}.adapters"
        found += [entry(f"{stem}.{letters[letter]}", f"{layer.site.name}.{letter}") for letter in layer.values]
    return found


def _twice_options(config: Settings, model: Model) -> dict[str, Any]:
    return _options(config, model) | {"norms": False}


def _form(options: Callable[..., dict[str, Any]], means: Callable[[dict[str, Any]], bool], *unused: str) -> Format:
    return Format(KIND, _entries, lambda adapter, model: {}, options, means=means, any_value=_IN_TRAINING + unused)


FORMATS = {
    "compacter": _form(_factored_options, lambda config: bool(config.get("phm_layer")), "phm_layer"),
    "pfeiffer": _form(_options, lambda config: not config.get("mh_adapter"), *_UNUSED),
    "houlsby": _form(_twice_options, lambda config: True, *_UNUSED),
}
"""By the method that a config means: the first that does."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(directory: str | Path, model: Model, adapter: Adapter, name: str = "refpeft") -> None:
    """Writes an adapter as `adapters` does; there, model.load_adapter(directory, use_safetensors=True) reads it.

    Raises RefpeftError for what AdapterHub has no bottleneck for.
    """
    settings = _settings(adapter, model)
    values = {key: to_host(tensor.data) for key, tensor in adapter.params.items()}
    tensors = {}
    for entry in _entries(adapter):
        inside = next(inside for inside in _INSIDE if f".{inside}." in entry.name)
        key = entry.name.replace(f".{inside}.", f".{inside}.{name}.")
        tensors[key] = entry.pack(values[entry.params[0]])
    config = {
        "config": settings,
        "hidden_size": model.config.dim,
        "model_class": _CLASSES[model.config.family],
        "model_name": model.name,
        "model_type": model.config.family,
        "name": name,
        "version": VERSION,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / TENSORS, tensors, {"format": "pt"})
    write_json(directory / CONFIG, config)


def _settings(adapter: Adapter, model: Model) -> dict[str, Any]:
    """The `config` of an adapter. Raises RefpeftError where they have none that computes the same."""
    if model.config.family not in _CLASSES:
        raise RefpeftError(
            f"models of the family {model.config.family} are not among AdapterHub's: {', '.join(_CLASSES)}"
        )
    cfg, method = adapter.cfg, adapter.parts[0].name
    factored = method in ("compacter", "compacter_pp")
    if len(adapter.parts) > 1 or not (factored or method in ("pfeiffer", "houlsby")):
        names = " with ".join(part.name for part in adapter.parts)
        raise RefpeftError(
            f"{names} has no form in AdapterHub; pfeiffer, and with norms = false houlsby, compacter have"
        )
    layers = {site.index for site in model.sites.values()} - {None}
    places = {layer.site.name.rpartition(".")[2] for layer in adapter.layers}
    used = {layer.site.index for layer in adapter.layers}
    if len(places) * len(used) != len(adapter.layers) or ("block_out" in places and len(places) > 1):
        raise RefpeftError(
            "AdapterHub has an adapter at the same places of all layers: block_out, or attn_out and mlp_out"
        )
    factor: float = model.config.dim / cfg.size
    if int(model.config.dim // factor) != cfg.size:  # rounded up
        factor = float(np.nextafter(factor, 0))
    return {
        "mh_adapter": "attn_out" in places,
        "output_adapter": bool(places - {"attn_out"}),
        "original_ln_before": "block_out" in places,
        "original_ln_after": True,
        "residual_before_ln": True,
        "non_linearity": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == cfg.activation),
        "reduction_factor": int(factor) if factor == int(factor) else factor,
        "leave_out": sorted(layers - used),
        "phm_layer": factored,
        **({"phm_dim": cfg.n, "phm_rank": cfg.rank, **_OF_FACTORS} if factored else {}),
    }
