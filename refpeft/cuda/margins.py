"""Room behind rows, where a low-rank method's narrow factors lie beside the wide ones: one product takes both.

With u = x A^T behind the rows of x, and alpha B behind those of W, x W^T + alpha u B^T is [x u] [W alphaB]^T: a product
whose sums are a little longer, in the place of three passes over memory. Going back, with du = alpha g B behind the
rows of g, and A below W, g W + du A is [g du] [W; A]. Weights have such room by refpeft.cuda.rooms, rows of activations
and of their gradients where they are made.

Layers that read the same x are one product, too, and so are their gradients where they lie side by side (`beside`).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda import aside, blas

MARGIN = 64
"""Numbers behind each row: three factors of rank 16, say, and one more."""

_made: dict[int, tuple[weakref.ref, list[int]]] = {}  # by their address, arrays with a margin and how much is taken


def rows(shape: tuple[int, ...], dtype: np.dtype = bfloat16) -> Array:
    """An empty array, with room behind its rows in a pass of training in bfloat16. It is a view then."""
    if dtype != bfloat16 or len(shape) < 2 or shape[-1] % 8 or not now():
        return cupy.empty(shape, dtype)
    whole = cupy.empty((*shape[:-1], shape[-1] + MARGIN), dtype)
    address = whole.data.ptr
    _made[address] = weakref.ref(whole, lambda _: _made.pop(address)), [0]
    return whole[..., : shape[-1]]


def zeros(shape: tuple[int, ...]) -> Array:
    """As `rows`, all zeros, in bfloat16."""
    found = rows(shape)
    (found if found.base is None else found.base).fill(0)
    return found


def now() -> int:
    """How many numbers `rows` leaves room for, here and now."""
    return MARGIN if blas.is_training() else 0


def heads(shape: tuple[int, ...], dtype: np.dtype = bfloat16) -> Array:
    """An empty (batch, heads, time, dim), a view of (batch, time, heads * dim) with room behind its rows as above."""
    batch, count, time, dim = shape
    return heads_of(rows((batch, time, count * dim), dtype), dim)


def heads_of(rows: Array, dim: int) -> Array:
    """Rows (batch, time, heads * dim) as (batch, heads, time, dim), a view."""
    batch, time, width = rows.shape
    return rows.reshape(batch, time, width // dim, dim).transpose(0, 2, 1, 3)


def step(array: Array) -> int | None:
    """How many numbers lie between the rows (..., width) of an array; None where they are not at equal distances."""
    if array.ndim < 2 or (array.shape[-1] > 1 and array.strides[-1] != array.itemsize):
        return None
    axes = [(n, stride) for n, stride in zip(array.shape[-2::-1], array.strides[-2::-1], strict=True) if n > 1]
    if any(outer != n * inner for (n, inner), (_, outer) in itertools.pairwise(axes)):
        return None
    return axes[0][1] // array.itemsize if axes else array.shape[-1]


def _whole(array: Array) -> tuple[Array, list[int]] | None:
    """The array that rows are a view of, as `rows` made it, and how much of its margin is taken; None of others."""
    whole = array.base
    if whole is None or array.data.ptr != whole.data.ptr:
        return None
    made, used = _made.get(whole.data.ptr, (lambda: None, []))
    if made() is not whole or array.shape[-1] + MARGIN != whole.shape[-1] or step(array) != whole.shape[-1]:
        return None
    return whole, used


def _columns(whole: Array, shape: tuple[int, ...], start: int, width: int) -> Array:
    """Some columns of an array, under the leading axes of `shape`."""
    return whole[..., start : start + width].reshape(*shape[:-1], width)


def taken(x: Array, width: int) -> int | None:
    """How much of the room behind the rows of x is taken; None where it has not room for `width` numbers more."""
    found = _whole(x)
    return None if found is None or width % 8 or found[1][0] + width > MARGIN else found[1][0]


def behind(x: Array, width: int) -> Array:
    """Room behind the rows of x (..., n) for `width` numbers each, where there is that: nobody else gets it."""
    whole, used = _whole(x)
    start = x.shape[-1] + used[0]
    used[0] += width
    return _columns(whole, x.shape, start, width)


def scratch(g: Array, width: int) -> Array | None:
    """Room right behind the rows of g (..., n): until the next one asks for it."""
    found = _whole(g)
    if found is None or width % 8 or width > MARGIN:
        return None
    whole, used = found
    if used[0]:
        aside.join()  # what was there before may still be read beside the main stream
    used[0] = width
    return _columns(whole, g.shape, g.shape[-1], width)


def together(x: Array, u: Array) -> Array:
    """Rows of x and all that lies behind them to the end of u, which `behind` or `scratch` gave: (..., n + ...)."""
    return _columns(x.base, x.shape, 0, x.shape[-1] + distance(x, u) + u.shape[-1])


def distance(x: Array, u: Array) -> int:
    """How many numbers lie between the rows of x and u, which is behind them."""
    return (u.data.ptr - x.data.ptr) // x.itemsize - x.shape[-1]


def lies_behind(u: Array, x: Array) -> bool:
    """Whether u (..., r) is room behind the rows of x."""
    return u.base is not None and u.base is x.base and _whole(x) is not None and step(u) == step(x)


# ---- columns of one array --------------------------------------------------------------------------------------------


def like(arrays: Sequence[Array]) -> list[Array]:
    """Empty arrays of these shapes (..., width), with room behind: columns of one where the given ones are that."""
    if beside(arrays) is None:
        return [rows(array.shape, array.dtype) for array in arrays]
    widths = [array.shape[-1] for array in arrays]
    return columns(rows((*arrays[0].shape[:-1], sum(widths)), arrays[0].dtype), widths)


def columns(array: Array, widths: Sequence[int]) -> list[Array]:
    """Views of an array (..., sum of widths), from the left to the right."""
    ends = list(itertools.accumulate(widths))
    return [array[..., end - width : end] for end, width in zip(ends, widths, strict=True)]


def beside(arrays: Sequence[Array]) -> Array | None:
    """The array (..., sum of widths) that these are all columns of, from the left to the right; None if there is none.

    It has the room that is behind it.
    """
    first = arrays[0]
    whole, end = first.base, first.data.ptr
    for array in arrays:
        at_place = array.data.ptr == end and array.base is whole and array.shape[:-1] == first.shape[:-1]
        if whole is None or not at_place or not array.size or step(array) != whole.shape[-1]:
            return None
        end += array.shape[-1] * array.itemsize
    start, width = (first.data.ptr - whole.data.ptr) // first.itemsize, sum(array.shape[-1] for array in arrays)
    if start + width > whole.shape[-1]:
        return None
    return _columns(whole, first.shape, start, width)


def heads_beside(arrays: Sequence[Array]) -> Array | None:
    """The rows (batch, time, all heads * dim) in which these (batch, heads, time, dim) lie side by side, or None."""
    dim = arrays[0].shape[3]
    if any(array.shape[3] != dim or array.strides[1::2] != (dim * array.itemsize, array.itemsize) for array in arrays):
        return None
    return beside([array.transpose(0, 2, 1, 3).reshape(array.shape[0], array.shape[2], -1) for array in arrays])


def heads_like(arrays: Sequence[Array]) -> list[Array]:
    """Empty heads of these shapes, as `heads` gives them; columns of one array where the given ones are that."""
    if heads_beside(arrays) is None:
        return [heads(array.shape, array.dtype) for array in arrays]
    batch, _, time, dim = arrays[0].shape
    widths = [array.shape[1] * dim for array in arrays]
    return [heads_of(part, dim) for part in columns(rows((batch, time, sum(widths)), arrays[0].dtype), widths)]
