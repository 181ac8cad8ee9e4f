"""SmolLM2 on E2E: the base with and without examples in its prompt, prompts, LoRA and QLoRA in one table; PEFT beside.

    python tests/bench/e2e.py MODEL DATA --out DIR [--only NAME ...] [--jobs N] [--threads N] [--device cpu|cuda]
                              [--rows N] [--batch N] [--epochs N] [--held-out N] [--prompts N] [--seed N]
                              [--times X]

MODEL is a Hugging Face directory or a GGUF file, DATA holds train.txt and valid.txt of attributes||sentence lines. Used
are --rows of train.txt, --held-out rows of valid.txt for the loss, and --prompts distinct prompts of valid.txt for BLEU
(sacrebleu's corpus BLEU, each prompt with all its references; greedy answers up to the end of the line, at most 64
tokens). All are trained by `refpeft train`: AdamW, gradient norm at most 1, a warm-up over 3 % of the steps and a
cosine, float32. The peer starts from the same adapter, sees the same batches, and writes an adapter in PEFT's form
that is scored here like all others.

Prints the loss over the response tokens of the held-out rows (EOS included) before and after, BLEU, and seconds a step,
and writes results.json. Each row of the table is a process, --jobs at a time; finished ones lie in DIR and are not run
again. Needs the extra `oracle` for the peers, and sacrebleu.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

LENGTH, LONGEST, WARMUP = 256, 64, 0.03


@dataclass(frozen=True)
class Way:
    method: str = ""  # "": the base
    lr: float = 0.0
    options: dict = field(default_factory=dict)
    quantizer: str = ""
    shots: int = 0
    peer: bool = False


LORA = Way("lora", 2e-3, {"r": 8, "alpha": 16.0})
PREFIX = Way("prefix_tuning", 1e-2, {"tokens": 10, "init_std": 0.1})
PROMPT = Way("prompt_tuning", 3e-2, {"tokens": 20})
WAYS = {
    "base, 0 shots": Way(),
    "base, 4 shots": Way(shots=4),
    "prompt tuning": PROMPT,
    "prefix tuning": PREFIX,
    "LoRA": LORA,
    "QLoRA": Way("lora", 2e-3, {"r": 8, "alpha": 16.0}, quantizer="nf4"),
    "LoRA, PEFT": Way(**vars(LORA) | {"peer": True}),
    "prefix tuning, PEFT": Way(**vars(PREFIX) | {"peer": True}),
    "prompt tuning, PEFT": Way(**vars(PROMPT) | {"peer": True}),
}
COLUMNS = {"trained": ",.0f", "before": ".4f", "after": ".4f", "BLEU": ".2f", "s a step": ".2f"}


def folder(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").lower()


def draw(given: argparse.Namespace) -> None:
    """Writes the rows that are used into the run directory; prompts.txt has all that BLEU's prompts are drawn from."""
    for name, source, count in (
        ("train", "train", given.rows),
        ("valid", "valid", given.held_out),
        ("prompts", "valid", 0),
    ):
        rows = (given.data / f"{source}.txt").read_text("utf-8").strip("\n").split("\n")
        chosen = random.Random(given.seed).sample(rows, count) if count else rows
        (given.out / f"{name}.txt").write_text("\n".join(chosen) + "\n", "utf-8")


def asked(file: Path, count: int, seed: int) -> dict[str, list[str]]:
    """So many distinct prompts of a file, each with all its references."""
    from refpeft.items import references

    found = references(items(file))
    return {prompt: found[prompt] for prompt in random.Random(seed).sample(sorted(found), count)}


def items(file: Path) -> list:
    """The rows of a file as refpeft puts them: prompts and completions."""
    from refpeft.formats import read_items

    return read_items(file).items


# ---- what is measured ------------------------------------------------------------------------------------------------


def measured(name: str, given: argparse.Namespace) -> dict:
    """A row of the table."""
    import refpeft

    way, run = WAYS[name], given.out / folder(name)
    if way.peer:
        found = peer(way, run, given)
    elif way.method:
        found = trained(way, run, given)
    else:
        found, run = {}, None
    quantized = {"quantizer": way.quantizer, "double_quant": True} if way.quantizer else {}
    model = refpeft.load(given.model, run, device=given.device, **quantized)
    if not way.method:
        found = {"trained": 0, "before": base_loss(model, way.shots, given)}
    return found | {"BLEU": bleu(model, way.shots, given)}


def trained(way: Way, run: Path, given: argparse.Namespace) -> dict:
    """What `refpeft train` says of a run."""
    command = [sys.executable, "-m", "refpeft", "train", "--json", "--model", given.model, "--out", str(run)]
    command += ["--data", str(given.out / "train.txt"), "--eval-data", str(given.out / "valid.txt")]
    command += [
        "--method",
        way.method,
        "--lr",
        str(way.lr * given.times),
        "--batch",
        str(given.batch),
        "--length",
        str(LENGTH),
    ]
    command += ["--epochs", str(given.epochs), "--seed", str(given.seed), "--device", given.device]
    command += ["--set", f"train.warmup={WARMUP}", "--set", "train.schedule=cosine", "--set", "train.clip=1.0"]
    if way.quantizer:
        command += ["--quantizer", way.quantizer, "--double-quant"]
    for key, value in way.options.items():
        command += ["--set", f"{way.method}.{key}={json.dumps(value)}"]
    if run.is_dir() and any(run.iterdir()):
        command += ["--resume"]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "trained": said["trained"],
        "before": said["loss_before"],
        "after": said["loss_after"],
        "s a step": statistics.median(record["seconds"] for record in records if "seconds" in record),
    }


def peer(way: Way, run: Path, given: argparse.Namespace) -> dict:
    """The same with transformers + PEFT; leaves the adapter in `run`."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from wikisql import hugging_face

    import refpeft
    from refpeft import adapters, schedule
    from refpeft.batches import Batches
    from refpeft.data import load_data

    model = refpeft.load(given.model)
    examples = {
        name: load_data(given.out / f"{name}.txt", model.tokenizer, length=LENGTH).examples
        for name in ("train", "valid")
    }
    train = Batches(examples["train"], given.batch, LENGTH, seed=given.seed)
    valid = Batches(examples["valid"], given.batch, LENGTH, shuffle=False)
    with tempfile.TemporaryDirectory() as start:
        adapters.save(start, model, refpeft.attach(model, way.method, way.options, seed=given.seed))
        base = AutoModelForCausalLM.from_pretrained(hugging_face(model, Path(start, "model")), dtype=torch.float32)
        config = peft.PeftConfig.from_pretrained(start)
        config.inference_mode = False
        net = peft.get_peft_model(base, config).to(given.device)
        peft.set_peft_model_state_dict(net, peft.utils.load_peft_weights(start, device=given.device))
    del model
    params = [p for p in net.parameters() if p.requires_grad]
    lr = way.lr * given.times
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    steps = math.ceil(given.epochs * train.steps_per_epoch)
    warmup = schedule.warmup_steps(WARMUP, steps)

    def loss_sum(batch):
        ids = torch.tensor(batch.ids, dtype=torch.long, device=given.device)
        real = torch.ones_like(ids) if batch.segments is None else torch.tensor(batch.segments >= 0).to(ids)
        targets = torch.tensor(batch.targets, dtype=torch.long, device=given.device)
        logits = net(input_ids=ids, attention_mask=real).logits[:, -ids.shape[1] :]  # those of a prompt come first
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )

    def evaluate():
        with torch.no_grad():
            return sum(loss_sum(b).item() for b in valid) / sum(b.supervised for b in valid)

    before, seconds = evaluate(), []
    for step in range(steps):
        started = time.perf_counter()
        batch = train.at(step)
        loss = loss_sum(batch) / batch.supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.factor("cosine", step, steps, warmup)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a device has finished
        seconds.append(time.perf_counter() - started)
    net.save_pretrained(run)
    return {
        "trained": sum(p.numel() for p in params),
        "before": before,
        "after": evaluate(),
        "s a step": statistics.median(seconds),
    }


def shots_text(count: int, given: argparse.Namespace) -> str:
    """So many training rows, each on a line, as they stand before a prompt."""
    shown = items(given.out / "train.txt")[:count]
    return "".join(f"{item.prompt}{item.completion}\n" for item in shown)


def base_loss(model, shots: int, given: argparse.Namespace) -> float:
    from refpeft.batches import Batches
    from refpeft.data import load_data
    from refpeft.evaluation import mean_loss

    before = shots_text(shots, given)
    rows = [{"prompt": before + item.prompt, "completion": item.completion} for item in items(given.out / "valid.txt")]
    file = given.out / f"valid-{shots}-shots.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    examples = load_data(file, model.tokenizer).examples
    return mean_loss(model, Batches(examples, given.batch, max(map(len, examples)), shuffle=False))


def bleu(model, shots: int, given: argparse.Namespace) -> float:
    """Of the answers to the prompts, against all references of each."""
    import sacrebleu

    from refpeft.generate import generate

    tokenizer, before = model.tokenizer, shots_text(shots, given)
    wanted = asked(given.out / "prompts.txt", given.prompts, given.seed)
    prompts = [tokenizer.encode(before + prompt, specials=True) for prompt in wanted]
    stop = {*tokenizer.eos_ids, *tokenizer.encode("\n")}
    said = [tokenizer.decode(answer) for answer in generate(model, prompts, LONGEST, stop=stop)]
    said = [text.partition("\n")[0].strip() for text in said]
    most = max(map(len, wanted.values()))
    references = [[refs[i] if i < len(refs) else None for refs in wanted.values()] for i in range(most)]
    return sacrebleu.corpus_bleu(said, references).score


# ---- all of them -----------------------------------------------------------------------------------------------------


def result(name: str, given: argparse.Namespace) -> dict:
    """A row of the table, from its file or from a process of its own; {} where that failed."""
    file = given.out / f"{folder(name)}.json"
    if not file.is_file():
        started = time.perf_counter()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
        with file.with_suffix(".log").open("w") as log:
            command = [sys.executable, *sys.argv, "--here", name]
            failed = subprocess.run(command, env=os.environ | threads, stdout=log, stderr=log).returncode
        how = f"failed: see {log.name}" if failed else f"done after {time.perf_counter() - started:.0f} s"
        print(f"{name} {how}", file=sys.stderr, flush=True)
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("model")
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", action="append", choices=WAYS, help="one row of the table; repeatable")
    arguments.add_argument("--rows", type=int, default=2000, help="training rows")
    arguments.add_argument("--held-out", type=int, default=200, help="rows for the loss")
    arguments.add_argument("--prompts", type=int, default=100, help="for BLEU")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--epochs", type=float, default=1.0)
    arguments.add_argument("--times", type=float, default=1.0, help="what the learning rates are multiplied by")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments.add_argument("--threads", type=int, default=2, help="of each job")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--here", choices=WAYS, help=argparse.SUPPRESS)  # measured in this process
    given = arguments.parse_args()
    if given.here:
        found = json.dumps(measured(given.here, given), indent=1)
        (given.out / f"{folder(given.here)}.json").write_text(found + "\n", "utf-8")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    draw(given)
    names = given.only or list(WAYS)
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(names, pool.map(lambda name: result(name, given), names), strict=True))
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("| | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    for name, row in found.items():
        cells = [format(row[column], form) if column in row else "-" for column, form in COLUMNS.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, row in found.items():
        theirs = found.get(f"{name}, PEFT")
        if row and theirs:
            print(f"{name}: the loss after is {abs(row['after'] / theirs['after'] - 1):.2%} from PEFT's")


if __name__ == "__main__":
    main()
