"""The README's tables of the GPU, from what gpu.py and `refpeft compare --bench` have measured.

    python tests/bench/gpu_table.py FILE.jsonl ... [--methods timings.json]

Each FILE is an --out of gpu.py; where two have the same system of the same case, the first counts. Cells are
milliseconds a step and GiB at most. What a step is made of (--profile) stands beside the least that each kind of work
could take: its operations or bytes at the speed of the ceilings that one of the FILEs has.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from gpu_cases import CASES
from gpu_profile import by_kind
from gpu_systems import OURS, SYSTEMS

WITHIN = 1.5
_SHAPES = {"1b": "Llama-3.2-1B", "8b": "Llama-3.1-8B", "135m": "SmolLM2-135M"}
_FILLS = {"full": "", "padded": ", rows of a half to all of that", "packed": ", four texts in each row"}


def title(name: str) -> str:
    """A case in words."""
    case = CASES[name]
    how = ", NF4" * case.quantized + ", checkpointing" * case.recompute
    return f"shape of {_SHAPES[case.shape]}, {case.rows} x {case.tokens:,} tokens{_FILLS[case.fill]}{how}"


def tables(lines: list[dict[str, Any]]) -> str:
    """Where it was measured, and a table for each kind of case with a column for each system."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        if "system" in line:
            rows.setdefault(line["case"], {}).setdefault(line["system"], line)
    found = [f"{line['machine']}; `{_command(line)}`" for line in lines if "machine" in line]
    for quantized in (False, True):
        here = {name: each for name, each in rows.items() if CASES[name].quantized == quantized}
        systems = [system for system in SYSTEMS if any(system in each for each in here.values())]
        if here:
            cells = [[title(name), *(_cell(each.get(system)) for system in systems)] for name, each in here.items()]
            found.append(markdown(["", *systems], cells))
    ours = {name: each[OURS] for name, each in rows.items() if OURS in each}
    shares = [f"{row['of it']:.0%} ({name})" for name, row in ours.items() if row.get("of it")]
    if shares:
        row = next(iter(ours.values()))
        reached = f"{row['ceiling TFLOP/s']:.0f} TFLOP/s"
        if row.get("sustained TFLOP/s"):
            reached += f" ({row['sustained TFLOP/s']:.0f} for a second)"
        reached += f", and a copy {row['copy TB/s']:.2f} TB/s"
        found.append(f"A product of 8192^3 reaches {reached}; refpeft's steps reach of that {', '.join(shares)}.")
    for line in lines:
        if "start" in line:
            said = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in line["start"].items())
            found.append(f"From the start of a process to the end of its first step of {line['case']}: {said}.")
    for line in lines:
        if "profile" in line and ours:
            found.append(made_of(line["case"], line["profile"]["by kernel"], next(iter(ours.values()))))
    return "\n\n".join(found)


def made_of(name: str, kernels: dict[str, tuple[float, float]], ceilings: dict[str, Any]) -> str:
    """A table of the kinds of work of a step, with their floors."""
    kinds, floors = by_kind(kernels), CASES[name].floors()
    rates = {"FLOP": ("TFLOP", 1e12, ceilings["ceiling TFLOP/s"]), "B": ("GB", 1e9, 1e3 * ceilings["copy TB/s"])}
    cells, least = [], 0.0
    for kind in dict.fromkeys([*floors, *(kind for kind, _ in kinds.most_common())]):
        unit, count = floors.get(kind, ("B", 0.0))
        called, scale, rate = rates[unit]
        floor = 1e3 * count / scale / rate
        least += floor
        what = [f"{count / scale:.3g} {called}", f"{floor:.2f}"] if count else ["", ""]
        cells.append([kind, *what, f"{kinds[kind]:.2f}"])
    cells.append([f"a step of {name}", "", f"{least:.1f}", f"{sum(kinds.values()):.1f}"])
    return markdown(["", "at least", "ms for that", "ms"], cells)


def methods(rows: list[dict[str, Any]]) -> str:
    """Which methods' steps are within 1.5 times LoRA's, and a table of the others."""
    beside = next(row["step_ms"] for row in rows if row["method"] == "lora")
    last = [row["step_ms"] for row in rows if row["method"] == "lora"][-1]
    times = {row["method"]: row["step_ms"] / beside for row in rows if not row["error"] and row["method"] != "lora"}
    within = sorted((ratio, name) for name, ratio in times.items() if ratio <= WITHIN)
    more = sorted((row for row in rows if times.get(row["method"], 0) > WITHIN), key=lambda row: row["step_ms"])
    found = [f"lora {beside:.1f} ms ({last:.1f} at the end). Within {WITHIN} times: "]
    found[0] += ", ".join(f"{name} {ratio:.2f}" for ratio, name in within) + "."
    cells = [
        [row["method"], f"{row['step_ms']:.1f}", f"{times[row['method']]:.2f}", row["refused"] or "-"] for row in more
    ]
    found.append(markdown(["", "ms", "times LoRA's", "no graph, because"], cells))
    found += [f"{row['method']}: {row['error']}" for row in rows if row["error"]]
    return "\n\n".join(found)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _command(line: dict[str, Any]) -> str:
    """What was asked for, without the place of the file."""
    return re.sub(r" --out \S+", "", f"python tests/bench/gpu.py {line['command']}")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['ms/step']:.3g}" + (f", {row['peak GiB']:.1f}" if row.get("peak GiB") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--methods", type=Path, metavar="timings.json")
    given = parser.parse_args()
    lines = [json.loads(line) for file in given.files for line in file.read_text().splitlines()]
    if lines:
        print(tables(lines))
    if given.methods:
        print("\n" * bool(lines) + methods(json.loads(given.methods.read_text())["rows"]))


if __name__ == "__main__":
    main()
