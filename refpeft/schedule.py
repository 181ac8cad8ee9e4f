"""Learning-rate schedules, as transformers defines `constant`, `linear` and `cosine` with warm-up."""

from __future__ import annotations

import math


def warmup_steps(warmup: int | float, total: int) -> int:
    """A number of steps, or a share of all steps (rounded up), as a number of steps."""
    return warmup if isinstance(warmup, int) else math.ceil(warmup * total)


def factor(kind: str, step: int, total: int, warmup: int) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step` (from 0) of `total`.

    The rate rises from 0 over `warmup` steps, then stays, or falls to 0 on a line or half a cosine.
    """
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
