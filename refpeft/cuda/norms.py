"""RMSNorm and LayerNorm: one launch each way. Beside x only the mean and the scale of each row are kept."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array
from refpeft.cuda import margins
from refpeft.cuda.elementwise import added
from refpeft.cuda.kernels import Source, contiguous
from refpeft.cuda.maps import lanes_of, summed
from refpeft.cuda.override import override, works
from refpeft.tape import ADDED, Total
from refpeft.tensor import Op, Pending, Tensor, needs_of

float32 = np.dtype("f4")

_OF_WARP = 512  # numbers of the longest row that a warp keeps
_sources = {kept: Source("norms.cu", KEPT=kept) for kept in (1, 2)}

WIDEST = 16384
"""Numbers of the longest row that a block keeps: two times eight for each of 1024 threads."""

_PARTS = 128  # that the rows are split into for the gradient of a gain
_ROWS = 64  # of a part, at least


@override(fused.rms_norm, "bfloat16", "float32")
def rms_norm(needs, x, w, *, eps):
    return _forward(needs, x, w, None, eps) if _takes(x, w) else NotImplemented


@rms_norm.recomputed
def _(x, mean, scale, w, b, needs):
    return _again(x, mean, scale, w, b)


@rms_norm.backward(into=True, onto=True, again=True)
def _(g, x, mean, scale, w, b, needs, into, onto=(None,), again=False):
    return _backward(g, x, mean, scale, (w,), needs, into, onto[0], again)


@override(fused.layer_norm, "bfloat16", "float32")
def layer_norm(needs, x, w, b, *, eps):
    return _forward(needs, x, w, b, eps) if _takes(x, w, b) else NotImplemented


@layer_norm.recomputed
def _(x, mean, scale, w, b, needs):
    return _again(x, mean, scale, w, b)


@layer_norm.backward(into=True, onto=True, again=True)
def _(g, x, mean, scale, w, b, needs, into, onto=(None,), again=False):
    return _backward(g, x, mean, scale, (w, b), needs, into, onto[0], again)


def _takes(x: Any, *vectors: Any) -> bool:
    if not x.ndim or not x.size:
        return False
    dim = x.shape[-1]
    return (
        dim % 8 == 0
        and dim <= WIDEST
        and all(vector.shape == (dim,) and vector.dtype in (float32, x.dtype) for vector in vectors)
    )


def _forward(
    needs: tuple[bool, ...], x: Array, w: Array, b: Array | None, eps: float, of: tuple[Array, Array] | None = None
) -> tuple[Array, tuple]:
    """What the pairs give; with `of`, x is yet to be written: the sum of these two."""
    rows = x.shape[:-1]
    scale = cupy.empty(rows, float32)
    mean = None if b is None else cupy.empty(rows, float32)
    y = _normalized(x, mean, scale, w, b, known=False, eps=eps, of=of)
    return y, (x, mean, scale, w, b, needs) if any(needs) else ()


def _again(x: Array, mean: Array | None, scale: Array, w: Array, b: Array | None) -> Array:
    return _normalized(x, mean, scale, w, b, known=True)


def _normalized(
    x: Array,
    mean: Array | None,
    scale: Array,
    w: Array,
    b: Array | None,
    known: bool,
    eps: float = 0.0,
    of: tuple[Array, Array] | None = None,
) -> Array:
    y = margins.rows(x.shape, x.dtype) if x.ndim <= 3 else cupy.empty(x.shape, x.dtype)
    first, plus, total = (x, None, None) if of is None else (*of, x)
    rows, dim, lanes, blocks, block = _shared_out(x)
    arrays = (aligned(first), _vector(w), _vector(b), y, mean, scale)
    numbers = (known, rows, dim, lanes, float(eps), margins.step(y) or dim)
    plus = None if plus is None else aligned(plus)
    _source(dim)("norm_forward", x.dtype)(blocks, block, *arrays, *numbers, plus, total)
    return y


@fused.rms_norm.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    return _of_a_sum(fused.rms_norm, inputs, options)


@fused.layer_norm.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    return _of_a_sum(fused.layer_norm, inputs, options)


def _of_a_sum(op: Op, inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    """The norm of a sum that waits, and the sum, in one launch."""
    x, *vectors = inputs
    if type(x) is not Pending or x.op is not ops.add or x.there:
        return None
    arrays = [vector.data if isinstance(vector, Tensor) else vector for vector in vectors]
    a, b = x.what
    if not _takes(a.data, *arrays):
        return None
    total, pair = cupy.empty(x.shape, x.dtype), op.overrides[cupy.ndarray, x.dtype]
    result = added(a, b, total)
    needs = needs_of((result, *vectors))
    if not works(pair, needs, total, *arrays, **options):
        return None
    x.becomes(result)
    gain, shift = (*arrays, None)[:2]
    y, saved = _forward(needs, total, gain, shift, options["eps"], of=(a.data, b.data))
    return pair.made(y, needs, inputs, saved) if any(needs) else Tensor(y)


def _backward(
    g: Array,
    x: Array,
    mean: Array | None,
    scale: Array,
    vectors: tuple[Array, ...],
    needs: tuple[bool, ...],
    into: tuple[Array | None, ...],
    onto: Array | None,
    again: bool,
) -> tuple:
    g, x = aligned(g), aligned(x)
    if needs[0]:
        y = cupy.empty(x.shape, x.dtype) if again else None
        dx = _of_x(g, x, mean, scale, vectors, into[0], onto, y)
    else:
        dx, y = None, _again(x, mean, scale, *(*vectors, None)[:2]) if again else None
    dtypes = [vector.dtype if need else None for vector, need in zip(vectors, needs[1:], strict=True)]
    return (dx, *_of_vectors(g, x, mean, scale, dtypes, into[1:]), *([y] if again else []))


def _of_x(
    g: Array,
    x: Array,
    mean: Array | None,
    scale: Array,
    vectors: tuple[Array, ...],
    into: Array | None,
    onto: Array | None,
    y: Array | None,
) -> Any:
    """The gradient of x, added to `into`, or with what is in `onto`; y becomes the norm, where it is given."""
    into, onto = (None if a is None or a.dtype != x.dtype or not in_rows(a) else a for a in (into, onto))
    plus = onto if into is None else into
    dx = into
    if dx is None:
        dx = margins.rows(x.shape, x.dtype) if x.ndim <= 3 else cupy.empty(x.shape, x.dtype)
    rows, dim, lanes, blocks, block = _shared_out(x)
    steps = [dim if array is None else margins.step(array) or dim for array in (plus, dx)]
    gain, shift = map(_vector, (*vectors, None)[:2])
    arrays = x, gain, g, mean, scale, plus, dx, shift, y
    _source(dim)("norm_backward", x.dtype)(blocks, block, *arrays, rows, dim, lanes, *steps)
    return ADDED if into is not None else dx if plus is None else Total(dx)


def _of_vectors(
    g: Array,
    x: Array,
    mean: Array | None,
    scale: Array,
    dtypes: list[np.dtype | None],
    into: tuple[Array | None, ...],
) -> list[Any]:
    """The gradients of gain and shift in these dtypes (None: not wanted): sums of parts of the rows, then of them."""
    if all(dtype is None for dtype in dtypes):
        return dtypes
    dim = x.shape[-1]
    rows = x.size // dim
    per = max(_ROWS, -(-rows // _PARTS))
    parts = -(-rows // per)
    partial = [None if dtype is None else cupy.empty((parts, dim), float32) for dtype in dtypes]
    gains, shifts = (*partial, None)[:2]
    _source(dim)("norm_gains", x.dtype)((-(-dim // 256), parts), 256, x, g, mean, scale, gains, shifts, rows, dim, per)
    found: list[Any] = []
    for each, dtype, onto in zip(partial, dtypes, into, strict=True):
        if each is None:
            found.append(None)
        elif onto is not None and onto.flags.c_contiguous:
            summed("copy", each, shape=each.shape, axes=(0,), into=onto)
            found.append(ADDED)
        else:
            found.append(summed("copy", each, shape=each.shape, axes=(0,), dtype=dtype))
    return found


def _shared_out(x: Array) -> tuple[int, int, int, int, int]:
    """Rows, dim, how many threads share a row (a part of a warp or a block), blocks, and threads of a block."""
    dim = x.shape[-1]
    rows = x.size // dim
    if dim <= _OF_WARP:
        lanes, block = lanes_of(dim), 128
    else:
        lanes = block = _threads(dim, _kept(dim))
    return rows, dim, lanes, -(-rows * lanes // block), block


def _kept(dim: int) -> int:
    """How many times eight numbers of a row a thread keeps: one where two would leave more threads without any."""
    if dim <= _OF_WARP:
        return -(-dim // 256)
    one, two = (kept * _threads(dim, kept) for kept in (1, 2))
    return 1 if one < two and one <= 1024 else 2


def _threads(dim: int, kept: int) -> int:
    """Of a block that keeps a row."""
    return -(-dim // (kept * 8 * 32)) * 32


def _source(dim: int) -> Source:
    return _sources[_kept(dim)]


def _vector(array: Array | None) -> Array | None:
    """A gain or a shift as the kernels read it."""
    return None if array is None else aligned(array.astype(float32, copy=False))


def in_rows(array: Array) -> bool:
    """Whether its rows (..., dim) are at equal distances, each at an address that sixteen bytes can be read from."""
    step = margins.step(array)
    return step is not None and step % 8 == 0 and array.data.ptr % 16 == 0


def aligned(array: Array) -> Array:
    """`array` in C order, at an address from which sixteen bytes can be read at once: itself where it is so."""
    found = contiguous(array)
    return found if found.data.ptr % 16 == 0 else found.copy()
