"""The systems of cpu.py: workers that train what cpu_cases.prepare wrote, and the first gradients of each."""

import contextlib
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cpu_cases import CLIP, LR, Case
from machine import Turns, train

# ---- refpeft ---------------------------------------------------------------------------------------------------------


def train_refpeft(turns: Turns, case: Case, folder: Path, threads: int, quantized: bool = False) -> None:
    trainer = _trainer(case, folder, threads, quantized, steps=10**6, clip=CLIP)
    turns.ready(frozen=trainer.model.nbytes)
    train(turns, trainer)


def gradients_of_refpeft(
    turns: Turns, case: Case, folder: Path, out: Path, threads: int, quantized: bool = False
) -> None:
    """Writes the gradients of the first step as if they were an adapter's values, and says the loss."""
    from refpeft import adapters

    trainer = _trainer(case, folder, threads, quantized, steps=1, clip=0.0)

    def keep_gradients() -> None:
        trainer.flat.values[...] = trainer.flat.grads

    trainer.optimizer.apply = keep_gradients
    loss = trainer.run().train_losses[0]
    adapters.save(out, trainer.model)
    turns.ready(loss=loss)


def _trainer(case: Case, folder: Path, threads: int, quantized: bool, steps: int, clip: float) -> Any:
    import refpeft
    from refpeft.batches import Batches
    from refpeft.config import Train

    how = {"quantizer": "nf4", "double_quant": True} if quantized else {}
    model = refpeft.load(folder / "model", folder / "adapter", **how)
    examples = pickle.loads((folder / "examples.pickle").read_bytes())
    batches = Batches(examples, case.rows, max(map(len, examples)))
    settings = Train(lr=LR, batch=case.rows, steps=steps, schedule="constant", warmup=0, clip=clip, threads=threads)
    return refpeft.Trainer(model, batches, None, settings)


# ---- transformers and PEFT -------------------------------------------------------------------------------------------


def train_torch(
    turns: Turns,
    case: Case,
    folder: Path,
    threads: int,
    attention: str,
    compiled: bool = False,
    quantized: bool = False,
) -> None:
    """Steps as they are written everywhere: the model's own loss, backward, clipping, AdamW."""
    import torch

    torch.set_num_threads(threads)
    model = _peft_model(case, folder, attention, quantized)
    forward = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    turns.ready(frozen=_frozen_bytes(model))
    for batch in _batches(folder):
        turns.wait()
        loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.done(loss=float(loss.detach()), tokens=int(batch["attention_mask"].sum()))


def gradients_of_torch(
    turns: Turns,
    case: Case,
    folder: Path,
    out: Path,
    threads: int,
    attention: str,
    dtype: str = "float32",
    quantized: bool = False,
) -> None:
    """As gradients_of_refpeft. In float64 nothing is rounded to float32 but the stored weights' values."""
    import torch

    torch.set_num_threads(threads)
    exact = dtype == "float64"
    model = _peft_model(case, folder, attention, quantized, dequantized=exact)
    with _in_float64(model) if exact else contextlib.nullcontext():
        loss = model(**next(_batches(folder))).loss
        loss.backward()
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.grad
    model.save_pretrained(out)
    turns.ready(loss=float(loss.detach()))


def _peft_model(case: Case, folder: Path, attention: str, quantized: bool, dequantized: bool = False) -> Any:
    logging.disable(logging.WARNING)  # what the libraries say of one another
    warnings.simplefilter("ignore", FutureWarning)
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM
    if case.family == "bert":
        kind = transformers.AutoModelForSequenceClassification
    how = {"dtype": torch.float32, "attn_implementation": attention}
    if quantized:
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        how["device_map"] = "cpu"
    base = kind.from_pretrained(folder / "model", **how)
    if quantized and dequantized:
        base = base.dequantize()
    base.config.use_cache = False
    model = peft.PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    return model.train()


def _in_float64(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Takes a model to float64; within what it returns, transformers does not go back to float32 for some steps."""
    import torch

    sys.path.append(str(Path(__file__).parents[1]))
    from torch_float64 import Float64

    model.double()
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # of rotary positions, computed in float32
            size = 2 * len(module.inv_freq)
            base = model.config.rope_parameters["rope_theta"]
            module.inv_freq = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return Float64()


def _batches(folder: Path) -> Iterator[dict[str, Any]]:
    """The arguments of transformers' models, step by step."""
    import numpy as np
    import torch

    names = {"input_ids": "ids", "attention_mask": "mask", "labels": "labels"}
    with np.load(folder / "batches.npz") as stored:
        for step in range(len(stored) // len(names)):
            yield {name: torch.from_numpy(stored[f"{step}.{array}"]) for name, array in names.items()}


def _frozen_bytes(model: Any) -> int:
    """Bytes of frozen weights, with the constants that bitsandbytes keeps beside the packed ones."""
    total = 0
    for value in model.parameters():
        if value.requires_grad:
            continue
        total += value.nbytes
        state = getattr(value, "quant_state", None)
        for part in (state, state and state.state2):
            if part is not None:
                total += part.absmax.nbytes + part.code.nbytes
    return total


# ---- all of them -----------------------------------------------------------------------------------------------------


def systems(
    case: Case, folder: Path, threads: list[int], compiled: bool
) -> dict[str, tuple[int, Callable[[Turns], None]]]:
    """(threads, worker) by name: refpeft first, with each number of threads; the others with the most."""
    most = max(threads)
    found = {}
    for count in sorted(threads, reverse=True):
        name = "refpeft" if count == most else f"refpeft, {count} thread{'s' * (count > 1)}"
        found[name] = count, partial(train_refpeft, case=case, folder=folder, threads=count, quantized=case.quantized)
    of_torch = partial(train_torch, case=case, folder=folder, threads=most)
    if case.quantized:
        found["refpeft, not quantized"] = most, partial(train_refpeft, case=case, folder=folder, threads=most)
        found["PEFT + bitsandbytes, sdpa"] = most, partial(of_torch, attention="sdpa", quantized=True)
        return found
    found["transformers + PEFT, eager"] = most, partial(of_torch, attention="eager")
    found["transformers + PEFT, sdpa"] = most, partial(of_torch, attention="sdpa")
    if compiled:
        found["the same, torch.compile"] = most, partial(of_torch, attention="sdpa", compiled=True)
    return found


def checks(case: Case, folder: Path, threads: int) -> dict[str, tuple[Path, Callable[[Turns], None]]]:
    """(where its gradients will be, worker) by name: the reference in float64 first."""
    given = {"case": case, "folder": folder, "threads": threads, "quantized": case.quantized}
    workers = {
        "transformers + PEFT, eager, float64": partial(gradients_of_torch, attention="eager", dtype="float64"),
        "refpeft": gradients_of_refpeft,
        "transformers + PEFT, eager": partial(gradients_of_torch, attention="eager"),
        "transformers + PEFT, sdpa": partial(gradients_of_torch, attention="sdpa"),
    }
    return {
        name: (folder / f"gradients-{i}", partial(work, out=folder / f"gradients-{i}", **given))
        for i, (name, work) in enumerate(workers.items())
    }
