"""Parameter-efficient fine-tuning on NumPy or CuPy alone.

Names are loaded on first use, so that `refpeft --help` imports neither NumPy nor a plugin.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "load": "refpeft.api",
    "attach": "refpeft.sites",
    "detach": "refpeft.sites",
    "merge": "refpeft.sites",
    "Trainer": "refpeft.trainer",
    "Tensor": "refpeft.tensor",
    "hookimpl": "refpeft.hookspecs",
    "RefpeftError": "refpeft.errors",
    "RefpeftWarning": "refpeft.errors",
}
_MODULES = ("ops", "fused")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"refpeft.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'refpeft' has no attribute {name!r}")
