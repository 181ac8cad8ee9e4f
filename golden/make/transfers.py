"""Prompts that tasks share, or that start from those of others. The witness is PEFT."""

from __future__ import annotations

from collections.abc import Iterator

import equations
import methods
import numpy as np
import peft
import peft_witness
import torch
from common import Case, Compute, Draw, Tensors
from method_sites import site_case
from methods import SMALL_GPT2, SMALL_LLAMA, Adapted
from models import precision, real_only, transformers_model
from reference import Advice, mean_loss

TOKENS, DIM = 3, 5
IDS = np.int32([[3, 0, 3], [6, 1, 2]])


def cases() -> Iterator[Case]:
    yield from prompts_to_start_from()
    yield from prompts_of_tasks()
    yield from decoded_prompts()
    for family, settings, embed in (
        ("llama", SMALL_LLAMA, "model.embed_tokens"),
        ("gpt2", SMALL_GPT2, "transformer.wte"),
    ):
        yield from methods.model_cases(family, settings, of_tasks_on_model(family, settings, embed))
        yield from methods.model_cases(family, settings, decoded_on_model(embed))
    yield from methods.model_cases("llama", SMALL_LLAMA, iter([started_on_model("model.embed_tokens")]))


# ---- prompts of other tasks (SPoT) -----------------------------------------------------------------------------


def start(sources: torch.Tensor, task: torch.Tensor | None, top: int) -> torch.Tensor:
    """arXiv:2110.07904, section 3: the `top` sources most similar to the task's prompt, averaged by similarity."""
    if task is None:
        return sources[0]
    similarities = torch.cosine_similarity(sources.mean(dim=1), task.mean(dim=0)[None], dim=1)
    best = torch.topk(similarities, top)
    return (best.values[:, None, None] * sources[best.indices]).sum(dim=0) / best.values.sum()


def prompts_to_start_from() -> Iterator[Case]:
    equations.PAPERS["spot"] = "arXiv:2110.07904, sections 2 and 3"
    for variant, count, top, comment in (
        ("one", 1, 1, "one source"),
        ("best", 4, 1, "the source most similar to a prompt of this task"),
        ("average", 4, 3, "the average of three sources, weighted by similarity"),
    ):
        draw = Draw(f"spot-embedding-{variant}")
        task = draw.normal(TOKENS, DIM)
        inputs = {"ids": IDS, "weight": draw.normal(7, DIM), "sources": draw.normal(count, TOKENS, DIM) + 0.8 * task}
        inputs |= {"task": task} if count > 1 else {}

        def compute(t: Tensors, top: int = top) -> Tensors:
            prompt = start(t["sources"], t.get("task"), top)
            y = equations.prompt(lambda ids: t["weight"][ids.long()], t["ids"], prompt)
            return {"prompt": prompt, "y": y}

        yield Case(
            id=f"spot-embedding-{variant}",
            kind="method",
            name="spot",
            at="embedding",
            comment=f"first values: {comment}",
            flags=("PromptFirst", *(("PromptSimilarity",) if count > 1 else ())),
            config={"tokens": TOKENS, "top": top},
            inputs=inputs,
            compute=compute,
            spec=equations.PAPERS["spot"],
        )


def started_on_model(embed: str) -> Adapted:
    def advice(t: Tensors) -> Advice:
        return {embed: lambda f, ids: equations.prompt(f, ids, t[f"{embed}.prompt"])}

    return Adapted(
        "spot",
        {"tokens": TOKENS, "sources": ["a"]},
        {f"{embed}.prompt": (TOKENS, 8)},
        advice,
        flags="PromptFirst PromptMaskedLoss",
        peft=False,
        comment="the prompt is given as it is; sources are not read",
    )


# ---- prompts of several tasks ----------------------------------------------------------------------------------

TASKS = {"tokens": TOKENS, "tasks": 3, "task": 1, "ranks": 2}
MULTITASK_FLAGS = "PromptFirst TaskFactor"


def shapes_of_tasks(dim: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(trained, constant) tensors: the prompt with the chosen task's factors, and those of the others."""
    every = {f"cols{task}": (TOKENS, TASKS["ranks"]) for task in range(TASKS["tasks"])}
    every |= {f"rows{task}": (TASKS["ranks"], dim) for task in range(TASKS["tasks"])}
    chosen = {name: shape for name, shape in every.items() if name.endswith(str(TASKS["task"]))}
    return {"prompt": (TOKENS, dim)} | chosen, {n: s for n, s in every.items() if n not in chosen}


def of_task(t: Tensors, place: str = "") -> torch.Tensor:
    """arXiv:2303.02861, section 3."""
    task = TASKS["task"]
    return t[f"{place}prompt"] * (t[f"{place}cols{task}"] @ t[f"{place}rows{task}"])


def prompts_of_tasks() -> Iterator[Case]:
    equations.PAPERS["multitask_prompt"] = "arXiv:2303.02861, section 3"
    draw = Draw("multitask_prompt-embedding-plain")
    trained, constant = shapes_of_tasks(DIM)
    inputs = {"ids": IDS, "weight": draw.normal(7, DIM)}
    inputs |= {name: draw.normal(*shape) for name, shape in (trained | constant).items()}

    def forward(ids, weight, **letters):
        return equations.prompt(lambda ids: weight[ids.long()], ids, of_task(letters))

    yield site_case(
        "multitask_prompt",
        "embedding",
        "plain",
        inputs,
        forward,
        " ".join(trained),
        config=TASKS,
        flags=MULTITASK_FLAGS,
        comment="the second of three tasks; factors of rank 2",
    )


def of_tasks_on_model(family: str, settings: dict, embed: str) -> Iterator[Adapted]:
    trained, constant = ({f"{embed}.{name}": shape for name, shape in shapes.items()} for shapes in shapes_of_tasks(8))

    def advice(t: Tensors) -> Advice:
        return {embed: lambda f, ids: equations.prompt(f, ids, of_task(t, f"{embed}."))}

    yield Adapted(
        "multitask_prompt",
        TASKS,
        trained,
        advice,
        constants=constant,
        flags=f"{MULTITASK_FLAGS} PromptMaskedLoss",
        comment="the second of three tasks",
        virtual=True,
        witness=peft_of_tasks(family, settings, embed),
    )


def peft_of_tasks(family: str, settings: dict, embed: str) -> Compute:
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=TOKENS, num_tasks=TASKS["tasks"], num_ranks=TASKS["ranks"], **peft_witness.TASK
    )

    def compute(t: Tensors) -> Tensors:
        task, ids, segments = TASKS["task"], t["ids"].long(), t.get("segments")
        with precision():
            base = transformers_model(family, settings)
            base.load_state_dict({n: t[n] for n, _ in base.named_parameters()}, strict=False)
            adapted = peft.get_peft_model(base, config).to(torch.get_default_dtype())
            encoder = adapted.prompt_encoder["default"]
            encoder.embedding.weight.data.copy_(t[f"{embed}.prompt"])
            for name, parameter in (("cols", encoder.prefix_task_cols), ("rows", encoder.prefix_task_rows)):
                parameter.data.copy_(torch.stack([t[f"{embed}.{name}{k}"] for k in range(TASKS["tasks"])]))
            mask = torch.ones_like(ids) if segments is None else (segments >= 0).long()
            answer = adapted(input_ids=ids, attention_mask=mask, task_ids=torch.full((len(ids),), task))
            logits = real_only(answer.logits[:, -ids.shape[1] :], segments)
            loss = mean_loss(logits, t["targets"])
            loss.backward()
        grads = {"prompt": encoder.embedding.weight.grad}
        grads |= {
            f"cols{task}": encoder.prefix_task_cols.grad[task],
            f"rows{task}": encoder.prefix_task_rows.grad[task],
        }
        return {"logits": logits, "loss": loss, **{f"grad.{embed}.{name}": grad for name, grad in grads.items()}}

    return compute


# ---- prompts that a fixed decoder gives ------------------------------------------------------------------------

DECODER = {"d": 4, "tokens": TOKENS, "hidden": 6}


def shapes_of_decoder(dim: int) -> dict[str, tuple[int, ...]]:
    d, hidden, width = DECODER["d"], DECODER["hidden"], TOKENS * dim
    return {"inner": (hidden, d), "inner_bias": (hidden,), "outer": (width, hidden), "outer_bias": (width,)}


def of_decoder(t: Tensors, dim: int, place: str = "") -> torch.Tensor:
    """arXiv:2110.07867, section 3."""
    z, W1, b1, W2, b2 = (t[f"{place}{name}"] for name in ("z", *shapes_of_decoder(dim)))
    return (W2 @ torch.tanh(W1 @ z + b1) + b2).unflatten(0, (TOKENS, dim))


def decoded_prompts() -> Iterator[Case]:
    equations.PAPERS["ipt"] = "arXiv:2110.07867, section 3"
    draw = Draw("ipt-embedding-plain")
    inputs = {"ids": IDS, "weight": draw.normal(7, DIM), "z": draw.normal(DECODER["d"])}
    inputs |= {name: draw.normal(*shape) for name, shape in shapes_of_decoder(DIM).items()}

    def forward(ids, weight, **letters):
        return equations.prompt(lambda ids: weight[ids.long()], ids, of_decoder(letters, DIM))

    yield site_case(
        "ipt",
        "embedding",
        "plain",
        inputs,
        forward,
        "z",
        config=DECODER,
        flags="PromptFirst",
        comment="the decoder is constant",
    )


def decoded_on_model(embed: str) -> Iterator[Adapted]:
    def advice(t: Tensors) -> Advice:
        return {embed: lambda f, ids: equations.prompt(f, ids, of_decoder(t, 8, f"{embed}."))}

    yield Adapted(
        "ipt",
        DECODER,
        {f"{embed}.z": (DECODER["d"],)},
        advice,
        constants={f"{embed}.{name}": shape for name, shape in shapes_of_decoder(8).items()},
        flags="PromptFirst PromptMaskedLoss",
        peft=False,
        comment="the decoder is constant",
    )
