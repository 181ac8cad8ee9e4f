"""Two adapters on one layer, in the order in which they are attached: each acts on what the one before has made of it.

Rotations of blocks of four and more, reflections and gains do not commute. The witness is PEFT where it agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import peft
import peft_witness
import torch
from common import Case, Compute, Draw, Tensors
from equations import PAPERS, ia3
from linear_methods import Equation, known
from low_rank import LORA
from models import precision
from torch.nn import functional

IA3 = Equation(
    "ia3",
    PAPERS["ia3"],
    lambda config, out, inp: {"gain": (inp if config["feedforward"] else out,)},
    lambda f, x, weight, t, config: ia3(f, x, t["gain"], config["feedforward"]),
    start=lambda letters, weight, config: {"gain": letters["gain"] + np.float32(1)},
    peft=lambda config, targets: peft.IA3Config(
        target_modules=targets, feedforward_modules=targets if config["feedforward"] else []
    ),
    names={"gain": "ia3_l.default"},
)


@cache
def equation(method: str) -> Equation:
    """The method's, such that it may stand on another: its bias is the frozen one, whatever f is."""
    if method in ("lora", "ia3"):
        return LORA if method == "lora" else IA3
    if method != "boft":
        return known(method)
    rotation = known("boft").merged

    def value(f, x, weight, t, config):
        turned = rotation(torch.eye(x.shape[-1], dtype=x.dtype), t | {"s": torch.ones(x.shape[-1])}, config)
        return t["s"] * f(x @ turned.mT) - (t["s"] - 1) * t.get("bias", 0)

    return replace(known("boft"), value=value)


def of(method: str, **options: Any) -> dict:
    return {"method": method, **options}


LORA_2 = of("lora", r=2, alpha=6.0, rslora=False, dropout=0.0)
LORA_3 = of("lora", r=3, alpha=3.0, rslora=True, dropout=0.0)
DORA = LORA_2 | of("dora")
DORA_3 = LORA_3 | of("dora")
INPUT, OUTPUT = of("ia3", feedforward=True), of("ia3", feedforward=False)
OFT = of("oft", block_size=4, block_share=False, cayley="exact", terms=5)
NEUMANN = OFT | {"cayley": "neumann"}
BOFT = of("boft", block_size=4, butterfly_factors=2)
HRA = of("hra", r=2)
C3A = of("c3a", block_size=4)
LOHA = of("loha", r=2, alpha=6.0)
PISSA = LORA_2 | of("pissa")
OLORA = LORA_3 | of("olora")
HIRA = of("hira", r=2, dropout=0.0)
ROAD = of("road", numbers=2, group_size=4)
MISS = of("miss", r=2, mini_r=None, dropout=0.0)
LOKR = of("lokr", r=1, alpha=3.0, factor=-1, decompose_both=False)
DELORA = of("delora", r=2, dropout=0.0)

ROWS: tuple[tuple, ...] = (  # variant, first, second, sides (out, in), bias, PEFT agrees, flags, comment
    ("lora", LORA_2, LORA_3, (6, 8), True, True, "Scaling RsLoraScale", "other ranks and scales; both are added"),
    ("plain", LORA_2, LORA_2 | {"alpha": 3.0}, (8, 8), True, True, "Scaling InputOverwritten", "both read x"),
    ("dora", DORA, DORA_3, (6, 8), True, False, "AdapterOrder BaseBias", "both V are of the frozen weight"),
    ("dora", LORA_2, DORA, (6, 8), True, False, "AdapterOrder", "V is of the frozen weight, without the first"),
    ("lora", DORA, LORA_2, (6, 8), True, True, "AdapterOrder", "DoRA's norms are without what follows"),
    ("ia3", OUTPUT, OUTPUT, (6, 8), True, True, "Ia3InputSide BaseBias", "gains of the output multiply, the bias too"),
    ("input", INPUT, INPUT, (8, 8), True, True, "Ia3InputSide BaseBias", "gains of the input multiply"),
    ("ia3", LORA_2, OUTPUT, (6, 8), True, False, "AdapterOrder BaseBias", "the gain is also of what LoRA adds"),
    ("lora", OUTPUT, LORA_2, (6, 8), True, False, "AdapterOrder BaseBias", "what LoRA adds has no gain"),
    ("oft", OFT, OFT, (6, 8), True, False, "AdapterOrder MergedOrder OftSide", "exact rotations"),
    (
        "neumann",
        NEUMANN,
        NEUMANN,
        (6, 8),
        True,
        False,
        "AdapterOrder MergedOrder OftSide",
        "PEFT 0.21: x R1 R2, merged as x R2 R1",
    ),
    ("oft", LORA_2, NEUMANN, (6, 8), True, True, "AdapterOrder MergedOrder", "LoRA reads what the rotation gives"),
    ("lora", NEUMANN, LORA_2, (6, 8), True, True, "AdapterOrder MergedOrder", "LoRA reads x, not what is rotated"),
    ("boft", BOFT, BOFT, (6, 8), True, True, "AdapterOrder MergedOrder ButterflyOrder", "the bias has no gain"),
    ("hra", HRA, HRA, (6, 8), True, True, "AdapterOrder MergedOrder ReflectionOrder", ""),
    ("dora", HRA, DORA, (6, 8), False, False, "AdapterOrder MergedOrder", "what DoRA reads is not reflected"),
    ("c3a", C3A, C3A, (12, 8), True, False, "InputOverwritten CirculantScale", "more outputs than inputs"),
    ("square", C3A, C3A, (8, 8), True, False, "InputOverwritten CirculantScale", "both read x"),
    ("loha", LOHA, LOHA, (6, 8), True, True, "Scaling HadamardOfProducts", ""),
    ("hira", HIRA, HIRA, (6, 8), True, True, "FrozenProduct", "both multiply the frozen weight"),
    (
        "road",
        ROAD,
        ROAD,
        (8, 6),
        True,
        True,
        "AdapterOrder MergedOrder RoadPlanes",
        "planes of the same pairs, with two angles each",
    ),
    ("lokr", LOKR, LOKR, (6, 8), True, True, "Scaling KroneckerOrder", ""),
    (
        "delora",
        DELORA,
        DELORA,
        (6, 8),
        True,
        True,
        "FrozenProduct DeloraNorms",
        "norms are of the frozen weight, twice",
    ),
    ("miss", MISS, MISS, (6, 8), True, True, "MissShards", ""),
    ("loha", LORA_2, LOHA, (6, 8), True, True, "Scaling", ""),
    (
        "lora",
        PISSA,
        LORA_3,
        (6, 8),
        True,
        False,
        "FrozenWeightKept PissaScale",
        "without PiSSA the weight is whole again",
    ),
    (
        "lora",
        OLORA,
        LORA_2,
        (6, 8),
        False,
        False,
        "FrozenWeightKept OloraScale",
        "without OLoRA the weight is whole again",
    ),
)


def cases() -> Iterator[Case]:
    for variant, first, second, sides, bias, agrees, flags, comment in ROWS:
        yield composition(variant, {"first": first, "second": second}, sides, bias, agrees, flags, comment)


def composition(
    variant: str, config: dict, sides: tuple[int, int], bias: bool, agrees: bool, flags: str, comment: str
) -> Case:
    methods = [one["method"] for one in config.values()]
    case_id = f"{methods[0]}-two-{variant}"
    draw, (out, inp) = Draw(case_id), sides
    weight = draw.normal(out, inp, scale=inp**-0.5)
    inputs = {"x": draw.normal(2, 3, inp), "weight": weight} | ({"bias": draw.normal(out)} if bias else {})
    trained = {}
    for place, own in config.items():
        trained |= {f"{place}.{letter}": array for letter, array in drawn_letters(own, draw, weight, 0.3).items()}
    return Case(
        id=case_id,
        kind="method",
        name=methods[0],
        at="two",
        level="may" if "AdapterOrder" in flags else "must",
        comment=comment,
        flags=tuple(flags.split()),
        spec="golden/README.md, Methods; " + "; ".join(dict.fromkeys(equation(name).source for name in methods)),
        config=config,
        inputs=inputs | trained | {"g": draw.normal(2, 3, out)},
        compute=both(config, tuple(trained)),
        witnesses={peft_witness.VERSION: pair(config)} if agrees else {},
    )


def drawn_letters(config: dict, draw: Draw, weight: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """What one adapter trains at a layer, drawn."""
    own = equation(config["method"])
    shapes = own.trained(config, *weight.shape)
    return own.start({name: draw.normal(*shape, scale=scale) for name, shape in shapes.items()}, weight, config)


def both(config: dict, trained: tuple[str, ...]) -> Compute:
    """y with the two, its gradients, what they merge to, and y with one of the two alone."""

    def composed(t: Tensors, places: tuple[str, ...] = ("first", "second")) -> Callable:
        weight, bias = t["weight"], t.get("bias")
        value = lambda x: functional.linear(x, weight, bias)  # noqa: E731
        for place in places:
            letters = {n.removeprefix(f"{place}."): tensor for n, tensor in t.items() if n.startswith(place)}
            letters |= {"bias": bias} if bias is not None else {}
            value = around(value, weight, letters, config[place])
        return value

    def compute(t: Tensors) -> Tensors:
        leaves = {name: t[name].clone().requires_grad_() for name in ("x", *trained)}
        y = composed(t | leaves)(leaves["x"])
        y.backward(t["g"])
        zero = torch.zeros(t["weight"].shape[1], dtype=y.dtype)
        bias = composed(t)(zero)  # what the two compute is affine
        merged = {"merged.weight": (composed(t)(torch.diag(zero + 1)) - bias).mT}
        merged |= {"merged.bias": bias} if "bias" in t else {}
        alone = {f"alone.{place}": composed(t, (place,))(t["x"]) for place in config}
        return {"y": y, **{f"grad.{name}": leaf.grad for name, leaf in leaves.items()}, **merged, **alone}

    return compute


def around(f: Callable, weight: torch.Tensor, letters: Tensors, config: dict) -> Callable:
    return lambda x: equation(config["method"]).value(f, x, weight, letters, config)


def in_peft(adapters: dict[str, dict], t: Tensors) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """PEFT's model of the layer with adapters, by name, and its parameters by the case's names, with its values."""
    settings = {place: equation(own["method"]).peft(own, ["site"]) for place, own in adapters.items()}
    mixed = len({own["method"] for own in adapters.values()}) > 1
    first, *others = adapters
    base = peft_witness.OneSite(peft_witness.base_layer(t, conv1d=False))
    model = peft.get_peft_model(base, settings[first], adapter_name=first, mixed=mixed)
    for place in others:
        model.add_adapter(place, settings[place])
    parameters = {}
    for place, own in adapters.items():
        for letter, name in equation(own["method"]).names.items():
            if f"{place}.{letter}" in t:
                theirs = name.replace("default", place)
                parameter = next(p for n, p in model.named_parameters() if n.endswith(theirs))
                parameter.data.copy_(t[f"{place}.{letter}"].reshape(parameter.shape))
                parameters[f"{place}.{letter}"] = parameter
    return model, parameters


def pair(config: dict) -> Compute:
    """The same by PEFT, with both adapters active."""

    def compute(t: Tensors) -> Tensors:
        with precision():
            return answer(t)

    def answer(t: Tensors) -> Tensors:
        model, parameters = in_peft(config, t)
        found = {}
        for place in config:
            model.base_model.set_adapter(place)
            found[f"alone.{place}"] = model(t["x"]).detach()
        model.base_model.set_adapter(["first", "second"])
        x = t["x"].clone().requires_grad_()
        y = model(x)
        y.backward(t["g"])
        grads = {f"grad.{name}": p.grad.reshape(t[name].shape) for name, p in parameters.items()}
        merged = model.merge_and_unload().site
        found |= {"y": y, "grad.x": x.grad, **grads, "merged.weight": merged.weight}
        return found | ({"merged.bias": merged.bias} if "bias" in t else {})

    return compute
