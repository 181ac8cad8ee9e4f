"""Buffers that are used again: never while anybody has an array in one, and always after."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import arena, fused
from refpeft.absent import Absent, absent
from refpeft.arena import Arena, using
from refpeft.tensor import parameter

BIG = arena.SMALLEST // 4  # float32 numbers from which on an arena has the buffer
F4 = np.dtype("f4")


def place(array):
    return array.__array_interface__["data"][0]


# ---- who has a buffer ------------------------------------------------------------------------------------------------

VIEWS = [
    lambda a: a,
    lambda a: a[1:],
    lambda a: a[-1:, -1:],
    lambda a: a.T,
    lambda a: a.reshape(-1),
    lambda a: a.reshape(-1)[::2],
    lambda a: a.view("i4"),
    lambda a: np.broadcast_to(a[0], (3, a.shape[1])),
    memoryview,
]


@given(st.lists(st.tuples(st.sampled_from([2, 5, 6, 9]), st.sampled_from(VIEWS), st.integers(0, 12)), max_size=60))
def test_no_array_is_written_over_while_a_view_of_it_lives(steps):
    mine, held = Arena(), []
    for number, (rows, view, drop) in enumerate(steps):
        array = mine.empty((rows, BIG), F4)
        array.fill(number)
        held.append((number, view(array)))
        del array
        if drop < len(held):
            del held[drop]
        if drop == 12:
            mine.next_step()
        for n, kept in held:
            values = np.asarray(kept)
            assert (values.view("f4") == n).all()


@pytest.mark.parametrize("view", VIEWS)
def test_a_buffer_is_handed_out_again_once_the_last_view_is_gone(view):
    mine = Arena()
    first = mine.empty((4, BIG), F4)
    where, kept = place(first), view(first)
    del first
    second = mine.empty((4, BIG), F4)
    assert place(second) != where
    del kept
    assert place(mine.empty((4, BIG), F4)) == where
    assert mine.nbytes == 2 * 4 * 4 * BIG


def test_an_array_within_a_closure_or_an_exception_is_still_had():
    mine = Arena()

    def fail():
        array = mine.empty((BIG,), F4)
        array.fill(7)
        raise ValueError(array)

    with pytest.raises(ValueError) as caught:
        fail()
    mine.empty((BIG,), F4).fill(8)
    assert (caught.value.args[0] == 7).all()


def test_a_tape_that_is_kept_is_not_written_over():
    x, g = np.random.default_rng(0).standard_normal((2, 20, BIG)).astype("f4")
    with using(Arena()):
        kept = parameter(x)
        first = fused.gelu(kept, approximate=True)
        for _ in range(3):
            other = parameter(x[::-1])
            fused.gelu(other, approximate=True).backward(g)
        first.backward(g)
        expected = parameter(x)
        fused.gelu(expected, approximate=True).backward(g)
    assert np.array_equal(kept.grad, expected.grad)


# ---- what is handed out ----------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from(["f4", "f8", "u1", "bool"]))
def test_an_array_is_as_asked_and_begins_a_cache_line(rows, columns, dtype):
    mine = Arena()
    array = mine.empty((rows, columns), np.dtype(dtype))
    assert array.shape == (rows, columns) and array.dtype == dtype
    assert array.flags.c_contiguous and array.flags.writeable
    if array.nbytes < arena.SMALLEST:
        assert mine.nbytes == 0
    else:
        assert place(array) % 64 == 0
        assert array.nbytes <= mine.nbytes <= array.nbytes * 9 / 8 + 64
    array.fill(1)
    assert array.all()


def test_arrays_of_about_one_size_share_a_buffer_whatever_their_dtype():
    mine = Arena()
    where = place(mine.empty((8, BIG), F4))
    assert place(mine.empty((4, BIG), np.dtype("f8"))) == where
    assert place(mine.empty((8 * BIG - 100,), F4)) == where


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_a_buffer_that_a_step_did_not_use_makes_room_for_another():
    mine = Arena()
    mine.empty((64, BIG), F4)
    mine.next_step()
    mine.empty((32, BIG), F4)
    assert mine.nbytes == 32 * BIG * 4


def test_within_a_step_nothing_is_given_back():
    mine = Arena()
    mine.empty((64, BIG), F4)
    mine.empty((32, BIG), F4)
    assert mine.nbytes == 96 * BIG * 4


def test_what_somebody_has_is_never_given_back():
    mine = Arena()
    kept = mine.empty((64, BIG), F4)
    kept.fill(3)
    for _ in range(3):
        mine.next_step()
        mine.empty((32, BIG), F4).fill(4)
    assert mine.nbytes == 96 * BIG * 4 and (kept == 3).all()


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=2, max_size=8))
def test_steps_that_repeat_need_no_more_buffers_than_the_first(sizes):
    mine, needed = Arena(), []
    for _ in range(3):
        mine.next_step()
        arrays = [mine.empty((n, BIG), F4) for step in sizes for n in step]
        del arrays
        needed.append(mine.nbytes)
    assert needed[0] == needed[1] == needed[2]


def test_steps_of_any_length_use_the_buffers_of_the_longest():
    mine = Arena()
    for tokens in (12, 11, 9, 7, 8, 12, 10):
        mine.next_step()
        held = [mine.empty((tokens, width * BIG), F4) for width in (1, 3, 8) for _ in range(4)]
        assert mine.nbytes == 4 * 12 * (1 + 3 + 8) * 4 * BIG
        del held


def test_small_arrays_take_no_buffer_of_twice_their_size():
    mine = Arena()
    mine.empty((4, BIG), F4)
    mine.empty((2, BIG), F4)
    mine.empty((3, BIG), F4)
    assert mine.nbytes == (4 + 2) * 4 * BIG


def test_a_cleared_arena_has_no_memory_and_what_somebody_has_stays():
    mine = Arena()
    kept = mine.empty((4, BIG), F4)
    kept.fill(3)
    mine.clear()
    assert mine.nbytes == 0
    mine.empty((4, BIG), F4).fill(4)
    assert (kept == 3).all()


# ---- the arena of a thread -------------------------------------------------------------------------------------------


def test_within_using_ops_take_memory_of_the_arena_and_elsewhere_of_none():
    mine, other = Arena(), Arena()
    arena.empty((BIG,), F4)
    with using(mine):
        arena.empty((BIG,), F4)
        with pytest.raises(ZeroDivisionError), using(other):
            arena.like(np.empty((2, BIG), "f4"))
            raise ZeroDivisionError
        arena.empty((BIG,), "f4")
    arena.empty((3, BIG), F4)
    assert (mine.nbytes, other.nbytes) == (4 * BIG, 8 * BIG)


def test_threads_have_arenas_of_their_own():
    ready, failures = threading.Barrier(4), []

    def work(number):
        mine = Arena()
        rng = np.random.default_rng(number)
        assert arena._state.arena is None
        with using(mine):
            ready.wait(10)
            held = []
            for i in range(200):
                array = arena.empty((int(rng.integers(1, 5)), BIG), F4)
                array.fill(1000 * number + i)
                held.append((1000 * number + i, array))
                del array
                if len(held) > 5:
                    del held[int(rng.integers(len(held)))]
                if i % 20 == 0:
                    mine.next_step()
                failures.extend(value for value, kept in held if not (kept == value).all())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and ready.broken is False


# ---- sums and zeros --------------------------------------------------------------------------------------------------


def test_zeros_are_zero_in_a_buffer_that_was_used_before():
    x = np.ones((2, BIG), "f4")
    with using(Arena()):
        arena.like(x).fill(5)
        found = arena.zeros(x, (2, BIG))
    assert found.dtype == np.float32 and not found.any()


def test_sums_are_those_of_numpy():
    a, b = np.random.default_rng(0).standard_normal((2, 3, BIG)).astype("f4")
    with using(Arena()):
        assert np.array_equal(arena.add(a, b), a + b)


def test_arrays_of_another_kind_get_none_of_its_memory():
    mine, weights = Arena(), absent((512, 512))
    with using(mine):
        assert isinstance(arena.add(weights, weights), Absent)
        arena.zeros(weights, (512, 512))
    assert mine.nbytes == 0
