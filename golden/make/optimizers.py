"""Twenty steps of an optimizer on given gradients, and learning-rate schedules: torch's and transformers' own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from common import Case, Draw, Tensors

STEPS = 20


def adamw(config: dict):
    def compute(t: Tensors) -> Tensors:
        params = [t["p0"].clone().requires_grad_(), t["p1"].clone().requires_grad_()]
        optimizer = torch.optim.AdamW(
            params, lr=1.0, betas=config["betas"], eps=config["eps"], weight_decay=config["weight_decay"], foreach=False
        )
        path: list[list[torch.Tensor]] = [[], []]
        norms = []
        for step in range(STEPS):
            for i, p in enumerate(params):
                p.grad = t[f"g{i}"][step].clone()
            if config["clip"]:
                norms.append(torch.nn.utils.clip_grad_norm_(params, config["clip"], foreach=False))
            optimizer.param_groups[0]["lr"] = config["lr"][step]
            optimizer.step()
            for i, p in enumerate(params):
                path[i].append(p.detach().clone())
        answer = {f"path.p{i}": torch.stack(steps) for i, steps in enumerate(path)}
        return answer | ({"norms": torch.stack(norms)} if norms else {})

    return compute


def cases() -> Iterator[Case]:
    plain = {"lr": [0.01] * STEPS, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip": 0.0}
    rows = [  # id, changes, size of the gradients, flags, comment
        ("adamw-plain", {}, 1.0, "AdamBiasCorrection", ""),
        (
            "adamw-weight-decay",
            {"weight_decay": 0.3},
            1.0,
            "DecoupledDecay",
            "decay is lr * weight_decay * p, not in the gradient",
        ),
        ("adamw-betas", {"betas": [0.5, 0.8]}, 1.0, "AdamBiasCorrection", ""),
        ("adamw-eps", {"eps": 0.1}, 0.3, "AdamEpsPlacement", "eps is added to the root after its bias correction"),
        ("adamw-small", {}, 1e-7, "AdamEpsPlacement", "gradients of about eps"),
        (
            "adamw-clip",
            {"clip": 1.0},
            1.0,
            "ClipNorm",
            "by the norm of all gradients together; some steps are below the limit",
        ),
        (
            "adamw-schedule",
            {"lr": [0.02 * (1 - i / STEPS) for i in range(STEPS)], "weight_decay": 0.1},
            1.0,
            "DecoupledDecay",
            "the rate changes from step to step; decay goes with it",
        ),
    ]
    for case_id, changes, size, flags, comment in rows:
        draw = Draw(case_id)
        inputs = {"p0": draw.normal(3, 2), "p1": draw.normal(4)}
        sizes = draw.uniform(STEPS, low=0.1, high=0.6) if "clip" in case_id else draw.uniform(STEPS, low=1.0, high=1.0)
        inputs |= {f"g{i}": draw.normal(STEPS, *shape, scale=size) for i, shape in enumerate(((3, 2), (4,)))}
        for i in range(2):
            inputs[f"g{i}"] *= sizes.reshape(-1, *[1] * (inputs[f"g{i}"].ndim - 1))
        yield Case(
            id=case_id,
            kind="optimizer",
            name="adamw",
            comment=comment,
            flags=tuple(flags.split()),
            config=plain | changes,
            inputs=inputs,
            compute=adamw(plain | changes),
            spec="arXiv:1711.05101; torch.optim.AdamW, clip_grad_norm_",
        )
    yield from schedules()


def schedules() -> Iterator[Case]:
    makers = {
        "constant": lambda o, warmup, steps: transformers.get_constant_schedule_with_warmup(o, warmup),
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }
    for name, make in makers.items():
        for warmup, steps in ((0, 9), (4, 13)):

            def compute(_, make=make, warmup=warmup, steps=steps) -> Tensors:
                optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
                schedule, factors = make(optimizer, warmup, steps), []
                for _ in range(steps):
                    factors.append(schedule.get_last_lr()[0])
                    optimizer.step()
                    schedule.step()
                return {"factors": torch.tensor(factors, dtype=torch.float64)}

            yield Case(
                id=f"schedule-{name}-warmup-{warmup}",
                kind="schedule",
                name=name,
                flags=("WarmUpStart",) if warmup else (),
                comment="the first step of a warm-up has rate 0" if warmup else "",
                config={"warmup": warmup, "steps": steps},
                inputs={},
                compute=compute,
                oracle=f"transformers {transformers.__version__}",
                spec="what the peak rate is multiplied by in steps 0 .. steps - 1",
            )
