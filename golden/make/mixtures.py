"""Several bottlenecks at a place: one drawn for each pass (AdaMix; draws are inputs), or attention over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import bottlenecks
import equations
import methods
import numpy as np
import reference
import torch
from bottlenecks import Block
from common import Case, Compute, Draw, Tensors
from method_sites import site_case
from models import config_of
from torch.nn import functional

SMALL = {"size": 3, "modules": 3, "share": "up", "consistency": 2.0, "activation": "gelu"}
APART = SMALL | {"share": "none"}
STEPS, PASSES = 3, 2


def cases() -> Iterator[Case]:
    equations.PAPERS["adamix"] = "arXiv:2205.12410, sections 3.1 to 3.4"
    merged = bottlenecks.block_cases(
        MIXTURE, ("plain", SMALL, ""), ("apart", APART, ""), ("down", SMALL | {"share": "down"}, "")
    )
    yield from (case for case in merged if case.at != "train")  # merged modules are not trained
    yield from drawn_at_one_place()
    yield objective()
    for family, settings, prefix in (
        ("llama", methods.SMALL_LLAMA, "model.layers"),
        ("gpt2", methods.SMALL_GPT2, "transformer.h"),
    ):
        yield training(family, settings, [f"{prefix}.{layer}.mlp_out" for layer in range(2)])
    yield from bottlenecks.block_cases(
        FUSION, ("plain", FUSED, ""), ("three", FUSED | {"adapters": ["a", "b", "c"]}, "")
    )
    yield bottlenecks.behind_the_last_norm(
        "adapterfusion",
        FUSED,
        attention_letters(FUSED, 6, 6),
        mixed,
        "FusionScale",
        constants=lambda draw: trained_adapters(draw, FUSED, 6, 6),
    )


# ---- AdaMix ----------------------------------------------------------------------------------------------------


def letters(config: dict, inp: int, out: int) -> dict[str, tuple[int, ...]]:
    count = {side: 1 if config["share"] == side else config["modules"] for side in ("down", "up")}
    shapes = bottlenecks.letters(config, inp, out)
    return {letter: (count[letter.removesuffix("_bias")], *shape) for letter, shape in shapes.items()}


def value(f: Callable, x: torch.Tensor, t: dict, config: dict) -> torch.Tensor:
    """With the modules of `draws`, of down and of up; without it with their averages."""
    draws = dict(zip(("down", "up"), t.get("draws", ()), strict=False))

    def one(letter: str) -> torch.Tensor:
        return t[letter][draws[letter.removesuffix("_bias")]] if draws else t[letter].mean(0)

    return bottlenecks.pfeiffer_value(f, x, {letter: one(letter) for letter in letters(config, 1, 1)}, config)


MIXTURE = Block(
    "adamix",
    "arXiv:2205.12410, section 3.3",
    letters,
    value,
    ("mlp_out",),
    flags="BottleneckSkip MergedModules",
)


def drawn_at_one_place() -> Iterator[Case]:
    for variant, config, draws in (("drawn", SMALL, (2, 0)), ("drawn-apart", APART, (0, 2))):
        draw = Draw(f"adamix-block-{variant}")
        inputs = {"x": draw.normal(2, 3, 6), "weight": draw.normal(6, 6, scale=0.4)}
        trained = letters(config, 6, 6)
        inputs |= {letter: draw.normal(*shape, scale=0.5) for letter, shape in trained.items()}
        inputs["draws"] = np.int32(draws)

        def forward(x, weight, config=config, **t):
            return value(lambda x: x @ weight.mT, x, t, config)

        yield site_case(
            "adamix",
            "block",
            variant,
            inputs,
            forward,
            " ".join(("x", *trained)),
            config=config,
            flags="BottleneckSkip DrawnModules",
            comment="in training: the module of down and of up; the others have no gradient",
        )


def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL both ways of what two (positions, vocab) logits say, a number a position; gradients pass through all of it."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    one = functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    other = functional.kl_div(log_p, log_q, reduction="none", log_target=True)
    return (one + other).sum(-1)


def minimised(a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor, config: dict) -> torch.Tensor:
    """Of the first pass the loss, of both how far they are apart."""
    return functional.cross_entropy(a, targets.long()) + config["consistency"] / 2 * divergence(a, b).mean()


def objective() -> Case:
    draw = Draw("adamix-objective")
    inputs = {"a": draw.normal(5, 7), "b": draw.normal(5, 7), "targets": draw.integers(0, 7, 5)}

    def compute(t: Tensors) -> Tensors:
        a, b = (t[name].clone().requires_grad_() for name in "ab")
        loss = minimised(a, b, t["targets"], SMALL)
        loss.backward()
        return {"loss": loss, "grad.a": a.grad, "grad.b": b.grad}

    return Case(
        id="adamix-objective",
        kind="method",
        name="adamix",
        at="objective",
        comment="the logits of both passes at supervised positions",
        flags=("ConsistencyGradient",),
        spec=equations.PAPERS["adamix"],
        config=SMALL,
        inputs=inputs,
        compute=compute,
    )


# ---- whole models ----------------------------------------------------------------------------------------------


def training(family: str, settings: dict, places: list[str]) -> Case:
    """Three steps of AdamW, of two passes each, with the modules that `draws` (step, pass, layer, down and up) says."""
    adapted = bottlenecks.on_model(MIXTURE, APART, places)
    (case,) = (case for case in methods.model_cases(family, settings, iter([adapted])) if case.at == "train")
    case = replace(case, id=f"adamix-{family}-drawn")
    draws = Draw(f"{case.id} draws").integers(0, APART["modules"], STEPS, PASSES, len(places), 2)
    return replace(
        case,
        comment="three steps of AdamW, of two passes each; draws are (step, pass, layer, down and up)",
        flags=("DrawnModules", "ConsistencyGradient"),
        inputs=case.inputs | {"draws": draws},
        compute=three_steps(config_of(family, settings), list(adapted.trained), places),
    )


def three_steps(model: dict, names: list[str], places: list[str]) -> Compute:
    def logits(t: Tensors, draws: torch.Tensor) -> torch.Tensor:
        def at(place: str, drawn: torch.Tensor) -> Callable:
            own = {letter: t[f"{place}.{letter}"] for letter in letters(APART, 1, 1)} | {"draws": drawn}
            return lambda f, x: value(f, x, own, APART)

        advice = {place: at(place, drawn) for place, drawn in zip(places, draws, strict=True)}
        found = reference.model(model, t, advice)(t["ids"], None, None)
        return found[t["targets"] >= 0]

    def compute(t: Tensors) -> Tensors:
        trained = {name: t[name].clone().requires_grad_() for name in names}
        options = {name: methods.TRAIN[name] for name in ("lr", "betas", "eps", "weight_decay")}
        optimizer = torch.optim.AdamW(trained.values(), foreach=False, **options)
        losses = []
        for draws in t["draws"]:
            optimizer.zero_grad()
            a, b = (logits(t | trained, drawn) for drawn in draws)
            loss = minimised(a, b, t["targets"][t["targets"] >= 0], APART)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), **{f"after.{name}": p for name, p in trained.items()}}

    return compute


# ---- AdapterFusion ---------------------------------------------------------------------------------------------

FUSED = {"adapters": ["a", "b"], "size": 3, "activation": "relu", "penalty": 0.01}


def attention_letters(config: dict, inp: int, out: int) -> dict[str, tuple[int, ...]]:
    return {"query": (out, inp), "query_bias": (out,), "key": (out, out), "value": (out, out)}


def trained_adapters(draw: Draw, config: dict, inp: int, out: int) -> dict[str, np.ndarray]:
    shapes = bottlenecks.letters(config, inp, out)
    return {letter: draw.normal(len(config["adapters"]), *shape, scale=0.5) for letter, shape in shapes.items()}


def fused(f: Callable, x: torch.Tensor, t: dict, config: dict) -> torch.Tensor:
    h = f(x)
    return h + mixed(h, t, config)


def mixed(h: torch.Tensor, t: dict, config: dict) -> torch.Tensor:
    """Keys and values are of what each adapter adds, without the residual."""
    each = [{letter: t[letter][i] for letter in bottlenecks.letters(config, 1, 1)} for i in range(len(t["down"]))]
    z = torch.stack([bottlenecks.bottleneck(h, one, config) for one in each], dim=-2)
    query, keys, values = h @ t["query"].mT + t["query_bias"], z @ t["key"].mT, z @ t["value"].mT
    scores = (query.unsqueeze(-2) * keys).sum(-1).softmax(-1)
    return (scores.unsqueeze(-1) * values).sum(-2)


FUSION = Block(
    "adapterfusion",
    "arXiv:2005.00247, section 3; biases, residual and penalty as AdapterHub",
    attention_letters,
    fused,
    ("block_out",),
    constants=trained_adapters,
    penalty=lambda t, config: config["penalty"] * (t["value"] - torch.eye(len(t["value"]))).square().sum(),
    flags="BottleneckSkip FusionResidual FusionScale",
)
