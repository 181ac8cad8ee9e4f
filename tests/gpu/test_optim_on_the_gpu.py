"""Optimizers on the GPU: AdamW's kernel is NumPy's to the bit, and captured steps are eager ones."""

import cupy
import numpy as np
import pytest

from refpeft import optim
from refpeft.backend import to_host
from refpeft.optim import OPTIMIZERS, AdamW, Flat
from refpeft.tensor import parameter

SHAPES = [(33, 20), (7,), (2, 5, 9), (300,)]
RATES = {"1": 3.0, "2": 3.0}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def flat_of(xp, dtype: str = "f4", rates: dict[str, float] | None = None) -> Flat:
    rng = np.random.default_rng(1)
    arrays = [(rng.standard_normal(shape) * 0.1).astype(dtype) for shape in SHAPES]
    return Flat(((str(i), parameter(xp.asarray(array))) for i, array in enumerate(arrays)), rates)


def gradients(step: int, size: int, dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng([2, step]).standard_normal(size).astype(dtype)


def steps_of(optimizer: optim.Optimizer, xp, count: int = 20) -> dict[str, np.ndarray]:
    """Values and state after some steps, of which each has another rate and the gradients of another size."""
    flat = optimizer.flat
    for step in range(count):
        size = 10.0 ** (step % 5 - 3)
        flat.grads[...] = xp.asarray(gradients(step, flat.grads.size) * np.float32(size))
        optimizer.step(0.01 / (step + 1))
        assert not to_host(flat.grads).any()
    return {"values": to_host(flat.values)} | {key: to_host(array) for key, array in optimizer.state.items()}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", [None, RATES])
def test_adamw_is_numpys_to_the_last_bit(decay: float, rates: dict | None, monkeypatch):
    monkeypatch.setitem(optim.PAGES, "cuda", 256)  # of which one launch treats as many as there are
    here, there = (AdamW(flat_of(xp, rates=rates), weight_decay=decay) for xp in (np, cupy))
    assert len(there._parts) == (3 if rates else 1)
    expected, found = steps_of(here, np), steps_of(there, cupy)
    for name, array in expected.items():
        assert found[name].dtype == "f4" and np.array_equal(found[name], array), name


def test_adamw_in_float64_is_array_code():
    here, there = (AdamW(flat_of(xp, "f8"), weight_decay=0.1) for xp in (np, cupy))
    expected, found = steps_of(here, np), steps_of(there, cupy)
    assert found["values"].dtype == "f8"
    assert np.abs(found["values"] - expected["values"]).max() <= 1e-13


@pytest.mark.parametrize("size", [1, 255, 70_001])
def test_the_norm_is_the_hosts_to_rounding_and_gradients_are_clipped_by_it(size: int):
    g = gradients(0, size)
    flat = Flat([("a", parameter(cupy.zeros(size, "f4")))])
    flat.grads[...] = cupy.asarray(g)
    norm = flat.clip(0.0)
    assert norm.shape == () and norm.dtype == np.float32 and flat.norm is norm
    exact = np.sqrt((g.astype("f8") ** 2).sum())
    assert abs(float(norm) - exact) <= 4 * np.finfo("f4").eps * exact
    assert np.array_equal(to_host(flat.grads), g)
    assert float(flat.clip(2 * float(exact))) == float(norm) and np.array_equal(to_host(flat.grads), g)
    limit = np.float32(exact / 3)
    assert float(flat.clip(float(limit))) == float(norm)
    factor = limit / (to_host(norm) + np.float32(1e-6))
    assert np.array_equal(to_host(flat.grads), g * factor)


@every_optimizer
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_changes_nothing(name: str, dtype: str, broken: float):
    optimizer = OPTIMIZERS[name](flat_of(cupy, dtype), weight_decay=0.1)
    flat = optimizer.flat

    def everything() -> list[bytes]:
        return [to_host(array).tobytes() for array in (flat.values, *optimizer.state.values())]

    for step in range(3):
        flat.grads[...] = cupy.asarray(gradients(step, flat.grads.size, dtype))
        if step == 1:
            flat.grads[5] = broken
        before = everything()
        flat.clip(1.0)
        optimizer.step(0.01)
        assert (everything() == before) == (step == 1)
        assert not to_host(flat.grads).any() and flat.norm is None
    assert np.isfinite(to_host(flat.values)).all()


@every_optimizer
def test_captured_steps_are_eager_ones_bit_for_bit(name: str):
    results = []
    for captured in (False, True):
        optimizer, stream = (
            OPTIMIZERS[name](flat_of(cupy, rates=RATES), weight_decay=0.1),
            cupy.cuda.Stream(non_blocking=True),
        )
        flat, graph, norms = optimizer.flat, None, []
        cupy.cuda.Device().synchronize()  # what was made on another stream is there
        with stream:
            for step in range(6):
                flat.grads[...] = cupy.asarray(gradients(step, flat.grads.size))
                optimizer.prepare(0.01 / (step + 1))
                if captured and step == 2:
                    stream.begin_capture()
                    norm = flat.clip(20.0)
                    optimizer.apply()
                    graph = stream.end_capture()
                if graph:
                    graph.launch(stream)
                else:
                    norm = flat.clip(20.0)
                    optimizer.apply()
                norms.append(float(to_host(norm)))
            stream.synchronize()
        results.append([np.array(norms), *map(to_host, (flat.values, *optimizer.state.values()))])
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))
