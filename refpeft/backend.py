"""NumPy or CuPy: which module owns an array, and moving arrays between host and device."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from .choices import DEVICES
from .errors import RefpeftError

Array = Any  # numpy.ndarray or cupy.ndarray

bfloat16 = np.dtype(ml_dtypes.bfloat16)
COMPUTE_DTYPES = {
    "float32": np.dtype("f4"),
    "tf32": np.dtype("f4"),
    "bfloat16": np.dtype("f4"),
    "float64": np.dtype("f8"),
}
"""What is computed in for each `--dtype`.

bfloat16 is a way to store frozen weights (see quant.Dense), tf32 one to multiply matrices on a GPU (see cuda.blas).
"""

PIECE = 1 << 20
"""Numbers that `single` casts at a time."""

SMALL_MODEL = 20_000_000
"""Parameters below which BLAS is given one thread."""


def xp_of(*arrays: Array) -> ModuleType:
    """The array module that owns `arrays`: cupy if one of them is on the device, else numpy."""
    cupy = sys.modules.get("cupy")  # an array cannot be CuPy's before CuPy has been imported
    return np if cupy is None else cupy.get_array_module(*arrays)


@functools.cache
def module(device: str) -> ModuleType:
    """numpy for "cpu", cupy for "cuda". Raises RefpeftError where there is no usable device."""
    if device == "cpu":
        return np
    if device != "cuda":
        raise RefpeftError(f"device is {device!r}: expected one of {', '.join(DEVICES)}")
    from . import doctor

    if obstacle := doctor.obstacle():
        raise RefpeftError(f"device 'cuda' cannot be used: {obstacle}. `refpeft doctor` says more")
    import cupy

    from . import cuda  # noqa: F401  its pairs register themselves

    return cupy


def blas_threads(parameters: int, asked: int | None = None) -> AbstractContextManager:
    """Within it, BLAS uses as many threads as are asked for; else one where a second one would mostly wait.

    That is so of models of few `parameters`. On small matrices OpenBLAS's threads spin while they wait: on a machine
    with other work they are many times slower.
    """
    import threadpoolctl

    return threadpoolctl.threadpool_limits(asked or (1 if parameters < SMALL_MODEL else None), user_api="blas")


def threads() -> int:
    """How many threads BLAS takes here: of the processor, or as OMP_NUM_THREADS and its like say."""
    import threadpoolctl

    found = threadpoolctl.threadpool_info()
    return max((library["num_threads"] for library in found if library["user_api"] == "blas"), default=1)


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b, into `out` where it is given; on a GPU by a call that a CUDA graph can hold, as CuPy's own cannot."""
    blas = sys.modules.get("refpeft.cuda.blas")  # imported where a GPU is used
    if blas is None or not isinstance(a, blas.cupy.ndarray):
        return xp_of(a).matmul(a, b, out=out)
    return blas.product(a, b, out)


_rounded_factors = ContextVar("rounded_factors", default=False)


@contextlib.contextmanager
def rounded_factors() -> Iterator[None]:
    """Within it, a GPU may round factors of float32 to TF32, 10 bits behind the point: for results in bfloat16, with 7.

    Factors that were bfloat16 are exact so, and sums stay float32: what is lost is in float32 values, and in what is
    made of them on the way, such as a weight. The host rounds nothing.
    """
    token = _rounded_factors.set(True)
    try:
        yield
    finally:
        _rounded_factors.reset(token)


def may_round_factors() -> bool:
    """Whether this is within `rounded_factors`."""
    return _rounded_factors.get()


_TOGETHER = 8  # arrays: of more, CuPy brings the addresses from the host, which a captured step cannot


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    """The arrays, of one dtype, one after another along an axis that exists."""
    xp = xp_of(arrays[0])
    if xp is np or len(arrays) <= _TOGETHER:
        return xp.concatenate(arrays, axis=axis)
    axis %= arrays[0].ndim
    shape = list(arrays[0].shape)
    shape[axis] = sum(array.shape[axis] for array in arrays)
    whole, at = xp.empty(shape, arrays[0].dtype), 0
    for array in arrays:
        end = at + array.shape[axis]
        whole[(slice(None),) * axis + (slice(at, end),)] = array
        at = end
    return whole


def stack(arrays: Sequence[Array], axis: int = 0) -> Array:
    """The arrays, of one shape and dtype, one after another along a new axis."""
    xp = xp_of(arrays[0])
    return concatenate([xp.expand_dims(array, axis) for array in arrays], axis)


def to_host(array: Array) -> np.ndarray:
    """`array` as a NumPy array (itself where it is one)."""
    xp = xp_of(array)
    return np.asarray(array) if xp is np else xp.asnumpy(array)


def cast(array: Array, dtype: np.dtype) -> Array:
    """`array` in `dtype`, itself where it has that dtype already."""
    if array.dtype == dtype:
        return array
    if array.dtype == bfloat16 and dtype == np.float32 and isinstance(array, np.ndarray):
        # bfloat16 is the upper half of float32, and shifting is several times faster than NumPy's cast
        wide = array.view("u2").astype("u4")
        wide <<= 16
        return wide.view("f4")
    return array.astype(dtype)


def single(array: np.ndarray) -> np.ndarray:
    """A host array as float32 in C order, itself where it is that: made in pieces, so that no other copy is needed."""
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    whole = np.empty(array.shape, np.float32)
    step = max(1, PIECE * len(array) // max(1, array.size))
    for at in range(0, len(array), step):
        whole[at : at + step] = cast(array[at : at + step], whole.dtype)
    return whole
