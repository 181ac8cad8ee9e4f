"""Implementations under test, right and wrong on purpose, and vectors to run them on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from refpeft.conformance.vectors import Arrays, Case, cases

PLAIN, DROPOUT = (next(case for case in cases() if case.id == f"lora-linear-{x}") for x in ("plain", "dropout"))
LORA = [case for case in cases() if case.id.startswith("lora-linear-")]


class Lora:
    """LoRA at a linear layer, without dropout."""

    name, version, dtypes = "mine", "0.1", ("float64", "float32")

    def scale(self, config: dict) -> float:
        return config["alpha"] / (config["r"] ** 0.5 if config["rslora"] else config["r"])

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        if case.name != "lora" or case.at != "linear":
            raise NotImplementedError("LoRA at linear layers alone")
        if case.config["dropout"]:
            raise NotImplementedError("no dropout")
        scale = self.scale(case.config)
        x, w, a, b, g = (given[name] for name in ("x", "weight", "A", "B", "g"))
        h, d = x @ a.T, scale * g @ b
        rows = tuple(range(x.ndim - 1))
        answer = {
            "y": x @ w.T + given.get("bias", 0) + scale * h @ b.T,
            "grad.x": g @ w + d @ a,
            "grad.A": np.tensordot(d, x, (rows, rows)),
            "grad.B": scale * np.tensordot(g, h, (rows, rows)),
            "merged.weight": w + scale * b @ a,
        }
        return answer | ({"merged.bias": given["bias"]} if "bias" in given else {})


class WrongScale(Lora):
    """alpha r instead of alpha / r."""

    def scale(self, config: dict) -> float:
        return config["alpha"] * config["r"]


PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from implementations import Lora
from refpeft.conformance import tensors, vectors

mine, ill = Lora(), {ill!r}
for line in sys.stdin:
    request = json.loads(line)
    if request["cmd"] == "stop":
        break
    if request["cmd"] == "start":
        print(json.dumps({start!r}), flush=True)
        continue
    case = vectors.read(Path(request["case"]))
    answer = {{"seq": request["seq"], "status": "ok"}}
    if case.id in ill:
        exec(ill[case.id])
    try:
        tensors.write(request["out"], mine.run(case, case.given(request["dtype"]), request["dtype"]))
    except NotImplementedError as error:
        answer |= {{"status": "not implemented", "reason": str(error)}}
    if case.id in ill and "after" in ill[case.id]:
        after(request["out"])
    print(json.dumps(answer), flush=True)
"""
START = {"protocol": 1, "name": "program", "version": "3", "dtypes": ["float32"]}


def program(folder: Path, ill: dict[str, str] | None = None, start: dict | None = None) -> str:
    """The command of a program that answers as Lora does; at the cases of `ill` it runs these lines before."""
    here = Path(__file__).parent
    text = PROGRAM.format(paths=[str(here), str(here.parent)], ill=ill or {}, start=start or START)
    (folder / "program.py").write_text(text)
    return f"{sys.executable} {folder / 'program.py'}"
