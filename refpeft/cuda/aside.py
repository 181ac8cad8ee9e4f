"""A second stream for gradients of values: nothing waits for them before the step's end.

On the way back, each layer's gradient waits for that of the layer after it, and kernels are short beside the time that
they take to start; those of values fill the gaps. The bits are those of one stream: no kernel changes, and each array
is added to in the order of the calls.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import cupy

from refpeft import tape
from refpeft.backend import Array

_MOST_READ = 2**24
"""Bytes that such a product reads at most. Larger ones fill the GPU by themselves, and slow down others."""

_MOST_HELD = 2**25  # bytes of what waits to be read there, with what that is a part of


class _Aside:
    """The second stream, for gradients that lie in one flat buffer."""

    def __init__(self, gradients: Array):
        self.gradients = gradients
        self._stream = _stream_of(cupy.cuda.runtime.getDevice())
        self._waiting: deque[tuple[cupy.cuda.Event, int, tuple[Array, ...]]] = deque()
        self._held = 0  # bytes

    def has(self, array: Array) -> bool:
        """Whether an array is a part of the flat buffer."""
        return 0 <= array.data.ptr - self.gradients.data.ptr < self.gradients.nbytes

    def run(self, work: Callable[[], None], reads: tuple[Array, ...]) -> None:
        """Starts `work`, which is to read these arrays and nothing that is made later."""
        ready, done = (cupy.cuda.Event(block=False, disable_timing=True) for _ in range(2))
        ready.record(cupy.cuda.get_current_stream())
        self._stream.wait_event(ready)
        with self._stream:
            work()
        done.record(self._stream)
        size = _held_by(reads)
        self._waiting.append((done, size, reads))
        self._held += size
        while self._held > _MOST_HELD:
            self._let_go()

    def join(self) -> None:
        """Lets the main stream wait for all of it."""
        while self._waiting:
            self._let_go()

    def _let_go(self) -> None:
        done, size, _ = self._waiting.popleft()
        self._held -= size
        cupy.cuda.get_current_stream().wait_event(done)  # before the arrays' memory is used again there


def _held_by(arrays: Sequence[Array]) -> int:
    """Bytes that are not given back while these arrays are there, which may be views."""
    wholes = [array if array.base is None else array.base for array in arrays]
    return sum({whole.data.ptr: whole.nbytes for whole in wholes}.values())


_current: list[_Aside] = []


@functools.cache
def _stream_of(device: int, use: str = "gradients") -> cupy.cuda.Stream:
    return cupy.cuda.Stream(non_blocking=True)


@contextlib.contextmanager
def gradients_aside(gradients: Array) -> Iterator[None]:
    """Within it, products that are added to parts of the flat buffer `gradients` run beside the main stream."""
    aside = _Aside(gradients)
    _current.append(aside)
    try:
        with tape.before_leaves(aside.join):  # what is added there by others waits
            yield
    finally:
        _current.pop()
        aside.join()


def run(work: Callable[[], None], out: Array, *reads: Array) -> None:
    """Starts `work`, which reads some arrays and adds to `out`: beside the main stream, where that is wanted."""
    if _current and _current[-1].has(out) and sum(array.nbytes for array in reads) <= _MOST_READ:
        _current[-1].run(work, reads)
    else:
        work()


def side_by_side(one: Callable[[], None], other: Callable[[], None]) -> None:
    """Starts both, which write to arrays that are there, on the current stream and on one beside it: `other` there."""
    current, beside = cupy.cuda.get_current_stream(), _stream_of(cupy.cuda.runtime.getDevice(), "side by side")
    ready, done = (cupy.cuda.Event(block=False, disable_timing=True) for _ in range(2))
    ready.record(current)
    beside.wait_event(ready)
    with beside:
        other()
    done.record(beside)
    one()
    current.wait_event(done)


def join() -> None:
    """Lets the main stream wait for all that runs beside it: before it reads gradients."""
    if _current:
        _current[-1].join()
