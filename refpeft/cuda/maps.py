"""Functions of up to three arrays, number by number, and sums of them along axes: the launches of maps.cu.

Operands are arrays of bfloat16, float32 or bool in any mixture and of any strides, which broadcast, and numbers. All is
computed in float32 and rounded once, to the dtype of the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda.kernels import Source

float32 = np.dtype("f4")

FUNCTIONS = (  # noqa: SIM905  a list would be 33 lines
    "copy add sub mul div neg where where_not maximum power exp log sqrt abs tanh sigmoid relu silu gelu gelu_tanh "
    "div_slope maximum_slope power_slope exp_slope sqrt_slope abs_slope tanh_slope sigmoid_slope relu_slope silu_slope "
    "gelu_slope gelu_tanh_slope"
).split()
"""By their numbers in maps.cu, which says what they compute of a, b and c; it is compiled for each that is used."""

_BLOCK = 256  # threads
_KINDS = {float32: 1, bfloat16: 2, np.dtype(bool): 3}
_IN_EIGHTS = 4
_COLUMNS = 256  # of a block of sum_columns
_BLOCKS = 1024  # that a sum is split into, about: several for each processor of a device
_LEAST_ROWS, _LEAST_LENGTH = 64, 4096  # that it is not split below: of columns, and of a row

Strides = list[int]


@functools.cache
def _source(function: str) -> Source:
    return Source("maps.cu", FUNCTION=FUNCTIONS.index(function))


def takes(*operands: Any) -> bool:
    """Whether the functions are for these: numbers, and arrays on the device of the three dtypes."""
    return all(
        operand.dtype in _KINDS if isinstance(operand, cupy.ndarray) else isinstance(operand, float | np.floating)
        for operand in operands
    )


def mapped(
    function: str,
    *operands: Any,
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype = bfloat16,
    out: Array | None = None,
) -> Array:
    """function(*operands) of `shape` (None: what the operands broadcast to) and `dtype`, or in `out`.

    `out` may have any strides, and be one of the operands. Raises ValueError where they do not broadcast.
    """
    if out is None:
        together = np.broadcast_shapes(*map(np.shape, operands)) if shape is None else shape
        out = cupy.empty(together, dtype)
    if not out.size:
        return out
    sizes, strides = merged(out.shape, [strides_of(operand, out.shape) for operand in (out, *operands)])
    if len(sizes) > 4:  # as contiguous arrays they have one axis
        whole = [_whole(operand, out.shape) for operand in operands]
        if out.flags.c_contiguous:
            return mapped(function, *whole, out=out)
        out[...] = mapped(function, *whole, dtype=out.dtype)
        return out
    n0, n1, n2, n3 = [1] * (4 - len(sizes)) + sizes
    of_out, *others = ([0] * (4 - len(each)) + each for each in strides)
    eights = n0 * n1 * n2 * -(-n3 // 8)
    _source(function)("map", out.dtype)(
        *(-(-eights // _BLOCK), _BLOCK),
        *(np.uint32(eights), n1, n2, np.int64(n3)),
        *(out, _in_eights(out, of_out), *of_out),
        *_arguments(operands, others, 4),
    )
    return out


def summed(
    function: str,
    *operands: Any,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    dtype: np.dtype = float32,
    into: Array | None = None,
) -> Array:
    """function(*operands), of `shape`, summed over `axes`: an array of the other axes.

    The order goes by the shapes alone: the same bits every time. With `into`, an array in C order of as many numbers as
    the result, the sums are added to it, and it comes back; then there must be axes.
    """
    kept = tuple(n for i, n in enumerate(shape) if i not in axes)
    if not math.prod(shape):
        return cupy.zeros(kept, dtype) if into is None else into
    if not axes:
        return mapped(function, *operands, shape=shape, dtype=dtype)
    last = _last_run(axes)
    if len(last) < len(axes):  # others lie before kept axes: these sums first, in float32
        first = summed(function, *operands, shape=shape, axes=last)
        return summed("copy", first, shape=first.shape, axes=axes[: -len(last)], dtype=dtype, into=into)
    parts = (slice(0, last[0]), slice(last[0], last[-1] + 1), slice(last[-1] + 1, None))
    strides = [strides_of(operand, shape) for operand in operands]
    axes_of = [merged(shape[part], [each[part] for each in strides]) for part in parts]
    if any(len(sizes) > 1 for sizes, _ in axes_of):  # a contiguous array has one axis in each part
        whole = mapped(function, *operands, shape=shape, dtype=float32)
        return summed("copy", whole, shape=shape, axes=axes, dtype=dtype, into=into)
    out = cupy.empty(kept, dtype) if into is None else into
    outer, n, width = (math.prod(sizes) for sizes, _ in axes_of)
    steps = [[(of[i] or [0])[0] for _, of in axes_of] for i in range(len(operands))]
    _sum(function, operands, steps, outer, n, width, out, add=into is not None)
    return out


def _sum(
    function: str,
    operands: Sequence[Any],
    strides: list[Strides],
    outer: int,
    n: int,
    width: int,
    out: Array,
    add: bool,
) -> None:
    """Fills `out`, or adds to it, (outer, width) numbers in C order: sums over the middle axis of (outer, n, width)."""
    if width == 1:
        parts = min(-(-n // _LEAST_LENGTH), max(1, _BLOCKS // outer))
        per = (-(-n // parts) + 7) // 8 * 8
    else:
        blocks = outer * -(-width // _COLUMNS)
        parts = min(-(-n // _LEAST_ROWS), max(1, _BLOCKS // blocks))
        per = -(-n // parts)
    parts = -(-n // per)
    partial = cupy.empty((outer, parts, width), float32) if parts > 1 else None
    result = (out, partial, add and partial is None)
    if width == 1:
        lanes = lanes_of(per) if per <= 8 * 4 * 32 else _BLOCK
        _source(function)("sum_rows", out.dtype)(
            *(-(-outer * parts // (_BLOCK // lanes)), _BLOCK),
            *(*result, outer, parts, np.int64(per), np.int64(n), lanes),
            *_arguments(operands, [each[:2] for each in strides], 2),
        )
    else:
        _source(function)("sum_columns", out.dtype)(
            *(blocks * parts, _BLOCK),
            *(*result, parts, per, n, width),
            *_arguments(operands, strides, 3),
        )
    if partial is not None:
        _sum("copy", (partial,), [[parts * width, width, 1]], outer, parts, width, out, add)


def lanes_of(width: int) -> int:
    """How many threads of a warp share a row of `width` numbers, eight each at a time: a power of two."""
    return min(32, 1 << (-(-width // 8) - 1).bit_length())


# ---- axes ------------------------------------------------------------------------------------------------------------


def strides_of(operand: Any, shape: tuple[int, ...]) -> Strides:
    """Those of an operand, in numbers, when it is broadcast to `shape`."""
    if not isinstance(operand, cupy.ndarray):
        return [0] * len(shape)
    own = [0 if n == 1 else step // operand.itemsize for n, step in zip(operand.shape, operand.strides, strict=True)]
    return [0] * (len(shape) - len(own)) + own


def merged(shape: tuple[int, ...], strides: list[Strides]) -> tuple[list[int], list[Strides]]:
    """As few axes as do: without those of length 1, and as one where every operand steps through two as through one."""
    sizes: list[int] = []
    steps: list[Strides] = [[] for _ in strides]
    for i, n in enumerate(shape):
        if n == 1:
            continue
        if sizes and all(new[-1] == n * old[i] for new, old in zip(steps, strides, strict=True)):
            sizes[-1] *= n
            for new, old in zip(steps, strides, strict=True):
                new[-1] = old[i]
        else:
            sizes.append(n)
            for new, old in zip(steps, strides, strict=True):
                new.append(old[i])
    return sizes, steps


def _last_run(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The last of `axes`, ascending, with those right before it."""
    start = len(axes)
    while start and axes[start - 1] == axes[-1] - (len(axes) - start):
        start -= 1
    return axes[start:]


def _whole(operand: Any, shape: tuple[int, ...]) -> Any:
    """An operand in C order; numbers as they are."""
    if not isinstance(operand, cupy.ndarray):
        return operand
    return cupy.ascontiguousarray(cupy.broadcast_to(operand, shape))


# ---- arguments of kernels --------------------------------------------------------------------------------------------


def _in_eights(array: Array, strides: Strides) -> bool:
    """Whether eight numbers may be read or written at once, wherever a multiple of eight along the last axis is."""
    *outer, last = strides
    return last == 1 and array.data.ptr % 16 == 0 and all(step % 8 == 0 for step in outer)


def _arguments(operands: Sequence[Any], strides: list[Strides], axes: int) -> list[Any]:
    """What a kernel is given for each of its three operands."""
    found: list[Any] = []
    for operand, steps in zip(operands, strides, strict=True):
        if isinstance(operand, cupy.ndarray):
            kind = _KINDS[operand.dtype] + _IN_EIGHTS * _in_eights(operand, steps)
            found += [operand, kind, 0.0, *steps]
        else:
            found += [None, 0, float(operand), *steps]
    return found + [None, 0, 0.0, *[0] * axes] * (3 - len(operands))
