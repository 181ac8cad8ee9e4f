"""Blocks and code books: the rules, in plain array code and in the fast code for NumPy."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import blockwise, blockwise_numpy
from refpeft.backend import to_host
from refpeft.conformance import device

LEVELS = {
    "two signs": np.linspace(-0.875, 1, 16, dtype="f4"),
    "not sorted, zero twice": np.array(
        [0, 0.1, 1, 0.5, 0.7, 0.3, 0.2, 0.9, 0, -0.1, -1, -0.5, -0.7, -0.3, -0.2, -0.9], "f4"
    ),
    "signed map": blockwise.dynamic_map(),
    "unsigned map": blockwise.dynamic_map(signed=False),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def encode(weight, levels, block=32):
    return blockwise.encode(np.asarray(weight, "f4"), block, blockwise.nearest(levels))


@pytest.fixture
def on_device(monkeypatch):
    return device.install(monkeypatch)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("count", [1, 31, 32, 64, 65, 1000, 4096])
@pytest.mark.parametrize("threads, chunk", [(1, 128), (3, 64), (4, 1 << 15)])
def test_the_fast_code_has_the_bits_of_the_plain_code(on_device, monkeypatch, name, count, threads, chunk):
    for constant, value in {"THREADS": threads, "CHUNK": chunk}.items():
        monkeypatch.setattr(blockwise_numpy, constant, value)
    weight = normal(count, seed=count)
    weight[3:40] = 0
    codes, absmax = blockwise.encode(weight, 32, blockwise.nearest(LEVELS[name]))
    book = blockwise.nearest(LEVELS[name], on_device)
    plain = blockwise.encode(on_device.asarray(weight), 32, book)
    assert all(np.array_equal(ours, to_host(part)) for ours, part in zip((codes, absmax), plain, strict=True))
    for dtype in map(np.dtype, ("f4", "f8", ml_dtypes.bfloat16)):
        values = blockwise.decode(blockwise.Blocks(codes, absmax, 32, LEVELS[name]), (count, 1), dtype)
        plain_values = to_host(blockwise.decode(blockwise.Blocks(*plain, 32, book.levels), (count, 1), dtype))
        assert values.dtype == plain_values.dtype == dtype and values.shape == (count, 1)
        assert values.tobytes() == plain_values.tobytes()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "name, block", [("two signs", 48), ("two signs", 1024), ("signed map", 7), ("signed map", 300)]
)
def test_constants_of_any_kind_and_blocks_of_any_size_are_decoded_alike(on_device, monkeypatch, name, block, nested):
    monkeypatch.setattr(blockwise_numpy, "THREADS", 3)
    monkeypatch.setattr(blockwise_numpy, "CHUNK", 128)
    count, levels, rng = 2100, LEVELS[name], np.random.default_rng(block)

    def blocks(xp):
        codes = xp.asarray(rng.integers(0, 256, count // 2 if len(levels) == 16 else count, "u1"))
        offset = xp.asarray(np.float32(0.1))
        constants = xp.asarray(normal(-(-count // block)))
        if nested:
            inner = blockwise.nearest(LEVELS["signed map"], xp)
            packed, absmax = blockwise.encode(constants, 64, inner)
            constants = blockwise.Blocks(packed, absmax, 64, inner.levels, offset)
        return blockwise.Blocks(codes, constants, block, xp.asarray(levels), offset, np.float32(1 / 127))

    here = blocks(np)
    rng = np.random.default_rng(block)  # the same codes once more
    there = blocks(on_device)
    for dtype in map(np.dtype, ("f4", ml_dtypes.bfloat16)):
        values = blockwise.decode(here, (42, 50), dtype)
        assert values.tobytes() == to_host(blockwise.decode(there, (42, 50), dtype)).tobytes()
        assert np.array_equal(blockwise.decode(here, (42, 50), dtype, slice(8, 31)), values[8:31])
    expected = levels[codes_of(here, levels)] * blockwise._array(here.absmax).repeat(block)[:count]
    expected = expected * np.float32(1 / 127) + np.float32(0.1)
    assert np.array_equal(blockwise.decode(here, (count,), np.dtype("f4")), expected)


def codes_of(blocks, levels):
    return blockwise.unpack_nibbles(blocks.codes, 2 * blocks.codes.size) if len(levels) == 16 else blocks.codes


def test_neither_chunks_nor_threads_change_a_bit_of_a_large_weight(monkeypatch):
    weight = normal(1500, 801)
    book, found = blockwise.nearest(LEVELS["two signs"]), set()
    for threads, chunk in ((1, 1 << 22), (1, 4096), (2, 1 << 15), (3, 1 << 17)):
        for constant, value in {"THREADS": threads, "CHUNK": chunk}.items():
            monkeypatch.setattr(blockwise_numpy, constant, value)
        codes, absmax = blockwise.encode(weight, 64, book)
        values = blockwise.decode(blockwise.Blocks(codes, absmax, 64, book.levels), weight.shape, np.dtype("f4"))
        found.add((codes.tobytes(), absmax.tobytes(), values.tobytes()))
    assert len(found) == 1


def test_what_is_needed_beside_the_result_does_not_grow_with_the_weight():
    book = blockwise.nearest(LEVELS["two signs"])
    weight = normal(1 << 22)
    tracemalloc.start()
    codes, absmax = blockwise.encode(weight, 64, book)
    encoding = tracemalloc.get_traced_memory()[1] - codes.nbytes - absmax.nbytes
    tracemalloc.reset_peak()
    values = blockwise.decode(blockwise.Blocks(codes, absmax, 64, book.levels), weight.shape, np.dtype("f4"))
    decoding = tracemalloc.get_traced_memory()[1] - codes.nbytes - absmax.nbytes - values.nbytes
    tracemalloc.stop()
    assert max(encoding, decoding) < 1 << 22


@pytest.mark.parametrize("name", LEVELS)
def test_the_code_is_that_of_the_nearest_level_and_between_two_of_the_lower(name):
    levels = LEVELS[name]
    rising = np.unique(levels)
    middles = (rising[1:] + rising[:-1]) / 2
    up, down = (np.nextafter(middles, np.float32(to)) for to in (2, -2))
    for values, expected in ((middles, rising[:-1]), (up, rising[1:]), (down, rising[:-1])):
        weight = np.stack((values, np.ones_like(values)), axis=1)  # the 1 keeps the value as it is
        weight = np.pad(weight, ((0, 0), (0, 30)))
        codes, _ = encode(weight, levels)
        if len(levels) == 16:
            codes = blockwise.unpack_nibbles(codes, weight.size)
        assert np.array_equal(levels[codes[::32]], expected)


def random_bounds(count, seed=0):
    """Of every size, and of either sign."""
    rng = np.random.default_rng(seed)
    return np.unique(rng.standard_normal(count) * 10.0 ** rng.integers(-9, 1, count)).astype("f4")


@pytest.mark.parametrize(
    ("bounds", "by_table"),
    [
        *((blockwise.nearest(blockwise.dynamic_map(signed)).bounds, True) for signed in (True, False)),
        (random_bounds(20), True),
        (np.linspace(-1, 1, 255, dtype="f4"), True),
        (np.linspace(0.99, 1, 255, dtype="f4"), False),
        (np.linspace(-1e-41, 1e-41, 100, dtype="f4"), False),
    ],
)
def test_values_beside_bounds_are_ranked_as_by_search(bounds, by_table):
    beside = [np.nextafter(bounds, np.float32(end)) for end in (-2, 2)]
    values = np.concatenate([bounds, *beside, -bounds, random_bounds(5000, 1), np.float32([0, -0.0, 1, -1, 1.1, -9])])
    ranks, above = np.empty(values.size, "u1"), np.empty(values.size, bool)
    assert (blockwise_numpy._table(bounds.tobytes()) is not None) == by_table
    assert np.array_equal(blockwise_numpy._ranks(values, bounds, ranks, above), np.searchsorted(bounds, values))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("smallest", [0, 1e-45, 1.1e-38])
def test_a_block_of_zeros_or_of_less_than_normal_numbers_decodes_to_zeros(name, smallest):
    weight = normal(3, 32)
    weight[1] = smallest
    codes, absmax = encode(weight, LEVELS[name])
    values = blockwise.decode(blockwise.Blocks(codes, absmax, 32, LEVELS[name]), (3, 32), np.dtype("f4"))
    assert not values[1].any() and not np.signbit(values[1]).any() and values[0].any() and values[2].any()


def test_the_last_block_may_be_short():
    weight = normal(70)
    codes, absmax = encode(weight, LEVELS["two signs"])
    last, largest = encode(weight[64:], LEVELS["two signs"])
    assert absmax.shape == (3,) and absmax[2] == largest[0] == abs(weight[64:]).max()
    assert np.array_equal(codes[32:], last)


@given(st.lists(st.integers(0, 15), max_size=9), st.integers(0, 15))
def test_nibbles_come_back_and_the_first_is_the_high_half(codes, unused):
    packed = blockwise.pack_nibbles(np.array(codes, "u1"), unused)
    assert blockwise.unpack_nibbles(packed, len(codes)).tolist() == codes
    assert packed.tolist() == [16 * a + b for a, b in zip(codes[::2], [*codes, unused][1::2], strict=True)]


def test_the_dynamic_maps_are_dense_near_zero_which_is_one_of_their_levels():
    signed, unsigned = blockwise.dynamic_map(), blockwise.dynamic_map(signed=False)
    for levels in signed, unsigned:
        assert levels.dtype == np.float32 and len(np.unique(levels)) == 256 and levels[255] == 1
        assert (np.diff(levels) > 0).all()
    assert signed[127] == 0 and signed[0] == np.float32(-0.99296874) and signed[128] == np.float32(5.5000004e-7)
    assert unsigned[0] == 0 and unsigned[1] == np.float32(3.2500003e-7)


def test_a_thread_that_is_alone_takes_no_others(monkeypatch):
    monkeypatch.setattr(blockwise_numpy, "THREADS", 4)
    spans = []
    with blockwise_numpy.alone():
        blockwise_numpy.in_parallel(lambda start, stop: spans.append((start, stop)), 100, 8)
    assert spans == [(0, 100)]
    blockwise_numpy.in_parallel(lambda start, stop: spans.append((start, stop)), 100, 8)
    assert len(spans) == 5
