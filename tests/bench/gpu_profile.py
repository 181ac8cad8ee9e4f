"""What a step of refpeft on the GPU is made of: by operation, and by kernel where torch is there to trace them.

By operation: steps without a graph, an event of the device wherever an operation begins or ends, so that every moment
counts for the innermost one that is being computed. Where the host is slower than the device, its time is in there.
By kernel: the steps as they are in training, and what torch.profiler sees of the process; idle is the rest.
"""

import contextlib
import gc
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from gpu_cases import Case
from gpu_systems import trainer_of
from machine import Failed, Turns, Worker

_WARM_UP, _STEPS = 6, 3
_MOST = 30  # rows of a table
_KINDS = {
    "products": r"gemm|nvjet|cutlass|xmma|gemv|splitk|cublas",
    "attention": r"attention|fmha|flash|sdpa|cudnn",
    "norms": r"norm_",
    "silu_mul": r"silu",
    "rope": r"rotate",
    "cross-entropy": r"softmax|mean_loss",
    "optimizer": r"adamw|clip|sums_of_squares|root_of_sum",
    "copies and zeros": r"memcpy|memset|copy_|write_|put_",
    "idle": r"^idle$",
}


def profile(name: str, case: Case) -> dict[str, dict[str, tuple[float, float]]]:
    """Prints the tables of a case; {"by operation": {name: (milliseconds a step, calls a step)}, "by kernel": ...}."""
    found = {}
    for how, work in (("by operation", _by_operation), ("by kernel", _by_kernel)):
        try:
            worker = Worker(4, work, case)
            worker.stop()
        except Failed as error:
            print(f"\n{name}, {how}, failed: {error}")
            continue
        found[how] = worker.loaded["found"]
        _show(f"{name}, {how}", found[how])
    return found


def _show(title: str, found: dict[str, tuple[float, float]]) -> None:
    total = sum(ms for ms, _ in found.values())
    print(f"\n### {title}: {total:.2f} ms a step\n\n| | ms | % | calls |\n| --- | --- | --- | --- |")
    for name, (ms, calls) in sorted(found.items(), key=lambda item: -item[1][0])[:_MOST]:
        print(f"| {name[:90]} | {ms:.3f} | {100 * ms / total:.1f} | {calls:g} |")
    if "kernel" in title:
        print("\n" + ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in by_kind(found).most_common()), flush=True)


def by_kind(found: dict[str, tuple[float, float]]) -> Counter[str]:
    """Milliseconds of kernels by what they do."""
    kinds: Counter[str] = Counter()
    for name, (ms, _) in found.items():
        kinds[next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name, re.I)), "other")] += ms
    return kinds


def _after(trainer: Any, warm_up: int, traced: Callable[[], contextlib.AbstractContextManager], steps: int) -> None:
    """Runs the trainer for `warm_up` steps and then, within what `traced` gives, for `steps` more."""
    within = contextlib.ExitStack()

    def after_step(record: dict[str, Any]) -> None:
        if record["step"] == warm_up:
            within.enter_context(traced())
        elif record["step"] == warm_up + steps:
            within.close()
            raise _Enough

    trainer.listeners = [after_step]
    with contextlib.suppress(_Enough):
        trainer.run()


class _Enough(Exception):
    """Ends a run."""


# ---- by operation ----------------------------------------------------------------------------------------------------


class Timeline:
    """Events of the device and what begins at each: times are those of the innermost that has begun and not ended."""

    def __init__(self, event: Callable[[], Any]):
        self._event, self._marks, self._open = event, [], ["between operations"]
        self.calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        if name == self._open[-1]:  # a pair that calls another one of the same op
            yield
            return
        self._open.append(name)
        self._mark()
        self.calls[name] += 1
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        event = self._event()
        event.record()
        self._marks.append((event, self._open[-1]))

    def milliseconds(self, elapsed: Callable[[Any, Any], float]) -> Counter[str]:
        found: Counter[str] = Counter()
        for (event, name), (following, _) in zip(self._marks, self._marks[1:], strict=False):
            found[name] += elapsed(event, following)
        return found


def _by_operation(turns: Turns, case: Case) -> None:
    trainer = trainer_of(case, case.quantized, captured=False)
    if case.tiny:
        event, elapsed, wait = _Instant, lambda a, b: 1e3 * (b.time - a.time), lambda: None
    else:
        import cupy

        event, elapsed, wait = cupy.cuda.Event, cupy.cuda.get_elapsed_time, cupy.cuda.Device().synchronize
    timeline = Timeline(event)

    @contextlib.contextmanager
    def traced() -> Iterator[None]:
        with _marked(timeline, trainer):
            yield
        wait()

    _after(trainer, _WARM_UP, traced, _STEPS)
    found = timeline.milliseconds(elapsed)
    turns.ready(found={name: (ms / _STEPS, timeline.calls[name] / _STEPS) for name, ms in found.items()})


@contextlib.contextmanager
def _marked(timeline: Timeline, trainer: Any) -> Iterator[None]:
    """Within it, operations both ways, clipping and the optimizer are on the timeline."""
    from refpeft import tape, tensor

    with contextlib.ExitStack() as stack:

        def mark(owner: Any, attribute: str, name: str) -> None:
            function = getattr(owner, attribute)

            def marked(*args: Any, **keywords: Any) -> Any:
                with timeline.within(name):
                    return function(*args, **keywords)

            stack.enter_context(mock.patch.object(owner, attribute, marked))

        pass_on = tape._pass_on

        def backward(node: Any) -> None:
            with timeline.within(f"{node.op.name}, backward{_kind(node.op)}"):
                pass_on(node)

        stack.enter_context(mock.patch.object(tape, "_pass_on", backward))
        for op in [each for each in gc.get_objects() if isinstance(each, tensor.Op)]:  # not Op.__call__, which counts
            mark(op, "forward", f"{op.name}, forward{_kind(op)}")  # the references to what it is called with
            if op.together:
                mark(op, "together", f"{op.name}, forward")
        mark(trainer.optimizer, "apply", "optimizer")
        mark(trainer.flat, "clip", "clipping")
        yield


def _kind(op: Any) -> str:
    return "" if op.stands_in or op.name == "_recompute" else " (plain pair)"


class _Instant:
    """In the place of an event, on the CPU."""

    time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()


# ---- by kernel -------------------------------------------------------------------------------------------------------


def _by_kernel(turns: Turns, case: Case) -> None:
    try:
        from torch import profiler
    except ImportError:
        return turns.ready(found={})
    trainer = trainer_of(case, case.quantized)
    which = profiler.ProfilerActivity.CPU if case.tiny else profiler.ProfilerActivity.CUDA
    found: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def traced() -> Iterator[None]:
        with profiler.profile(activities=[which]) as seen:
            start = time.perf_counter()
            yield
            if not case.tiny:
                trainer.model.xp.cuda.Device().synchronize()
            seconds = time.perf_counter() - start
        for event in seen.key_averages():
            found[event.key] = event.device_time_total / 1e3 / _STEPS, event.count / _STEPS
        busy = sum(ms for ms, _ in found.values())
        found["idle"] = max(0.0, 1e3 * seconds / _STEPS - busy), 0

    _after(trainer, _WARM_UP, traced, _STEPS)
    turns.ready(found=found)
