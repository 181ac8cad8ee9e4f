"""Methods that start from adapters of other tasks."""

from __future__ import annotations

from collections.abc import Iterator

import equations
import numpy as np
import torch
from common import Case, Draw, Tensors

TOKENS, DIM = 3, 5
IDS = np.int32([[3, 0, 3], [6, 1, 2]])


def cases() -> Iterator[Case]:
    yield from prompts_to_start_from()


# ---- prompts of other tasks (SPoT) -----------------------------------------------------------------------------


def start(sources: torch.Tensor, task: torch.Tensor | None, top: int) -> torch.Tensor:
    """arXiv:2110.07904, section 3.3: the `top` sources most similar to the task's prompt, averaged by similarity."""
    if task is None:
        return sources[0]
    similarities = torch.cosine_similarity(sources.mean(dim=1), task.mean(dim=0)[None], dim=1)
    best = torch.topk(similarities, top)
    return (best.values[:, None, None] * sources[best.indices]).sum(dim=0) / best.values.sum()


def prompts_to_start_from() -> Iterator[Case]:
    equations.PAPERS["spot"] = "arXiv:2110.07904, sections 2 and 3.3"
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
