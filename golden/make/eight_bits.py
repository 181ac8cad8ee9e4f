"""AdamW with moments in 8 bits (arXiv:2110.02861): float64 steps between states that are exactly what 8 bits hold.

The state of both moments is what dynamic8 stores in float32, in blocks of 256, the second one with the unsigned map.
Parameters are whole blocks, or the last ones, so that it makes no difference whether blocks run from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from common import Case, Compute, Draw, run
from nf4 import NESTED_MAP, dynamic_map, f32
from optimizers import STEPS, trace

BLOCK = 256
MAPS = {"m": NESTED_MAP, "v": dynamic_map(signed=False)}
ERRORS = 4 * np.finfo(f32).eps
"""What float32 may be off by, as a share of a moment's terms. No moment is so near to the middle of two levels."""


class AdamW8bit(torch.optim.Optimizer):
    def __init__(self, params: list[torch.Tensor], config: dict):
        super().__init__(params, {"lr": 1.0})
        self.config, self.steps = config, 0
        self.state8 = [{name: torch.zeros(p.numel()) for name in MAPS} for p in params]

    @torch.no_grad()
    def step(self) -> None:
        group, (b1, b2) = self.param_groups[0], self.config["betas"]
        lr, self.steps = group["lr"], self.steps + 1
        for p, state in zip(group["params"], self.state8, strict=True):
            g = p.grad.reshape(-1)
            old, new = b1 * state["m"].to(p.dtype), (1 - b1) * g
            m = old + new
            v = b2 * state["v"].to(p.dtype) + (1 - b2) * g * g
            p *= 1 - lr * self.config["weight_decay"]
            root = (v / (1 - b2**self.steps)).sqrt() + self.config["eps"]
            p -= (lr * m / (1 - b1**self.steps) / root).reshape(p.shape)
            state |= {"m": kept(m, old.abs() + new.abs(), MAPS["m"]), "v": kept(v, v, MAPS["v"])}


class TooNear(Exception):
    """A moment's code hangs on the last bits."""


def kept(moment: torch.Tensor, terms: torch.Tensor, levels: np.ndarray) -> torch.Tensor:
    """A moment as 8 bits hold it: each value of a block is the nearest level times the block's largest magnitude.

    `terms` is the sum of the magnitudes that were added up. Raises TooNear.
    """
    values, middles = moment.float().numpy(), (levels[:-1] + levels[1:]) / f32(2)
    answer = []
    for at in range(0, len(values), BLOCK):
        block = values[at : at + BLOCK]
        top = np.abs(block).max()
        scaled = block * (f32(1) / top) if top else block
        codes = np.searchsorted(middles, scaled)
        error = ERRORS * (terms[at : at + BLOCK].numpy() / (top or 1) + np.abs(scaled))
        if moment.dtype == torch.float64 and top and (np.abs(scaled[:, None] - middles).min(axis=1) < error).any():
            raise TooNear
        answer.append(levels[codes] * top)
    return torch.from_numpy(np.concatenate(answer))


def adamw8bit(config: dict) -> Compute:
    return trace(config, lambda params: AdamW8bit(params, config))


def far_from_middles(variant: str, shape: tuple[int, int], config: dict) -> dict[str, np.ndarray]:
    """The first inputs of the case whose codes are the same in float32 and float64."""
    for salt in count():
        draw = Draw(f"adamw8bit-{variant}-{salt}")
        inputs = {"p0": draw.normal(*shape), "p1": draw.normal(4)}
        inputs |= {"g0": draw.normal(STEPS, *shape), "g1": draw.normal(STEPS, 4)}
        if variant == "no-gradient":
            inputs["g0"][:, 2:6] = inputs["g1"][...] = 0
        if variant == "blocks":
            inputs["g0"][:, 8:] *= 1000
            inputs["g1"][...] = 0
        if variant == "short":
            inputs["g1"] *= 1000
        try:
            run(adamw8bit(config), inputs)
        except TooNear:
            continue
        return inputs


def cases() -> Iterator[Case]:
    plain = {"lr": [0.01] * STEPS, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip": 0.0}
    rows = [  # variant, changes, shape of p0, flags, comment
        ("plain", {}, (8, 32), "EightBitMoments EightBitRange CoarseTable", "p0 is one block, p1 a short one"),
        (
            "weight-decay", {"weight_decay": 0.3, "clip": 1.0}, (8, 32), "DecoupledDecay CoarseTable",
            "decay before the update",
        ),
        (
            "no-gradient", {}, (8, 32), "EightBitZero CoarseTable",
            "rows 2 to 5 of p0 and all of p1 have no gradient and must not move: zero is a level of both maps",
        ),
        (
            "blocks", {}, (10, 32), "EightBitBlocks CoarseTable",
            "p0 is a block of 256 and one of 64, whose gradients are 1000 times as large; p1 has none",
        ),
        (
            "short", {}, (2, 16), "EightBitBlocks CoarseTable",
            "p0 is a short block, and does not share one with p1, whose gradients are 1000 times as large",
        ),
    ]  # fmt: skip
    for variant, changes, shape, flags, comment in rows:
        config = plain | changes
        inputs = far_from_middles(variant, shape, config)
        yield Case(
            id=f"adamw8bit-{variant}",
            kind="optimizer",
            name="adamw8bit",
            comment=comment,
            flags=tuple(flags.split()),
            config=config | {"block": BLOCK},
            inputs=inputs,
            compute=adamw8bit(config),
            spec="golden/README.md, Optimizers; arXiv:2110.02861, section 2",
            oracle="float64 steps, float32 states",
        )
