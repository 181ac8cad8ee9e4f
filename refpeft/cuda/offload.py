"""What layers that are computed again keep, on the host in the meantime: copied there, and back before it is asked for.

A layer's input leaves the device while the next layer runs, and comes back while the layer after it is computed again.
So the device holds two of them, whatever the number of layers. Copies run on a stream of their own, in a captured step
too, and change no bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import cupy
import cupyx
import numpy as np
from cupy.cuda import runtime

from refpeft.backend import Array
from refpeft.capturing import keep
from refpeft.models.base import Model


class _Away:
    """An array that may be on the device, on the host at `place`, or on its way; called, it is on the device."""

    def __init__(self, array: Array, place: np.ndarray, bring: Callable[[_Away], Array]):
        self.array: Array | None = array
        self.place, self._bring, self.shape, self.dtype = place, bring, array.shape, array.dtype
        self.moved = cupy.cuda.Event(block=False, disable_timing=True)  # the last copy of it that was asked for

    def __call__(self) -> Array:
        return self._bring(self)


class Offload:
    """The stream for such copies, and the pinned memory that they go to: see `of`."""

    def __init__(self) -> None:
        self._side = cupy.cuda.Stream(non_blocking=True)
        self._free: dict[int, list[np.ndarray]] = {}  # pinned memory, by its bytes
        self._away: list[_Away] = []  # in the order of the forward pass

    @contextlib.contextmanager
    def of(self, model: Model) -> Iterator[None]:
        """Within it, the model's layers keep what they keep on the host."""
        model.put_away = self._put_away
        try:
            yield
        finally:
            model.put_away = None
            while self._away:  # nobody asked for these
                self._at_hand(self._away.pop())

    def _put_away(self, array: Array) -> Callable[[], Array]:
        """Starts to copy an array, of which nothing else is kept, to the host; what it gives brings it back."""
        if not array.flags.c_contiguous:
            return lambda: array
        free = self._free.get(array.nbytes)
        place = free.pop() if free else cupyx.empty_pinned(array.nbytes, np.uint8)
        away = _Away(array, keep(place), self._bring)
        self._copy(away, place.ctypes.data, array.data.ptr, runtime.memcpyDeviceToHost)
        if self._away:
            before = self._away[-1]
            cupy.cuda.get_current_stream().wait_event(before.moved)  # its copy had this layer's time
            before.array = None
        self._away.append(away)
        return away

    def _bring(self, away: _Away) -> Array:
        """The array, on the device; the one that was put away before it is on its way there then."""
        self._start(away)
        self._away.remove(away)
        if self._away:
            self._start(self._away[-1])
        return self._at_hand(away)

    def _start(self, away: _Away) -> None:
        """Starts to copy an array back, if it is not on the device."""
        if away.array is None:
            away.array = cupy.empty(away.shape, away.dtype)
            self._copy(away, away.array.data.ptr, away.place.ctypes.data, runtime.memcpyHostToDevice)

    def _copy(self, away: _Away, to: int, source: int, kind: int) -> None:
        """Copies on the other stream, after what the current one was asked for: it may use this memory until then."""
        ready = cupy.cuda.Event(block=False, disable_timing=True)
        ready.record(cupy.cuda.get_current_stream())
        self._side.wait_event(ready)
        with self._side:
            runtime.memcpyAsync(to, source, away.place.nbytes, kind, self._side.ptr)
        away.moved.record(self._side)

    def _at_hand(self, away: _Away) -> Array | None:
        """The array that was on its way, when the copy is done; its place on the host is free for later copies."""
        cupy.cuda.get_current_stream().wait_event(away.moved)
        self._free.setdefault(away.place.nbytes, []).append(away.place)
        array, away.array = away.array, None
        return array
