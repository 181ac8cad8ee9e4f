"""Timing on a machine that others use, too: what a stretch of time took, who else worked in it, and workers in turns.

The systems that a benchmark compares are processes that stay alive and do one step each, one after the other, so that
what changes on the machine changes for all of them. A sample in which other processes took much of the processor is
known by /proc/stat and left out of the medians called quiet.
"""

import contextlib
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUIET = 0.08  # the most that other processes may take of one core for a sample to count as quiet
PAUSE = 0.2  # seconds between two systems' turns: until the threads of the one before have stopped spinning
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# ---- a stretch of time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Seconds of several clocks: the wall's, this process's on all cores, all processes' and the host's on this VM."""

    wall: float
    own: float
    busy: float
    stolen: float

    @staticmethod
    def now() -> "Moment":
        user, nice, system, _, _, irq, soft, stolen = (int(n) for n in _proc("stat").split()[1:9] or [0] * 8)
        ticks = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system + irq + soft) / ticks
        return Moment(time.perf_counter(), time.process_time(), busy, stolen / ticks)


@dataclass(frozen=True)
class Sample:
    """What happened between two moments; `other` and `steal` are shares of one core."""

    seconds: float
    cpu: float
    other: float
    steal: float

    @staticmethod
    def between(start: Moment, end: Moment) -> "Sample":
        seconds, cpu = end.wall - start.wall, end.own - start.own
        other = max(0.0, end.busy - start.busy - cpu) / seconds
        return Sample(seconds, cpu, other, (end.stolen - start.stolen) / seconds)

    @property
    def quiet(self) -> bool:
        return max(self.other, self.steal) <= QUIET


def median(samples: Iterable[Sample], what: Callable[[Sample], float] = lambda sample: sample.seconds) -> float:
    """The median over the quiet samples, or over all where none is quiet."""
    samples = list(samples)
    return statistics.median(map(what, [sample for sample in samples if sample.quiet] or samples))


def peak() -> int:
    """The most bytes that this process has held so far. (ru_maxrss would begin with that of the parent.)"""
    return int(_proc("self/status").partition("VmHWM:")[2].split()[0]) * 1024


def _proc(name: str) -> str:
    file = Path("/proc", name)
    return file.read_text() if file.is_file() else ""


def description(*packages: str) -> str:
    """One line: the processor, its cores, versions of Python and of packages that are installed, the date."""
    model = _proc("cpuinfo").partition("model name")[2].partition("\n")[0].strip(" \t:") or platform.machine()
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join([f"{model}, {os.cpu_count()} cores", *versions, datetime.date.today().isoformat()])


# ---- workers in turns ------------------------------------------------------------------------------------------------


class Turns:
    """A worker's end: `ready` once, then for each step `wait`, until it is this one's turn, and `done`."""

    def __init__(self, pipe: Any):
        self.pipe, self.start = pipe, Moment.now()

    def ready(self, **found: Any) -> None:
        """Says that all is loaded, how long that took, and what is to be said of it."""
        self.done(**found)

    def wait(self) -> int:
        """Returns when the next turn is to begin, and of how many steps; raises SystemExit when none is."""
        steps = self.pipe.recv()
        if not steps:
            raise SystemExit
        self.start = Moment.now()
        return steps

    def done(self, **found: Any) -> None:
        self.pipe.send({"sample": Sample.between(self.start, Moment.now()), "peak": peak(), **found})


def train(turns: Turns, trainer: Any, end: Callable[[], dict[str, Any]] = dict) -> None:
    """Steps of a refpeft.Trainer as `refpeft train` takes them: each ends where the trainer tells its listeners.

    At the end of a turn `end` is called, which waits until all is done, where that is needed, and says more.
    """
    left = tokens = 0

    def after_step(record: dict[str, Any]) -> None:
        nonlocal left, tokens
        left, tokens = left - 1, tokens + record["tokens"]
        if not left:
            turns.done(loss=record["loss"], tokens=tokens, **end())
            left, tokens = turns.wait(), 0

    trainer.listeners = [after_step]
    left = turns.wait()
    trainer.run()


class Failed(Exception):
    """A worker raised; the message is its traceback."""


class Worker:
    """A process that runs `work(turns, *arguments)` with so many threads.

    `loaded` is what it said when it was ready, `said` a list of what it said after each turn. Raises Failed where the
    process does. With `wait` false it is still loading when this returns: `ready` waits for that.
    """

    def __init__(self, threads: int, work: Callable[..., None], *arguments: Any, wait: bool = True):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        before = {name: os.environ.pop(name, None) for name in THREADS}
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of all libraries, from their import on
        try:
            self.process = context.Process(target=_run, args=(theirs, work, arguments), daemon=True)
            self.process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            os.environ |= {name: value for name, value in before.items() if value is not None}
        theirs.close()
        self.loaded, self.said = {}, []
        if wait:
            self.ready()

    def ready(self, timeout: float | None = None) -> None:
        self.loaded = self._heard(timeout)

    def step(self) -> None:
        self.begin(1)
        self.end()

    def begin(self, steps: int) -> None:
        """Asks for a turn of so many steps; `end` waits for what it says."""
        self.pipe.send(steps)
        self.steps = steps

    def end(self, timeout: float | None = None) -> None:
        """Raises Failed, and ends the process, where it says nothing within so many seconds."""
        self.said.append({"steps": self.steps} | self._heard(timeout))

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # of one that has ended
            self.pipe.send(False)
        self.process.join()

    def _heard(self, timeout: float | None = None) -> dict[str, Any]:
        if timeout is not None and not self.pipe.poll(max(0.0, timeout)):
            self.process.kill()
            raise Failed("the time was over")
        try:
            found = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise Failed(f"the process ended with exit code {self.process.exitcode}") from None
        if isinstance(found, str):
            self.process.join()
            raise Failed(found)
        return found


def _run(pipe: Any, work: Callable[..., None], arguments: tuple) -> None:
    try:
        work(Turns(pipe), *arguments)
    except Exception:
        pipe.send(traceback.format_exc())


def alternate(workers: dict[str, Worker], rounds: int, warm_up: int) -> None:
    """Asks each worker in turn for a step, `warm_up` times and then in `rounds` rounds.

    There are more rounds, up to three times as many, until each has quiet samples in half of `rounds`. A worker that
    fails is taken out, with a word.
    """

    def enough() -> bool:
        return all(sum(said["sample"].quiet for said in w.said[warm_up:]) > rounds // 2 for w in workers.values())

    done = 0
    while done < warm_up + rounds or (done < warm_up + 3 * rounds and not enough()):
        for name, worker in list(workers.items()):
            time.sleep(PAUSE)
            try:
                worker.step()
            except Failed as error:
                print(f"{name} failed: {error}", flush=True)
                del workers[name]
        done += 1


# ---- what the machine can do -----------------------------------------------------------------------------------------


def multiply(turns: Turns, threads: int, shapes: list[tuple[int, int, int]]) -> None:
    """A worker whose step is products (rows x inner) (inner x columns) in float32, on each thread by itself.

    Each step says how many operations it was, 2 for each pair of numbers that is multiplied.
    """
    import numpy as np
    import threadpoolctl

    repeats = max(1, round(2e10 / sum(2 * m * k * n for m, k, n in shapes)))

    def products(arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        for a, b, out in arrays:
            for _ in range(repeats):
                np.matmul(a, b, out=out)

    def of_a_thread() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return [(np.ones((m, k), "f4"), np.ones((k, n), "f4"), np.ones((m, n), "f4")) for m, k, n in shapes]

    each = [of_a_thread() for _ in range(threads)]
    turns.ready()
    with threadpoolctl.threadpool_limits(1):
        while True:
            turns.wait()
            running = [threading.Thread(target=products, args=(arrays,)) for arrays in each]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            turns.done(flops=threads * repeats * sum(2 * m * k * n for m, k, n in shapes))
