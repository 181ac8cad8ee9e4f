"""A LoRA step here and with transformers + PEFT, on one GPU: time, memory, and how far from the machine's own limit.

    python tests/bench/gpu.py [CASE[=SYSTEM,...] ...] [--systems refpeft,peft,...] [--quick] [--rounds 5]
                              [--budget SECONDS] [--at-once 2] [--start] [--profile] [--out FILE]

Cases are those of gpu_cases.py; without a name it is all. One with systems of its own is measured with those. A step is
forward, backward, gradients of norm at most 1 and AdamW, in bfloat16; LoRA, r = 16, on all seven linear layers; every
token is learned. Weights are random numbers, made in memory; refpeft's steps are those of its Trainer. Each system is a
process of its own on the same GPU: they warm up side by side, as many peers beside refpeft as --at-once says, and then
take turns of about --turn seconds; refpeft has some before, while they load. Numbers are medians of the turns. Peak
memory is what CuPy's pools held at most, all of it, and what torch had allocated; beside it what nvidia-smi says of the
process, with its CUDA context.

The ceiling is a product of 8192^3 in bfloat16, measured in the same rounds for some milliseconds; for a second, which
is measured once, a device may be slower, by its limit of power. "Of it" are the operations of a step in products of
matrices, as `refpeft plan` counts them, over the former. --start measures the time from the start of a process to
the end of its first step of the first case, without and with cached kernels. --profile says what refpeft's step is made
of, instead of all else (gpu_profile.py). --quick: refpeft and eager PEFT, few and short turns. --out gets a line of
JSON for each system of each case, of which gpu_table.py makes the README's tables. --tiny runs on models of no size, on
the CPU, to see that all works.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_cases import CASES, Case
from gpu_profile import profile
from gpu_systems import OURS, SYSTEMS, ceilings, systems, train_refpeft
from machine import PAUSE, Failed, Turns, Worker, description

PACKAGES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cudnn-frontend", "torch", "transformers", "peft")
PACKAGES += ("bitsandbytes",)
LIMITS = "limits"  # the worker that measures what the device can do
CORES = 4  # threads of each process
WARM_UP = 6  # steps, in which kernels and graphs are made and pools filled
PROBED = 2  # steps of the turn that tells how many steps a turn may have
MOST = 200
COLUMNS = ("ms/step", "min", "tokens/s", "TFLOP/s", "of it", "peak GiB", "nvidia-smi", "ready s", "warm-up s")

Clock = Callable[[], float]  # the seconds that are left

# ---- turns -----------------------------------------------------------------------------------------------------------


def started(asked: dict[str, Callable[[Turns], None]]) -> dict[str, Worker]:
    """A worker for each, all loading at the same time."""
    return {name: Worker(CORES, work, wait=False) for name, work in asked.items()}


def ready(workers: dict[str, Worker], left: Clock) -> dict[str, Worker]:
    """The same when they have loaded; without those that fail."""
    for name in list(workers):
        with _taken_out(workers, name):
            workers[name].ready(left())
    return workers


def take_turns(workers: dict[str, Worker], rounds: int, turn: float, left: Clock) -> None:
    """Those that have not taken a step yet take some at the same time; then all take turns of about `turn` seconds.

    A worker that fails is taken out of `workers`, with a word. Ends early where no time is left.
    """
    fresh = [name for name, worker in workers.items() if not worker.said]
    for name in fresh:
        workers[name].begin(WARM_UP)
    for name in fresh:
        with _taken_out(workers, name):
            workers[name].end(left())
    for _ in range(1 + rounds if fresh else rounds):
        for name in list(workers):
            if left() > 0:
                time.sleep(PAUSE)
                with _taken_out(workers, name):
                    workers[name].begin(_steps(workers[name], turn))
                    workers[name].end(left())


def _steps(worker: Worker, turn: float) -> int:
    if len(worker.said) < 2:
        return PROBED
    return max(1, min(MOST, round(turn / _seconds(worker.said[1]))))


def _seconds(said: dict[str, Any]) -> float:
    return said["sample"].seconds / said["steps"]


@contextlib.contextmanager
def _taken_out(workers: dict[str, Worker], name: str) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        print(f"\n{name} failed: {error}", file=sys.stderr, flush=True)
        del workers[name]


# ---- cases -----------------------------------------------------------------------------------------------------------


def measure(
    case: Case, chosen: list[str], limits: dict[str, Worker], rounds: int, turn: float, at_once: int, left: Clock
) -> dict[str, dict[str, Any]]:
    """Of a case, for each system: its numbers, as JSON takes them.

    Refpeft has turns alone first, for time may be over before the peers are there.
    """
    asked = {name: work for name, work in systems(case).items() if name in chosen}
    peers = [name for name in asked if name != OURS]
    groups = [{name: asked[name] for name in peers[at : at + at_once]} for at in range(0, len(peers), at_once)]
    ours = started({OURS: asked[OURS]} if OURS in asked else {})
    others = started(groups[0]) if groups else {}
    before = len(limits[LIMITS].said) if limits else 0
    workers = limits | ready(ours, left)
    take_turns(workers, rounds, turn, left)
    rows = {name: _numbers(case, worker) for name, worker in workers.items() if name != LIMITS}
    ours = {name: worker for name, worker in workers.items() if name == OURS}
    for number, group in enumerate(groups):
        others = ready(others if number == 0 else started(group), left)
        workers = limits | ours | others
        take_turns(workers, rounds, turn, left)
        rows |= {name: _numbers(case, worker) for name, worker in workers.items() if name != LIMITS}
        for name in others.keys() & workers.keys():
            workers[name].stop()
        ours = {name: worker for name, worker in workers.items() if name == OURS}
    for worker in ours.values():
        worker.stop()
    rows = {name: row for name, row in rows.items() if row}
    operations = case.operations()
    for row in rows.values():
        row["TFLOP/s"] = operations / row["ms/step"] / 1e9
        if limits:
            row |= _ceiling(limits[LIMITS].said[before:])
            row["sustained TFLOP/s"] = limits[LIMITS].loaded["sustained"] / 1e12
            row["of it"] = row["TFLOP/s"] / row["ceiling TFLOP/s"]
        if OURS in rows:
            row["x time"] = row["ms/step"] / rows[OURS]["ms/step"]
            row["x peak"] = row["peak GiB"] / rows[OURS]["peak GiB"] if row.get("peak GiB") else None
    return {name: rows[name] for name in asked if name in rows}


def _numbers(case: Case, worker: Worker) -> dict[str, Any] | None:
    """None of one that was not measured."""
    said = worker.said[2:]
    if not said:
        return None
    each = [1e3 * _seconds(one) for one in said]
    found = {"ms/step": statistics.median(each), "min": min(each), "turns": each}
    found |= {"tokens/s": 1e3 * sum(case.lengths) / found["ms/step"], "loss": said[-1]["loss"]}
    found |= {f"{name} GiB": nbytes / 2**30 for name, nbytes in said[-1]["memory"].items()}
    found |= {"nvidia-smi": _of_process(worker.process.pid), "frozen GiB": worker.loaded["frozen"] / 2**30}
    return found | {"ready s": worker.loaded["sample"].seconds, "warm-up s": worker.said[0]["sample"].seconds}


def _ceiling(said: list[dict[str, Any]]) -> dict[str, float]:
    found = {name: statistics.median(one[name] for one in said) for name in ("FLOP/s", "B/s")}
    return {"ceiling TFLOP/s": found["FLOP/s"] / 1e12, "copy TB/s": found["B/s"] / 1e12}


def _of_process(pid: int) -> float | None:
    """GiB that nvidia-smi says of a process; None where it does not tell."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
        used = dict(line.split(", ") for line in lines)
        return float(used[str(pid)]) / 1024 if str(pid) in used else None
    return None


def start(case: Case, left: Clock) -> dict[str, float]:
    """Seconds from the start of a process to the end of its first step, with a cache of kernels that is empty and with
    the one that this leaves."""
    found = {}
    with tempfile.TemporaryDirectory() as cache, _environment(CUPY_CACHE_DIR=cache):
        for how in ("no kernel cached", "kernels cached"):
            began = time.perf_counter()
            for worker in ready(started({OURS: partial(train_refpeft, case=case)}), left).values():
                found[f"{how}, ready"] = time.perf_counter() - began
                worker.step()
                found[how] = time.perf_counter() - began
                worker.stop()
    return found


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ---- what is said ----------------------------------------------------------------------------------------------------


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    if not rows:
        print(f"\nNothing was measured of {name}.")
        return
    columns = (*COLUMNS, "x time", "x peak")
    print(f"\n### {name}\n\n| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for system, row in rows.items():
        cells = ["-" if row.get(column) is None else f"{row[column]:.4g}" for column in columns]
        print(f"| {system} | {' | '.join(cells)} |")
    for row in list(rows.values())[:1]:
        if "ceiling TFLOP/s" in row:
            reached = f"{row['ceiling TFLOP/s']:.4g} TFLOP/s, {row['sustained TFLOP/s']:.4g} for a second"
            print(f"\nCeiling: {reached}; a copy moves {row['copy TB/s']:.3g} TB/s.")
    print(end="", flush=True)


class Lines:
    """Lines of JSON in a file, written as they come; none where there is no file."""

    def __init__(self, path: Path | None):
        self.path = path
        if path:
            path.write_text("")

    def add(self, **record: Any) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE[=SYSTEM,...]", help=f"of {', '.join(CASES)}")
    parser.add_argument("--systems", metavar="A,B,...", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--quick", action="store_true", help="refpeft and eager PEFT, few and short turns")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="turns of each system (5; quick: 3)")
    parser.add_argument("--turn", type=float, default=None, metavar="S", help="seconds of a turn (1; quick: 0.3)")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="S", help="no turn begins after that")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="peers on the GPU beside refpeft (2)")
    parser.add_argument("--start", action="store_true", help="the first case's time to the first step, too")
    parser.add_argument("--profile", action="store_true", help="what refpeft's step is made of, and nothing else")
    parser.add_argument("--out", type=Path, metavar="FILE", help="lines of JSON")
    parser.add_argument("--tiny", action="store_true", help="models of no size, on the CPU")
    given = parser.parse_args()
    quick = [OURS, "peft", "bnb"]
    of_all = given.systems.split(",") if given.systems else quick if given.quick else list(SYSTEMS)
    asked = [each.partition("=") for each in given.cases or CASES]
    given.cases = [(name, own.split(",") if own else of_all) for name, _, own in asked]
    if wrong := {name for name, _ in given.cases} - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(wrong))}: expected some of {', '.join(CASES)}")
    if wrong := {system for _, chosen in given.cases for system in chosen} - set(SYSTEMS):
        parser.error(f"unknown system {', '.join(sorted(wrong))}: expected some of {', '.join(SYSTEMS)}")
    given.rounds = given.rounds or (3 if given.quick else 5)
    given.turn = given.turn or (0.3 if given.quick else 1.0)
    if min(given.rounds, given.at_once) < 1 or given.turn < 0:
        parser.error("--rounds, --turn and --at-once are more than 0")
    return given


def device(tiny: bool) -> str:
    """Which GPU this is; ends the process with a clear word where there is none."""
    if tiny:
        return "the CPU"
    from refpeft import backend
    from refpeft.errors import RefpeftError

    try:
        cupy = backend.module("cuda")
    except RefpeftError as error:
        print(
            f"{error}\nThis benchmark needs a GPU; --tiny runs it without one, to see that it works.", file=sys.stderr
        )
        raise SystemExit(2) from None
    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"].decode()
    driver, library = (
        f"{n // 1000}.{n % 1000 // 10}" for n in (runtime.driverGetVersion(), runtime.runtimeGetVersion())
    )
    return f"{name}, driver for CUDA {driver}, CUDA {library}"


def main() -> None:
    given = arguments()
    cases = [(name, replace(CASES[name], tiny=given.tiny), chosen) for name, chosen in given.cases]
    end = time.monotonic() + given.budget

    def left() -> float:
        return end - time.monotonic()

    lines = Lines(given.out)
    machine = f"{device(given.tiny)}; {description(*PACKAGES)}"
    print(machine, flush=True)
    lines.add(machine=machine, systems=SYSTEMS, command=" ".join(sys.argv[1:]))
    if given.profile:
        for name, case, _ in cases:
            lines.add(case=name, profile=profile(name, case))
        return
    limits = {} if given.tiny else ready(started({LIMITS: ceilings}), left)
    for name, case, chosen in cases:
        if left() <= 0:
            print(f"\nNo time is left for {name}.")
            continue
        rows = measure(case, chosen, limits, given.rounds, given.turn, given.at_once, left)
        show(name, rows)
        for system, row in rows.items():
            lines.add(case=name, system=system, **row)
        if given.start and left() > 0:
            given.start, found = False, start(case, left)
            print("\nTo the end of the first step: " + ", ".join(f"{what} {s:.3g} s" for what, s in found.items()))
            lines.add(case=name, start=found)
    for worker in limits.values():
        worker.stop()


if __name__ == "__main__":
    main()
