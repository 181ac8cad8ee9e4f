"""Whether a step is being captured in a CUDA graph, which will repeat it without asking the host for anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

Kept = TypeVar("Kept")

_capturing: ContextVar[list[Any] | None] = ContextVar("capturing", default=None)  # what the graph holds on to


class NotCapturable(RuntimeError):
    """What the host does anew in every step, in words: it cannot be a part of a graph."""


@contextlib.contextmanager
def capturing() -> Iterator[list[Any]]:
    """Within it, `refuse` raises. Gives the list of what was used by `keep`, to be held as long as the graph is."""
    held: list[Any] = []
    token = _capturing.set(held)
    try:
        yield held
    finally:
        _capturing.reset(token)


def refuse(what: str) -> None:
    """Said by whatever the host decides in every step: raises NotCapturable where the step is being captured."""
    if _capturing.get() is not None:
        raise NotCapturable(what)


def keep(array: Kept) -> Kept:
    """`array`, which lies in a cache that may drop it: a graph that is captured here keeps it for its replays."""
    held = _capturing.get()
    if held is not None:
        held.append(array)
    return array
