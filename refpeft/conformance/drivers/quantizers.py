"""Quantizers: cases of the kind `quantizer`."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refpeft import manager
from refpeft.fused import frozen_linear
from refpeft.models.quantized_files import tensors_of
from refpeft.quant import Quantized, make_quantizer
from refpeft.tensor import parameter

from ..vectors import Arrays, Case
from .operations import gradients, placed

_CONSTANTS = {"nf4": "absmax", "fp4": "absmax", "affine": "scale", "int4": "scale", "int8": "scale"}
"""What double quantization quantizes, by quantizer."""

_NESTED = {"nested_codes": "codes", "nested_absmax": "absmax", "offset": "offset", "nested_map": "levels"}
"""The cases' names of a quantized constant's parts -> refpeft's."""

_NOT_OPTIONS = ("double_quant", "nested_block", "shape", "dtype")
"""Members of a quantizer's config that are no options of its plugin."""


def run_quantizer(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    if dtype != "float32":
        raise NotImplementedError("quantizers are defined in float32")
    if case.name not in manager.find():
        raise NotImplementedError(f"refpeft has no quantizer {case.name!r}")
    options = {name: value for name, value in case.config.items() if name not in _NOT_OPTIONS}
    quantizer = make_quantizer(case.name, options, case.config.get("double_quant", False))
    arrays = placed(given, xp)
    if case.at == "encode":
        parts = quantizer.pack(arrays["weight"])
        return {name: parts[_part(case, name)] for name in case.checks}
    shape, kept = tuple(case.config["shape"]), case.config.get("dtype")
    if case.at == "file":
        parts = {_part(case, name): array for name, array in arrays.items()}
        return tensors_of("q_proj.weight", Quantized(quantizer, parts, shape, np.dtype(dtype)), kept)
    inputs = {name: arrays.pop(name) for name in ("x", "g", "x_codes", "x_scale") if name in arrays}
    built_in = ("codebook", "map", "nested_map") if case.level == "must" else ()  # files of others bring their own
    parts = {_part(case, name): array for name, array in arrays.items() if name not in built_in}
    if case.at == "decode":
        return {"weight": quantizer.dense(parts, shape, np.dtype(kept or dtype)).astype(dtype)}
    weight = Quantized(quantizer, parts, shape, np.dtype(dtype))
    if "x_codes" in inputs:
        return {"y": (inputs["x_codes"] * inputs["x_scale"][:, None] / 127) @ weight().T}
    x = parameter(inputs["x"])
    y = frozen_linear(x, weight=weight)
    return gradients(y, inputs["g"], {"x": x}) if "g" in inputs else {"y": y.data, "weight": weight()}


def _part(case: Case, name: str) -> str:
    """refpeft's name of a part, or of a map that is stored with it."""
    if name in _NESTED and case.config.get("double_quant"):
        return f"{_CONSTANTS[case.name]}.{_NESTED[name]}"
    return "levels" if name in ("codebook", "map") else name
