"""How long refpeft takes to begin: its help, and the first optimizer step of the embedded run.

    python tests/bench/startup.py [--runs 20] [--steps 5]

Help is held against bare Python that imports click, by turns: processor seconds (user + system), which other work on
the machine disturbs least, and wall seconds. The first step counts from the start of the process to its record in
metrics.jsonl, which is written when the step is done: all that comes before, with the first evaluation. Medians.
Without PYTHONDONTWRITEBYTECODE, as an installed package runs; the first turn, which compiles, does not count.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import refpeft

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT["PYTHONPATH"] = str(Path(refpeft.__file__).parents[1])
HELP = {"python + click": ["-c", "import click"], "refpeft --help": ["-m", "refpeft", "--help"]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--runs", type=int, default=20, help="turns of the help")
    arguments.add_argument("--steps", type=int, default=5, help="turns of the first step")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        ENVIRONMENT["PYTHONPYCACHEPREFIX"] = compiled
        turns = [{name: seconds(command) for name, command in HELP.items()} for _ in range(given.runs + 1)][1:]
        print(f"{'':16} {'processor':>9} {'wall':>9}")
        for name in HELP:
            print(f"{name:16}" + "".join(f" {statistics.median(t[name][i] for t in turns):7.3f} s" for i in (0, 1)))
        more = [[b - a for a, b in zip(*t.values(), strict=True)] for t in turns]
        print(f"{'more':16}" + "".join(f" {statistics.median(m[i] for m in more):7.3f} s" for i in (0, 1)))
        steps = [first_step() for _ in range(given.steps + 1)][1:]
        print(f"{'first step':16}" + "".join(f" {statistics.median(s[i] for s in steps):7.3f} s" for i in (0, 1)))


def seconds(command: list[str]) -> tuple[float, float]:
    """(processor, wall) seconds of a Python process."""
    before, started = processor(), time.perf_counter()
    subprocess.run([sys.executable, *command], env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    return processor() - before, time.perf_counter() - started


def processor() -> float:
    """Processor seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_step() -> tuple[float, float]:
    """(processor, wall) seconds from the start of `refpeft train` to the record of its first step."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        before, started = processor(), time.perf_counter()
        command = [sys.executable, "-m", "refpeft", "train", "--out", str(out)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while not stepped(out / "metrics.jsonl"):
                if process.poll() is not None:
                    raise SystemExit(process.stderr.read().decode())
                time.sleep(0.002)
            wall = time.perf_counter() - started
        finally:
            process.kill()
            process.communicate()
        return processor() - before, wall


def stepped(metrics: Path) -> bool:
    return metrics.is_file() and '"loss"' in metrics.read_text()


if __name__ == "__main__":
    main()
