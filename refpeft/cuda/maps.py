"""Functions of up to three arrays, number by number, and sums of them along axes: one or two launches of maps.cu.

Arrays are bfloat16, float32 or bool in any mixture, of any strides, and broadcast; numbers stand for arrays. All is
computed in float32 and rounded once, to the dtype of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda.kernels import Source

source = Source("maps.cu")

FUNCTIONS = (
    "copy add sub mul div neg where maximum power exp log sqrt abs tanh sigmoid relu silu gelu gelu_tanh "
    "div_slope maximum_slope power_slope exp_slope sqrt_slope abs_slope tanh_slope sigmoid_slope relu_slope silu_slope "
    "gelu_slope gelu_tanh_slope"
).split()
"""By their numbers in maps.cu, where it says what they compute."""

_BLOCK = 256  # threads
_IN_EIGHTS = 4
_KINDS = {np.dtype("f4"): 1, bfloat16: 2, np.dtype(bool): 3}
_FARTHEST = 2**31  # what a stride is less than
_BLOCKS = 1024  # of a sum, so that all of a device's processors have some


def takes(*operands: Any) -> bool:
    """Whether these are what the functions here are for: numbers, and arrays on the device of the three dtypes."""
    return all(
        operand.dtype in _KINDS if isinstance(operand, cupy.ndarray) else isinstance(operand, (float, np.floating))
        for operand in operands
    )


def broadcast_shape(*operands: Any) -> tuple[int, ...] | None:
    """The shape that these arrays and numbers have together, or None where they do not broadcast."""
    try:
        return np.broadcast_shapes(*(np.shape(operand) for operand in operands))
    except ValueError:
        return None


def mapped(
    function: str, *operands: Any, shape: tuple[int, ...] | None = None, dtype: np.dtype = bfloat16, out: Any = None
) -> Array:
    """function(*operands), broadcast to `shape` (None: that of the operands), in a new array of `dtype` or in `out`.

    `out` may have any strides, and may be an operand.
    """
    if out is None:
        out = cupy.empty(broadcast_shape(*operands) if shape is None else shape, dtype)
    if not out.size:
        return out
    found = _common([out.shape], [out, *operands], 4)
    if found is None:  # too many axes that no stride steps over: as contiguous arrays they are one
        operands = tuple(cupy.ascontiguousarray(cupy.broadcast_to(x, out.shape)) if _is_array(x) else x for x in operands)
        if not out.flags.c_contiguous:
            return _copied(mapped(function, *operands, dtype=out.dtype), out)
        found = _common([out.shape], [out, *operands], 4)
    ((n0, n1, n2, n3),), (out_strides, *strides) = found
    eights = n0 * n1 * n2 * -(-n3 // 8)
    alone = n0 * n1 * n2 == 1
    source("map", out.dtype)(
        -(-eights // _BLOCK),
        _BLOCK,
        FUNCTIONS.index(function),
        np.uint32(eights),
        n1,
        n2,
        np.int64(n3),
        out,
        _in_eights(out, out_strides, n3, alone),
        *out_strides,
        *_arguments(operands, strides, n3, alone),
    )
    return out


def _copied(array: Array, out: Array) -> Array:
    out[...] = array
    return out


def summed(
    function: str,
    *operands: Any,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    dtype: np.dtype,
    into: Array | None = None,
) -> Array:
    """The sum over `axes` of function(*operands), broadcast to `shape`: an array of the other axes.

    Its order goes by the shapes alone, so that it has the same bits every time. With `into`, an array in C order of as
    many numbers as the result, it is added to that, which is what comes back.
    """
    kept = tuple(n for i, n in enumerate(shape) if i not in axes)
    if not math.prod(shape):
        return cupy.zeros(kept, dtype) if into is None else into
    groups = _groups(shape, axes)
    found = _common(groups, operands, 3) if len(groups) == 3 else None
    if found is None:
        array = mapped(function, *operands, shape=shape, dtype=np.dtype("f4"))
        found = _common(_groups(shape, axes), [array], 3)
        function, operands = "copy", (array,)
    out = cupy.empty(kept, dtype) if into is None else into
    raise NotImplementedError
