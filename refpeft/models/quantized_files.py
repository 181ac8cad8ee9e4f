"""How files keep quantized weights: bitsandbytes' layouts and refpeft's own, read without trusting them, and written.

bitsandbytes, 4 bits   `<weight>` (bytes, 1), `<weight>.absmax`, `.quant_map`, with double quantization
                       `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, which is JSON
bitsandbytes, 8 bits   `<weight>` int8, `<module>.SCB`, `<module>.weight_format`
refpeft                `<weight>.<part>` for each part that the quantizer makes

All are of the weight as (out, in), also where a dense file has (in, out); config.json's quantization_config says which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft.backend import bfloat16, to_host
from refpeft.errors import RefpeftError
from refpeft.quant import CONSTANTS, Quantized, Quantizer, make_quantizer

if TYPE_CHECKING:
    from refpeft.models.checkpoint import Stored

Parts = dict[str, np.ndarray]
_BITSANDBYTES, _OWN = "bitsandbytes", "refpeft"
_BITS = {"nf4": 4, "fp4": 4, "int8": 8}  # the quantizers whose weights bitsandbytes reads
_STATE = "quant_state.bitsandbytes__"
_BESIDE = ("SCB", "weight_format")  # tensors of 8 bits that lie beside the weight
_LARGEST = float(np.finfo("f4").max)
_MOST_JSON = 4096  # bytes; bitsandbytes writes less than 200
_MOST_NUMBERS = 64  # of a quantized weight in a byte
_STORAGE = (np.dtype(np.uint8), bfloat16, np.dtype(np.float16), np.dtype(np.float32))  # in which 4-bit codes may lie


@dataclass(frozen=True)
class Packed:
    """A weight that a file has quantized: the quantizer's parts of it, as (out, in), mapped from the file."""

    quantizer: Quantizer
    parts: Parts


# Reading --------------------------------------------------------------------------------------------------------------


def check_method(scheme: Any) -> None:
    """Raises RefpeftError for a quantization_config of a kind that is not read, or that is not whole."""
    method = _method(scheme)
    if method not in (_BITSANDBYTES, _OWN):
        raise RefpeftError(
            f"the checkpoint is quantized already (config key quantization_config, quant_method {method!r}); refpeft "
            f"reads {_BITSANDBYTES} and its own: take the original weights and let refpeft quantize them"
        )
    if method == _OWN:
        own_quantizer(scheme)
    elif str(_kind(scheme)) not in _BITS:  # it becomes the name of a plugin
        found = repr(_kind(scheme))
        raise RefpeftError(f"config key quantization_config has bnb_4bit_quant_type {found}: expected nf4 or fp4")


def gathered(
    scheme: Mapping[str, Any], found: dict[str, Stored], shapes: dict[str, tuple[int, ...]], transposed: bool
) -> dict[str, Stored]:
    """`found` with the tensors of each quantized weight as one Stored.

    shapes      (out, in) of every weight that may be quantized; one that is there as it is stays dense
    transposed  whether dense files have them as (in, out)

    Raises RefpeftError where the tensors are not what the scheme and the shapes ask for.
    """
    if _method(scheme) == _OWN:
        read = partial(_own, own_quantizer(scheme))
    else:
        read = _eight_bits if _kind(scheme) == "int8" else partial(_four_bits, _kind(scheme))
    parts: dict[str, dict[str, Stored]] = {name: {} for name in shapes}
    kept = {}
    for name, entry in found.items():
        weight, part = _owner(name, parts)
        if weight:
            parts[weight][part] = entry
        else:
            kept[name] = entry
    for name, of_weight in parts.items():
        if set(of_weight) == {""} and of_weight[""].dtype.kind not in "iu":
            kept[name] = of_weight[""]
        elif of_weight:
            shape = shapes[name]
            packed = read(_Tensors(name, of_weight), shape)
            kept[name] = replace(
                next(iter(of_weight.values())),
                shape=shape[::-1] if transposed else shape,
                dtype=np.dtype("f4"),
                read=partial(_dense, packed, shape, transposed),
                packed=packed,
            )
    return kept


def _dense(packed: Packed, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
    dense = packed.quantizer.dense(packed.parts, shape, np.dtype("f4"))
    return dense.T if transposed else dense


def _method(scheme: Any) -> Any:
    if not isinstance(scheme, dict):
        return None
    old = _BITSANDBYTES if scheme.get("load_in_4bit") or scheme.get("load_in_8bit") else None
    return scheme.get("quant_method", old)  # before quant_method there was only bitsandbytes


def _kind(scheme: Mapping[str, Any]) -> Any:
    """The quantizer of bitsandbytes' scheme."""
    return "int8" if scheme.get("load_in_8bit") else scheme.get("bnb_4bit_quant_type", "fp4")


def _owner(name: str, weights: Mapping[str, Any]) -> tuple[str | None, str]:
    """(the weight that a tensor belongs to, its name below it): "" is the weight's own; (None, "") for another's."""
    if name in weights:
        return name, ""
    module, _, last = name.rpartition(".")
    if last in _BESIDE and f"{module}.weight" in weights:
        return f"{module}.weight", last
    start, found, part = name.partition(".weight.")
    weight = f"{start}.weight"
    return (weight, part) if found and weight in weights else (None, "")


class _Tensors:
    """The tensors of one quantized weight, by their names below it: checked when they are taken."""

    def __init__(self, name: str, stored: dict[str, Stored]):
        self.name, self._stored = name, stored

    def fail(self, problem: str, part: str = "") -> RefpeftError:
        """The error that `problem` is with a part."""
        file, above = next(iter(self._stored.values())).file, self.name
        if part in _BESIDE:
            above = above.removesuffix(".weight")
        return RefpeftError(f"{file}: tensor {above + '.' * bool(part) + part!r} {problem}")

    def __contains__(self, part: str) -> bool:
        return part in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in self._stored.values())

    def entry(self, part: str) -> Stored:
        if part not in self._stored:
            raise self.fail("is missing; the weight is quantized and needs it", part)
        return self._stored[part]

    def take(self, part: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The part, which must have this shape and dtype."""
        entry = self.entry(part)
        if entry.dtype != dtype or entry.shape != shape:
            wanted = f"{np.dtype(dtype)} {list(shape)}"
            raise self.fail(f"is {entry.dtype} {list(entry.shape)}, expected {wanted}", part)
        return entry.read()

    def codes(self, count: int) -> np.ndarray:
        """The weight's own tensor as the vector of its bytes, of which there must be so many; any shape will do."""
        entry = self.entry("")
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.dtype not in _STORAGE or size != count:
            raise self.fail(f"has {size} bytes of {entry.dtype}, expected {count} of {' or '.join(map(str, _STORAGE))}")
        return entry.read().reshape(-1).view(np.uint8)

    def levels(self, part: str, count: int) -> np.ndarray:
        """A code book."""
        levels = self.take(part, (count,), np.float32)
        if not np.isfinite(levels).all():
            raise self.fail("has values that are not finite", part)
        return levels

    def state(self, part: str) -> dict[str, Any]:
        """The JSON of bitsandbytes' QuantState."""
        entry = self.entry(part)
        if entry.dtype != np.uint8 or len(entry.shape) != 1 or entry.shape[0] > _MOST_JSON:
            raise self.fail(f"is {entry.dtype} {list(entry.shape)}, expected the bytes of a short JSON text", part)
        try:
            state = json.loads(entry.read().tobytes())
        except (ValueError, RecursionError) as error:
            raise self.fail(f"is not valid JSON: {error}", part) from None
        if not isinstance(state, dict):
            raise self.fail(f"is a JSON {type(state).__name__}, expected an object", part)
        return state

    def only(self, *parts: str) -> None:
        """Raises RefpeftError where there are others."""
        for part in self._stored:
            if part not in parts:
                raise self.fail(f"is not part of this format, which has {', '.join(filter(None, parts))}", part)


def _eight_bits(tensors: _Tensors, shape: tuple[int, ...]) -> Packed:
    tensors.only("", *_BESIDE)
    parts = {"codes": tensors.take("", shape, np.int8), "scale": tensors.take("SCB", shape[:1], np.float32)}
    if "weight_format" in tensors and tensors.take("weight_format", (), np.uint8) != 0:
        raise tensors.fail("is not 0: only rows in their order are read", "weight_format")
    return Packed(_quantizer("int8"), parts)


def _four_bits(kind: str, tensors: _Tensors, shape: tuple[int, ...]) -> Packed:
    states = [part for part in tensors if part.startswith(_STATE)]
    if states != [f"{_STATE}{kind}"]:
        found = f"is {' and '.join(part.removeprefix(_STATE) for part in states)}" if states else "has no quant_state"
        raise tensors.fail(f"{found}; the config says that it is bitsandbytes' {kind}")
    state, count = tensors.state(states[0]), math.prod(shape)
    if state.get("quant_type") != kind or state.get("shape") != list(shape):
        found = f"{state.get('quant_type')} {state.get('shape')}"
        raise tensors.fail(f"says that the weight is {found}; the config says {kind} {list(shape)}", states[0])
    nested = "nested_absmax" in tensors or "nested_offset" in state
    block, inner = state.get("blocksize"), state.get("nested_blocksize") if nested else 0
    if type(block) is not int or type(inner) is not int:
        raise tensors.fail(f"has block sizes {block!r} and {inner!r}, expected whole numbers", states[0])
    try:
        quantizer = _quantizer(kind, block, inner)
    except RefpeftError as error:
        raise tensors.fail(f"has a block size that refpeft has not: {error}", states[0]) from None

    parts, maps = {"packed": tensors.codes(-(-count // 2))}, {"levels": tensors.levels("quant_map", 16)}
    if nested:
        blocks, offset = -(-count // block), state.get("nested_offset")
        if type(offset) is not float or not abs(offset) <= _LARGEST:
            raise tensors.fail(f"has nested_offset {offset!r}, expected a float32 number", states[0])
        parts["absmax.codes"] = tensors.take("absmax", (blocks,), np.uint8)
        parts["absmax.absmax"] = tensors.take("nested_absmax", (-(-blocks // inner),), np.float32)
        parts["absmax.offset"] = np.array(offset, np.float32)
        maps["absmax.levels"] = tensors.levels("nested_quant_map", 256)
    else:
        parts["absmax"] = tensors.take("absmax", (-(-count // block),), np.float32)
    tensors.only("", "absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else []), states[0])
    built_in = _levels(quantizer)
    parts |= {name: levels for name, levels in maps.items() if not np.array_equal(levels, built_in[name])}
    return Packed(quantizer, parts)


@cache
def _quantizer(kind: str, block: int = 0, inner: int = 0) -> Quantizer:
    """One object for all weights of a format; `block` and that of double quantization, `inner`, are 0 without."""
    quantizer = make_quantizer(kind, {"block": block} if block else {})
    constants = make_quantizer(CONSTANTS, {"offset": True, "block": inner}) if inner else None
    return Quantizer(quantizer.plugin, quantizer.cfg, constants)


@cache
def _levels(quantizer: Quantizer) -> dict[str, np.ndarray]:
    """The code books that a 4-bit quantizer and its constants' have built in, under the names that parts have them by.

    They are what the codes in their order decode to.
    """
    kind, float32 = Quantizer(quantizer.plugin, quantizer.cfg), np.dtype("f4")
    pairs = np.arange(8, dtype=np.uint8) * 0x22 + 1  # 0x01, 0x23 ... 0xEF
    books = {"levels": kind.dense({"packed": pairs, "absmax": np.ones(1, np.float32)}, (16,), float32)}
    if quantizer.constants:
        codes = np.arange(256, dtype=np.uint8)
        blocks = -(-256 // quantizer.constants.cfg.block)
        parts = {"codes": codes, "absmax": np.ones(blocks, np.float32)}
        books["absmax.levels"] = quantizer.constants.dense(parts, (256,), float32)
    return books


def own_quantizer(scheme: Any, key: str = "quantization_config") -> Quantizer:
    """The quantizer that refpeft's own scheme, a config's `key`, names: one that is known, as no file names code."""
    scheme = scheme if isinstance(scheme, dict) else {}
    name, options, double = (scheme.get(entry) for entry in ("quantizer", "options", "double_quant"))
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or not isinstance(options, dict)
        or type(double) is not bool
    ):
        raise RefpeftError(
            f"config key {key} says quantizer {name!r}, options {options!r}, double_quant {double!r}: "
            "expected a quantizer's name, its options, true or false"
        )
    return make_quantizer(name, options, double)


def _own(quantizer: Quantizer, tensors: _Tensors, shape: tuple[int, ...]) -> Packed:
    if math.prod(shape) > _MOST_NUMBERS * tensors.nbytes:  # no array is made on the word of a config alone
        raise tensors.fail(f"has {tensors.nbytes} bytes in all, too few for the {list(shape)} that the config says")
    try:
        expected = parts_of(quantizer, shape)
    except RefpeftError as error:
        raise tensors.fail(f"cannot be {quantizer}: {error}") from None
    tensors.only(*expected)
    return Packed(quantizer, {part: tensors.take(part, *kind) for part, kind in expected.items()})


@cache
def parts_of(quantizer: Quantizer, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of each part of such a weight: what the quantizer makes of one."""
    sample = np.resize(np.linspace(-1, 1, 97, dtype=np.float32), shape)
    return {name: (part.shape, part.dtype) for name, part in quantizer.pack(sample).items()}


# Writing --------------------------------------------------------------------------------------------------------------


def own_scheme(quantizer: Quantizer) -> dict[str, Any]:
    """What `own_quantizer` reads."""
    return {
        "quant_method": _OWN,
        "quantizer": quantizer.name,
        "options": quantizer.options,
        "double_quant": quantizer.constants is not None,
    }


def scheme_of(quantizer: Quantizer, dtype: str, dense: list[str]) -> dict[str, Any]:
    """config.json's quantization_config for weights of a quantizer; of nf4, fp4 and int8 as transformers 5 writes it.

    dtype  what the weights are computed with
    dense  the modules of linear layers that are not quantized; for transformers that is the head, unless told otherwise

    Raises RefpeftError for what bitsandbytes has no form for.
    """
    if quantizer.name not in _BITS:
        return own_scheme(quantizer)
    four = _BITS[quantizer.name] == 4
    if not four and quantizer.constants:
        raise RefpeftError("bitsandbytes has no double quantization of int8: leave --double-quant out")
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantizer.name if four else "fp4",
        "bnb_4bit_use_double_quant": quantizer.constants is not None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if dense == ["lm_head"] else dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": _BITSANDBYTES,
    }


def tensors_of(name: str, weight: Quantized, dtype: str) -> dict[str, np.ndarray]:
    """The tensors that a quantized weight is in a file; `dtype` is what bitsandbytes gives when it dequantizes."""
    quantizer, parts = weight.quantizer, {part: to_host(array) for part, array in weight.parts.items()}
    if quantizer.name not in _BITS:
        return {f"{name}.{part}": array for part, array in parts.items()}
    if quantizer.name == "int8":
        module = name.removesuffix(".weight")
        tensors = {name: parts["codes"], f"{module}.SCB": parts["scale"]}
        return tensors | {f"{module}.weight_format": np.zeros((), np.uint8)}
    parts = _levels(quantizer) | parts
    state = {"quant_type": quantizer.name, "blocksize": quantizer.cfg.block, "dtype": dtype, "shape": weight.shape}
    tensors = {name: parts["packed"][:, None], f"{name}.quant_map": parts["levels"]}
    if quantizer.constants:
        state["nested_blocksize"], state["nested_dtype"] = quantizer.constants.cfg.block, "float32"
        state["nested_offset"] = float(parts["absmax.offset"])
        tensors[f"{name}.absmax"] = parts["absmax.codes"]
        tensors[f"{name}.nested_absmax"] = parts["absmax.absmax"]
        tensors[f"{name}.nested_quant_map"] = parts["absmax.levels"]
    else:
        tensors[f"{name}.absmax"] = parts["absmax"]
    tensors[f"{name}.{_STATE}{quantizer.name}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors
