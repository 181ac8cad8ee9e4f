"""Gradients of low-rank factors that read what is wide only once, where products read it once each: see narrow.cu."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import cupy
import numpy as np

from refpeft.backend import Array, bfloat16
from refpeft.cuda.kernels import KernelError, Source
from refpeft.cuda.override import say_once

_RANK, _ROWS, _STAGES, _THREADS = 16, 64, 3, 128  # as in narrow.cu
_STRIPS = (256, 192, 128)  # columns that a block takes
_BLOCKS = 256
"""At most so many blocks: two for each multiprocessor of a large GPU. The bits depend on it: it is asked of no GPU."""
_LEAST = 2**23  # bytes of g: fewer are read again before they have left the cache

_sources = {strip: Source("narrow.cu", STRIP=strip) for strip in _STRIPS}


def both_ways(
    g: Array,
    u: Array,
    up: Array,
    du: Array,
    dB: Array,
    widths: Sequence[int],
    ranks: Sequence[int],
    scale: float = 1.0,
    add: bool = False,
    twin: Array | None = None,
) -> bool:
    """du = g up, and dB = scale g^T u, or added to what is there. Whether that was done: for these it can be, and pays.

    A `twin` as du becomes the same.

    g (rows, out), u and du (rows, r), up (out, r) in bfloat16, dB (out, r) in float32, of layers side by side: `widths`
    and `ranks` add up to out and r. Only the layers' own blocks of `up` and dB are read, and written.
    """
    rows, strip = len(g), _strip(widths)
    second = du if twin is None else twin
    if g.nbytes < _LEAST or not all(map(_fits, (g, u, up, du, second, dB), (8, 8, 8, 8, 8, 4))):
        return False
    if any(rank % 8 or rank > _RANK for rank in ranks) or any(width % 8 for width in widths) or not _compiles(strip):
        return False
    tables = _tables(tuple(widths), tuple(ranks), strip)
    if tables is None:
        return False
    strips, layers = tables
    chunks = -(-rows // _ROWS)
    each = -(-chunks // max(1, min(chunks, _BLOCKS // len(strips))))
    segments = -(-chunks // each)
    du_parts = cupy.empty((len(strips), rows, _RANK), np.float32)
    dB_parts = cupy.empty((segments, len(strips) * strip, _RANK), np.float32)
    _sources[strip]("both_ways")(
        (len(strips), segments), _THREADS, g, _step(g), u, _step(u), up, _step(up), strips, rows, each,
        du_parts, dB_parts, shared=_shared(strip),
    )  # fmt: skip
    blocks = -(-(rows + max(widths)) * (_RANK // 4) // 256)
    _sources[strip]("add_parts")(
        (blocks, len(layers)), 256, du_parts, dB_parts, layers, du, _step(du), twin, _step(second),
        dB, _step(dB), rows, len(strips), segments, float(scale), add,
    )  # fmt: skip
    return True


def _fits(x: Array, at_once: int) -> bool:
    """Whether rows of a matrix can be read in steps of so many numbers."""
    step = at_once * x.itemsize
    return x.dtype == (bfloat16 if at_once == 8 else np.float32) and (
        x.strides[1] == x.itemsize and x.strides[0] % step == 0 and x.data.ptr % step == 0
    )


def _step(x: Array) -> np.int64:
    return np.int64(x.strides[0] // x.itemsize)


def _strip(widths: Sequence[int]) -> int:
    """The widest strip that all layers are cut into without a rest, or the widest of all that a block has room for."""
    strips = [strip for strip in _STRIPS if _shared(strip) <= _most_shared(cupy.cuda.runtime.getDevice())]
    return next((strip for strip in strips if all(width % strip == 0 for width in widths)), strips[0])


def _shared(strip: int) -> int:
    """Bytes of shared memory of a block. All GPUs whose tensor cores know bfloat16 have what strips of 128 take."""
    return _STAGES * _ROWS * (strip + 8 + _RANK + 8) * 2


@functools.cache
def _most_shared(device: int) -> int:
    return cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]


_known: dict[tuple, tuple[Array, Array]] = {}  # as many as kinds of layers


def _tables(widths: tuple[int, ...], ranks: tuple[int, ...], strip: int) -> tuple[Array, Array] | None:
    """The strips of these layers, and the layers, as narrow.cu has them; None in a capture that meets them first."""
    key = widths, ranks, strip, cupy.cuda.runtime.getDevice()
    if key in _known:
        return _known[key]
    if cupy.cuda.get_current_stream().is_capturing():
        return None  # nothing can be copied from the host
    strips, layers = [], []
    columns, places = itertools.accumulate(widths, initial=0), itertools.accumulate(ranks, initial=0)
    for width, rank, column, u in zip(widths, ranks, columns, places, strict=False):
        if rank:
            layers.append((column, width, u, rank, len(strips), 0, 0, 0))
            strips += [(column + start, min(strip, width - start), u, rank) for start in range(0, width, strip)]
    _known[key] = tuple([cupy.asarray(np.array(rows, np.int32)) for rows in (strips, layers)])
    return _known[key]


def _compiles(strip: int) -> bool:
    try:
        _sources[strip]("both_ways"), _sources[strip]("add_parts")
    except KernelError as error:
        say_once(f"{error}; gradients of low-rank factors are products instead, which is slower")
        return False
    return True
