"""How frozen weights are kept: dense, dense in a narrower type, or quantized; each a callable that gives the array."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import manager
from .backend import Array, cast
from .errors import RefpeftError


class Dense:
    """A frozen array; bfloat16 is cast to the compute dtype whenever it is asked for."""

    def __init__(self, array: Array, dtype: np.dtype):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def __call__(self) -> Array:
        return cast(self.array, self.dtype)

    def rows(self, ids: Array) -> Array:
        """Some rows of it: only these are cast."""
        return cast(self.array[ids], self.dtype)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


class Quantizer:
    """A quantizer plugin with its Config: makes Quantized weights."""

    def __init__(self, plugin: Any, cfg: Any):
        self.cfg = cfg
        self.name = plugin.__name__.rpartition(".")[2]
        pack, unpack = (manager.hook(plugin, hook) for hook in ("quant_pack", "quant_unpack"))
        if pack is None or unpack is None:
            raise RefpeftError(f"plugin '{self.name}' is no quantizer: it has no quant_pack and quant_unpack")
        self._pack, self._unpack = pack, unpack

    def __call__(self, array: Array, dtype: np.dtype, name: str = "") -> Quantized:
        """`array` in this quantizer's format; `name` is for error messages."""
        if not np.isfinite(array.astype(np.float32)).all():
            raise RefpeftError(f"{name or 'a weight'} holds NaN or infinity and cannot be quantized")
        function, names = self._pack
        parts = function(*({"weight": array, "cfg": self.cfg}[n] for n in names))
        return Quantized(self, parts, array.shape, dtype)

    def dense(self, parts: dict[str, Array], shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """The array that `parts` stand for."""
        function, names = self._unpack
        have = {"parts": parts, "cfg": self.cfg, "shape": shape, "dtype": dtype}
        return function(*(have[n] for n in names))


class Quantized:
    """A frozen weight in a quantizer's format, dequantized whenever it is asked for."""

    def __init__(self, quantizer: Quantizer, parts: dict[str, Array], shape: tuple[int, ...], dtype: np.dtype):
        self.quantizer, self.parts, self.shape, self.dtype = quantizer, parts, shape, dtype

    def __call__(self) -> Array:
        return self.quantizer.dense(self.parts, self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())
