"""Rows in pieces: neither pieces nor threads nor the device change a bit, and no temporary array is large."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from refpeft import blockwise_numpy, manager, rowwise
from refpeft.backend import to_host
from refpeft.conformance import device
from refpeft.quant import make_quantizer

F4 = np.dtype("f4")
QUANTIZERS = [name for name, listing in manager.catalogue().items() if listing.kind == "quantizer"]
CASES = [
    *((name, {}) for name in QUANTIZERS),
    ("int4", {"group": 7}),
    *(("affine", {"bits": bits, "per": per}) for bits in (4, 8) for per in ("tensor", "row")),
    ("affine", {"nested": True, "group": 7}),
    ("gguf", {"type": "Q4_0"}),
    ("gguf", {"type": "Q4_1"}),
]
SHAPES = [(1, 64), (9, 32), (33, 19), (5, 3, 96), (301,)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype("f4")


def packed_and_back(quantizer, weight, dtype=F4):
    parts = quantizer.pack(weight)
    return [*(to_host(parts[name]) for name in sorted(parts)), to_host(quantizer.dense(parts, weight.shape, dtype))]


@pytest.mark.parametrize("dtype", [F4, np.dtype("f8"), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("name, options", CASES)
def test_pieces_threads_and_the_device_do_not_change_a_bit(monkeypatch, name, options, dtype):
    quantizer = make_quantizer(name, options)
    shapes = [shape for shape in SHAPES if name != "gguf" or shape[-1] % 32 == 0]
    expected = [packed_and_back(quantizer, normal(*shape), dtype) for shape in shapes]
    xp = device.install(monkeypatch)
    monkeypatch.setattr(blockwise_numpy, "THREADS", 3)
    monkeypatch.setattr(blockwise_numpy, "CHUNK", 128)
    monkeypatch.setattr(rowwise, "PIECE_ON_A_DEVICE", 128)
    if name in ("nf4", "fp4", "dynamic8"):  # these are not row-wise
        monkeypatch.setattr(blockwise_numpy, "CHUNK", 1 << 12)
    for shape, arrays in zip(shapes, expected, strict=True):
        for weight in normal(*shape), xp.asarray(normal(*shape)):
            found = packed_and_back(quantizer, weight, dtype)
            assert all(ours.dtype == array.dtype for ours, array in zip(found, arrays, strict=True))
            assert all(ours.tobytes() == array.tobytes() for ours, array in zip(found, arrays, strict=True))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_needed_beside_the_result_is_less_than_the_weight(name):
    quantizer, weight = make_quantizer(name), normal(4096, 1024)
    quantizer(normal(4, 64), F4)  # what is made once is not counted
    tracemalloc.start()
    parts = quantizer.pack(weight)
    packing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    kept = tracemalloc.get_traced_memory()[0]
    quantizer.dense(parts, weight.shape, F4)
    unpacking = tracemalloc.get_traced_memory()[1] - kept - weight.nbytes
    tracemalloc.stop()
    assert packing - kept < weight.nbytes
    assert unpacking < weight.nbytes
