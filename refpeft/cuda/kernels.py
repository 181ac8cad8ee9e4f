"""CUDA kernels from the `.cu` files of this folder: compiled when first asked for, kept on disk by CuPy."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16

_HERE = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_MOST_SHARED = 48 * 1024  # bytes that a block gets without asking


class KernelError(Exception):
    """A kernel does not compile, or does not load, on this machine."""


class Source:
    """One `.cu` file: `Source("norms.cu")("rms_norm_forward", dtype)` launches the kernel of that name for that dtype.

    Kernels are written for the type `real`, which is float32 or bfloat16. A launch takes the grid, the block, and the
    kernel's arguments: arrays, None for a null pointer, int (32 bits), float (float32), or NumPy numbers of any type.
    `constants` are the integers that a file leaves open, as macros of these names.
    """

    def __init__(self, name: str, **constants: int):
        self.name = name
        self.constants = tuple(f"-D{constant}={int(value)}" for constant, value in constants.items())

    @functools.cached_property
    def text(self) -> str:
        """The file, with our own headers in the place of their includes: so CuPy's cache sees them change."""
        return _INCLUDE.sub(lambda found: (_HERE / found[1]).read_text(), (_HERE / self.name).read_text())

    def __call__(self, kernel: str, dtype: np.dtype = bfloat16) -> Launch:
        """The launcher of a kernel. Raises KernelError where it does not compile."""
        found = self._tried(kernel, dtype)
        if isinstance(found, str):
            raise KernelError(found)
        return found

    @functools.cache  # noqa: B019  there are as many as files
    def _tried(self, kernel: str, dtype: np.dtype) -> Launch | str:
        """The launcher, or why there is none, which is not tried again."""
        try:
            return Launch(self._module(np.dtype(dtype)).get_function(kernel))
        except (cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError, RuntimeError, OSError) as error:
            first = next((line for line in str(error).splitlines() if "error" in line), str(error)[:200])
            return f"{self.name}: {kernel} in {np.dtype(dtype).name} does not compile: {first}"

    @functools.cache  # noqa: B019
    def _module(self, dtype: np.dtype) -> cupy.RawModule:
        define = {bfloat16: ("-DREAL_IS_BFLOAT16",), np.dtype("f4"): ()}[dtype]
        return cupy.RawModule(code=self.text, options=("--std=c++17", *define, *self.constants))


_started: ContextVar[bool] = ContextVar("started", default=True)


def are_started() -> bool:
    """Whether launches do something, here and now."""
    return _started.get()


@contextlib.contextmanager
def unstarted() -> Iterator[None]:
    """Within it, kernels are compiled, and launches of them do nothing: arrays that they would fill are not filled."""
    token = _started.set(False)
    try:
        yield
    finally:
        _started.reset(token)


class Launch:
    """A compiled kernel."""

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, grid: int | tuple[int, ...], block: int, *args: Any, shared: int = 0) -> None:
        """Starts it on the current stream; `shared` is bytes of dynamic shared memory a block."""
        if shared > _MOST_SHARED and self._function.max_dynamic_shared_size_bytes < shared:
            self._function.max_dynamic_shared_size_bytes = shared
        if not are_started():
            return
        grid = grid if isinstance(grid, tuple) else (grid,)
        self._function(grid, (block,), tuple(map(_argument, args)), shared_mem=shared)


def _argument(value: Any) -> Any:
    if isinstance(value, bool | int):
        return np.int32(value)
    if isinstance(value, float):
        return np.float32(value)
    return np.intp(0) if value is None else value


def row_block(width: int, most: int = 1024) -> int:
    """How many threads a block has that treats a row of `width` numbers, eight a thread at a time: a multiple of 32."""
    return min(most, (-(-width // 8) + 31) // 32 * 32)


def contiguous(array: Array) -> Array:
    """`array` in C order, itself where it is that."""
    return array if array.flags.c_contiguous else cupy.ascontiguousarray(array)
