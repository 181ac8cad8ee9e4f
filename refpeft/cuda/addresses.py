"""Addresses of a device that get memory when it is needed, and give it back: CUDA's virtual memory management.

The driver is called through ctypes: CuPy has no bindings of this part of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from typing import Any

CHUNK = 2**24
"""Bytes that get memory together: a few hundred of them hold a step, and half of one is lost."""

_IS_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_PINNED, _ON_A_DEVICE, _READ_AND_WRITE = 1, 1, 3  # CU_MEM_ALLOCATION_TYPE_, CU_MEM_LOCATION_TYPE_, CU_MEM_ACCESS_FLAGS_


class Unavailable(Exception):
    """This driver, or this device, has no virtual memory management."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("device", ctypes.c_int)]


class _Kind(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class Addresses:
    """A stretch of addresses, in chunks: `provide` gives some of them memory, `withdraw` takes it away.

    start   the first one
    size    how many there are
    held    bytes of memory behind them

    They are given back by `close`, or with the object.
    """

    def __init__(self, device: int, size: int, driver: Any = None):
        """At least `size` addresses, without memory. Raises Unavailable."""
        self._driver = driver or _library()
        here = _Location(_ON_A_DEVICE, device)
        self._kind, self._access = _Kind(type=_PINNED, location=here), _Access(here, _READ_AND_WRITE)
        supported, unit, start = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_uint64()
        self._need("cuDeviceGetAttribute", ctypes.byref(supported), _IS_SUPPORTED, device)
        if not supported.value:
            raise Unavailable("the device has no virtual memory management")
        self._need("cuMemGetAllocationGranularity", ctypes.byref(unit), ctypes.byref(self._kind), 0)
        self.chunk = -(-CHUNK // unit.value) * unit.value
        self.size = -(-size // self.chunk) * self.chunk
        self._need("cuMemAddressReserve", ctypes.byref(start), _size(self.size), _size(0), _address(0), _flags)
        self.start = start.value
        self._there = bytearray(self.size // self.chunk)  # 1: the chunk has memory
        try:
            self.provide(self.start, 1)
        except MemoryError as error:
            raise Unavailable(str(error)) from None
        self.withdraw(self.start, self.start + self.chunk)

    @property
    def held(self) -> int:
        return self.chunk * self._there.count(1)

    @property
    def end(self) -> int:
        """The first address behind all that have memory."""
        return self.start + self.chunk * (self._there.rfind(1) + 1)

    def provide(self, address: int, size: int) -> None:
        """Sees to it that `size` bytes from `address` on are there. Raises MemoryError, and nothing is changed then."""
        chunks = range((address - self.start) // self.chunk, -(-(address + size - self.start) // self.chunk))
        if self._there.find(0, chunks.start, chunks.stop) < 0:
            return
        added = []
        try:
            for chunk in chunks:
                if not self._there[chunk]:
                    self._map(chunk)
                    added.append(chunk)
        except MemoryError as error:
            for chunk in added:
                self._unmap(chunk)
            raise MemoryError(f"no memory is left on the device for {size:,} bytes: {error}") from None

    def withdraw(self, start: int, end: int) -> None:
        """Takes away memory of whole chunks between two addresses, of which the device must use none any more."""
        for chunk in range(-(-(start - self.start) // self.chunk), (end - self.start) // self.chunk):
            if self._there[chunk]:
                self._unmap(chunk)

    def _map(self, chunk: int) -> None:
        handle, place, size = ctypes.c_uint64(), _address(self.start + chunk * self.chunk), _size(self.chunk)
        self._need("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._kind), _flags, error=MemoryError)
        try:
            self._need("cuMemMap", place, size, _size(0), handle, _flags, error=MemoryError)
        finally:
            self._driver.cuMemRelease(handle)  # the memory stays until nothing is mapped to it
        self._there[chunk] = 1
        self._need("cuMemSetAccess", place, size, ctypes.byref(self._access), _size(1))

    def _unmap(self, chunk: int) -> None:
        self._need("cuMemUnmap", _address(self.start + chunk * self.chunk), _size(self.chunk))
        self._there[chunk] = 0

    def _need(self, name: str, *args: Any, error: type[Exception] = Unavailable) -> None:
        status = getattr(self._driver, name)(*args)
        if status:
            raise error(f"{name} failed with status {status}")

    def close(self) -> None:
        """Gives the addresses back, which nothing may use any more."""
        if self._there:
            self._driver.cuCtxSynchronize()
            self.withdraw(self.start, self.start + self.size)
            self._driver.cuMemAddressFree(_address(self.start), _size(self.size))
            self._there = bytearray()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # where it was not made; at the end of a process the driver may be gone
            self.close()


_size, _address = ctypes.c_size_t, ctypes.c_uint64
_flags = ctypes.c_ulonglong(0)


@functools.cache
def _library() -> ctypes.CDLL:
    """The driver's library, with all that is called here."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        for name in ("cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemCreate", "cuMemMap"):
            getattr(library, name)
    except (OSError, AttributeError) as error:
        raise Unavailable(str(error)) from None
    return library
