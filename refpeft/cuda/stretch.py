"""Memory for arrays that come and go, in one stretch of addresses, so that pieces of all sizes share it.

CuPy's pools ask the device for a piece of exactly the size that an array needs, and later divide such pieces, but never
join them: of a step's arrays, whose sizes differ a little, about an eighth is lost. Here the pool has one piece, as
large as no device, of which it takes the smallest part that an array fits into, and joins neighbours again. Memory is
put behind those addresses only that an array had (refpeft.cuda.addresses), and taken away where there is none any more.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import cupy

from refpeft.cuda import blas, rooms
from refpeft.cuda.addresses import Addresses, Unavailable

_UNIT = 512  # bytes: CuPy's pools give out multiples of it
_PROBE = 2**22  # bytes of pieces by which it is found out which addresses no array has
_SMALL = 2**16  # bytes of arrays that have no part in a stretch: those that stay would keep memory there


class Stretch:
    """Stands for a cupy.cuda.MemoryPool. Small arrays, and those of other streams than its own, lie beside it."""

    def __init__(self, stream: cupy.cuda.Stream):
        """Raises Unavailable."""
        device, (_, total) = cupy.cuda.runtime.getDevice(), cupy.cuda.runtime.memGetInfo()
        self._addresses, self._stream = Addresses(device, 2 * total), stream
        whole = cupy.cuda.UnownedMemory(self._addresses.start, self._addresses.size, self._addresses, device)
        pieces = iter([cupy.cuda.MemoryPointer(whole, 0)])
        self._pool, self._small = cupy.cuda.MemoryPool(lambda size: next(pieces, None) or _memory(size)), _Pool(_memory)
        with stream:
            self._pool.malloc(self._addresses.size)  # is there now, and free
            all_but_one = self._pool.malloc(self._addresses.size - _UNIT)
            self._last = self._pool.malloc(_UNIT)  # as long as it is there, the pool keeps the whole
        del all_but_one

    def malloc(self, size: int) -> cupy.cuda.MemoryPointer:
        """An allocator for CuPy. Raises MemoryError."""
        if size < _SMALL:
            return self._small.malloc(size)
        pointer = self._pool.malloc(size)
        if not self._addresses.start <= pointer.ptr < self._addresses.start + self._addresses.size:
            return pointer  # of another stream
        try:
            self._addresses.provide(pointer.ptr, size)
        except MemoryError:
            if cupy.cuda.get_current_stream().is_capturing():
                raise
            give_back()
            self._addresses.provide(pointer.ptr, size)
        return pointer

    def total_bytes(self) -> int:
        """Bytes that are held."""
        return self._addresses.held + self._pool.total_bytes() - self._addresses.size + self._small.total_bytes()

    def used_bytes(self) -> int:
        """Bytes of arrays."""
        return self._pool.used_bytes() - _UNIT + self._small.used_bytes()

    def free_all_blocks(self) -> None:
        """Gives back what no array has, after the device has done its work."""
        cupy.cuda.Device().synchronize()
        self._pool.free_all_blocks()  # of other streams
        self._small.free_all_blocks()
        for start, end in self._unused():
            self._addresses.withdraw(start, end)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of a process CuPy may be gone
            self.free_all_blocks()
            if self._pool.used_bytes() == _UNIT:  # else an array is left, and the addresses go with it
                self._addresses.close()
            del self._last  # the pool has one piece again: parts of one that were side by side would never be freed

    def _unused(self) -> list[tuple[int, int]]:
        """Addresses with memory that no array has, (the first, the one behind the last): the pool gives them all out.

        It begins with the smallest parts that are large enough, and ends with that without memory.
        """
        pieces, start, end = [], self._addresses.start, self._addresses.end
        with self._stream:
            while not pieces or start <= pieces[-1].ptr < end:
                pieces.append(self._pool.malloc(_PROBE))
        found: list[tuple[int, int]] = []
        for address in sorted(piece.ptr for piece in pieces):
            start = found.pop()[0] if found and found[-1][1] == address else address
            found.append((start, min(address + _PROBE, end)))
        return found


class _Pool(cupy.cuda.MemoryPool):
    """CuPy's own, where there can be no stretch."""


def _memory(size: int) -> cupy.cuda.MemoryPointer:
    """Memory for a pool.

    Of CuPy's own error the pool would first free what is unused at the moment, and a graph that is being captured
    writes there.
    """
    try:
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise MemoryError(f"no memory is left for {size:,} bytes ({error})") from error


# ---- pools in use ----------------------------------------------------------------------------------------------------

_pools: weakref.WeakSet[Stretch | _Pool] = weakref.WeakSet()
_eager: dict[tuple[int, int], Stretch | None] = {}  # by device and stream
_most = 0


def pool(stream: cupy.cuda.Stream) -> Stretch | _Pool:
    """A new pool for arrays of this stream."""
    found = _stretch(stream) or _Pool(_memory)
    _pools.add(found)
    return found


def missing() -> str | None:
    """Why there are no stretches here, but CuPy's own pools; None where there are."""
    try:
        Addresses(cupy.cuda.runtime.getDevice(), 1)
    except Unavailable as error:
        return str(error)
    return "CuPy's pools have been given a limit" if cupy.get_default_memory_pool().get_limit() else None


def _stretch(stream: cupy.cuda.Stream) -> Stretch | None:
    """None where there can be none, or CuPy's pools have been given a limit, which they see to."""
    if cupy.get_default_memory_pool().get_limit():
        return None
    try:
        return Stretch(stream)
    except Unavailable:
        return None


@contextlib.contextmanager
def in_use(stream: cupy.cuda.Stream) -> Iterator[None]:
    """Within it arrays are made in a stretch, always the same one, unless another allocator has been chosen.

    In the end what none of them has is given back.
    """
    chosen = cupy.cuda.get_allocator() != cupy.get_default_memory_pool().malloc
    stretch = None if chosen else _of_eager_work(stream)
    if stretch is None:
        yield
        return
    with cupy.cuda.using_allocator(stretch.malloc):
        try:
            yield
        finally:
            give_back()


def _of_eager_work(stream: cupy.cuda.Stream) -> Stretch | None:
    key = cupy.cuda.runtime.getDevice(), stream.ptr
    if key not in _eager:
        _eager[key] = _stretch(stream)
        _pools.update({_eager[key]} - {None})
    return _eager[key]


def give_back() -> None:
    """Gives back the memory of eager work that no array has."""
    most_held()
    cupy.get_default_memory_pool().free_all_blocks()
    for stretch in filter(None, _eager.values()):
        stretch.free_all_blocks()


def most_held() -> int:
    """The most bytes that memory pools and cuBLAS have held of the device, so far.

    Pools give nothing back unasked, so it is enough that this is called before they are asked to.
    """
    global _most
    pools = cupy.get_default_memory_pool().total_bytes() + sum(each.total_bytes() for each in _pools)
    _most = max(_most, pools + blas.workspaces() + rooms.nbytes())
    return _most


def forget_most() -> None:
    """From now on `most_held` counts anew, with what is in use now."""
    global _most
    give_back()
    _most = 0
