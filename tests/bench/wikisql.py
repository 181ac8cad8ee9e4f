"""Fine-tuning SmolLM2 on WikiSQL here and with transformers + PEFT, from the same adapter over the same batches.

    python tests/bench/wikisql.py MODEL DATA refpeft|peft|both [--steps N] [--threads N]

MODEL is a Hugging Face directory or a GGUF file, DATA holds train.jsonl and valid.jsonl. LoRA r = 8, alpha = 16 on q
and v, AdamW, constant learning rate 1e-3, batch 8, gradient norm at most 1, float32. Prints the loss over the response
tokens of valid.jsonl (EOS included) before, after half of the steps and after all of them, and seconds a step.
Needs the extra `oracle` for the peer.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import threadpoolctl

import refpeft
from refpeft import adapters, files
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.data import load_data
from refpeft.evaluation import mean_loss
from refpeft.trainer import Trainer

LENGTH, BATCH, LR = 512, 8, 1e-3


def hugging_face(model: refpeft.models.base.Model, out: Path) -> str:
    """The directory that transformers can read the loaded model from: its own, or for a GGUF file `out`, written."""
    if Path(model.name).is_dir():
        return model.name
    out.mkdir()
    for name, content in model.checkpoint.files().items():
        (out / name).write_bytes(content)
    stored = model.checkpoint
    weights = {name: np.ascontiguousarray(stored.tensor(name)) for name in stored.names}
    files.write_safetensors(out / "model.safetensors", weights, {"format": "pt"})
    return str(out)


def ours(model, train: Batches, valid: Batches, steps: int) -> dict:
    settings = Train(lr=LR, batch=BATCH, steps=steps, schedule="constant", warmup=0, clip=1.0, log_every=1)
    trainer = Trainer(model, train, valid, settings)
    out = {"before": mean_loss(model, valid)}
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        trainer._step()
        seconds.append(time.perf_counter() - started)
        if step + 1 in (steps // 2, steps):
            out[f"after {step + 1}"] = mean_loss(model, valid)
            print("refpeft", json.dumps(out), f"{np.median(seconds):.2f} s a step", flush=True)
    return out | {"seconds": float(np.median(seconds))}


def peer(
    model_directory: str, adapter_directory: str, train: Batches, valid: Batches, steps: int, threads: int
) -> dict:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_directory, is_trainable=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def loss_sum(batch):
        mask = None if batch.segments is None else torch.tensor((batch.segments >= 0).astype("i8"))
        logits = model(input_ids=torch.tensor(batch.ids.astype("i8")), attention_mask=mask).logits
        targets = torch.tensor(batch.targets.astype("i8")).reshape(-1)
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets, ignore_index=-100, reduction="sum"
        )

    def evaluate():
        with torch.no_grad():
            return sum(float(loss_sum(b)) for b in valid) / sum(b.supervised for b in valid)

    out, seconds = {"before": evaluate()}, []
    for step in range(steps):
        started = time.perf_counter()
        batch = train.at(step)
        (loss_sum(batch) / batch.supervised).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        if step + 1 in (steps // 2, steps):
            out[f"after {step + 1}"] = evaluate()
            print("peft   ", json.dumps(out), f"{np.median(seconds):.2f} s a step", flush=True)
    return out | {"seconds": float(np.median(seconds))}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("model")
    arguments.add_argument("data", type=Path)
    arguments.add_argument("which", choices=["refpeft", "peft", "both"])
    arguments.add_argument("--steps", type=int, default=125)
    arguments.add_argument("--threads", type=int, default=2)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, threadpoolctl.threadpool_limits(given.threads):
        model = refpeft.load(given.model)
        rows = {
            name: load_data(given.data / f"{name}.jsonl", model.tokenizer, length=LENGTH) for name in ("train", "valid")
        }
        train = Batches(rows["train"].examples, BATCH, LENGTH, seed=0)
        valid = Batches(rows["valid"].examples, BATCH, LENGTH, shuffle=False)
        adapter = refpeft.attach(model, "lora", {"r": 8, "alpha": 16.0}, seed=0)
        results = {}
        if given.which != "refpeft":
            directory = hugging_face(model, Path(folder, "model"))
            adapters.save(Path(folder, "adapter"), model, adapter)
            results["peft"] = peer(directory, str(Path(folder, "adapter")), train, valid, given.steps, given.threads)
        if given.which != "peft":
            results["refpeft"] = ours(model, train, valid, given.steps)
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
