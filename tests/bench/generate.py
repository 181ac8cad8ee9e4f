"""Tokens a second of greedy generation with cached keys and values: here and with transformers, on the same CPU.

    python tests/bench/generate.py MODEL [--rows 1 8] [--prompt 64] [--new 128] [--rounds 5] [--threads 2] [--json FILE]

MODEL is a Hugging Face directory or a GGUF file; both sides read the same weights in float32. Prompts are stretches of
this repository's README. All go on to the last token, whatever they say, and take their turns as in cpu.py; medians are
over the samples in which little else ran. Says how many rows are those that refpeft writes. Needs the extra `oracle`.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from cpu_cases import write_real_model
from machine import Turns, Worker, alternate, description, median

README = Path(__file__).parents[2] / "README.md"
WARM_UP = 1


def prepare(turns: Turns, model: str, rows: int, length: int, folder: Path) -> None:
    """A worker that writes the model into `folder` and says the prompts."""
    import refpeft

    loaded = refpeft.load(model)
    write_real_model(loaded, folder / "model")
    ids = [int(i) for i in loaded.tokenizer.encode(README.read_text())]
    turns.ready(prompts=[ids[row * length : (row + 1) * length] for row in range(rows)])


def refpeft_writes(turns: Turns, folder: Path, prompts: list[list[int]], new: int) -> None:
    import refpeft
    from refpeft.generate import generate

    model = refpeft.load(folder / "model")
    turns.ready()
    while True:
        turns.wait()
        turns.done(tokens=generate(model, prompts, new))


def transformers_writes(
    turns: Turns, folder: Path, prompts: list[list[int]], new: int, threads: int, attention: str
) -> None:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation=attention
    )
    model.generation_config = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    ids = torch.tensor(prompts)
    turns.ready()
    while True:
        turns.wait()
        out = model.generate(ids, attention_mask=torch.ones_like(ids))
        turns.done(tokens=out[:, ids.shape[1] :].tolist())


def measure(folder: Path, prompts: list[list[int]], new: int, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """By system: tokens a second, peak memory and the share of tokens that are refpeft's."""
    given = {"folder": folder, "prompts": prompts, "new": new}
    workers = {"refpeft": Worker(threads, partial(refpeft_writes, **given))}
    for attention in ("eager", "sdpa"):
        work = partial(transformers_writes, **given, threads=threads, attention=attention)
        workers[f"transformers, {attention}"] = Worker(threads, work)
    alternate(workers, rounds, WARM_UP)
    found = {}
    for name, worker in workers.items():
        worker.stop()
        samples = [said["sample"] for said in worker.said[WARM_UP:]]
        pairs = zip(workers["refpeft"].said[-1]["tokens"], worker.said[-1]["tokens"], strict=True)
        found[name] = {
            "tokens/s": len(prompts) * new / median(samples),
            "peak MiB": worker.said[-1]["peak"] / 2**20,
            "quiet": f"{sum(sample.quiet for sample in samples)}/{len(samples)}",
            "same rows": f"{sum(a == b for a, b in pairs)}/{len(prompts)}",
        }
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("model")
    arguments.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--prompt", type=int, default=64, help="tokens that are there")
    arguments.add_argument("--new", type=int, default=128, help="tokens that are written")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--json", type=Path, metavar="FILE")
    given = arguments.parse_args()
    machine, found = description("numpy", "torch", "transformers"), {}
    print(f"{machine}\n\n| rows | | tokens/s | x | peak MiB | quiet | rows as refpeft's |\n|{' --- |' * 7}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        prepared = Worker(
            given.threads, partial(prepare, model=given.model, rows=max(given.rows), length=given.prompt, folder=folder)
        )
        prepared.stop()
        for rows in given.rows:
            found[rows] = measure(folder, prepared.loaded["prompts"][:rows], given.new, given.rounds, given.threads)
            ours = found[rows]["refpeft"]["tokens/s"]
            for name, row in found[rows].items():
                cells = f"{row['tokens/s']:.4g} | {row['tokens/s'] / ours:.2f} | {row['peak MiB']:.0f}"
                print(f"| {rows} | {name} | {cells} | {row['quiet']} | {row['same rows']} |", flush=True)
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine, "threads": given.threads, "rows": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
