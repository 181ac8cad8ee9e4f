"""QLoRA beside LoRA: loss, bytes of frozen weights, and peak memory, each in a process of its own.

    python tests/bench/qlora.py MODEL DATA [--steps N] [--threads N] [--device cuda] [--only NAME ...]

MODEL is a Hugging Face directory or a GGUF file, DATA holds train.jsonl and valid.jsonl. LoRA r = 64, alpha = 128 on
all linear layers but the head, as arXiv:2305.14314 does, AdamW, learning rate 5e-4 with a warm-up and cosine decay,
batch 8, gradient norm at most 1. Prints a row for each way to keep the
frozen weights: bits of a quantized weight, MiB of all frozen weights, the peak of resident memory (VmHWM; MiB) when the
model is loaded and when it has been trained, the loss over the response tokens of valid.jsonl before and after, and
seconds a step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LENGTH, BATCH, LR = 512, 8, 5e-4
WAYS = {
    "LoRA, float32": {},
    "LoRA, bfloat16": {"dtype": "bfloat16"},
    "QLoRA, NF4": {"quantizer": "nf4"},
    "QLoRA, NF4 + DQ": {"quantizer": "nf4", "double_quant": True},
    "QLoRA, NF4 + DQ, rest bfloat16": {"quantizer": "nf4", "double_quant": True, "dtype": "bfloat16"},
}
COLUMNS = ("bits", "frozen MiB", "loaded MiB", "trained MiB", "before", "after", "s a step")


def measure(model_path: str, data: Path, way: dict, steps: int, threads: int, device: str) -> dict:
    import threadpoolctl

    import refpeft
    from refpeft import report
    from refpeft.batches import Batches
    from refpeft.config import Train
    from refpeft.data import load_data
    from refpeft.evaluation import mean_loss
    from refpeft.trainer import Trainer

    with threadpoolctl.threadpool_limits(threads):
        model = refpeft.load(model_path, device=device, **way)
        found = {"frozen MiB": model.nbytes / 2**20, "loaded MiB": report.peak() / 2**20}
        weights = [model.frozen[name] for name in model.quantizable]
        found["bits"] = 8 * sum(w.nbytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)
        rows = {name: load_data(data / f"{name}.jsonl", model.tokenizer, length=LENGTH) for name in ("train", "valid")}
        train = Batches(rows["train"].examples, BATCH, LENGTH, seed=0)
        valid = Batches(rows["valid"].examples, BATCH, LENGTH, shuffle=False)
        refpeft.attach(model, "lora", {"r": 64, "alpha": 128.0, "targets": "all-linear"}, seed=0)
        settings = Train(lr=LR, batch=BATCH, steps=steps)
        seconds, started = [], time.perf_counter()

        def watch(record: dict) -> None:
            nonlocal started
            if "loss" in record:
                seconds.append(time.perf_counter() - started)
            started = time.perf_counter()

        found["before"] = mean_loss(model, valid)
        started = time.perf_counter()
        Trainer(model, train, None, settings, listeners=[watch]).run()
        found["trained MiB"] = report.peak() / 2**20
        found["after"] = mean_loss(model, valid)
    return found | {"s a step": statistics.median(seconds)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("model")
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--steps", type=int, default=250)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--only", action="append", choices=WAYS, help="one of the ways; repeatable")
    arguments.add_argument("--here", choices=WAYS, help=argparse.SUPPRESS)  # measured in this process
    given = arguments.parse_args()
    if given.here:
        print(json.dumps(measure(given.model, given.data, WAYS[given.here], given.steps, given.threads, given.device)))
        return
    print("| | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1), flush=True)
    for way in given.only or WAYS:
        command = [sys.executable, __file__, given.model, str(given.data), "--here", way]
        command += ["--steps", str(given.steps), "--threads", str(given.threads), "--device", given.device]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {way} | " + " | ".join(f"{found[column]:.5g}" for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
