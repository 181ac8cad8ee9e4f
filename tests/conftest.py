"""What all tests share: one hypothesis profile, one thread beside other workers, and plugins made within a test."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # before NumPy: threads of several processes that spin for one core are slow
    for library in ("OPENBLAS", "OMP", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

from dataclasses import dataclass
from types import ModuleType

import pytest
from hypothesis import settings

from refpeft import hookimpl, manager

# The same examples every time, and no deadline on a busy machine.
settings.register_profile("refpeft", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("refpeft")


@pytest.fixture(autouse=True)
def what_a_test_adds_is_gone_after_it(monkeypatch):
    """Plugins, and folders of modules: later tests, and the processes that they start, know nothing of them."""
    monkeypatch.setattr(manager, "_added", dict(manager._added))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def registered():
    """A function of hooks by name: makes a plugin of them, whose Config has `targets` only (None: a recipe's)."""
    made = []

    def register(targets: tuple[str, ...] | None = ("@q",), **hooks) -> ModuleType:
        module = ModuleType("refpeft_plugins.made_here")
        fields = {} if targets is None else {"__annotations__": {"targets": tuple[str, ...]}, "targets": targets}
        module.Config = dataclass(frozen=True)(type("Config", (), fields))
        for name, function in hooks.items():
            setattr(module, name, hookimpl(function))
        made.append(module)
        manager._pm.register(module, f"made here {len(made)}")
        return module

    yield register
    for module in made:
        manager._pm.unregister(module)
