"""A run goes on where the kernels of a file do not compile: with the losses that it has, and what is slower is said."""

import functools
import warnings
from pathlib import Path

import cupy
import numpy as np
import pytest
import tiny
from test_trainer import examples

import refpeft.cuda
from refpeft import placing, sites
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.cuda import override
from refpeft.cuda.kernels import KernelError, Source
from refpeft.errors import RefpeftWarning
from refpeft.trainer import Trainer

FILES = sorted(path.name for path in Path(refpeft.cuda.__file__).parent.glob("*.cu"))
METHODS = {
    "lora": ("llama", {"r": 8, "targets": "all-linear"}),
    "dora": ("llama", {"r": 8, "dropout": 0.2}),
    "ln_tuning": ("gpt2", {}),
    "bitfit": ("gpt2", {"create": True}),
}
SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 96}, "gpt2": {"n_embd": 64}}  # that kernels are written for


@pytest.fixture
def broken(monkeypatch):
    """Files whose kernels do not compile, and those that were asked for in vain."""
    files, asked, compiled = set(), [], Source.__call__

    def fails(self, kernel, *dtype):
        if self.name in files:
            asked.append(kernel)
            raise KernelError(f"{self.name}: {kernel} does not compile")
        return compiled(self, kernel, *dtype)

    monkeypatch.setattr(Source, "__call__", fails)
    monkeypatch.setattr(override, "_said", set())
    monkeypatch.setattr(override, "_works", {})  # by other models, too
    monkeypatch.setattr(placing, "UNIT", 16)
    return files, asked


def run(method: str) -> tuple[list[float], list[str]]:
    """The losses of some steps, and what was warned of: but that steps are not captured, which is another matter."""
    family, options = METHODS[method]
    tiny.CONFIGS["wider"] = tiny.CONFIGS[family] | SIZES[family]
    model = tiny.low("wider", xp=cupy)
    tiny.scramble(sites.attach(model, method, options))
    trainer = Trainer(model, Batches(examples(), 4, 64), None, Train(steps=4, batch=4, lr=1e-3))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RefpeftWarning)
        trainer.run()
    told = [str(one.message) for one in said if issubclass(one.category, RefpeftWarning)]
    return trainer.summary.train_losses, [line for line in told if not line.startswith("steps are not captured")]


@functools.cache
def losses(method: str) -> list[float]:
    """Those where all kernels compile."""
    return run(method)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("file", FILES)
def test_a_run_goes_on(broken, file: str, method: str):
    files, asked = broken
    expected = losses(method)
    override._works.clear()
    files.add(file)
    found, said = run(method)
    assert np.allclose(found, expected, rtol=0.01)
    assert len(said) == len(set(said)) and bool(said) == bool(asked)
    assert all(file in line and "instead, which is slower" in line for line in said)
