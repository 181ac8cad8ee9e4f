"""MiniLM on SST-2: methods trained here and with transformers + PEFT, from the same values over the same batches.

    python tests/bench/sst2.py MODEL DATA --out DIR [--methods lora,...] [--seeds N] [--side refpeft|peer|both]
                               [--epochs N] [--times X] [--jobs N] [--device cpu|cuda]

MODEL is a BERT-style directory without a classifier, DATA holds train.tsv and dev.tsv (sentence, tab, 0 or 1; no
header). Both sides: AdamW without weight decay, batch 32, gradient norm at most 1, a warm-up over 6 % of the steps and
then a straight line to zero, no dropout, float32, the classifier trained beside every method. A seed decides the first
values and the order of rows, the same on both sides. PEFT gives the peer LoRA, IA3 and prompt tuning; the others are
plain torch. --times multiplies the learning rates, which came from short runs of the peer (2,000 rows): there LoRA,
BitFit, Houlsby and IA3 had been as good or better with two to three times as much.

Prints dev accuracy, mean and standard deviation over the seeds, of both sides, and writes results.json. The baseline is
a logistic regression on the frozen model's mean-pooled states. Each run is a process with one thread of its own, --jobs
at a time; finished runs lie in DIR and are not run again. Needs the extra `oracle` and scikit-learn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BATCH, WARMUP, LENGTH = 32, 0.06, 128


@dataclass(frozen=True)
class Method:
    lr: float
    options: dict = field(default_factory=dict)


METHODS = {
    "lora": Method(2e-3, {"r": 8, "alpha": 16.0}),
    "bitfit": Method(3e-3),
    "houlsby": Method(1e-3, {"size": 64, "activation": "gelu"}),
    "ia3": Method(1e-2),
    "prompt_tuning": Method(3e-2, {"tokens": 20, "head_reads": "prompt"}),  # the first row is what PEFT's head reads
    "top_layers": Method(5e-4, {"count": 2}),
    "full": Method(2e-4),
}


# ---- here ------------------------------------------------------------------------------------------------------------


def ours(method: str, seed: int, given: argparse.Namespace) -> dict:
    """What `refpeft train` says of a run."""
    run = given.out / f"{method}-refpeft-{seed}"
    command = [sys.executable, "-m", "refpeft", "train", "--json", "--task", "classify", "--out", str(run)]
    command += ["--model", given.model, "--method", method, "--seed", str(seed), "--device", given.device]
    command += ["--data", str(given.data / "train.tsv"), "--eval-data", str(given.data / "dev.tsv")]
    command += ["--batch", str(BATCH), "--length", str(LENGTH), "--epochs", str(given.epochs)]
    command += ["--lr", str(METHODS[method].lr * given.times), "--set", "train.schedule=linear"]
    command += ["--set", f"train.warmup={WARMUP}", "--set", "train.clip=1.0"]
    for key, value in METHODS[method].options.items():
        command += ["--set", f"{method}.{key}={json.dumps(value)}"]
    if run.is_dir() and any(run.iterdir()):
        command += ["--resume"]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "accuracy": said["after"]["accuracy"],
        "loss": said["after"]["loss"],
        "trained": said["trained"],
        "seconds": sum(record.get("seconds", 0.0) for record in records),
    }


def frozen_features(given: argparse.Namespace) -> float:
    """Dev accuracy of a logistic regression on mean-pooled states."""
    from sklearn.linear_model import LogisticRegression

    import refpeft
    from refpeft.formats import read_items
    from refpeft.tensor import no_grad

    model = refpeft.load(given.model, device=given.device)

    def features(file: Path) -> tuple[np.ndarray, np.ndarray]:
        items = read_items(file).items
        rows = [model.tokenizer.encode_pair(item.text)[0][:LENGTH] for item in items]
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        means = np.zeros((len(rows), model.config.dim), np.float32)
        for at in range(0, len(rows), BATCH):
            chosen = longest_first[at : at + BATCH]
            ids, segments = padded([rows[i] for i in chosen])
            with no_grad():
                states = refpeft.backend.to_host(model(ids, segments=segments).data)
            real = (segments >= 0)[..., None]
            means[chosen] = (states * real).sum(axis=1) / real.sum(axis=1)
        return means, np.array([item.label for item in items])

    regression = LogisticRegression(max_iter=1000).fit(*features(given.data / "train.tsv"))
    return float(regression.score(*features(given.data / "dev.tsv")))


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments (rows, longest)."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    segments = np.full_like(ids, -1)
    for i, row in enumerate(rows):
        ids[i, : len(row)], segments[i, : len(row)] = row, 0
    return ids, segments


# ---- the peer --------------------------------------------------------------------------------------------------------


def peer(method: str, seed: int, given: argparse.Namespace) -> dict:
    import torch
    from transformers import AutoModelForSequenceClassification

    import refpeft
    from refpeft import api, schedule, tasks
    from refpeft.batches import Batches
    from refpeft.data import examples_of
    from refpeft.formats import read_items
    from refpeft.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(given.model)
    model = api.build(checkpoint, "float32", task="classify", labels=("0", "1"), seed=seed)
    model.name = given.model
    task = tasks.make("classify", model.tokenizer, model.config, labels=model.labels)

    def batches(name: str, **how) -> Batches:
        file = given.data / f"{name}.tsv"
        return Batches(examples_of(read_items(file), task, str(file), LENGTH).examples, BATCH, LENGTH, **how)

    train, dev = batches("train", seed=seed), batches("dev", shuffle=False)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = AutoModelForSequenceClassification.from_pretrained(
        given.model, num_labels=2, dtype=torch.float32, **no_dropout
    )
    adapter = refpeft.attach(model, method, METHODS[method].options, seed=seed)
    with torch.no_grad():
        base.classifier.weight.copy_(torch.tensor(adapter.params["classifier.weight"].data))
        base.classifier.bias.copy_(torch.tensor(adapter.params["classifier.bias"].data))
    net = PEERS[method](base, model, adapter).to(given.device).train()
    del model, adapter
    params = [p for p in net.parameters() if p.requires_grad]
    lr, steps = METHODS[method].lr * given.times, given.epochs * train.steps_per_epoch
    warmup = schedule.warmup_steps(WARMUP, steps)
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def asked(batch):
        ids = torch.tensor(batch.ids, dtype=torch.long, device=given.device)
        real = torch.ones_like(ids) if batch.segments is None else torch.tensor(batch.segments >= 0).to(ids)
        return net(input_ids=ids, attention_mask=real).logits, torch.tensor(batch.targets[:, 0]).to(ids)

    started = time.perf_counter()
    for step in range(steps):
        torch.nn.functional.cross_entropy(*asked(train.at(step))).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.factor("linear", step, steps, warmup)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    right, loss = 0, 0.0
    with torch.no_grad():
        for logits, labels in map(asked, dev):
            right += (logits.argmax(-1) == labels).sum().item()
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return {
        "accuracy": right / len(dev.rows),
        "loss": loss / len(dev.rows),
        "trained": sum(p.numel() for p in params),
        "seconds": seconds,
    }


def with_lora(net, model, adapter):
    import peft
    import torch

    options = METHODS["lora"].options
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=options["r"], lora_alpha=options["alpha"], target_modules=["query", "value"]
    )
    net = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            site, lora_a, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
            if lora_a:
                parameter.copy_(torch.tensor(adapter.params[f"{site}.A"].data))
    return net


def with_ia3(net, model, adapter):
    import peft

    down = r".*layer\.\d+\.output\.dense"
    targets = rf".*self\.(key|value)|{down}"
    return peft.get_peft_model(
        net, peft.IA3Config(task_type="SEQ_CLS", target_modules=targets, feedforward_modules=down)
    )


def with_prompt(net, model, adapter):
    import peft
    import torch

    tokens = METHODS["prompt_tuning"].options["tokens"]
    net = peft.get_peft_model(net, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=tokens))
    rows = adapter.params[f"{model.embed.name}.prompt"].data
    with torch.no_grad():
        net.prompt_encoder["default"].embedding.weight.copy_(torch.tensor(rows))
    return net


def with_bottlenecks(net, model, adapter):
    import torch

    class Bottleneck(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.down, self.down_bias, self.up, self.up_bias = map(torch.nn.Parameter, values)

        def forward(self, h):
            inner = torch.nn.functional.gelu(torch.nn.functional.linear(h, self.down, self.down_bias))
            return h + torch.nn.functional.linear(inner, self.up, self.up_bias)

    for i, layer in enumerate(net.bert.encoder.layer):
        for place, name in ((layer.attention.output, "attn_out"), (layer.output, "mlp_out")):
            parts = (f"bert.encoder.layer.{i}.{name}.{part}" for part in ("down", "down_bias", "up", "up_bias"))
            values = [torch.tensor(adapter.params[part].data) for part in parts]
            place.dense = torch.nn.Sequential(place.dense, Bottleneck(values))
    return only(net, lambda name: "LayerNorm" in name or ".dense.1." in name)


def only(net, trained):
    """Trains the parameters whose names `trained` says, and the classifier."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name.startswith("classifier.") or trained(name)
    return net


def with_top_layers(net, model, adapter):
    last = range(net.config.num_hidden_layers)[-METHODS["top_layers"].options["count"] :]
    return only(net, lambda name: any(f".layer.{i}." in name for i in last))


PEERS = {
    "lora": with_lora,
    "bitfit": lambda net, model, adapter: only(net, lambda name: name.endswith(".bias")),
    "houlsby": with_bottlenecks,
    "ia3": with_ia3,
    "prompt_tuning": with_prompt,
    "top_layers": with_top_layers,
    "full": lambda net, model, adapter: net,
}


# ---- all of them -----------------------------------------------------------------------------------------------------


def measured(name: str, given: argparse.Namespace) -> dict:
    if name == "features":
        return {"accuracy": frozen_features(given)}
    method, side, seed = name.rsplit("-", 2)
    return (ours if side == "refpeft" else peer)(method, int(seed), given)


def result(name: str, given: argparse.Namespace) -> dict:
    """What a run gave, from its file or from a process of its own; {} where it failed."""
    file = given.out / f"{name}.json"
    if not file.is_file():
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with (given.out / f"{name}.log").open("w") as log:
            command = [sys.executable, *sys.argv, "--here", name]
            done = subprocess.run(command, env=os.environ | threads, stdout=log, stderr=log)
        if done.returncode:
            print(f"{name} failed: see {log.name}", file=sys.stderr, flush=True)
            return {}
    found = json.loads(file.read_text("utf-8"))
    print(name, json.dumps(found), file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict], given: argparse.Namespace) -> list[str]:
    """Markdown: dev accuracy in percent, mean +- standard deviation, of each method on each side."""
    baseline = found["features"].get("accuracy")
    lines = ["| method | learning rate | trained | refpeft | transformers + PEFT | apart |", "|" + " --- |" * 6]
    if baseline is not None:
        lines.append(f"| frozen features, logistic regression | | | {baseline:.1%} | | |")
    for method in given.methods:
        sides = {}
        for side in ("refpeft", "peer"):
            runs = [found.get(f"{method}-{side}-{seed}", {}) for seed in range(given.seeds)]
            sides[side] = [100 * run["accuracy"] for run in runs if run]
        trained = {row["trained"] for name, row in found.items() if name.startswith(f"{method}-") and row}
        cells = [method, f"{METHODS[method].lr * given.times:g}", " / ".join(f"{n:,}" for n in trained)]
        cells += [f"{statistics.fmean(v):.2f} ± {deviation(v):.2f}" if v else "-" for v in sides.values()]
        cells.append(apart(*sides.values()) if all(sides.values()) else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def apart(a: list[float], b: list[float]) -> str:
    """How far the means are from each other, and whether that is within one standard deviation."""
    gap, width = abs(statistics.fmean(a) - statistics.fmean(b)), max(deviation(a), deviation(b))
    return f"{gap:.2f}: {'within' if gap <= width else 'more than'} one deviation"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("model")
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--side", default="both", choices=["refpeft", "peer", "both"])
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--times", type=float, default=1.0, help="what the learning rates are multiplied by")
    arguments.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--here", help=argparse.SUPPRESS)  # the run that is measured in this process
    given = arguments.parse_args()
    if given.here:
        found = json.dumps(measured(given.here, given))
        (given.out / f"{given.here}.json").write_text(found + "\n", "utf-8")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    sides = ["refpeft", "peer"] if given.side == "both" else [given.side]
    runs = [f"{method}-{side}-{seed}" for seed in range(given.seeds) for method in given.methods for side in sides]
    runs.insert(0, "features")
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(runs, pool.map(lambda name: result(name, given), runs), strict=True))
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("\n".join(table(found, given)))


if __name__ == "__main__":
    main()
