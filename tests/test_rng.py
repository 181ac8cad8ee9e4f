"""The random stream: Philox as its authors define it, the same for ever, and independent of the order of calls."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import rng
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.rng import Order, Slots, Step, Stream, philox4x32

# Random123 (Salmon et al., 2011), kat_vectors, philox4x32 with 10 rounds: counter, key, answer
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = philox4x32(*(np.array([c], "u4") for c in counter), *key)
    assert tuple(int(word[0]) for word in words) == answer


SKIPPED = st.integers(0, 2**60) | st.integers(2**34 - 99, 2**34)  # to where the counter's second word begins


@given(SKIPPED, st.integers(0, 99), st.integers(0, 2**64 - 1), st.sampled_from([1, 4, 2**14]))
def test_the_stream_is_philox_of_its_counters_whatever_the_block(skipped, n, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "_BLOCK", block)
        found = Stream(seed, "x").skip(skipped).bits(n)
    index = np.arange(skipped // 4, (skipped + n) // 4 + 1, dtype="u8")
    high, low = divmod(index, 2**32)
    purpose = (np.full_like(index, function(b"x")) for function in (zlib.crc32, zlib.adler32))
    words = philox4x32(low, high, *purpose, *divmod(seed, 2**32)[::-1])
    assert np.array_equal(found, np.stack(words, axis=1).reshape(-1)[skipped % 4 :][:n])


@given(st.integers(0, 30), st.integers(0, 200), st.floats(0, 1))
def test_what_is_kept_are_the_words_of_a_size(skipped, n, rate):
    words, kept = Stream(3).skip(skipped).bits(n), Stream(3).skip(skipped).keeps(n, rate)
    assert kept.dtype == bool and np.array_equal(kept, words >= min(round(rate * 2**32), 2**32 - 1))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 5))
def test_numbers_of_another_order_are_those_of_the_stream(begins, row, width):
    order = Order(np.array(begins, "i4"), row, width)
    places = (np.array(begins)[:, None] * width + np.arange(row)).reshape(-1)
    assert np.array_equal(Stream(3).of(order).bits(places.size), Stream(3).bits(600)[places])
    assert np.array_equal(Stream(3).of(order).keeps(places.size, 0.4), Stream(3).keeps(600, 0.4)[places])
    assert np.array_equal(Stream(3).of(order).uniform(0, 1, places.size), Stream(3).uniform(0, 1, 600)[places])


def test_the_stream_is_pinned():
    # Runs made with one version continue with the next: these values never change.
    assert Stream(0).bits(5).tolist() == [768504805, 323543615, 4244168940, 2726800091, 3914554339]
    assert Stream(2**40 + 3, "init", "lora", 7).bits(2).tolist() == [2335006082, 3604324935]
    assert Stream(0, "a").uniform(-1, 1, 2).tolist() == [-0.20957803964813415, 0.4865737883605241]
    normal = [-0.9241676519749865, -1.0464116922938431, 0.8707265964848491]
    assert np.allclose(Stream(0, "a").standard_normal(3), normal, rtol=1e-14, atol=0)
    assert Stream(0, "a").permutation(8).tolist() == [5, 2, 4, 0, 3, 1, 6, 7]


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 20), max_size=6))
def test_bits_drawn_in_pieces_are_whole_blocks_of_one_stream(seed, sizes):
    pieces = Stream(seed, "x")
    whole = Stream(seed, "x").bits(sum(-(-n // 4) * 4 for n in sizes))
    at = 0
    for n in sizes:
        assert np.array_equal(pieces.bits(n), whole[at : at + n])
        at += -(-n // 4) * 4


def test_streams_do_not_depend_on_one_another():
    a, b = Stream(0, "a"), Stream(0, "b")
    mixed = [a.bits(8), b.bits(8), a.bits(8), b.bits(8)]
    a, b = Stream(0, "a"), Stream(0, "b")
    apart = [a.bits(8), a.bits(8), b.bits(8), b.bits(8)]
    assert np.array_equal(mixed[0], apart[0]) and np.array_equal(mixed[2], apart[1])
    assert np.array_equal(mixed[1], apart[2]) and np.array_equal(mixed[3], apart[3])


def test_every_purpose_and_every_seed_is_a_stream_of_its_own():
    purposes = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", 2), ("a", 12), ("a", 1, 2), (1,), (2,)]
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63]
    first = {(seed, purpose): tuple(Stream(seed, *purpose).bits(4)) for seed in seeds for purpose in purposes}
    assert len(set(first.values())) == len(first)
    names = [("init", "lora", f"model.layers.{i}.self_attn.{p}_proj") for i in range(200) for p in "qkvo"]
    assert len({tuple(Stream(0, *name).bits(4)) for name in names}) == len(names)


def test_uniform_has_the_moments_and_the_range_of_its_interval():
    n = 100_000
    x = Stream(1, "u").uniform(-2, 3, n)
    assert x.dtype == np.float64 and x.min() >= -2 and x.max() < 3
    assert abs(x.mean() - 0.5) < 5 * 5 / math.sqrt(12 * n)
    assert abs(x.var() - 25 / 12) < 0.05
    counts = np.histogram(x, bins=50, range=(-2, 3))[0]
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 100  # chi square, 49 degrees of freedom: 85.4 is 0.1 %
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(n)


def test_standard_normal_has_its_moments():
    n = 100_000
    x = Stream(2, "n").standard_normal(n)
    assert np.isfinite(x).all()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    below = np.array([(x < z).mean() for z in (-2, -1, 0, 1, 2)])
    assert np.abs(below - [0.02275, 0.15866, 0.5, 0.84134, 0.97725]).max() < 0.008


@given(st.integers(0, 200), st.integers(0, 50))
def test_a_permutation_has_every_number_once(n, seed):
    order = Stream(seed, "p").permutation(n)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))


def test_permutations_are_evenly_spread():
    firsts = np.bincount([Stream(seed).permutation(5)[0] for seed in range(5000)], minlength=5)
    assert np.abs(firsts - 1000).max() < 150


@pytest.mark.parametrize("size, shape", [((), ()), (3, (3,)), ((2, 3), (2, 3)), ((2, 0), (2, 0)), (0, (0,))])
def test_sizes_are_as_in_numpy(size, shape):
    assert Stream(0).uniform(size=size).shape == shape
    assert Stream(0).standard_normal(size).shape == shape


def test_a_negative_seed_is_an_error():
    with pytest.raises(RefpeftError, match="seed is -1: expected 0 or more"):
        Stream(-1)


# ---- streams of a captured step --------------------------------------------------------------------------------------

PURPOSES = [
    (),
    ("a", 1),
    ("a", Step(1)),
    (Step(1), "a"),
    (Step(1),),
    ("dropout", "x", Step(1), 0, 1),
    (Step(1), Step(1)),
]


def as_of(purpose: tuple, step: int) -> tuple:
    return tuple(step if isinstance(word, Step) else word for word in purpose)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**9))
def test_refilled_slots_hold_what_streams_of_that_step_are(seed, step):
    slots = Slots(np)
    with slots.recording():
        places = [Stream(seed, *purpose).slot for purpose in PURPOSES]
        again = [Stream(seed, *purpose).slot for purpose in PURPOSES]
    assert all(one is other for one, other in zip(places, again, strict=True))
    for now in (step, step + 1):
        slots.refill(now)
        for place, purpose in zip(places, PURPOSES, strict=True):
            assert tuple(place) == Stream(seed, *as_of(purpose, now)).words


@pytest.mark.parametrize("draw", [lambda s: s.skip(3).bits(7), lambda s: s.keeps(9, 0.3), lambda s: s.uniform(size=5)])
def test_a_recorded_stream_draws_what_the_slots_say(draw):
    slots, expected = Slots(np), draw(Stream(5, "a", 8, 2))
    with slots.recording():
        stream = Stream(5, "a", Step(1), 2)
        assert stream.slot is not None
        slots.refill(8)
        assert np.array_equal(draw(stream), expected)
    assert Stream(5, "a", Step(1), 2).slot is None


def test_streams_of_the_host_are_not_recorded_with_those_of_the_device(monkeypatch):
    with Slots(device.install(monkeypatch)).recording():
        assert Stream(5, "a", Step(1)).slot is None


def test_more_streams_than_slots_are_an_error():
    slots = Slots(np, most=1)
    slots.of(("a",))
    with pytest.raises(RefpeftError, match="more than 1 random streams"):
        slots.of(("b",))


def test_what_a_caller_makes_itself_counts_as_drawn():
    stream, other = Stream(0), Stream(0)
    for n in (3, 0, 8, 1):
        first = stream.take(n)
        assert np.array_equal(other.bits(n), Stream(0).skip(first).bits(n))
