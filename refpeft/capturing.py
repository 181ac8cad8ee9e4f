"""Whether a step is being captured in a CUDA graph, which will repeat it without asking the host for anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_capturing = ContextVar("capturing", default=False)


class NotCapturable(RuntimeError):
    """What the host does anew in every step, in words: it cannot be a part of a graph."""


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Within it, `refuse` raises."""
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


def refuse(what: str) -> None:
    """Said by whatever the host decides in every step: raises NotCapturable where the step is being captured."""
    if _capturing.get():
        raise NotCapturable(what)
