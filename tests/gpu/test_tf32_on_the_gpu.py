"""--dtype tf32: all is float32, but tensor cores round the factors of products to 10 bits behind the point."""

import contextlib
import shutil

import cupy
import numpy as np
import pytest
import tiny
import tiny_files

import refpeft
from refpeft import config, gates, run, sites, tensor
from refpeft.backend import bfloat16, rounded_factors, to_host
from refpeft.cuda import blas
from refpeft.errors import RefpeftError
from refpeft.files import read_safetensors
from refpeft.tensor import parameter


@pytest.fixture(autouse=True)
def _as_before():
    yield
    blas.use_tf32(False)


def off(got, expected: np.ndarray) -> float:
    """The distance as a share of the largest expected value."""
    return float(np.abs(to_host(got).astype("f8") - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("leading", [(), (3,)], ids=["one", "several"])
def test_in_tf32_factors_are_rounded_to_ten_bits_and_sums_are_not(leading: tuple[int, ...]):
    blas.use_tf32(True)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype("f4").astype("f8") for shape in ((*leading, 256, 512), (512, 256)))
    x, y = cupy.asarray(a.astype("f4")), cupy.asarray(b.astype("f4"))
    rough = blas.product(x, y)
    assert rough.dtype == np.float32
    assert 2.0**-14 < off(rough, a @ b) < 2.0**-9
    cut = [(array.view("u4") & np.uint32(0xFFFFE000)).view("f4") for array in (x, y)]
    assert off(blas.product(*cut), to_host(cut[0]).astype("f8") @ to_host(cut[1]).astype("f8")) < 2.0**-16
    assert off(blas.product(x.astype("f8"), y.astype("f8")), a @ b) < 2.0**-46
    blas.use_tf32(False)
    assert off(blas.product(x, y), a @ b) < 2.0**-18


def test_an_op_that_is_widened_rounds_factors_and_no_other_does(monkeypatch):
    """gated_linear has no pair for bfloat16: its result is as near to float64's as rounding it once allows."""
    seen = []
    computed = blas._computed
    monkeypatch.setattr(blas, "_computed", lambda *args: seen.append(computed(*args)[0]) or computed(*args))
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((64, size)).astype(bfloat16) for size in (96, 48))
    w, log_alpha = (rng.standard_normal((48, 96)).astype("f4") for _ in range(2))

    def work(*arrays):
        leaves = [parameter(array) for array in arrays]
        out = gates.gated_linear(*leaves, u=gates.MIDDLE)
        out.backward((cupy if isinstance(out.data, cupy.ndarray) else np).asarray(g).astype(out.dtype))
        return [out.data, *(leaf.grad for leaf in leaves)]

    expected = work(*(array.astype("f8") for array in (x, w, log_alpha)))
    there = list(map(cupy.asarray, (x, w, log_alpha)))
    got = work(*there)
    assert seen == [77, 77, 77]
    assert [each.dtype for each in got] == [bfloat16, bfloat16, np.float32, np.float32]
    assert off(got[0], expected[0]) < 2.0**-8 and off(got[1], expected[1]) < 2.0**-8
    assert off(got[2], expected[2]) < 2.0**-18 and off(got[3], expected[3]) < 2.0**-18  # of factors that are exact
    for arrays, context in (
        (there, tensor.plain()),
        ([array.astype("f4") for array in there], contextlib.nullcontext()),
    ):
        seen.clear()
        with context:
            work(*arrays)
        assert seen == [68, 68, 68]
    with rounded_factors():
        assert blas._computed(np.dtype("f8"), 1.0, False)[0] == 70 and blas._computed(bfloat16, 1.0, False)[0] == 68


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32", "float64"])
def test_what_a_dtype_multiplies_in(monkeypatch, dtype: str, tmp_path):
    """A loaded model's products, forward and backward, are asked of cuBLAS as its dtype says."""
    seen = []
    computed = blas._computed
    monkeypatch.setattr(blas, "_computed", lambda *args: seen.append((args[0], computed(*args)[0])) or computed(*args))
    model = refpeft.load(tiny_files.write_model(tmp_path), dtype=dtype, device="cuda")
    tiny.scramble(sites.attach(model, "lora"))
    model.loss(tiny.batch()).backward()
    refpeft.load(tmp_path, device="cuda")
    wanted = {"bfloat16": (bfloat16, 68), "float32": ("f4", 68), "tf32": ("f4", 77), "float64": ("f8", 70)}[dtype]
    assert {compute for kind, compute in seen if kind == wanted[0]} == {wanted[1]}
    assert len(seen) > 20 and blas._of_float32 == 68


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """A checked configuration in tf32: a tiny model, ten steps."""
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model")
    tiny_files.write_rows(tmp_path / "rows.jsonl")
    flags = {"model": "./model", "data.file": "rows.jsonl", "train.steps": 10, "train.batch": 4, "train.save_every": 5}
    flags |= {"device": "cuda", "dtype": "tf32", "out": "run"}
    return lambda **other: config.resolve(None, [("", key, value) for key, value in (flags | other).items()])


def train(resolved: config.Resolved, resume: bool = False) -> run.Outcome:
    return run.train(resolved, run.run_directory(resolved.run, resume), resume, say=lambda line: None)


def test_a_run_is_in_tf32_to_its_end_and_its_adapter_in_float32(resolve, tmp_path):
    """And it goes on as it began, or not at all."""
    outcome = train(resolve())
    assert outcome.model.dtype == outcome.model.activations == np.float32
    blas.use_tf32(False)  # as if a model in float32 had been loaded since
    assert train(resolve(out="again")).summary.train_losses == outcome.summary.train_losses
    assert train(resolve(out="exact", dtype="float32")).summary.train_losses != outcome.summary.train_losses
    values = [read_safetensors(tmp_path / folder / "adapter_model.safetensors") for folder in ("run", "again")]
    assert {array.dtype.name for array in values[0].values()} == {"float32"}
    assert all(np.array_equal(value, values[1][name]) for name, value in values[0].items())

    assert config.written("run")["dtype"] == "tf32"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    assert train(resolve(), resume=True).summary.train_losses == outcome.summary.train_losses
    with pytest.raises(RefpeftError, match="dtype was tf32, now float32"):
        train(resolve(dtype="float32"), resume=True)
    for device, dtype, tf32 in (("cuda", "tf32", True), ("cpu", "float32", False)):
        kept = run.how_kept("run", device=device)
        assert kept["dtype"] == dtype and refpeft.load("model", "run", device=device, **kept).tf32 is tf32
