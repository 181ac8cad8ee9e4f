"""How frozen weights are kept: dense, dense in a narrower type, or quantized; each a callable that gives the array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import arena, blockwise, manager
from .backend import Array, bfloat16, cast
from .errors import RefpeftError

CONSTANTS = "dynamic8"  # the quantizer of another's constants

PANEL = 2048
"""Rows of a weight that are made dense at once, about: products with fewer take noticeably longer."""


class Dense:
    """A frozen array; bfloat16 is cast to the compute dtype whenever it is asked for."""

    quantized = False

    def __init__(self, array: Array, dtype: np.dtype):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def __call__(self) -> Array:
        return _dense(self.array, self.dtype)

    def panels(self, rows: int | None = None) -> Iterator[tuple[slice, Array]]:
        """(which rows, these rows dense), from the first to the last; `rows` at a time, a multiple of 64."""
        as_it_is = self.array.dtype == self.dtype
        for part in _parts(len(self.array), rows or (len(self.array) if as_it_is else PANEL)):
            yield part, _dense(self.array[part], self.dtype)

    def low(self) -> Array:
        """The array in bfloat16, as products with bfloat16 take it."""
        return cast(self.array, bfloat16)

    def rows(self, ids: Array, dtype: np.dtype) -> Array:
        """Some rows of it: only these are cast."""
        return _dense(self.array[ids], dtype)

    def like(self, array: Array, name: str = "") -> Dense:
        """Another array, kept as this one is."""
        return Dense(cast(array, self.array.dtype), self.dtype)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


def _dense(array: Array, dtype: np.dtype) -> Array:
    """cast(array, dtype); where NumPy makes float32 of bfloat16, in arena memory and in the layout of `array`."""
    if not (isinstance(array, np.ndarray) and array.dtype == bfloat16 and dtype == np.float32):
        return cast(array, dtype)
    by_columns = array.ndim == 2 and array.strides[0] < array.strides[1]
    wide = arena.empty(array.shape[::-1], np.dtype("u4")).T if by_columns else arena.empty(array.shape, np.dtype("u4"))
    wide[...] = array.view("u2")
    np.left_shift(wide, 16, out=wide)
    return wide.view("f4")


def _parts(count: int, step: int) -> Iterator[slice]:
    """Slices that make up range(count), as few as have at most `step` each, of about the same multiple of 64."""
    number = -(-count // step)
    each = min(step, -(-count // (64 * number or 1)) * 64)
    return (slice(start, min(start + each, count)) for start in range(0, count, each or 1))


LARGEST = 2.0**120
"""Of a weight's numbers: quantizers divide by scales, and 1 / 2^126 is 0 on a GPU."""


class Quantizer:
    """A quantizer plugin with its Config: makes Quantized weights.

    With `constants`, another Quantizer, the float32 arrays among its parts are themselves quantized: double
    quantization (arXiv:2305.14314, section 3), of any quantizer that has such arrays. The parts of "absmax" are then
    "absmax.codes", "absmax.absmax" and so on. Single float32 numbers stay as they are.
    """

    def __init__(self, plugin: Any, cfg: Any, constants: Quantizer | None = None):
        self.plugin, self.cfg, self.constants = plugin, cfg, constants
        self.name = plugin.__name__.rpartition(".")[2]
        hooks = (manager.hook(plugin, hook) for hook in ("quant_pack", "quant_unpack", "quant_blocks"))
        self._pack, self._unpack, self._blocks = hooks
        if self._pack is None or (self._unpack is None and self._blocks is None):
            raise RefpeftError(f"plugin '{self.name}' is no quantizer: it has no quant_pack and quant_unpack")

    def __call__(self, array: Array, dtype: np.dtype, name: str = "") -> Quantized:
        """`array` in this quantizer's format, to be computed with in `dtype`; `name` is for error messages.

        Raises RefpeftError for NaN, infinity and magnitudes above LARGEST, with their place, and for a shape that does
        not fit the format.
        """
        array = cast(array, np.dtype("f4"))
        _refuse_what_has_no_code(array, name)
        try:
            parts = self.pack(array)
        except RefpeftError as error:
            raise RefpeftError(f"{name or 'a weight'}: {error}") from None
        return Quantized(self, parts, array.shape, dtype)

    @property
    def options(self) -> dict[str, Any]:
        """The values of its Config; a plugin without a Config has none."""
        return {} if self.cfg is None else vars(self.cfg)

    @property
    def by_rows(self) -> bool:
        """Whether the plugin gives some rows of a weight without the others."""
        return self._blocks is not None or "rows" in self._unpack[1]

    def __str__(self) -> str:
        options = ", ".join(f"{key} = {value}" for key, value in self.options.items())
        said = f"{self.name} ({options})" if options else self.name
        return said + (" with double quantization" if self.constants else "")

    def serves_as(self, other: Quantizer) -> bool:
        """Whether weights of this format are what `other` asks for: its options, double quantization at least."""
        ours, theirs = (q.options | {"compat": None} for q in (self, other))
        return self.name == other.name and ours == theirs and (self.constants is not None or other.constants is None)

    def pack(self, array: Array) -> dict[str, Array]:
        """The parts of a finite float32 array. Raises RefpeftError where `constants` would find none among them."""
        function, names = self._pack
        parts = function(*({"weight": array, "cfg": self.cfg}[n] for n in names))
        if self.constants is None:
            return parts
        found = {}
        for name, part in parts.items():
            if part.dtype == np.float32 and part.ndim:
                found |= {f"{name}.{inner}": array for inner, array in self.constants.pack(part).items()}
            else:
                found[name] = part
        if found.keys() == parts.keys():
            raise RefpeftError(
                f"{self.name} keeps no arrays of float32 constants, which double_quant is for: leave it out"
            )
        return found

    def dense(self, parts: dict[str, Array], shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """The array that `parts` stand for."""
        return self._dense(self._whole(parts, encoded=True), shape, dtype)

    def panels(
        self, parts: dict[str, Array], shape: tuple[int, ...], dtype: np.dtype, step: int
    ) -> Iterator[tuple[slice, Array]]:
        """The same of a matrix, as (which rows, these); `step` rows at a time, a multiple of 64, or somewhat fewer.

        Constants that are quantized themselves are made dense once. Without `by_rows` so is the matrix.
        """
        parts = self._whole(parts)
        whole = None if self.by_rows else self._dense(parts, shape, dtype)
        for rows in _parts(shape[0], step):
            yield rows, self._dense(parts, shape, dtype, rows) if self.by_rows else whole[rows]

    def _dense(
        self, parts: dict[str, Array], shape: tuple[int, ...], dtype: np.dtype, rows: slice | None = None
    ) -> Array:
        if self._blocks is not None:
            return blockwise.decode(self._as_blocks(parts), shape, dtype, rows)
        function, names = self._unpack
        have = {"parts": parts, "cfg": self.cfg, "shape": shape, "dtype": dtype, "rows": rows}
        return function(*(have[n] for n in names))

    def _as_blocks(self, parts: dict[str, Array | blockwise.Blocks]) -> blockwise.Blocks:
        function, names = self._blocks
        return function(*({"parts": parts, "cfg": self.cfg}[n] for n in names))

    def _whole(self, parts: dict[str, Array], encoded: bool = False) -> dict[str, Array | blockwise.Blocks]:
        """`parts` with the constants that were quantized themselves as float32 arrays again; with `encoded` they are
        Blocks, where those of a plugin with quant_blocks are for another one."""
        if self.constants is None:
            return parts
        found = {name: part for name, part in parts.items() if "." not in name}
        for name in {name.partition(".")[0] for name in parts if "." in name}:
            inner = {key.removeprefix(f"{name}."): part for key, part in parts.items() if key.startswith(f"{name}.")}
            if encoded and self._blocks and self.constants._blocks:
                found[name] = self.constants._as_blocks(inner)
            else:
                found[name] = self.constants.dense(inner, inner["codes"].shape, np.dtype("f4"))
        return found


class Quantized:
    """A frozen weight in a quantizer's format, dequantized whenever it is asked for."""

    quantized = True

    def __init__(self, quantizer: Quantizer, parts: dict[str, Array], shape: tuple[int, ...], dtype: np.dtype):
        self.quantizer, self.parts, self.shape, self.dtype = quantizer, parts, shape, dtype

    def __call__(self) -> Array:
        return self.quantizer.dense(self.parts, self.shape, self.dtype)

    def low(self) -> Array:
        """The same in bfloat16, as products with bfloat16 take it."""
        return self.quantizer.dense(self.parts, self.shape, bfloat16)

    def panels(self, rows: int = PANEL) -> Iterator[tuple[slice, Array]]:
        """As Dense.panels."""
        return self.quantizer.panels(self.parts, self.shape, self.dtype, rows)

    def like(self, array: Array, name: str = "") -> Quantized:
        """Another array in the same format; `name` is for error messages."""
        return self.quantizer(array, self.dtype, name)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


Frozen = Dense | Quantized


def frozen(weight: Callable[[], Array]) -> Frozen:
    """`weight` itself, or what another callable gives as a Dense."""
    if isinstance(weight, Frozen):
        return weight
    array = weight()
    return Dense(array, array.dtype)


def make_quantizer(name: str | None, options: Any = None, double_quant: bool = False) -> Quantizer | None:
    """The quantizer plugin of this name with its options (a dict or a Config); None for None.

    With `double_quant` its float32 constants are kept in 8 bits, as QLoRA does: by the plugin dynamic8, in the same
    `compat` mode where the quantizer has one. Raises RefpeftError for an unknown name or option.
    """
    from .config import plugin_options

    if name is None:
        if double_quant:
            raise RefpeftError("double_quant quantizes a quantizer's constants, but no quantizer is given")
        if options:
            raise RefpeftError("options are those of a quantizer, but none is given")
        return None
    plugin = manager.load(str(manager.path_of(name, "quantizer")) if not name.endswith(".py") else name)
    cfg = plugin_options(plugin, options or {}) if options is None or isinstance(options, dict) else options
    compat = {"compat": cfg.compat} if hasattr(cfg, "compat") else {}
    constants = make_quantizer(CONSTANTS, {"offset": True} | compat) if double_quant else None
    return Quantizer(plugin, cfg, constants)


def _refuse_what_has_no_code(array: Array, name: str) -> None:
    if array.size and not (array.min() >= -LARGEST and array.max() <= LARGEST):  # NaN is the least and the largest
        usable = (array <= LARGEST) & (array >= -LARGEST)
        place = np.unravel_index(int(usable.argmin()), array.shape)
        at = ", ".join(map(str, place))
        raise RefpeftError(
            f"{name or 'a weight'} holds {array[place]} at [{at}] and cannot be quantized, as numbers up to 2^120 can: "
            "mend the weight, or train without a quantizer"
        )
