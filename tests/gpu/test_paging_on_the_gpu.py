"""Optimizers on the GPU: the host's values, and paged the bits of unpaged, where ordinary memory would not do, too.

Less than half a GiB of managed memory is in use at any time.
"""

import gc
import shutil
import time
from pathlib import Path

import cupy
import numpy as np
import pytest
import tiny

from refpeft import optim, paging, placing, sites
from refpeft import trainer as training
from refpeft.backend import to_host
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.optim import OPTIMIZERS, Flat, Optimizer
from refpeft.paging import ManagedArray
from refpeft.tensor import parameter
from refpeft.trainer import Trainer

MANAGED = cupy.cuda.runtime.memoryTypeManaged
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:lora. r is"),  # a rank that only makes the state large
    pytest.mark.filterwarnings("ignore:steps are not captured:refpeft.errors.RefpeftWarning"),
]
pages = pytest.mark.skipif(bool(paging.obstacle(cupy)), reason=f"nothing is paged: {paging.obstacle(cupy)}")


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setitem(optim.PAGES, "cuda", 2**18)
    monkeypatch.setattr(placing, "UNIT", 8)  # as rows have tokens: of 64, what A gives at a rank of 2^16 is 16 MiB


def kind_of(address: int) -> int:
    """What CUDA says of the memory at an address."""
    return cupy.cuda.runtime.pointerGetAttributes(address).type


def trained(name: str, xp, paged: bool = False, dtype: str = "f4", steps: int = 6) -> Optimizer:
    """An optimizer after steps on random values and gradients, the same everywhere."""
    rng = np.random.default_rng(0)
    shapes = [(400, 500), (1_000_003,), (3, 70, 200)]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    flat = Flat((str(i), parameter(xp.asarray(array))) for i, array in enumerate(arrays))
    optimizer = OPTIMIZERS[name](flat, weight_decay=0.1, paged=paged)
    for _ in range(steps):
        flat.grads[...] = xp.asarray(rng.standard_normal(flat.grads.size).astype(dtype))
        optimizer.step(0.01)
    return optimizer


def assert_same(one: Optimizer, other: Optimizer) -> None:
    assert np.array_equal(to_host(one.flat.values), to_host(other.flat.values))
    assert one.state.keys() == other.state.keys()
    for name, array in one.state.items():
        assert np.array_equal(to_host(array), to_host(other.state[name])), name


@every_optimizer
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_values_are_the_hosts(name, dtype):
    here, there = (trained(name, xp, dtype=dtype) for xp in (np, cupy))
    expected, found = here.flat.values, to_host(there.flat.values)
    if name in ("adamw8bit", "lion"):  # a code or a sign may be another where rounding decides: a few values differ
        assert np.mean(np.abs(found - expected) > 1e-5) < 1e-3
    else:
        assert np.abs(found - expected).max() <= 64 * np.finfo(dtype).eps * np.abs(expected).max()


@pages
@every_optimizer
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_paged_is_unpaged_bit_for_bit(name, dtype):
    paged, unpaged = (trained(name, cupy, paged, dtype) for paged in (True, False))
    assert {kind_of(array.data.ptr) for array in paged.state.values()} == {MANAGED}
    assert MANAGED not in {kind_of(array.data.ptr) for array in unpaged.state.values()}
    assert_same(paged, unpaged)


@pages
def test_managed_memory_is_zeros_outside_of_every_pool_and_freed_when_dropped():
    gc.collect()
    pool, size = cupy.cuda.MemoryPool(), 2**24
    with cupy.cuda.using_allocator(pool.malloc):
        kept = paging.zeros(cupy, size, np.dtype("f4"), paged=True)
        assert isinstance(kept, ManagedArray) and pool.total_bytes() == 0
        assert not kept.array.any()
    page = slice(100, size - 100)
    kept.prefetch(page)
    kept.take(page)[...] = 7
    kept.evict(page)
    found = to_host(kept.array)
    assert (found[page] == 7).all() and not found[:100].any() and not found[-100:].any()
    address = kept.array.data.ptr
    assert kind_of(address) == MANAGED
    del kept
    gc.collect()
    assert kind_of(address) != MANAGED


# ---- training --------------------------------------------------------------------------------------------------------

RANK, CAP = 2**16, 76 * 2**20  # 11,010,048 trained values: 84 MiB of moments
STEPS = 4


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 40, 8).astype("i4"), np.ones(8, bool), line) for line in range(4)]


@pytest.fixture
def flat_elsewhere(monkeypatch):
    """Values and gradients, which no optimizer can do without, lie in the default pool, whatever pool is in use."""

    def flat(*params) -> Flat:
        with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
            return Flat(*params)

    monkeypatch.setattr(training, "Flat", flat)


def trainer(rows: list[Example], name: str, paged: bool, out: Path, rank: int = RANK) -> Trainer:
    model = tiny.model("llama", dtype="float32", xp=cupy)
    with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
        sites.attach(model, "lora", {"r": rank}, seed=1)
    settings = Train(
        steps=STEPS, batch=1, lr=1e-3, schedule="constant", warmup=0, save_every=2, optimizer=name, paged=paged
    )
    return Trainer(model, Batches(rows, 1, 32, seed=1), None, settings, out, seed=1)


def resumed(rows: list[Example], name: str, paged: bool, out: Path, rank: int = RANK) -> Trainer:
    """A finished run that had been stopped in the middle; both parts as `paged` says."""
    trainer(rows, name, paged, out, rank).run()
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    again = trainer(rows, name, paged, out, rank)
    again.run(resume=True)
    return again


@pages
@every_optimizer
def test_a_run_resumed_as_paged_ends_with_the_bits_of_an_unbroken_unpaged_one(name, rows, tmp_path):
    whole = trainer(rows, name, False, tmp_path / "whole", rank=2000)
    whole.run()
    again = resumed(rows, name, True, tmp_path / "cut", rank=2000)
    assert {kind_of(array.data.ptr) for array in again.optimizer.state.values()} == {MANAGED}
    assert_same(whole.optimizer, again.optimizer)
    assert whole.summary.train_losses == again.summary.train_losses


def capped() -> cupy.cuda.MemoryPool:
    """An ordinary pool that may take CAP bytes."""
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=CAP)
    return pool


@pages
def test_state_larger_than_a_cap_on_the_ordinary_pool_is_trained_paged_to_the_same_bits(rows, tmp_path, flat_elsewhere):
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 2 * 2**30:
        pytest.skip(f"{free:,} bytes of the GPU are free")
    whole = trainer(rows, "adamw", False, tmp_path / "whole")
    whole.run()
    assert sum(array.nbytes for array in whole.optimizer.state.values()) > CAP
    with cupy.cuda.using_allocator(capped().malloc):
        again = resumed(rows, "adamw", True, tmp_path / "cut")
    assert_same(whole.optimizer, again.optimizer)
    assert whole.summary.train_losses == again.summary.train_losses


def test_unpaged_it_is_refused_with_what_helps(rows, tmp_path, flat_elsewhere):
    message = r"^out of memory: Out of memory allocating [\d,]+ bytes \(.*limit set to: [\d,]+ bytes\); "
    message += r"[\d,]+ bytes are free\. Taken were: weights .*\. What helps: "
    message += r".*--paged keeps .*; --optimizer adamw8bit keeps .*rank"
    with pytest.raises(RefpeftError, match=message), cupy.cuda.using_allocator(capped().malloc):
        trainer(rows, "adamw", False, tmp_path)


@pages
@every_optimizer
def test_how_much_slower_paged_steps_are(name, capsys, monkeypatch):
    """Printed, not asserted: 16 million values, pages as in use."""
    monkeypatch.setitem(optim.PAGES, "cuda", 2**22)
    size, took = (4096, 4096), {}
    for paged in (False, True):
        optimizer = OPTIMIZERS[name](Flat([("a", parameter(cupy.ones(size, "f4")))]), paged=paged)
        for _ in range(7):
            optimizer.flat.grads.fill(1e-3)
            cupy.cuda.Device().synchronize()
            began = time.perf_counter()
            optimizer.step(1e-3)
            cupy.cuda.Device().synchronize()
            took[paged] = min(took.get(paged, np.inf), time.perf_counter() - began)
    state = sum(array.nbytes for array in optimizer.state.values()) / 2**20
    with capsys.disabled():
        print(f"\n{name}: {state:.0f} MiB of state, a step {took[False] * 1e3:.2f} ms, paged {took[True] * 1e3:.2f} ms")
