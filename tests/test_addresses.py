"""Addresses of a device that get memory in chunks, over a driver that keeps account: it is where it was asked for."""

import ctypes
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

FILE = Path(__file__).parents[1] / "refpeft" / "cuda" / "addresses.py"
_spec = importlib.util.spec_from_file_location("addresses", FILE)  # not as a part of refpeft.cuda, which wants CuPy
addresses = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(addresses)

START, UNIT, CHUNK, COUNT = 2**40, 2**21, addresses.CHUNK, 8


class Driver:
    """CUDA's part of it. A mistake in the use of it is an AssertionError; memory is for `most` chunks."""

    def __init__(self, supported: bool = True, most: int = COUNT):
        self.supported, self.most = supported, most
        self.mapped: dict[int, bool] = {}  # by address: whether it can be read and written
        self.handles, self.freed = 0, False

    def cuDeviceGetAttribute(self, found, what, device):
        found._obj.value = self.supported
        return 0

    def cuMemGetAllocationGranularity(self, found, kind, which):
        assert ctypes.sizeof(kind._obj) == 32 and (kind._obj.type, kind._obj.location.device) == (1, 3)
        found._obj.value = UNIT
        return 0

    def cuMemAddressReserve(self, found, size, alignment, wanted, flags):
        assert size.value % UNIT == 0
        found._obj.value = START
        return 0

    def cuMemCreate(self, handle, size, kind, flags):
        assert size.value == CHUNK
        if len(self.mapped) == self.most:
            return 2
        self.handles += 1
        handle._obj.value = 7
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):
        assert handle.value == 7 and size.value == CHUNK and (address.value - START) % CHUNK == 0
        assert START <= address.value < START + COUNT * CHUNK and address.value not in self.mapped
        self.mapped[address.value] = False
        return 0

    def cuMemRelease(self, handle):
        self.handles -= 1
        return 0

    def cuMemSetAccess(self, address, size, access, count):
        assert access._obj.flags == 3 and count.value == 1
        self.mapped[address.value] = True
        return 0

    def cuMemUnmap(self, address, size):
        assert size.value == CHUNK
        del self.mapped[address.value]
        return 0

    def cuCtxSynchronize(self):
        return 0

    def cuMemAddressFree(self, address, size):
        assert not self.mapped and not self.freed
        self.freed = True
        return 0


def whole_chunks(first: int, last: int) -> set[int]:
    """Chunks of which all bytes from `first` to before `last` are meant."""
    return {chunk for chunk in range(COUNT) if first <= chunk * CHUNK and (chunk + 1) * CHUNK <= last}


ASKED = st.tuples(st.booleans(), st.integers(0, COUNT * CHUNK - 1), st.integers(1, COUNT * CHUNK))


@given(st.lists(ASKED, max_size=12), st.integers(1, COUNT))
def test_memory_is_where_it_was_asked_for_and_not_taken_away(asked, most):
    driver = Driver(most=most)
    found = addresses.Addresses(3, COUNT * CHUNK, driver)
    assert not driver.mapped and (found.start, found.size, found.held) == (START, COUNT * CHUNK, 0)
    there: set[int] = set()
    for more, first, size in asked:
        last = min(first + size, COUNT * CHUNK)
        if more:
            wanted = there | set(range(first // CHUNK, -(-last // CHUNK)))
            if len(wanted) <= most:
                found.provide(START + first, last - first)
                there = wanted
            else:
                with pytest.raises(MemoryError, match=f"no memory is left on the device for {last - first:,} bytes"):
                    found.provide(START + first, last - first)
        else:
            found.withdraw(START + first, START + last)
            there -= whole_chunks(first, last)
        assert driver.mapped == {START + chunk * CHUNK: True for chunk in there} and not driver.handles
        assert found.held == CHUNK * len(there) and found.end == START + CHUNK * (max(there, default=-1) + 1)
    del found
    assert driver.freed


def test_what_cannot_be_is_told():
    with pytest.raises(addresses.Unavailable, match="no virtual memory"):
        addresses.Addresses(3, 1, Driver(supported=False))
    with pytest.raises(addresses.Unavailable, match="no memory is left"):
        addresses.Addresses(3, 1, Driver(most=0))
    driver = Driver()
    driver.cuMemAddressReserve = lambda *_: 801
    with pytest.raises(addresses.Unavailable, match="cuMemAddressReserve failed with status 801"):
        addresses.Addresses(3, 1, driver)


def test_an_error_of_a_mapping_is_too_little_memory_and_loses_none():
    driver = Driver()
    found = addresses.Addresses(3, CHUNK, driver)
    driver.cuMemMap = lambda *_: 1
    with pytest.raises(MemoryError, match="cuMemMap failed with status 1"):
        found.provide(START, CHUNK)
    assert not driver.handles and not driver.mapped and found.held == 0


def test_they_are_given_back_once_by_whoever_comes_first():
    driver, times = Driver(), []
    driver.cuMemAddressFree = lambda *_: times.append(dict(driver.mapped)) or 0
    found = addresses.Addresses(3, COUNT * CHUNK, driver)
    found.provide(START, 3 * CHUNK)
    found.close()
    assert times == [{}] and not found.held and found.end == START
    found.close()
    del found
    assert len(times) == 1
