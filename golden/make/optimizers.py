"""Twenty steps of an optimizer on given gradients, and learning-rate schedules: torch's and transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from common import Case, Compute, Draw, Tensors

STEPS = 20


def trace(config: dict, optimizer_of: Callable[[list[torch.Tensor]], Any]) -> Compute:
    """The parameters after each step of an optimizer in torch's form, and the norms before clipping if there is any."""

    def compute(t: Tensors) -> Tensors:
        params = [t["p0"].clone().requires_grad_(), t["p1"].clone().requires_grad_()]
        optimizer = optimizer_of(params)
        path: list[list[torch.Tensor]] = [[], []]
        norms = []
        for step, lr in enumerate(config["lr"]):
            for i, p in enumerate(params):
                p.grad = t[f"g{i}"][step].clone()
            if config.get("clip"):
                norms.append(torch.nn.utils.clip_grad_norm_(params, config["clip"], foreach=False))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            for i, p in enumerate(params):
                path[i].append(p.detach().clone())
        answer = {f"path.p{i}": torch.stack(steps) for i, steps in enumerate(path)}
        return answer | ({"norms": torch.stack(norms)} if norms else {})

    return compute


def adamw(config: dict) -> Compute:
    options = {name: config[name] for name in ("betas", "eps", "weight_decay")}
    return trace(config, lambda params: torch.optim.AdamW(params, lr=1.0, foreach=False, **options))


def adam(config: dict) -> Compute:
    options = {name: config[name] for name in ("betas", "eps")}
    return trace(config, lambda params: torch.optim.Adam(params, lr=1.0, foreach=False, **options))


def sgd(config: dict) -> Compute:
    options = {name: config[name] for name in ("momentum", "weight_decay")}
    return trace(config, lambda params: torch.optim.SGD(params, lr=1.0, foreach=False, **options))


def adafactor(config: dict) -> Compute:
    """torch's step is lr * max(least, RMS(p)): with `least` 1 above every RMS(p) it is lr, as without a relative step.
    Its other eps is 1e-15, far below the gradients at hand."""
    options = {"eps": (1e-15, 1e-3 if config["relative_step"] else 1.0), "weight_decay": config["weight_decay"]}
    return trace(config, lambda params: torch.optim.Adafactor(params, lr=1.0, foreach=False, **options))


def paper_adafactor(config: dict) -> Compute:
    """transformers' has the paper's eps; its rate is a factor, and here below 1 / sqrt(t)."""
    options = {"scale_parameter": True, "relative_step": False, "weight_decay": config["weight_decay"]}
    return trace(config, lambda params: transformers.Adafactor(params, lr=1.0, **options))


class Lion(torch.optim.Optimizer):
    """arXiv:2302.06675, algorithm 2."""

    def __init__(self, params: list[torch.Tensor], betas: list[float], weight_decay: float):
        super().__init__(params, {"lr": 1.0})
        self.betas, self.weight_decay = betas, weight_decay
        self.moments = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        (b1, b2), lr = self.betas, group["lr"]
        for p, m in zip(group["params"], self.moments, strict=True):
            direction = torch.sign(b1 * m + (1 - b1) * p.grad)
            p -= lr * (direction + self.weight_decay * p)
            m.copy_(b2 * m + (1 - b2) * p.grad)


def lion(config: dict) -> Compute:
    return trace(config, lambda params: Lion(params, config["betas"], config["weight_decay"]))


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
    yield from other_cases()
    yield from schedules()


def other_cases() -> Iterator[Case]:
    """Adam, SGD, Lion and Adafactor."""
    moments = {"betas": [0.9, 0.999], "eps": 1e-8}
    momentum, betas = {"momentum": 0.9, "weight_decay": 0.0}, {"betas": [0.9, 0.99], "weight_decay": 0.0}
    factored = {"relative_step": False, "weight_decay": 0.0}
    falling = [0.02 * (1 - i / STEPS) for i in range(STEPS)]
    rows = [  # name, variant, maker, config, size of the parameters, of the gradients, flags, comment
        ("adam", "plain", adam, moments | {"clip": 0.0}, 1.0, 1.0, "AdamBiasCorrection", ""),
        (
            "adam", "schedule", adam, moments | {"lr": falling, "clip": 2.0}, 1.0, 1.0, "ClipNorm AdamEpsPlacement",
            "the rate falls; some steps are below the limit of the norm",
        ),
        ("sgd", "momentum", sgd, momentum, 1.0, 1.0, "MomentumAverage", ""),
        ("sgd", "plain", sgd, momentum | {"momentum": 0.0}, 1.0, 1.0, "", "without momentum"),
        (
            "sgd", "weight-decay", sgd, momentum | {"weight_decay": 0.3, "lr": falling}, 1.0, 1.0, "CoupledDecay",
            "weight_decay * p is added to the gradient, so it is in the momentum, too; the rate falls",
        ),
        ("lion", "plain", lion, betas, 1.0, 1.0, "LionBetas", ""),
        (
            "lion", "weight-decay", lion, betas | {"weight_decay": 0.3, "lr": falling}, 1.0, 1.0, "DecoupledDecay",
            "decay is lr * weight_decay * p, beside the sign",
        ),
        ("lion", "betas", lion, betas | {"betas": [0.5, 0.8]}, 1.0, 1.0, "LionBetas", ""),
        ("lion", "no-gradient", lion, betas, 1.0, 1.0, "SignOfZero", "p1 and half of p0 have no gradient and stay"),
        ("adafactor", "plain", adafactor, factored, 0.2, 1.0, "AdafactorFactors AdafactorDecay", ""),
        ("adafactor", "relative", adafactor, factored | {"relative_step": True}, 1.0, 1.0, "AdafactorStep", ""),
        (
            "adafactor", "relative-zero", adafactor, factored | {"relative_step": True}, 0.0, 1.0, "AdafactorStep",
            "parameters that begin as zeros: max(1e-3, RMS(p))",
        ),
        (
            "adafactor", "relative-large-rate", adafactor, factored | {"relative_step": True, "lr": [0.5] * STEPS},
            1.0, 1.0, "AdafactorStep", "from step 5 on 1 / sqrt(t) is below the rate",
        ),
        (
            "adafactor", "weight-decay", adafactor, {"relative_step": True, "weight_decay": 0.3, "lr": falling},
            1.0, 1.0, "DecoupledDecay AdafactorStep", "RMS(p) is taken before the decay",
        ),
        (
            "adafactor", "outlier", adafactor, factored, 0.2, 1.0, "AdafactorClip",
            "gradients 30 times as large in step 10: the update is scaled down to RMS 1",
        ),
        ("adafactor", "small", adafactor, factored, 0.2, 1e-6, "AdafactorFactors", "gradients of 1e-6"),
        (
            "adafactor", "tiny", paper_adafactor, factored | {"relative_step": True}, 1.0, 1e-8, "AdafactorEps",
            "gradients of 1e-8: their squares are far above the paper's eps, 1e-30, and far below float32's",
        ),
    ]  # fmt: skip
    for name, variant, maker, changes, size, slope, flags, comment in rows:
        draw = Draw(f"{name}-{variant}")
        config = {"lr": [0.01] * STEPS} | changes
        inputs = {"p0": draw.normal(3, 2, scale=size), "p1": draw.normal(4, scale=size)}
        inputs |= {"g0": draw.normal(STEPS, 3, 2, scale=slope), "g1": draw.normal(STEPS, 4, scale=slope)}
        if variant == "no-gradient":
            inputs["g0"][:, :, 1] = inputs["g1"][...] = 0
        if variant == "outlier":
            inputs["g0"][10] *= 30
            inputs["g1"][10] *= 30
        yield Case(
            id=f"{name}-{variant}",
            kind="optimizer",
            name=name,
            comment=comment,
            flags=tuple(flags.split()),
            config=config,
            inputs=inputs,
            compute=maker(config),
            spec=SPECS[name],
            **({"oracle": ORACLES[maker]} if maker in ORACLES else {}),
        )


ORACLES = {lion: "float64, from the paper", paper_adafactor: f"transformers {transformers.__version__} float64"}
SPECS = {
    "adam": "golden/README.md, Optimizers; arXiv:1412.6980, algorithm 1; torch.optim.Adam",
    "sgd": "golden/README.md, Optimizers; torch.optim.SGD",
    "lion": "golden/README.md, Optimizers; arXiv:2302.06675, algorithm 2",
    "adafactor": "golden/README.md, Optimizers; arXiv:1804.04235, algorithms 4 and 5; torch.optim.Adafactor",
}


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
                flags=("WarmUpStart",) * bool(warmup) + ("DecayStart",) * (name != "constant"),
                comment="the first step of a warm-up has rate 0" if warmup else "",
                config={"warmup": warmup, "steps": steps},
                inputs={},
                compute=compute,
                oracle=f"transformers {transformers.__version__}",
                spec="what the peak rate is multiplied by in steps 0 .. steps - 1",
            )
