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
from dataclasses import dataclass

import cupy

from refpeft import tape
from refpeft.backend import Array

_MOST_READ = 2**24
"""Bytes that such a product reads at most. Larger ones fill the GPU by themselves, and slow down others."""

_MOST_HELD = 2**25  # bytes of what waits to be read there, with what that is a part of


@dataclass
class _Work:
    """What was started: when it is done, what it writes to and reads, and how many bytes that holds."""

    done: cupy.cuda.Event
    outs: Sequence[Array]
    reads: Sequence[Array]
    held: int


class _Aside:
    """The second stream, for gradients that lie in one flat buffer."""

    def __init__(self, gradients: Array):
        self.gradients = gradients
        self._stream = _stream_of(cupy.cuda.runtime.getDevice())
        self._waiting: deque[_Work] = deque()
        self._held = 0  # bytes

    def has(self, array: Array) -> bool:
        """Whether an array is a part of the flat buffer."""
        return 0 <= array.data.ptr - self.gradients.data.ptr < self.gradients.nbytes

    def run(self, work: Callable[[], None], outs: Sequence[Array], reads: Sequence[Array]) -> None:
        """Starts `work`, which is to add to and read these arrays and nothing that is made later."""
        ready, done = (cupy.cuda.Event(block=False, disable_timing=True) for _ in range(2))
        ready.record(cupy.cuda.get_current_stream())
        self._stream.wait_event(ready)
        with self._stream:
            work()
        done.record(self._stream)
        self._waiting.append(_Work(done, outs, reads, _held_by(reads)))
        self._held += self._waiting[-1].held
        while self._held > _MOST_HELD:
            self._let_go()

    def join(self) -> None:
        """Lets the main stream wait for all of it."""
        while self._waiting:
            self._let_go()

    def join_all_that_adds_to(self, array: Array) -> None:
        """Lets the main stream wait until nothing is added to `array`."""
        while any(_overlap(array, out) for work in self._waiting for out in work.outs):
            self._let_go()

    def _let_go(self) -> None:
        work = self._waiting.popleft()
        self._held -= work.held
        cupy.cuda.get_current_stream().wait_event(work.done)  # before the arrays' memory is used again there


def _overlap(one: Array, other: Array) -> bool:
    """Whether two contiguous arrays have numbers in common."""
    return one.data.ptr < other.data.ptr + other.nbytes and other.data.ptr < one.data.ptr + one.nbytes


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
        with tape.before_leaves(aside.join_all_that_adds_to):  # what is added there by others waits
            yield
    finally:
        _current.pop()
        aside.join()


def run(work: Callable[[], None], outs: Sequence[Array], reads: Sequence[Array]) -> None:
    """Starts `work`, which reads some arrays and adds to others: beside the main stream, where that is wanted."""
    small = sum(array.nbytes for array in reads) <= _MOST_READ
    if small and _current and all(map(_current[-1].has, outs)):
        _current[-1].run(work, outs, reads)
        return
    for out in outs:
        join_all_that_adds_to(out)
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


def join_all_that_adds_to(array: Array) -> None:
    """Lets the main stream wait until nothing beside it adds to `array`: before that is added to there."""
    if _current and _current[-1].has(array):
        _current[-1].join_all_that_adds_to(array)
