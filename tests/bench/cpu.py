"""A LoRA step here and with transformers + PEFT, on the CPU: time, memory, and how far from the machine's own limit.

    python tests/bench/cpu.py [CASE ...] [--compile] [--rounds 7] [--threads 2[,1]] [--check] [--json FILE]
                              [--model MODEL --data DATA]

Cases are those of cpu_cases.py; without a name it is all of them. `wikisql` needs a MODEL (a Hugging Face directory or
a GGUF file) and DATA with train.jsonl. A step is forward, backward and AdamW in float32, without dropout, gradients of
norm at most 1. All systems read the same model and adapter files, see the same batches, and take their steps in turns;
medians are over the samples in which little else ran (machine.py), as far as there are such.

The floor is the time of the step's products of matrices alone (see cpu_cases._operations) at the speed that products of
the model's shapes reach in the same rounds, each thread computing its own. --threads: the first number is for all
systems, the others are for refpeft alone. --compile adds torch.compile. --check compares the loss and the gradients of
the first step, B not zero, with transformers in float64: the largest norm-wise error of a tensor. --tiny runs the cases
on models of no size, to see that all works. Needs the extra `oracle`.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cpu_cases import CASES, Case, Source, prepare
from cpu_systems import checks, systems
from machine import Failed, Worker, alternate, description, median, multiply

PACKAGES = ("numpy", "torch", "transformers", "peft", "bitsandbytes")
PRODUCTS = "products alone"
COLUMNS = ("s/step", "all", "min", "tokens/s", "CPU s", "others", "steal", "first s", "frozen MiB", "peak MiB")


def measure(case: Case, source: Source, threads: list[int], rounds: int, compiled: bool, check: bool) -> dict:
    """What is found of a case, as JSON takes it."""
    warm_up = 4 if compiled else 2
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        prepared = _alone(
            max(threads), partial(prepare, case=case, source=source, steps=warm_up + 3 * rounds, folder=folder)
        )
        found = {"systems": {}}
        if check:
            found["check"] = _compared(case, folder, max(threads))
        asked = systems(case, folder, threads, compiled)
        asked[PRODUCTS] = max(threads), partial(multiply, threads=max(threads), shapes=prepared["products"])
        workers = {}
        for name, (count, work) in asked.items():
            try:
                workers[name] = Worker(count, work)
            except Failed as error:
                print(f"{name} failed: {error}", flush=True)
        alternate(workers, rounds, warm_up)
        for worker in workers.values():
            worker.stop()
    steps = len(workers[PRODUCTS].said)
    speed = statistics.median(s["flops"] / s["sample"].seconds for s in _quiet(workers.pop(PRODUCTS).said[warm_up:]))
    found |= {"GFLOP/s": speed / 1e9, "GFLOP": statistics.median(prepared["flops"][warm_up:steps]) / 1e9}
    found["floor s"] = found["GFLOP"] / found["GFLOP/s"]
    for name, worker in workers.items():
        found["systems"][name] = _row(worker, warm_up)
    return found


def _alone(threads: int, work) -> dict:
    """What a worker says that takes no steps."""
    worker = Worker(threads, work)
    worker.stop()
    return worker.loaded


def _quiet(said: list[dict]) -> list[dict]:
    return [one for one in said if one["sample"].quiet] or said


def _row(worker: Worker, warm_up: int) -> dict:
    said = worker.said[warm_up:]
    samples, kept = [one["sample"] for one in said], _quiet(said)
    return {
        "s/step": median(samples),
        "all": statistics.median(sample.seconds for sample in samples),
        "min": min(sample.seconds for sample in samples),
        "tokens/s": sum(one["tokens"] for one in kept) / sum(one["sample"].seconds for one in kept),
        "CPU s": median(samples, lambda sample: sample.cpu),
        "others": statistics.median(sample.other for sample in samples),
        "steal": statistics.median(sample.steal for sample in samples),
        "quiet": sum(sample.quiet for sample in samples),
        "load s": worker.loaded["sample"].seconds,
        "first s": worker.said[0]["sample"].seconds,
        "frozen MiB": worker.loaded["frozen"] / 2**20,
        "peak MiB": said[-1]["peak"] / 2**20,
        "losses": [one["loss"] for one in worker.said],
        "samples": [asdict(sample) for sample in samples],
    }


# ---- gradients -------------------------------------------------------------------------------------------------------


def _compared(case: Case, folder: Path, threads: int) -> dict[str, dict[str, float | str]]:
    """Relative errors of the first step's loss and gradients, by system."""
    import numpy as np

    from refpeft.files import read_safetensors

    reference, errors = None, {}
    for name, (out, work) in checks(case, folder, threads).items():
        loss = _alone(threads, work)["loss"]
        gradients = {key: np.asarray(g, "f8") for key, g in read_safetensors(out / "adapter_model.safetensors").items()}
        if reference is None:
            reference = loss, gradients
            continue
        if gradients.keys() != reference[1].keys():
            raise SystemExit(f"{name} trains other tensors: {sorted(gradients.keys() ^ reference[1].keys())}")
        norms = {key: np.linalg.norm(gradients[key] - g) / np.linalg.norm(g) for key, g in reference[1].items()}
        worst = max(norms, key=norms.get)
        errors[name] = {"loss": abs(loss / reference[0] - 1), "gradient": float(norms[worst]), "of": worst}
    return errors


# ---- tables ----------------------------------------------------------------------------------------------------------


def show(name: str, case: Case, found: dict) -> None:
    ours = found["systems"]["refpeft"]
    print(f"\n### {name}\n\n| | {' | '.join(COLUMNS)} | quiet | x time | x peak |\n|{' --- |' * (len(COLUMNS) + 4)}")
    for system, row in found["systems"].items():
        cells = [f"{row[column]:.4g}" for column in COLUMNS] + [f"{row['quiet']}/{len(row['samples'])}"]
        cells += [f"{row[column] / ours[column]:.2f}" for column in ("s/step", "peak MiB")]
        print(f"| {system} | {' | '.join(cells)} |")
    print(
        f"\nFloor: {found['GFLOP']:.4g} GFLOP a step at {found['GFLOP/s']:.4g} GFLOP/s is {found['floor s']:.3g} s; "
        f"refpeft's step is {ours['s/step'] / found['floor s']:.2f} times that."
    )
    for system, errors in found.get("check", {}).items():
        print(
            f"First step of {system}, relative errors: loss {errors['loss']:.1e}, "
            f"gradients at most {errors['gradient']:.1e} ({errors['of']})."
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    arguments.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--threads", default="2", help="such as 2, or 2,1")
    arguments.add_argument("--check", action="store_true", help="compare gradients first")
    arguments.add_argument("--json", type=Path, metavar="FILE")
    arguments.add_argument("--model")
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--tiny", action="store_true", help="models of no size")
    given = arguments.parse_args()
    if wrong := set(given.cases) - set(CASES):
        arguments.error(f"unknown case {', '.join(sorted(wrong))}: expected some of {', '.join(CASES)}")
    real = given.model is not None and given.data is not None
    names = given.cases or [name for name, case in CASES.items() if real or not case.real]
    if not real and any(CASES[name].real for name in names):
        arguments.error("wikisql needs --model and --data")
    source = Source(given.model, given.data, given.tiny)
    threads = [int(count) for count in given.threads.split(",")]
    machine, found = description(*PACKAGES), {}
    print(machine)
    for name in names:
        found[name] = measure(CASES[name], source, threads, given.rounds, given.compile, given.check)
        show(name, CASES[name], found[name])
        if given.json:
            given.json.write_text(json.dumps({"machine": machine, "threads": threads, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
