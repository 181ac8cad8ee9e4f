"""The systems of gpu.py: workers that train a case of gpu_cases.py, each in a process of its own on the same GPU."""

import gc
import importlib.util
import logging
import os
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_cases import LORA, Case, Random
from machine import Turns, train

LR, CLIP = 1e-4, 1.0
OURS = "refpeft"

# ---- refpeft ---------------------------------------------------------------------------------------------------------


def train_refpeft(turns: Turns, case: Case, quantized: bool | None = None) -> None:
    """Steps of a refpeft.Trainer, as `refpeft train --device cuda --dtype bfloat16` makes it."""
    trainer = trainer_of(case, case.quantized if quantized is None else quantized)
    turns.ready(frozen=trainer.model.nbytes)
    train(turns, trainer, end=lambda: {"memory": _waited(trainer.model.xp)})


def trainer_of(case: Case, quantized: bool, captured: bool = True) -> Any:
    """On the CPU where a tiny case is asked for. Its steps may be captured in a graph, or not."""
    from refpeft import Trainer, api, backend, sites
    from refpeft.quant import make_quantizer
    from refpeft.settings import Train

    xp = backend.module("cpu" if case.tiny else "cuda")
    quantizer = make_quantizer("nf4", None, double_quant=True) if quantized else None
    model = api.build(Random(case.config, xp), "bfloat16", xp, quantizer)
    model.name = case.shape
    sites.attach(model, "lora", LORA)
    settings = Train(
        lr=LR, batch=case.rows, steps=10**6, schedule="constant", warmup=0, clip=CLIP,
        checkpoint_activations=case.recompute, capture=captured,
    )  # fmt: skip
    return Trainer(model, case.batches(), None, settings)


def _waited(xp: Any) -> dict[str, int]:
    """Waits until the device has done all; the most bytes that CuPy's pools have held."""
    from refpeft import report

    if xp.__name__ == "cupy":
        xp.cuda.Device().synchronize()
        return {"peak": report.peak("cuda")}
    return {}


# ---- transformers and PEFT -------------------------------------------------------------------------------------------


def train_peft(turns: Turns, case: Case, compiled: bool, narrow: bool, quantized: bool = False) -> None:
    """Steps as they are written everywhere: the model's own loss, backward, clipping, AdamW; adapters in float32, or in
    bfloat16 where `narrow`."""
    import torch

    model = _peft_model(case, narrow, quantized)
    trained = [value for value in model.parameters() if value.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=device.type == "cuda")
    forward = torch.compile(model) if compiled else model
    batch = _batch(case, device)
    turns.ready(frozen=sum(value.nbytes for value in model.parameters() if not value.requires_grad))
    while True:
        steps = turns.wait()
        for _ in range(steps):
            loss = forward(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found = {}
        if device.type == "cuda":
            torch.cuda.synchronize()
            found = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        turns.done(loss=float(loss.detach()), tokens=steps * sum(case.lengths), memory=found)


def _peft_model(case: Case, narrow: bool, quantized: bool) -> Any:
    logging.disable(logging.WARNING)  # what the libraries say of one another
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(**{key: value for key, value in case.config.items() if key != "model_type"})
    config._attn_implementation, config.use_cache = "sdpa", False
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if case.tiny else "cuda"):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if quantized:
        _quantize(model)
    model.requires_grad_(False)
    if case.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["targets"], lora_dropout=0.0,
                           task_type="CAUSAL_LM")  # fmt: skip
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=not narrow).train()


def _quantize(model: Any) -> None:
    """Linear layers but the head in bitsandbytes' NF4 with double quantization, computed with in bfloat16."""
    import bitsandbytes
    import torch

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or "lm_head" in name:
            continue
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(layer.weight.device)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, packed)
    model.is_loaded_in_4bit = True
    model.quantization_method = "bitsandbytes"
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _batch(case: Case, device: Any) -> dict[str, Any]:
    """The arguments of transformers' models; a mask only where there is padding."""
    import torch

    batch = case.batches().at(0)
    ids = torch.from_numpy(batch.ids).long()
    labels = ids.clone()
    found = {"input_ids": ids, "labels": labels}
    if batch.segments is not None:
        real = torch.from_numpy(batch.segments >= 0)
        labels[~real] = -100
        found["attention_mask"] = real.long()
    return {name: value.to(device) for name, value in found.items()}


# ---- what the device can do ------------------------------------------------------------------------------------------


def ceilings(turns: Turns, size: int = 8192) -> None:
    """A worker that tells the speed of a product size^3 of random bfloat16 numbers, and of a copy of 2 GiB.

    When it is ready it tells that of products one after the other for a second: the device lowers its clock then, for
    it would take more power than it may.
    """
    import cupy

    from refpeft.backend import bfloat16

    def narrow() -> Any:
        return cupy.random.standard_normal((size, size), dtype=cupy.float32).astype(bfloat16)

    a, b, source = narrow(), narrow(), cupy.ones(2**29, cupy.float32)
    target = cupy.empty_like(source)
    multiply = partial(cupy.matmul, a, b)
    each = [_seconds(multiply, 20) for _ in range(40)]
    turns.ready(sustained=2 * size**3 / statistics.median(each[20:]))
    while True:
        steps = turns.wait()
        product = min(_seconds(multiply) for _ in range(max(steps, 3)))
        copy = min(_seconds(partial(cupy.copyto, target, source)) for _ in range(max(steps, 3)))
        turns.done(**{"FLOP/s": 2 * size**3 / product, "B/s": 2 * source.nbytes / copy})


def _seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Of one of several calls in a row, by the device's clock."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    work()
    start.record()
    for _ in range(times):
        work()
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3 / times


# ---- all of them -----------------------------------------------------------------------------------------------------


SYSTEMS = {
    OURS: "the product's trainer",
    "refpeft-lora": "the same on weights that are not quantized",
    "peft": "transformers + PEFT, eager, sdpa",
    "peft-bf16": "the same with adapters in bfloat16",
    "peft-compiled": "the same with torch.compile, adapters in float32",
    "peft-compiled-bf16": "... and in bfloat16",
    "bnb": "transformers + PEFT + bitsandbytes",
    "bnb-bf16": "the same with adapters in bfloat16",
}


def systems(case: Case) -> dict[str, Callable[[Turns], None]]:
    """Workers by name, those that this case has and this machine can run; refpeft first."""
    found: dict[str, Callable[[Turns], None]] = {OURS: partial(train_refpeft, case=case)}
    if case.quantized and not case.recompute:
        found["refpeft-lora"] = partial(train_refpeft, case=case, quantized=False)
    if case.fill == "packed" or not all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
        return found  # sdpa knows of no texts within a row
    peft = partial(train_peft, case=case)
    if case.quantized and importlib.util.find_spec("bitsandbytes"):
        for narrow, suffix in ((False, ""), (True, "-bf16")):
            found[f"bnb{suffix}"] = partial(peft, compiled=False, narrow=narrow, quantized=True)
    for compiled, how in ((False, ""), (True, "-compiled")):
        for narrow, suffix in ((False, ""), (True, "-bf16")):
            if not (case.quantized and (compiled or narrow)):
                found[f"peft{how}{suffix}"] = partial(peft, compiled=compiled, narrow=narrow)
    return found
