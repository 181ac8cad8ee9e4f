"""Arrays that need not lie in the memory that is computed in: a page comes near before it is used, and goes back after.

On the host they are a file, mapped into memory. On the GPU they are managed memory whose home is the host's (as in
QLoRA, arXiv:2305.14314, section 3): pages move on streams of their own, while the page before is worked on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from . import capturing
from .backend import Array
from .errors import RefpeftError


class PagedArray:
    """A flat array in pages, zeros at first: `array` is all of it, for whoever does not care when pages move.

    `prefetch` begins to bring a page near, `take` gives it to compute with, and `evict` sends it back once what was
    asked of it is done; all return at once. This class itself keeps everything in ordinary memory, and nothing moves.
    The memory is freed with the last reference to `array`.
    """

    def __init__(self, array: Array):
        self.array = array

    def prefetch(self, page: slice) -> None:
        """Begins to bring a page near."""

    def take(self, page: slice) -> Array:
        """The page, near for all that is asked of the device from now on."""
        return self.array[page]

    def evict(self, page: slice) -> None:
        """Sends a page back, after what has been asked of the device so far."""


def zeros(xp: ModuleType, size: int, dtype: np.dtype, paged: bool) -> PagedArray:
    """A flat array of zeros; where `paged` is not asked for or not possible (see `obstacle`) an ordinary one."""
    if not paged or obstacle(xp):
        return PagedArray(xp.zeros(size, dtype))
    return FileArray(size, dtype) if xp is np else ManagedArray(xp, size, dtype)


def in_turn(arrays: Mapping[str, PagedArray], pages: Iterable[dict[str, slice]]) -> Iterator[dict[str, Array]]:
    """One page of all arrays after the other, near; meanwhile the next one comes, and the one before goes back."""
    for now, following in pairwise([{}, *pages, {}]):
        for name, page in following.items():
            arrays[name].prefetch(page)
        if now:
            yield {name: arrays[name].take(page) for name, page in now.items()}
        for name, page in now.items():
            arrays[name].evict(page)


@functools.cache
def obstacle(xp: ModuleType) -> str:
    """Why arrays of `xp` cannot be paged here; "" where they can."""
    if xp is np:
        return ""
    if not xp.cuda.Device().attributes.get("ConcurrentManagedAccess"):
        return "this GPU, or its driver, cannot use memory that the host uses at the same time"
    if not hasattr(_driver(), "cuMemPrefetchAsync_v2"):
        return "the CUDA driver is older than 12.2"
    return ""


# ---- on the host -----------------------------------------------------------------------------------------------------


class FileArray(PagedArray):
    """A file without a name in the folder for temporary files (TMPDIR), mapped. Pages that were sent back no longer
    belong to the process: the system keeps them while it has memory to spare, and writes them when it has not.
    """

    def __init__(self, size: int, dtype: np.dtype):
        nbytes = size * dtype.itemsize
        try:
            with tempfile.TemporaryFile() as file:
                _reserve(file.fileno(), nbytes)
                self._map = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            where = tempfile.tempdir or "a folder for temporary files"
            raise RefpeftError(
                f"no file for {nbytes:,} bytes of paged memory in {where}: {error.strerror}; "
                "let TMPDIR name a folder with more room"
            ) from None
        super().__init__(np.frombuffer(self._map, dtype))

    def prefetch(self, page: slice) -> None:
        self._advise("MADV_WILLNEED", page)

    def evict(self, page: slice) -> None:
        self._advise("MADV_DONTNEED", page)  # of a file that others could map, too, so nothing is lost

    def _advise(self, advice: str, page: slice) -> None:
        if not hasattr(mmap, advice):
            return  # not on this system, which then decides alone
        start, stop = (at * self.array.itemsize for at in (page.start, page.stop))
        start -= start % mmap.PAGESIZE
        self._map.madvise(getattr(mmap, advice), start, stop - start)


def _reserve(file: int, nbytes: int) -> None:
    """Room for all of a file of zeros: were it missing later, when a page is written, the process would be killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)


# ---- on the GPU ------------------------------------------------------------------------------------------------------


class ManagedArray(PagedArray):
    """CUDA's managed memory. It comes from no memory pool: no pool's limit counts it, none keeps it when it is dropped.

    Pages come on one stream and go on another, so that both can happen at once, and while a third is worked on.
    """

    def __init__(self, cupy: ModuleType, size: int, dtype: np.dtype):
        self._cupy = cupy
        super().__init__(cupy.ndarray((size,), dtype, memptr=cupy.cuda.malloc_managed(size * dtype.itemsize)))
        self._near = _Location(_DEVICE, self.array.device.id)
        whole = self.array.data.ptr, self.array.nbytes
        _call("cuMemAdvise_v2", *whole, _PREFERRED_LOCATION, _HOST)
        ctypes.memset(whole[0], 0, whole[1])  # from the host: so that it begins there
        self._coming, self._going = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        self._arrivals: dict[int, Any] = {}

    def prefetch(self, page: slice) -> None:
        self._move(page, self._near, self._coming)
        self._arrivals[page.start] = self._event(self._coming)

    def take(self, page: slice) -> Array:
        self._cupy.cuda.get_current_stream().wait_event(self._arrivals.pop(page.start))
        return self.array[page]

    def evict(self, page: slice) -> None:
        used = self._event(self._cupy.cuda.get_current_stream())
        self._going.wait_event(used)
        self._coming.wait_event(used)  # or the host, which is ahead, would ask for all pages at once
        self._move(page, _HOST, self._going)

    def _event(self, stream: Any) -> Any:
        return stream.record(self._cupy.cuda.Event(disable_timing=True))

    def _move(self, page: slice, where: _Location, stream: Any) -> None:
        """CuPy 14's own prefetch cannot name the host under CUDA 13: it takes every location for a device."""
        capturing.refuse("pages of the optimizer's state come and go during a step")
        part = self.array[page]
        _call("cuMemPrefetchAsync_v2", part.data.ptr, part.nbytes, where, 0, ctypes.c_void_p(stream.ptr))


class _Location(ctypes.Structure):  # CUmemLocation
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


_DEVICE, _PREFERRED_LOCATION = 1, 3  # CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ADVISE_SET_PREFERRED_LOCATION
_HOST = _Location(2, 0)


@functools.cache
def _driver() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError):
        return ctypes.CDLL("libcuda.so.1")
    return None


def _call(name: str, address: int, nbytes: int, *arguments: Any) -> None:
    """A function of the driver on a stretch of memory."""
    code = getattr(_driver(), name)(ctypes.c_uint64(address), ctypes.c_size_t(nbytes), *arguments)
    if code:
        raise RefpeftError(f"CUDA refused to move memory: {name} of {nbytes:,} bytes gave error {code}")
