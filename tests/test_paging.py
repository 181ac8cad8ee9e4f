"""Paged state on the host: the bits of ordinary memory, also after a resumed run, and nothing left of it when dropped.

tests/gpu/test_paging_on_the_gpu.py has the same for managed memory.
"""

import errno
import gc
import mmap
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import tiny_files

from refpeft import optim, paging, report, run, sites
from refpeft.batches import Batches
from refpeft.config import Train, resolve
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.optim import OPTIMIZERS, Flat
from refpeft.paging import FileArray, PagedArray, in_turn
from refpeft.tensor import parameter
from refpeft.trainer import Trainer

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setitem(optim.PAGES, "cpu", 512)


def trained(name: str, paged: bool, dtype: str = "f4", steps: int = 10) -> optim.Optimizer:
    """An optimizer after steps on random values and gradients."""
    rng = np.random.default_rng(0)
    shapes = [(40, 50), (1300,), (3, 7, 20)]
    flat = Flat((str(i), parameter(rng.standard_normal(shape).astype(dtype))) for i, shape in enumerate(shapes))
    optimizer = OPTIMIZERS[name](flat, weight_decay=0.1, paged=paged)
    for _ in range(steps):
        flat.grads[...] = rng.standard_normal(flat.grads.size)
        optimizer.step(0.01)
    return optimizer


def same(one: optim.Optimizer, other: optim.Optimizer) -> bool:
    assert one.state.keys() == other.state.keys()
    states = ((array, other.state[key]) for key, array in one.state.items())
    return all(np.array_equal(*pair) for pair in [(one.flat.values, other.flat.values), *states])


# ---- bits ------------------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_paged_is_unpaged_bit_for_bit(name, dtype, small_pages):
    paged, unpaged = (trained(name, paged, dtype) for paged in (True, False))
    assert all(isinstance(kept, FileArray) for kept in paged._state.values())
    assert not any(isinstance(kept, FileArray) for kept in unpaged._state.values())
    assert same(paged, unpaged)


def trainer(name: str, paged: bool, out: Path) -> Trainer:
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(0, 40, 8).astype("i4"), np.ones(8, bool), line) for line in range(8)]
    model = tiny.model("llama", dtype="float32")
    sites.attach(model, "lora", {"dropout": 0.1}, seed=1)
    settings = Train(steps=6, batch=4, lr=0.01, save_every=3, weight_decay=0.1, optimizer=name, paged=paged)
    return Trainer(model, Batches(rows, 4, 32, seed=1), None, settings, out, seed=1)


@every_optimizer
@pytest.mark.parametrize("before", [True, False])
def test_a_run_resumed_as_paged_ends_with_the_bits_of_an_unbroken_unpaged_one(name, before, tmp_path, small_pages):
    whole = trainer(name, False, tmp_path / "whole")
    whole.run()
    cut = trainer(name, before, tmp_path / "cut")
    for _ in range(4):
        cut._step()
        if cut._due(3):
            cut._save()
    again = trainer(name, True, tmp_path / "cut")
    again.run(resume=True)
    assert all(isinstance(kept, FileArray) for kept in again.optimizer._state.values())
    assert same(whole.optimizer, again.optimizer)
    assert again.summary.train_losses == whole.summary.train_losses


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_a_file_is_zeros_at_first_and_keeps_what_was_sent_back():
    kept = FileArray(100_000, np.dtype("f4"))
    assert not kept.array.any()
    expected = np.random.default_rng(0).standard_normal(100_000).astype("f4")
    for page in (slice(0, 3), slice(3, 70_001), slice(70_001, 100_000)):  # as they come: not where the system's begin
        kept.prefetch(page)
        kept.take(page)[...] = expected[page]
        kept.evict(page)
    assert np.array_equal(kept.array, expected)


def test_the_next_page_comes_before_one_is_worked_on_which_then_goes():
    told = []

    class Telling(PagedArray):
        def prefetch(self, page):
            told.append(f"{page.start} comes")

        def evict(self, page):
            told.append(f"{page.start} goes")

    pages = [{"a": slice(at, at + 2)} for at in (0, 2, 4)]
    for number, near in enumerate(in_turn({"a": Telling(np.arange(6))}, pages)):
        told.append(f"{number}: {near['a'].tolist()}")
    assert told == [
        *("0 comes", "2 comes", "0: [0, 1]", "0 goes"),
        *("4 comes", "1: [2, 3]", "2 goes"),
        *("2: [4, 5]", "4 goes"),
    ]


@linux
@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no advice")
def test_pages_that_were_sent_back_are_no_longer_the_processs():
    size = 64 * 2**20
    kept, whole = FileArray(size, np.dtype("u1")), slice(0, size)
    before = report.resident()
    kept.take(whole)[...] = 7
    assert report.resident() - before > 0.9 * size
    kept.evict(whole)
    assert report.resident() - before < 0.1 * size


def open_files() -> list[str]:
    """Files without a name that this process has open or mapped."""
    links = [os.readlink(entry) if entry.is_symlink() else "" for entry in Path("/proc/self/fd").iterdir()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [name for name in (*links, *mapped) if name.endswith("(deleted)")]


@linux
def test_files_are_gone_when_the_optimizer_is():
    gc.collect()
    before = open_files()
    optimizer = trained("adamw", paged=True)
    assert len(open_files()) == len(before) + 4  # m and v, each open and mapped
    state = optimizer.state["m"]
    del optimizer
    gc.collect()
    assert len(open_files()) == len(before) + 2 and state.any()
    del state
    gc.collect()
    assert open_files() == before


# ---- where it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no room in files")
def test_a_full_disk_is_told_before_the_first_step(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RefpeftError, match=r"^no file for 4,000 bytes of paged memory in /.*: No space .*TMPDIR"):
        paging.zeros(np, 1000, np.dtype("f4"), paged=True)


@pytest.fixture
def poor_gpu(monkeypatch):
    """Arrays on a GPU whose memory the host cannot use at the same time."""
    xp = device.install(monkeypatch)
    monkeypatch.setattr(xp, "cuda", ModuleType("cuda"), raising=False)
    xp.cuda.Device = lambda: type("Device", (), {"attributes": {"ConcurrentManagedAccess": 0}})
    paging.obstacle.cache_clear()
    yield xp
    paging.obstacle.cache_clear()


def test_a_gpu_that_cannot_page_uses_ordinary_memory(poor_gpu):
    kept = paging.zeros(poor_gpu, 5, np.dtype("f4"), paged=True)
    assert isinstance(kept.array, device.Array) and type(kept) is PagedArray
    assert "cannot use memory that the host uses" in paging.obstacle(poor_gpu)


def test_a_run_says_once_that_it_is_not_paged(monkeypatch, tmp_path):
    monkeypatch.setattr(paging, "obstacle", lambda xp: "this machine is too old")
    model, rows = tiny_files.write_model(tmp_path / "model"), tiny_files.write_rows(tmp_path / "rows.jsonl")
    said = []
    sets = [f"model={model}", f"data.file={rows}", "train.steps=2", "train.paged=true"]
    outcome = run.train(resolve(None, (), sets), tmp_path / "out", say=said.append)
    assert outcome.summary.steps == 2
    assert [line for line in said if "paged" in line] == ["the optimizer's state is not paged: this machine is too old"]


@pytest.mark.parametrize(
    ("options", "helps"),
    [
        ({}, r"Taken were: weights .*; --paged .*; --optimizer adamw8bit .*; --set train.micro_batch=1 .*; a smaller"),
        ({"paged": True, "optimizer": "lion", "batch": 1}, "What helps: --quantizer .*; --set train.checkpoint.*; a"),
    ],
)
def test_memory_that_does_not_suffice_is_told_with_what_helps(options, helps, tmp_path, monkeypatch):
    def short(*_, **__):
        raise MemoryError("Unable to allocate 9 GiB for an array")

    monkeypatch.setattr(paging, "zeros", short)
    model = tiny.model("llama")
    sites.attach(model, "lora")
    rows = Batches([Example(np.arange(4, dtype="i4"), np.ones(4, bool), 1)], 1, 32)
    with pytest.raises(RefpeftError, match=rf"^out of memory: Unable to allocate 9 GiB for an array; .*{helps}"):
        Trainer(model, rows, None, Train(steps=1, **options))
