"""Memory in one stretch of addresses: pieces of all sizes share it, it is given back, and graphs work in it."""

import gc

import cupy
import numpy as np
import pytest
import tiny

from refpeft import sites
from refpeft.batches import Batches
from refpeft.cuda import graph, stretch
from refpeft.cuda.addresses import CHUNK, Addresses, Unavailable
from refpeft.examples import Example
from refpeft.settings import Train
from refpeft.trainer import Trainer

MIB = 2**20


@pytest.fixture
def stream():
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        yield stream
    stream.synchronize()


@pytest.fixture
def pool(stream):
    try:
        return stretch.Stretch(stream)
    except Unavailable as reason:
        pytest.skip(str(reason))


def has(array: cupy.ndarray, value: int) -> bool:
    """Whether all numbers of an array are `value`; what is compared lies elsewhere."""
    with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
        return bool((array == value).all())


def test_pieces_of_all_sizes_share_it(pool):
    """What large arrays leave is enough for smaller ones that are more, and for larger ones that are fewer."""
    with cupy.cuda.using_allocator(pool.malloc):
        for count, size in ((16, 8 * MIB), (32, 4 * MIB - 512), (4, 32 * MIB), (1, 128 * MIB)):
            arrays = [cupy.full(size // 4, at, np.int32) for at in range(count)]
            assert len({array.data.ptr for array in arrays}) == count
            assert all(has(array, at) for at, array in enumerate(arrays))
            assert pool.used_bytes() >= count * size
            arrays.clear()
    assert 128 * MIB <= pool.total_bytes() <= 128 * MIB + 2 * CHUNK


def test_it_gives_back_what_no_array_has_and_gets_it_again(pool):
    with cupy.cuda.using_allocator(pool.malloc):
        arrays = [cupy.full(2 * CHUNK, at, np.uint8) for at in range(6)]
        del arrays[1:5]
        pool.free_all_blocks()
        assert pool.total_bytes() <= 6 * CHUNK
        again = cupy.full(8 * CHUNK, 7, np.uint8)  # over addresses with memory and without
        assert has(arrays[0], 0) and has(arrays[1], 5) and has(again, 7)
    del arrays, again
    pool.free_all_blocks()
    assert pool.total_bytes() == pool.used_bytes() == 0


def test_memory_of_another_stream_lies_beside_it(pool):
    other = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.using_allocator(pool.malloc), other:
        array = cupy.full(CHUNK, 3, np.uint8)
        held = pool.total_bytes()
        assert CHUNK <= held <= 2 * CHUNK and has(array, 3)
    del array
    pool.free_all_blocks()
    assert pool.total_bytes() == 0


def test_more_than_there_is_is_a_memory_error_and_changes_nothing(pool, monkeypatch):
    real, most = Addresses._map, 4

    def scarce(self, chunk):
        if self.held >= most * CHUNK:
            raise MemoryError("no memory is left")
        real(self, chunk)

    monkeypatch.setattr(Addresses, "_map", scarce)
    with cupy.cuda.using_allocator(pool.malloc):
        array, other = cupy.full(CHUNK, 5, np.uint8), cupy.full(2 * CHUNK, 6, np.uint8)
        with pytest.raises(MemoryError, match="no memory is left"):
            cupy.empty(4 * CHUNK, np.uint8)
        assert has(array, 5) and has(other, 6) and pool.total_bytes() <= most * CHUNK
        del array, other
        assert has(cupy.full(3 * CHUNK, 7, np.uint8), 7)


def test_it_grows_while_a_graph_is_captured(pool, stream):
    with cupy.cuda.using_allocator(pool.malloc):
        x, y = cupy.zeros(CHUNK, np.uint8), cupy.zeros(CHUNK, np.uint8)
        stream.begin_capture()
        parts = [x + number for number in (1, 2, 3)]
        y[...] = parts[0] + parts[1] + parts[2]
        del parts
        captured = stream.end_capture()
        for number in (1, 2):
            x.fill(number)
            captured.launch(stream)
            assert has(y, 6 + 3 * number)


def test_it_is_gone_with_its_last_user(pool, stream):
    found = stretch.Stretch(stream)
    with cupy.cuda.using_allocator(found.malloc):
        cupy.zeros(4 * CHUNK, np.uint8)
    addresses = found._addresses
    assert addresses.held and addresses.end > addresses.start
    del found
    gc.collect()
    assert not addresses.held and addresses.end == addresses.start


def test_work_of_a_run_is_in_one_stretch_and_another_choice_is_left_alone(pool, stream):
    chosen = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(chosen.malloc), graph.on(stream):
        assert cupy.cuda.get_allocator() == chosen.malloc
    with graph.on(stream):
        found = cupy.cuda.get_allocator()
        kept = cupy.ones(CHUNK, np.uint8)
    assert has(kept, 1)
    with graph.on(stream):
        assert cupy.cuda.get_allocator() == found


def losses(capture: bool = True) -> list[float]:
    model = tiny.low("llama", xp=cupy)
    tiny.scramble(sites.attach(model, "lora", {"r": 8, "targets": "all-linear"}))
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(0, 40, 32).astype("i4"), np.ones(32, bool), line) for line in range(8)]
    trainer = Trainer(model, Batches(rows, 4, 32), None, Train(steps=6, batch=4, lr=0.01, capture=capture), seed=1)
    trainer.run()
    return trainer.summary.train_losses


def test_steps_have_the_bits_that_they_have_in_cupys_pools(monkeypatch):
    captured, eager = losses(), losses(capture=False)
    monkeypatch.setattr(stretch, "_stretch", lambda stream: None)
    monkeypatch.setattr(stretch, "_eager", {})
    assert losses() == captured == eager
