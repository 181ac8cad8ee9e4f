"""What scripts of methods at linear layers share: an equation becomes cases at one layer and on whole tiny models.

A case at one layer has the output, all gradients and the merged weight; cases on models add three steps of AdamW. The
witness is PEFT's own layer, with the same tensors, where PEFT has the method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import equations
import methods
import numpy as np
import peft_witness
import torch
from common import Case, Draw, Tensors
from method_sites import site_case
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Equation:
    """A method at a linear layer. Weights are (out, in) here, whatever a file has.

    trained    (config, out, in) -> shapes of the trained tensors, by letter
    value      (f, x, weight, letters, config) -> y, where f is the frozen layer with its bias
    merged     (weight, letters, config) -> the weight that stands in for all of it; None where there is none
    merged_bias  the same for the bias, where that changes
    penalty    (weight, letters, config) -> a term of the objective
    constants  (draw, config, out, in) -> tensors that are given and not trained
    shared     (config, largest out, largest in) -> shapes of constants that all layers share, by letter
    bank       config -> shapes of trained tensors that all layers share, by letter: `shared.<letter>` in a case
    start      (letters as drawn, weight, config) -> values to test at, where normal numbers around 0 will not do
    peft       (config, target names) -> PEFT's config, and `names` its parameters of a layer, by letter
    """

    method: str
    source: str
    trained: Callable[[dict, int, int], Shapes]
    value: Callable[..., torch.Tensor]
    merged: Callable[..., torch.Tensor] | None = None
    merged_bias: Callable[..., torch.Tensor] | None = None
    penalty: Callable[..., torch.Tensor] | None = None
    constants: Callable[..., Arrays] = lambda draw, config, out, inp: {}
    shared: Callable[[dict, int, int], Shapes] = lambda config, out, inp: {}
    bank: Callable[[dict], Shapes] = lambda config: {}
    start: Callable[..., Arrays] = lambda letters, weight, config: letters
    peft: Callable[[dict, list[str]], Any] | None = None
    names: dict[str, str] = field(default_factory=dict)
    peft_constants: dict[str, str] = field(default_factory=dict)  # the constants' names in PEFT's model, by letter
    flags: str = ""
    flags_on_models: str = ""


EQUATIONS: dict[str, Equation] = {}
"""Those that cases were made of, by method: see `known`."""


def known(method: str) -> Equation:
    """The equation of a method at linear layers, from the script that makes its cases."""
    for script in ("low_rank", "decompositions", "structured", "selective"):
        if method not in EQUATIONS:
            list(importlib.import_module(script).cases())  # which notes the equation of each
    return EQUATIONS[method]


@dataclass(frozen=True)
class Variant:
    """One configuration of a method at one layer of `out` x `inp`."""

    name: str
    config: dict
    out: int = 6
    inp: int = 4
    rows: tuple[int, ...] = (2, 3)
    bias: bool = False
    conv1d: bool = False
    peft: bool = True  # whether PEFT computes the same; if not, the comment says why
    flags: str = ""
    comment: str = ""


def shapes_of(config: dict, peft_conv1d: bool = True, **more: Any) -> tuple[Variant, ...]:
    """The layers that every method is tried on: with and without a bias and a time axis, and as GPT-2 stores them.

    `peft_conv1d`: whether PEFT has the method for layers as GPT-2 stores them.
    """
    as_gpt2 = more if peft_conv1d else more | {"peft": False}
    return (
        Variant("plain", config, **more),
        Variant("bias", config, bias=True, flags="BaseBias", **more),
        Variant("two-axes", config, rows=(4,), comment="x without a time axis", **more),
        Variant(
            "conv1d", config, bias=True, conv1d=True, flags="TransposedWeight", comment="weight is (in, out)", **as_gpt2
        ),
    )


def dropout_of(config: dict, **more: Any) -> Variant:
    """In training: the mask `keep` is given, of what the method itself reads of x."""
    comment = "in training: the mask `keep` is given; only what the method itself reads is dropped"
    config = config | {"dropout": 0.25}
    return Variant("dropout", config, bias=True, flags="DropoutPlace DropoutScale", comment=comment, **more)


def cases_of(equation: Equation, *variants: Variant, models: dict | None = None) -> Iterator[Case]:
    """Cases of every variant at one layer and, with the config `models`, on a tiny Llama and GPT-2."""
    equations.PAPERS[equation.method] = equation.source
    EQUATIONS.setdefault(equation.method, equation)
    for variant in variants:
        yield _at_one_layer(equation, variant)
    if models is not None:
        yield from methods.model_cases("llama", methods.SMALL_LLAMA, on_layers(equation, models, LLAMA_SITES))
        yield from methods.model_cases("gpt2", methods.SMALL_GPT2, on_layers(equation, models, GPT2_SITES))


def _letters(equation: Equation, draw: Draw, config: dict, weight: np.ndarray) -> tuple[Arrays, Arrays]:
    """(trained, constant) tensors of one layer."""
    out, inp = weight.shape
    shapes = equation.trained(config, out, inp) | _bank(equation, config)
    drawn = {letter: draw.normal(*shape, scale=0.5) for letter, shape in shapes.items()}
    constants = {letter: draw.normal(*shape) for letter, shape in equation.shared(config, out, inp).items()}
    return equation.start(drawn, weight, config), constants | equation.constants(draw, config, out, inp)


def _bank(equation: Equation, config: dict) -> Shapes:
    return {f"shared.{letter}": shape for letter, shape in equation.bank(config).items()}


def _plainly(letters: Tensors) -> Tensors:
    """Without saying which of them are shared."""
    return {name.removeprefix("shared."): tensor for name, tensor in letters.items()}


def _at_one_layer(equation: Equation, variant: Variant) -> Case:
    at = "conv1d" if variant.conv1d else "linear"
    name = "plain" if variant.conv1d and variant.name == "conv1d" else variant.name
    draw = Draw(f"{equation.method}-{at}-{name}")
    config, x = variant.config, draw.normal(*variant.rows, variant.inp)
    weight = draw.normal(variant.out, variant.inp, scale=variant.inp**-0.5)
    bias = {"bias": draw.normal(variant.out)} if variant.bias else {}
    trained, constants = _letters(equation, draw, config, weight)
    if config.get("dropout"):
        constants["keep"] = (draw.generator.random(x.shape) >= config["dropout"]).astype(np.float32)
    stored = np.ascontiguousarray(weight.T) if variant.conv1d else weight
    plain = (lambda weight: weight.mT) if variant.conv1d else (lambda weight: weight)

    def forward(x, weight, bias=None, keep=None, **letters):
        weight = plain(weight)
        if keep is None:
            return equation.value(lambda x: functional.linear(x, weight, bias), x, weight, _plainly(letters), config)
        y, dropped = functional.linear(x, weight, bias), x * keep / (1 - config["dropout"])
        return equation.value(lambda _: y, dropped, weight, _plainly(letters), config)  # f reads all of x

    def merged(t: Tensors) -> Tensors:
        found = {"merged.weight": plain(equation.merged(plain(t["weight"]), _plainly(t), config))}
        if equation.merged_bias and "bias" in t:
            found["merged.bias"] = equation.merged_bias(t["bias"], t, config)
        return found

    def penalty(t: Tensors) -> torch.Tensor:
        return equation.penalty(plain(t["weight"]), _plainly(t), config)

    witness = None
    if equation.peft and variant.peft and "keep" not in constants:
        settings = equation.peft(config, ["site"])
        witness = peft_witness.site(
            settings, equation.names.__getitem__, " ".join(trained), variant.conv1d, equation.peft_constants
        )
    return site_case(
        equation.method,
        at,
        name,
        {"x": x, "weight": stored, **bias, **trained, **constants},
        forward,
        " ".join(("x", *trained)),
        config=config,
        merged=merged if equation.merged else None,
        penalty=penalty if equation.penalty else None,
        comment=variant.comment,
        flags=f"{equation.flags} {variant.flags}",
        witness=witness,
    )


# ---- whole models ----------------------------------------------------------------------------------------------

LLAMA_SITES = {
    f"model.layers.{layer}.self_attn.{name}_proj": (out, 8) for layer in range(2) for name, out in (("q", 8), ("v", 4))
}
GPT2_SITES = {f"transformer.h.{layer}.attn.c_attn": (24, 8) for layer in range(2)}


def on_layers(equation: Equation, config: dict, sites: Shapes) -> Iterator[methods.Adapted]:
    """The method on some layers of a model. Starts are not for here."""
    shapes = {
        f"{site}.{letter}": shape
        for site, (out, inp) in sites.items()
        for letter, shape in equation.trained(config, out, inp).items()
    } | _bank(equation, config)

    largest = (max(side) for side in zip(*sites.values(), strict=True))
    shared = {f"shared.{letter}": shape for letter, shape in equation.shared(config, *largest).items()}
    draw = Draw(f"{equation.method}-constants")
    constants = {
        f"{site}.{letter}": array
        for site, (out, inp) in sites.items()
        for letter, array in equation.constants(draw, config, out, inp).items()
    }

    def advice(t: Tensors) -> dict[str, Callable]:
        return {site: partial_of(t, site) for site in sites}

    def partial_of(t: Tensors, site: str) -> Callable:
        weight = t[f"{site}.weight"]
        weight = weight.mT if site.startswith("transformer.") else weight
        ours = [name for name in t if name.rpartition(".")[0] in (site, "shared")]
        letters = {name.rpartition(".")[2]: t[name] for name in ours}
        return lambda f, x: equation.value(f, x, weight, letters, config)

    yield methods.Adapted(
        equation.method,
        config | {"targets": list(sites)},
        shapes,
        advice,
        constants=shared | constants,
        flags=f"{equation.flags} {equation.flags_on_models}".strip(),
        peft=False,
    )
