"""Matrix products by cuBLAS, through ctypes: CuPy's own calls of it refuse to be captured in a CUDA graph.

Products of bfloat16 add up in float32, and may be wanted in float32; factors of float32 may be rounded to TF32. Frozen
and trained values meet here: `low` gives the bfloat16 copy of float32 values that a product takes.

How a product is computed is left to cuBLAS. On an H200 (cuBLAS 13.1; the products of a step of LoRA on Llama-3.2-1B)
the best of 16 candidates of cublasLt for each, with four times the workspace too, are 4 % faster for some milliseconds.
One after the other for seconds they are not: that GPU is at its limit of power then, and 8192^3, which began at 800
TFLOP/s, goes on at 685.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16, may_round_factors
from refpeft.errors import RefpeftError

_WORKSPACE = 32 << 20  # bytes: NVIDIA's figure for Hopper
_KEEP_FLOAT32_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: also where a product is split along k
_TYPES = {np.dtype(name): number for name, number in (("f4", 0), ("f8", 1), (bfloat16, 14), ("c8", 4), ("c16", 5))}
_FLOAT32, _TF32, _FLOAT64 = 68, 77, 70  # cublasComputeType; above, cudaDataType

_of_float32 = _FLOAT32


def use_tf32(wanted: bool) -> None:
    """From now on, factors of float32 are rounded to TF32 where tensor cores multiply them, or are not."""
    global _of_float32
    _of_float32 = _TF32 if wanted else _FLOAT32


def product(
    a: Array,
    b: Array,
    out: Array | None = None,
    dtype: np.dtype | None = None,
    alpha: float = 1.0,
    add: bool = False,
) -> Array:
    """alpha a @ b: a (..., m, k), b (..., k, n), both of one dtype; into `out`, or added to what is there.

    Without `out` the result is of `dtype` (None: that of a); from bfloat16 it may be float32. Leading axes broadcast.
    Views whose last two axes have a unit stride between them are read as they are, transposed ones too.
    """
    if out is None:
        leading = a.shape[:-2] if a.shape[:-2] == b.shape[:-2] else np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        out = cupy.empty((*leading, a.shape[-2], b.shape[-1]), dtype or a.dtype)
    if a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        raise ValueError(f"a product of {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
    if not out.size:
        return out
    if not a.shape[-1]:
        if not add:
            out.fill(0)
        return out
    if out.ndim == 2:
        _single(a, b, out, alpha, add)
    else:
        _batched(a, b, out, alpha, add)
    return out


def _single(a: Array, b: Array, out: Array, alpha: float, add: bool) -> None:
    if not _is_rows(out):
        if not _is_rows(out.T):
            raise ValueError("the result of a product has a unit stride along one axis")
        a, b, out = b.T, a.T, out.T
    (a, turned_a, step_a), (b, turned_b, step_b) = _readable(a), _readable(b)
    (m, n), k = out.shape, a.shape[1]
    compute, one, zero = _computed(a.dtype, alpha, add)
    # cuBLAS goes by columns: for it, this is the transposed result, from the transposed factors in the other order
    _check(
        _library().cublasGemmEx(
            _handle(), turned_b, turned_a, n, m, k,
            one, b.data.ptr, _TYPES[b.dtype], step_b, a.data.ptr, _TYPES[a.dtype], step_a,
            zero, out.data.ptr, _TYPES[out.dtype], _step(out), compute, -1,
        )
    )  # fmt: skip


def _batched(a: Array, b: Array, out: Array, alpha: float, add: bool) -> None:
    leading = out.shape[:-2]
    first = (0,) * len(leading)
    if not (_evenly(out) and _is_rows(out[first])):
        raise ValueError("the results of a batched product lie in rows, at equal distances")
    a, b = (cupy.broadcast_to(x, (*leading, *x.shape[-2:])) for x in (a, b))
    a, b = (x if _evenly(x) and _lies(x[first]) else cupy.ascontiguousarray(x) for x in (a, b))
    (_, turned_a, step_a), (_, turned_b, step_b) = _readable(a[first]), _readable(b[first])
    count = out.size // (out.shape[-2] * out.shape[-1])
    (m, n), k = out.shape[-2:], a.shape[-1]
    compute, one, zero = _computed(a.dtype, alpha, add)
    _check(
        _library().cublasGemmStridedBatchedEx(
            _handle(), turned_b, turned_a, n, m, k,
            one, b.data.ptr, _TYPES[b.dtype], step_b, _distance(b), a.data.ptr, _TYPES[a.dtype], step_a, _distance(a),
            zero, out.data.ptr, _TYPES[out.dtype], _step(out[first]), _distance(out), count, compute, -1,
        )
    )  # fmt: skip


# ---- how matrices lie in memory --------------------------------------------------------------------------------------


def _is_rows(x: Array) -> bool:
    """Whether numbers of a row of the matrix are side by side, and rows do not overlap."""
    return (x.shape[1] == 1 or x.strides[1] == x.itemsize) and (
        x.shape[0] == 1 or x.strides[0] >= x.shape[1] * x.itemsize
    )


def _lies(x: Array) -> bool:
    """Whether the matrix can be read as it is: by rows, or by columns."""
    return _is_rows(x) or _is_rows(x.T)


def _step(rows: Array) -> int:
    """Numbers from one row to the next."""
    return rows.strides[0] // rows.itemsize if rows.shape[0] > 1 else rows.shape[1]


def _readable(x: Array) -> tuple[Array, int, int]:
    """(the matrix, or a copy; whether it lies in columns; numbers from one row, or column, to the next)."""
    x = x if _lies(x) else cupy.ascontiguousarray(x)
    return (x, 0, _step(x)) if _is_rows(x) else (x, 1, _step(x.T))


def _evenly(x: Array) -> bool:
    """Whether matrices (..., m, n) are at equal distances, or are all the same one."""
    axes = [(n, stride) for n, stride in zip(x.shape[-3::-1], x.strides[-3::-1], strict=True) if n > 1]
    return all(outer == n * inner for (n, inner), (_, outer) in itertools.pairwise(axes))


def _distance(x: Array) -> int:
    """Numbers from one matrix to the next, of those that lie evenly."""
    strides = [stride for count, stride in zip(x.shape[:-2], x.strides[:-2], strict=True) if count > 1]
    return strides[-1] // x.itemsize if strides else 0


# ---- cuBLAS ----------------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except Exception as error:  # pathfinder's own, and OSError
        raise RefpeftError(
            f"cuBLAS cannot be loaded ({str(error).splitlines()[0]}): pip install 'refpeft[cuda13]' brings it "
            "(or [cuda12]); `refpeft doctor` says more"
        ) from None
    i, p, far = ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong
    library.cublasGemmEx.argtypes = [p, i, i, i, i, i, p, p, i, i, p, i, i, p, p, i, i, i, i]
    batched = [p, i, i, i, i, i, p, p, i, i, far, p, i, i, far, p, p, i, i, far, i, i, i]
    library.cublasGemmStridedBatchedEx.argtypes = batched
    library.cublasSetStream_v2.argtypes = [p, p]
    library.cublasSetWorkspace_v2.argtypes = [p, p, ctypes.c_size_t]
    return library


class _Context:
    """cuBLAS on one stream: its handle and its workspace, which products on another stream must not write to."""

    def __init__(self, stream: int) -> None:
        self.handle = ctypes.c_void_p()
        _check(_library().cublasCreate_v2(ctypes.byref(self.handle)))
        _check(_library().cublasSetMathMode(self.handle, _KEEP_FLOAT32_SUMS))
        with cupy.cuda.using_allocator(None):  # of no pool: captured graphs write to it as long as they live
            self.workspace = cupy.empty(_WORKSPACE, "u1")
        _check(_library().cublasSetStream_v2(self.handle, stream))  # first: it takes the workspace away
        _check(_library().cublasSetWorkspace_v2(self.handle, self.workspace.data.ptr, _WORKSPACE))


@functools.cache
def _context(device: int, stream: int) -> _Context:
    return _Context(stream)


def workspaces() -> int:
    """Bytes of all workspaces, which lie in no pool."""
    return _context.cache_info().currsize * _WORKSPACE


def _handle() -> ctypes.c_void_p:
    """The handle of the current stream of the current device."""
    return _context(cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr).handle


def _check(status: int) -> None:
    if status:
        raise RefpeftError(f"cuBLAS refused a call with status {status}; `refpeft doctor` checks the installation")


def _computed(dtype: np.dtype, alpha: float, add: bool) -> tuple[int, object, object]:
    """(how cuBLAS computes with factors of this dtype, alpha, beta)."""
    compute = _FLOAT64 if dtype in (np.float64, np.complex128) else _FLOAT32
    if dtype == np.float32:
        compute = _TF32 if may_round_factors() else _of_float32
    real = ctypes.c_double if compute == _FLOAT64 else ctypes.c_float
    if dtype.kind == "c":
        number = real * 2  # the second one, the imaginary part, is zero
        return compute, ctypes.byref(number(alpha)), ctypes.byref(number(add))
    return compute, ctypes.byref(real(alpha)), ctypes.byref(real(add))


# ---- values in bfloat16 ----------------------------------------------------------------------------------------------

_shadows: list[tuple[Array, Array]] = []  # float32 values, and the same in bfloat16


@contextlib.contextmanager
def lowered(values: Array) -> Iterator[None]:
    """Within it, `low` of any part of the flat float32 `values` costs nothing: all were cast in one launch."""
    _shadows.append((values, values.astype(bfloat16)))
    try:
        yield
    finally:
        _shadows.pop()


def is_training() -> bool:
    """Whether a pass of training is under way: values have been lowered."""
    return bool(_shadows)


def low(array: Array) -> Array:
    """`array` as a factor for products with bfloat16: itself, or a copy in bfloat16 of the same strides."""
    if array.dtype == bfloat16:
        return array
    for values, copy in _shadows:
        offset = array.data.ptr - values.data.ptr
        if 0 <= offset < values.nbytes and array.dtype == values.dtype:
            strides = tuple(stride // 2 for stride in array.strides)
            return cupy.ndarray(array.shape, bfloat16, copy.data + offset // 2, strides)
    return array.astype(bfloat16)
