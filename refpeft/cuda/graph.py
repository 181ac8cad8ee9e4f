"""CUDA graphs: work that comes again is captured, and then launched as a whole, without Python between its kernels."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import cupy

from refpeft.backend import Array
from refpeft.capturing import capturing
from refpeft.cuda import stretch
from refpeft.cuda.override import say_once
from refpeft.rng import Slots

MOST = 16
"""Graphs that are kept; where more kinds of steps come, the one that was launched longest ago is dropped."""

FFT_PLANS = 256
"""Plans of cuFFT that are kept: CuPy keeps 16, and one that comes again would be made in a capture, which fails."""


class Graphs:
    """The graphs of a run, by what its steps are told apart by.

    They have a memory pool of their own, all the same one, since one is launched after the other: a replay writes to
    the arrays of its capture, which eager work must not be given. So a pool holds as much as the largest of them needs.

    refused  why work is done without graphs, where that is so because it cannot be captured
    """

    def __init__(self, stream: cupy.cuda.Stream, wanted: bool = True):
        self._stream, self._wanted, self.refused = stream, wanted, ""
        cupy.fft.config.get_plan_cache().set_size(FFT_PLANS)
        self._slots = Slots(cupy)
        self._met: set[Hashable] = set()
        self._captured: OrderedDict[Hashable, tuple[Any, Array, list[Any]]] = OrderedDict()
        self._pool = stretch.pool(stream)

    def run(self, key: Hashable, step: int, work: Callable[[], Array]) -> Array:
        """What work() gives in a step, of what is now in the arrays that it reads; `key` says which arrays these are.

        Work that comes for the first time is done, so that kernels are compiled and plans are made; when it comes again
        it is captured. What is given is overwritten when the same comes once more. Where something cannot be captured
        all work is done without graphs from then on, which is said.
        """
        if self._wanted and key in self._met and key not in self._captured:
            self._capture(key, work)
        if key in self._captured:
            self._captured.move_to_end(key)
            graph, found, _ = self._captured[key]
            self._slots.refill(step)
            graph.launch(self._stream)
            return found
        self._met.add(key)
        return work()

    def __len__(self) -> int:
        return len(self._captured)

    def give_back(self) -> None:
        """Drops all graphs and their memory; they are captured again when the same comes."""
        self._stream.synchronize()
        self._captured.clear()
        self._met.clear()
        stretch.give_back()
        self._pool.free_all_blocks()

    def _capture(self, key: Hashable, work: Callable[[], Array]) -> None:
        """Captures `work`, of which nothing is done by that; or gives up all graphs where it cannot be."""
        self._stream.synchronize()
        while len(self._captured) >= MOST:
            self._captured.popitem(last=False)
        try:
            with _without_collections(), cupy.cuda.using_allocator(self._pool.malloc), capturing() as held:
                stretch.give_back()  # what eager work needed, the graph needs now
                with self._slots.recording():
                    graph, found = self._graph_of(work)
                held += [node.plan for _, node in cupy.fft.config.get_plan_cache()]  # the graph writes to their memory
                self._captured[key] = graph, found, held
        except Exception as error:  # whatever it is, it is the capture's: the same work was done before
            self.refused = str(error).partition("\n")[0] or type(error).__name__
        else:
            return
        self._wanted = False
        self.give_back()
        say_once(f"steps are not captured in a CUDA graph, and may take longer: {self.refused}")

    def _graph_of(self, work: Callable[[], Array]) -> tuple[Any, Array]:
        self._stream.begin_capture()
        try:
            found = work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # where the capture has become invalid
                self._stream.end_capture()
            raise
        return self._stream.end_capture(), found


def own_stream() -> cupy.cuda.Stream:
    """The current stream, or another one where that is the default one, on which nothing can be captured."""
    current = cupy.cuda.get_current_stream()
    return _stream_of(cupy.cuda.runtime.getDevice()) if current == cupy.cuda.Stream.null else current


@functools.cache
def _stream_of(device: int) -> cupy.cuda.Stream:
    """One for all runs: cuBLAS works in memory of its own for each stream."""
    return cupy.cuda.Stream(non_blocking=True)


@contextlib.contextmanager
def on(stream: cupy.cuda.Stream) -> Iterator[None]:
    """Within it the device works on `stream`, after all that it was asked for before; after it, that is done.

    Arrays are made in one stretch of memory (refpeft.cuda.stretch).
    """
    cupy.cuda.get_current_stream().synchronize()
    with stream, stretch.in_use(stream):
        try:
            yield
        finally:
            stream.synchronize()


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Within it Python collects no garbage, which might free what must not be freed in a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
