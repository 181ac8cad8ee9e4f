"""Low-rank methods at linear layers beside LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import methods
import numpy as np
import peft
import peft_witness
import torch
from common import Case, Draw
from equations import PAPERS, lora, lora_scale
from linear_methods import LLAMA_SITES, Equation, Variant, cases_of, dropout_of, on_layers, shapes_of
from method_sites import site_case

LORA_NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
LORA = Equation(
    "lora",
    PAPERS["lora"],
    lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"])},
    lambda f, x, weight, t, config: lora(f, x, t["A"], t["B"], lora_scale(config)),
    merged=lambda weight, t, config: weight + lora_scale(config) * t["B"] @ t["A"],
    peft=peft_witness.lora_config,
    names=LORA_NAMES,
)
"""For scripts of LoRA with something else; its own cases are those of method_sites."""


def cases() -> Iterator[Case]:
    yield from dora()
    yield from adalora()
    yield from (adalora_steps(compat) for compat in ("none", "official"))
    yield from eva()
    yield from vera()
    yield from loha()
    yield from lokr()
    yield from hira()
    yield from delora()
    yield from krona()


def without_conv1d(variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """The same, where PEFT has the method at nn.Linear alone."""
    return tuple(
        replace(v, peft=False, comment=f"{v.comment}; PEFT has no Conv1D here") if v.conv1d else v for v in variants
    )


def direction(weight: torch.Tensor, t: dict, config: dict) -> torch.Tensor:
    """DoRA's V (out, in), and nothing of it in the gradient of its norms."""
    return weight + lora_scale(config) * t["B"] @ t["A"]


def dora_value(f, x, weight, t, config) -> torch.Tensor:
    V = direction(weight, t, config)
    factor = t["m"] / V.detach().square().sum(1).sqrt()
    return f(x) - x @ weight.mT + (x @ V.mT) * factor


def dora_merged(weight, t, config) -> torch.Tensor:
    V = direction(weight, t, config)
    return V * (t["m"] / V.square().sum(1).sqrt())[:, None]


def dora() -> Iterator[Case]:
    config = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}

    def start(letters, weight, config):
        return letters | {"m": np.abs(letters["m"]) + np.float32(0.5)}

    equation = Equation(
        "dora",
        "arXiv:2402.09353, section 4",
        lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"]), "m": (out,)},
        dora_value,
        merged=dora_merged,
        start=start,
        peft=lambda config, targets: peft.LoraConfig(
            r=config["r"],
            lora_alpha=config["alpha"],
            use_rslora=config["rslora"],
            use_dora=True,
            target_modules=targets,
        ),
        names=LORA_NAMES | {"m": "lora_magnitude_vector.default.weight"},
        flags="DoraNormIsConstant DoraNormOfRows Scaling",
    )
    yield from cases_of(
        equation,
        *shapes_of(config),
        Variant("rslora", config | {"rslora": True, "r": 4}, flags="RsLoraScale"),
        Variant("square", config, out=5, inp=5, comment="norms are of rows, one for each output"),
        dropout_of(config),
        models=config,
    )


def adalora_delta(t, config) -> torch.Tensor:
    return config["alpha"] / (config["init_r"] + 1e-5) * t["P"] @ torch.diag(t["E"]) @ t["Q"]


def adalora() -> Iterator[Case]:
    config = {"init_r": 3, "target_r": 2, "alpha": 6.0, "dropout": 0.0}
    equation = Equation(
        "adalora",
        "arXiv:2303.10512, section 3.1; the scale as the authors' code",
        lambda config, out, inp: {"P": (out, config["init_r"]), "E": (config["init_r"],), "Q": (config["init_r"], inp)},
        lambda f, x, weight, t, config: f(x) + x @ adalora_delta(t, config).mT,
        merged=lambda weight, t, config: weight + adalora_delta(t, config),
        peft=lambda config, targets: peft.AdaLoraConfig(
            init_r=config["init_r"],
            target_r=config["target_r"],
            lora_alpha=config["alpha"],
            total_step=9,
            target_modules=targets,
        ),
        names={"P": "lora_B.default", "E": "lora_E.default", "Q": "lora_A.default"},
        flags="AdaloraScale",
        flags_on_models="PenaltyInEvaluation",
    )
    pruned = {"P": (6, 2), "E": (2,), "Q": (2, 4)}
    left = Equation(**vars(equation) | {"trained": lambda config, out, inp: pruned, "peft": None})
    square = Variant("square", config, out=5, inp=5, comment="P is (out, r), Q (r, in)")
    yield from cases_of(equation, *shapes_of(config), square, dropout_of(config), models=config)
    comment = "two of three triplets are left: the scale is that of the first rank, init_r"
    yield from cases_of(left, Variant("pruned", config | {"rank_pattern": {"site": 2}}, comment=comment))
    for orth, comment in (
        ("official", "the mean of both distances, as the authors' code"),
        ("paper", "the sum of the squares of both distances"),
    ):
        weighted = config | {"gamma": 0.3, "orth": orth}
        penalised = replace(equation, penalty=adalora_penalty, peft=None)
        yield from cases_of(penalised, Variant(f"penalty-{orth}", weighted, comment=f"the penalty is {comment}"))


def adalora_penalty(weight: torch.Tensor, t, config: dict) -> torch.Tensor:
    """Of the only target."""
    one = torch.eye(config["init_r"], dtype=weight.dtype)
    distances = torch.stack([torch.linalg.norm(gram - one) for gram in (t["P"].mT @ t["P"], t["Q"] @ t["Q"].mT)])
    return config["gamma"] * (distances.mean() if config["orth"] == "official" else distances.square().sum())


def adalora_steps(compat: str) -> Case:
    """Which triplets of two targets are left after each of twelve steps, whose gradients are given."""
    config = {"init_r": 8, "target_r": 3, "tinit": 2, "tfinal": 3, "delta_t": 2, "beta1": 0.7, "beta2": 0.3}
    config |= {"compat": compat, "steps": 12, "lr": 0.1}
    draw = Draw(f"adalora-steps-{compat}")
    shapes = {"a.P": (9, 8), "a.E": (8,), "a.Q": (8, 10), "b.P": (8, 8), "b.E": (8,), "b.Q": (8, 11)}
    inputs = {name: draw.normal(*shape) for name, shape in shapes.items()}
    inputs |= {f"grad.{name}": draw.normal(config["steps"], *shape) for name, shape in shapes.items()}
    order = {"none": "as in the paper", "official": "of numbers after the step, as in the authors' code"}
    return Case(
        id=f"adalora-steps-{compat}",
        kind="method",
        name="adalora",
        at="steps",
        comment=f"sensitivities {order[compat]}; the last choice is made in step 9, no multiple of delta_t",
        flags=("AdaloraAllocation",),
        spec="arXiv:2303.10512, Algorithm 1",
        config=config,
        inputs=inputs,
        compute=lambda t: algorithm_1(t, list(shapes), config),
        witnesses={peft_witness.VERSION: lambda t: peft_allocation(t, list(shapes), config)}
        if compat != "none"
        else {},
    )


def algorithm_1(t: dict, names: list[str], config: dict) -> dict:
    numbers = {name: t[name].clone() for name in names}
    means, distances = ({name: torch.zeros_like(t[name]) for name in names} for _ in range(2))
    last, chosen = config["steps"] - config["tfinal"], {"a": [], "b": []}
    for step in range(1, config["steps"] + 1):
        before = {name: number.clone() for name, number in numbers.items()}
        for name in names:
            gradient = t[f"grad.{name}"][step - 1]
            numbers[name] -= config["lr"] * gradient
            if step < last:
                sensitivity = ((before if config["compat"] == "none" else numbers)[name] * gradient).abs()
                means[name] = config["beta1"] * means[name] + (1 - config["beta1"]) * sensitivity
                distance = (sensitivity - means[name]).abs()
                distances[name] = config["beta2"] * distances[name] + (1 - config["beta2"]) * distance
        if step >= last or (step > config["tinit"] and step % config["delta_t"] == 0):
            part = max(1 - (step - config["tinit"]) / (last - config["tinit"]), 0)
            budget = int(2 * (config["init_r"] - config["target_r"]) * part**3 + 2 * config["target_r"])
            of = {name: means[name] * distances[name] for name in names}
            score = torch.stack([of[f"{w}.E"] + of[f"{w}.P"].mean(0) + of[f"{w}.Q"].mean(1) for w in "ab"])
            best = (
                torch.zeros(score.numel()).index_fill(0, score.flatten().topk(budget).indices, 1).reshape(score.shape)
            )
            for where, kept in zip("ab", best, strict=True):
                numbers[f"{where}.E"] = numbers[f"{where}.E"] * kept
        for where, trace in chosen.items():
            trace.append(numbers[f"{where}.E"].clone())
    after = {f"after.{name}": number for name, number in numbers.items()}
    return {f"E.{where}": torch.stack(trace) for where, trace in chosen.items()} | after


def peft_allocation(t: dict, names: list[str], config: dict) -> dict:
    """The same by PEFT's allocator, which has the official order."""
    layers = {w: torch.nn.Linear(t[f"{w}.Q"].shape[1], t[f"{w}.P"].shape[0]) for w in "ab"}
    options = {name: config[name] for name in ("init_r", "target_r", "tinit", "tfinal", "beta1", "beta2")}
    schedule = {"deltaT": config["delta_t"], "total_step": config["steps"]}
    adapted = peft.get_peft_model(
        torch.nn.ModuleDict(layers), peft.AdaLoraConfig(**options, **schedule, target_modules=list(layers))
    ).double()
    letters = {"P": "lora_B", "E": "lora_E", "Q": "lora_A"}
    theirs = {n: getattr(adapted.base_model.model[n[0]], letters[n[2]])["default"] for n in names}
    chosen = {"a": [], "b": []}
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(t[name].reshape(parameter.shape))
        for step in range(1, config["steps"] + 1):
            for name, parameter in theirs.items():
                parameter.grad = t[f"grad.{name}"][step - 1].reshape(parameter.shape).to(parameter.dtype)
                parameter -= config["lr"] * parameter.grad
            adapted.base_model.update_and_allocate(step)
            for where, trace in chosen.items():
                trace.append(theirs[f"{where}.E"].detach().flatten().clone())
    after = {f"after.{name}": theirs[name].detach().reshape(t[name].shape) for name in names}
    return {f"E.{where}": torch.stack(trace) for where, trace in chosen.items()} | after


def eva() -> Iterator[Case]:
    config = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}
    equation = Equation(
        "eva",
        "arXiv:2410.07170, section 3",
        lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"])},
        lambda f, x, weight, t, config: f(x) + lora_scale(config) * x @ (t["B"] @ t["A"]).mT,
        merged=lambda weight, t, config: weight + lora_scale(config) * t["B"] @ t["A"],
        peft=peft_witness.lora_config,
        names=LORA_NAMES,
        flags="Scaling",
    )
    yield from cases_of(equation, *shapes_of(config), dropout_of(config), models=config)


def vera_delta(weight, t, config) -> torch.Tensor:
    A, B = t["A"][:, : weight.shape[1]], t["B"][: weight.shape[0]]
    return (t["b"][:, None] * B) @ (t["d"][:, None] * A)


def vera() -> Iterator[Case]:
    config = {"r": 3, "dropout": 0.0}
    equation = Equation(
        "vera",
        "arXiv:2310.11454, section 3.1; matrices for targets of several shapes as PEFT",
        lambda config, out, inp: {"d": (config["r"],), "b": (out,)},
        lambda f, x, weight, t, config: f(x) + x @ vera_delta(weight, t, config).mT,
        merged=lambda weight, t, config: weight + vera_delta(weight, t, config),
        shared=lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"])},
        peft=lambda config, targets: peft.VeraConfig(r=config["r"], target_modules=targets),
        names={"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"},
        peft_constants={"A": "vera_A.default", "B": "vera_B.default"},
        flags="VeraShared VeraVectors",
    )
    wide = Variant("wide", config | {"r": 7}, comment="r is above both sides of the weight")
    yield from cases_of(equation, *shapes_of(config), wide, dropout_of(config), models=config)
    sites = LLAMA_SITES | {f"model.layers.{i}.mlp.down_proj": (8, 12) for i in range(2)}
    comment = "inputs of two widths: the narrower ones take the first columns of A"
    (found,) = on_layers(equation, config, sites)
    sides = methods.model_cases("llama", methods.SMALL_LLAMA, iter([replace(found, label="sides-", comment=comment)]))
    yield from (case for case in sides if case.at == "model")


def loha_delta(t, config) -> torch.Tensor:
    return config["alpha"] / config["r"] * (t["A1"] @ t["B1"]) * (t["A2"] @ t["B2"])


def loha() -> Iterator[Case]:
    config = {"r": 2, "alpha": 6.0}
    equation = Equation(
        "loha",
        "arXiv:2309.14859, section 3.2",
        lambda config, out, inp: {
            "A1": (out, config["r"]),
            "B1": (config["r"], inp),
            "A2": (out, config["r"]),
            "B2": (config["r"], inp),
        },
        lambda f, x, weight, t, config: f(x) + x @ loha_delta(t, config).mT,
        merged=lambda weight, t, config: weight + loha_delta(t, config),
        peft=lambda config, targets: peft.LoHaConfig(r=config["r"], alpha=config["alpha"], target_modules=targets),
        names={f"{letter}{i}": f"hada_w{i}_{letter.lower()}.default" for i in "12" for letter in "AB"},
        flags="Scaling ScaleTwice HadamardOfProducts",
    )
    wide = Variant("high-rank", config | {"r": 5}, comment="r is above a side of the weight")
    yield from cases_of(equation, *without_conv1d(shapes_of(config)), wide, models=config)


def near_root(side: int, factor: int) -> tuple[int, int]:
    """LyCORIS' factorization of a side: its largest divisor up to the root (and up to `factor`), and what is left."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    small = max(n for n in range(1, side + 1) if side % n == 0 and n * n <= side and (n <= factor or factor == -1))
    return small, side // small


def lokr_shapes(config: dict, out: int, inp: int) -> dict[str, tuple[int, ...]]:
    r, shapes = config["r"], {}
    sides = zip(near_root(out, config["factor"]), near_root(inp, config["factor"]), strict=True)
    for name, (m, n) in zip("CD", sides, strict=True):
        if 2 * r < max(m, n) and (name == "D" or config["decompose_both"]):
            shapes |= {f"{name}a": (m, r), f"{name}b": (r, n)}
        else:
            shapes[name] = (m, n)
    return shapes


def lokr_delta(t, config) -> torch.Tensor:
    C, D = (t[name] if name in t else t[f"{name}a"] @ t[f"{name}b"] for name in "CD")
    return config["alpha"] / config["r"] * torch.kron(C, D)


def lokr() -> Iterator[Case]:
    config = {"r": 1, "alpha": 3.0, "factor": -1, "decompose_both": False}
    equation = Equation(
        "lokr",
        "arXiv:2309.14859, section 3.3; sizes of the factors as LyCORIS",
        lokr_shapes,
        lambda f, x, weight, t, config: f(x) + x @ lokr_delta(t, config).mT,
        merged=lambda weight, t, config: weight + lokr_delta(t, config),
        peft=lambda config, targets: peft.LoKrConfig(
            r=config["r"],
            alpha=config["alpha"],
            decompose_both=config["decompose_both"],
            decompose_factor=config["factor"],
            target_modules=targets,
        ),
        names={
            f"{name}{part}": f"lokr_w{i}{part and '_' + part}.default"
            for i, name in ((1, "C"), (2, "D"))
            for part in ("", "a", "b")
        },
        flags="Scaling ScaleTwice KroneckerOrder",
    )
    whole = {"out": 6, "inp": 15, "flags": "LokrWhole"}
    variants = (
        Variant("whole", config | {"r": 4}, comment="both factors are whole, and s is 3 / 4 as ever", **whole),
        Variant("both", config | {"factor": 3, "decompose_both": True}, out=12, inp=9, comment="both are of rank 1"),
        Variant("factor", config | {"factor": 4}, out=12, inp=9, comment="12 is 4 * 3, and 9, not a multiple, 3 * 3"),
        Variant("prime", config, out=7, inp=5, comment="a factor of 1 * 1 and one as large as the weight"),
    )
    plain = without_conv1d(shapes_of(config, out=12, inp=8))
    yield from cases_of(equation, *plain, *variants, models=config)


def hira() -> Iterator[Case]:
    config = {"r": 2, "dropout": 0.0}
    equation = Equation(
        "hira",
        "https://openreview.net/forum?id=TwJrTz9cRS, section 3.2",
        lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"])},
        lambda f, x, weight, t, config: f(x) + x @ (weight * (t["B"] @ t["A"])).mT,
        merged=lambda weight, t, config: weight * (1 + t["B"] @ t["A"]),
        peft=lambda config, targets: peft.HiraConfig(r=config["r"], target_modules=targets),
        names={"A": "hira_A.default", "B": "hira_B.default"},
        flags="HadamardOfProducts NoScale",
    )
    yield from cases_of(equation, *shapes_of(config), dropout_of(config), models=config)


def delora_delta(weight, t, config) -> torch.Tensor:
    columns, rows = (torch.linalg.vector_norm(v, dim=axis).clamp(min=1e-4) for v, axis in ((t["B"], 0), (t["A"], 1)))
    inner = columns * rows
    of_inputs = weight.square().sum(0).sqrt()
    return t["B"] @ torch.diag(t["strength"] / (config["r"] * inner)) @ t["A"] * of_inputs


def delora() -> Iterator[Case]:
    config = {"r": 3, "dropout": 0.0}
    equation = Equation(
        "delora",
        "arXiv:2503.18225, section 3; norms of W's columns as PEFT",
        lambda config, out, inp: {"A": (config["r"], inp), "B": (out, config["r"]), "strength": (1,)},
        lambda f, x, weight, t, config: f(x) + x @ delora_delta(weight, t, config).mT,
        merged=lambda weight, t, config: weight + delora_delta(weight, t, config),
        start=lambda letters, weight, config: letters | {"strength": np.float32([2.5])},
        peft=lambda config, targets: peft.DeloraConfig(r=config["r"], target_modules=targets),
        names={"A": "delora_A.default", "B": "delora_B.default", "strength": "delora_lambda.default"},
        flags="DeloraNorms",
    )
    yield from cases_of(equation, *without_conv1d(shapes_of(config)), dropout_of(config), models=config)
    comment = "a column of B is 0, as all are at the start, and a row of A is shorter than 1e-4"
    yield from cases_of(replace(equation, start=delora_start), Variant("small-norms", config, comment=comment))


def delora_start(letters: dict[str, np.ndarray], weight: np.ndarray, config: dict) -> dict[str, np.ndarray]:
    letters["B"][:, 0] = 0
    letters["A"][1] *= np.float32(1e-5)
    return letters | {"strength": np.float32([2.5])}


KRONA = {"scale": 3.0, "a_out": 2, "a_in": 2}


def krona_shapes(config: dict, out: int, inp: int) -> dict[str, tuple[int, ...]]:
    sides = (config["a_out"], config["a_in"])
    return {"A": sides, "B": (out // sides[0], inp // sides[1])}


def krona() -> Iterator[Case]:
    equation = Equation(
        "krona",
        "arXiv:2212.10650, section 3",
        krona_shapes,
        lambda f, x, weight, t, config: f(x) + config["scale"] * x @ torch.kron(t["A"], t["B"]).mT,
        merged=lambda weight, t, config: weight + config["scale"] * torch.kron(t["A"], t["B"]),
        flags="Scaling KroneckerOrder",
    )
    yield from cases_of(equation, *shapes_of(KRONA), Variant("tall", KRONA | {"a_out": 3, "a_in": 1}), models=KRONA)
    for variant, residual in (("plain", False), ("residual", True)):
        draw = Draw(f"krona-block-{variant}")
        inputs = {"x": draw.normal(2, 3, 6), "weight": draw.normal(6, 6, scale=0.4)}
        inputs |= {"A": draw.normal(2, 2, scale=0.5), "B": draw.normal(3, 3, scale=0.5)}
        inputs |= {"gain": draw.normal(1)} if residual else {}

        def forward(x, weight, A, B, gain=0.0):
            return x @ weight.mT + KRONA["scale"] * x @ torch.kron(A, B).mT + gain * x

        yield site_case(
            "krona",
            "block",
            variant,
            inputs,
            forward,
            "x A B gain" if residual else "x A B",
            config=KRONA | {"residual": residual},
            comment="what it stands beside is x @ weight.T",
            flags="Scaling KroneckerOrder",
        )
