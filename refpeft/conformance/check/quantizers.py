"""What is asked of a quantizer: a format that is whole for weights of any shape, and the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import backend, manager, sites
from refpeft.backend import Array, to_host
from refpeft.config import plugin_options
from refpeft.conformance import device
from refpeft.conformance.check import subjects
from refpeft.conformance.check.findings import Failed, NotApplicable, place
from refpeft.errors import RefpeftError
from refpeft.manager import Listing
from refpeft.quant import Quantizer
from refpeft.rng import Stream

WHOLE, TALL, ODD = (24, 256), (200, 96), (7, 37)
_FLOAT = np.dtype("f4")


@dataclass
class Subject:
    """A quantizer with its options."""

    plugin: ModuleType
    listing: Listing
    options: dict[str, Any]

    @property
    def path(self) -> str:
        return self.listing.path

    @cached_property
    def quantizer(self) -> Quantizer:
        cfg = plugin_options(self.plugin, self.options) if hasattr(self.plugin, "Config") else None
        return Quantizer(self.plugin, cfg)

    def dense(self, weight: Array, dtype: np.dtype = _FLOAT) -> Array:
        """The weight that the format has in place of this one."""
        parts = self.quantizer.pack(weight)
        return self.quantizer.dense(parts, weight.shape, dtype)


def drawn(shape: tuple[int, ...]) -> np.ndarray:
    """A weight as models have them, always the same."""
    return (0.1 * Stream(0, "check", *shape).standard_normal(shape)).astype(_FLOAT)


def both_ways(subject: Subject) -> str:
    for hook, other in (("quant_pack", None), ("quant_unpack", "quant_blocks")):
        if not any(manager.hook(subject.plugin, name) for name in (hook, other) if name):
            raise Failed(f"there is no {hook}: quant_pack makes the parts, and quant_unpack defines what they mean")
    weight = drawn(WHOLE)
    parts, back = subject.quantizer.pack(weight), subject.dense(weight)
    wrong = [name for name, part in parts.items() if not isinstance(part, np.ndarray | np.generic)]
    if wrong:
        raise Failed(
            f"part {wrong[0]!r} is of {type(parts[wrong[0]]).__name__}: parts are arrays, of any dtype and shape"
        )
    if back.shape != weight.shape:
        raise Failed(
            f"quant_unpack gives the shape {back.shape}: expected that of its argument `shape`, {weight.shape}"
        )
    share = float(np.linalg.norm(back - weight) / np.linalg.norm(weight))
    if not share < 0.5:
        raise Failed(
            f"a weight comes back with an error of {share:.2f} of its size: do both hooks mean the same format?"
        )
    bits = sum(part.nbytes for part in parts.values()) * 8 / weight.size
    return f"{', '.join(parts)}; {bits:.4g} bits a weight, relative error {share:.3f} on normal numbers"


def odd_shapes(subject: Subject) -> str:
    refused = []
    for shape in (ODD, (1, 1), (3, 2, 33), (64,)):
        try:
            back = subject.dense(drawn(shape))
        except RefpeftError as error:
            refused.append(" ".join(str(error).split()))
            continue
        if back.shape != shape:
            raise Failed(
                f"a weight {shape} comes back as {back.shape}: give quant_unpack's result the shape it is told"
            )
        if not np.isfinite(back).all():
            raise Failed(f"a weight {shape} comes back with NaN: fill up a block that is not full with zeros")
    if refused:
        return f"refused where they do not fit: {refused[0]}"
    return "any shape, blocks that are not full too"


def zeros(subject: Subject) -> str:
    weight = drawn(WHOLE)
    weight[:2] = 0
    for array in (np.zeros(WHOLE, _FLOAT), weight):
        try:
            with np.errstate(invalid="raise", divide="raise"):
                back = subject.dense(array)
        except FloatingPointError as error:
            raise Failed(f"{error}: divide by no scale of 0, what that gives is another thing on a GPU") from error
        if not np.isfinite(back).all() or (array is not weight and back.any()):
            raise Failed("zeros do not come back as zeros: give a block of zeros the code of 0")
    return "blocks of zeros are zeros"


def any_finite_number(subject: Subject) -> str:
    for scale in (1e-30, 1e-38, 1e30):
        with np.errstate(all="ignore"):
            back = subject.dense(drawn(WHOLE) * np.float32(scale))
        if not np.isfinite(back).all():
            raise Failed(
                f"weights of about {0.1 * scale:.0e} come back with NaN or infinity: bound scales before dividing"
            )
    return "no NaN and no infinity of weights from 1e-38 to 1e29"


def dtypes(subject: Subject) -> str:
    weight = drawn(WHOLE)
    parts = subject.quantizer.pack(weight)
    given = {
        dtype: subject.quantizer.dense(parts, WHOLE, dtype) for dtype in (_FLOAT, np.dtype("f8"), backend.bfloat16)
    }
    for dtype, back in given.items():
        if back.dtype != dtype:
            raise Failed(f"quant_unpack gives {back.dtype} where {dtype} is asked for: give its argument `dtype`")
        if not np.array_equal(back, given[_FLOAT].astype(dtype)):
            raise Failed(f"in {dtype} the weight is another: compute in float32, and cast what comes out")
    return "float32 and float64, the same numbers, and in bfloat16 these rounded"


def some_rows(subject: Subject) -> str:
    if not subject.quantizer.by_rows:
        raise NotApplicable("quant_unpack names no `rows`: for a product the whole weight is made dense")
    weight = drawn(TALL)
    parts, whole = subject.quantizer.pack(weight), subject.dense(weight)
    for rows, panel in subject.quantizer.panels(parts, TALL, _FLOAT, 64):
        if panel.shape != whole[rows].shape:
            raise Failed(f"of {len(whole[rows])} rows it gives the shape {panel.shape}: expected {whole[rows].shape}")
        if not np.array_equal(panel, whole[rows]):
            raise Failed(f"rows {rows.start} to {rows.stop - 1} alone are others than in the whole weight")
    return "rows alone are those of the whole weight, to the bit"


def same_bits_again(subject: Subject) -> str:
    weight = drawn(ODD if _takes(subject, ODD) else WHOLE)
    before = weight.copy()
    one, two = subject.quantizer.pack(weight), subject.quantizer.pack(np.asfortranarray(weight).copy("C"))
    if not np.array_equal(weight, before):
        raise Failed("quant_pack writes into the weight: work on a copy")
    off = [name for name in one if not np.array_equal(one[name], two[name])]
    if off:
        raise Failed(f"part {off[0]!r} is another the second time: no random numbers, and no memory that is not filled")
    return "packing twice gives the same bits"


def packing_what_was_unpacked(subject: Subject) -> str:
    weight = drawn(WHOLE)
    once = subject.dense(weight)
    twice = subject.dense(once)
    largest = float(abs(once).max())
    off = float(abs(twice - once).max()) / largest
    if np.array_equal(once, twice):
        return "the same weight to the bit"
    if not off <= 0.25:
        raise Failed(f"another weight, by {off:.2g} of the largest: a level of the format does not get its own code")
    if off < 1e-6:
        return f"the same weight up to the rounding of its scales, {off:.1g} of the largest"
    count = int((once != twice).sum())
    return f"{count} of {once.size} numbers move, by up to {off:.1g} of the largest: scales are not found again"


def on_a_device(subject: Subject) -> str:
    """On a stand-in for CuPy the parts and the weight are NumPy's, to the bit; unpacking reads nothing on the host."""
    weight = drawn(ODD if _takes(subject, ODD) else WHOLE)
    with device.installed() as xp:
        parts = subject.quantizer.pack(xp.asarray(weight))
        try:
            with device.capture():
                back = subject.quantizer.dense(parts, weight.shape, _FLOAT)
        except device.HostRead as error:
            raise Failed(f"quant_unpack: {error}{place(error, subject.path)}: keep it an array") from error
        there = {name: to_host(part) for name, part in parts.items()} | {"weight": to_host(back)}
    here = subject.quantizer.pack(weight) | {"weight": subject.dense(weight)}
    off = [name for name, array in here.items() if not np.array_equal(there[name], array)]
    if off:
        raise Failed(f"{off[0]} is another on a device: take array functions of backend.xp_of(array)")
    return "the same bits on a stand-in for CuPy, and nothing read on the host"


def gpu(subject: Subject) -> str:
    try:
        xp = backend.module("cuda")
    except RefpeftError as error:
        raise NotApplicable(f"no device here ({error})") from None
    weight = drawn(WHOLE)
    off = float(abs(to_host(subject.dense(xp.asarray(weight))) - subject.dense(weight)).max())
    if not off <= 1e-6:
        raise Failed(f"on the GPU weights differ by {off:.1g}: take array functions of backend.xp_of(array)")
    return "the same weight" if not off else f"the same weight up to {off:.1g}"


def under_a_method(subject: Subject) -> str:
    """LoRA on weights of this format: its outputs and gradients are finite, and the base is what was unpacked."""
    try:
        built = subjects.model("llama", "float32", subject.quantizer)
    except RefpeftError as error:
        raise NotApplicable(f"the tiny model's weights do not fit the format: {error}") from None
    adapter = sites.attach(built, "lora", {"r": 3, "targets": "all-linear"})
    subjects.move(adapter)
    if not all(np.isfinite(g).all() for g in subjects.gradients(built).values()):
        raise Failed("LoRA's gradients on such weights are not finite")
    return "LoRA trains on such weights"


def _takes(subject: Subject, shape: tuple[int, ...]) -> bool:
    try:
        subject.quantizer.pack(drawn(shape))
    except RefpeftError:
        return False
    return True


PROPERTIES = (
    both_ways,
    odd_shapes,
    zeros,
    any_finite_number,
    dtypes,
    some_rows,
    same_bits_again,
    packing_what_was_unpacked,
    on_a_device,
    gpu,
    under_a_method,
)
