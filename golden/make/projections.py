"""Intrinsic dimension: one short vector, projected onto every weight. Random numbers are those of a stream by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import equations
import methods
import numpy as np
import torch
from common import Case, Draw, Tensors
from method_sites import site_case
from ops import fastfood
from random_numbers import normal, permutation, words
from torch.nn import functional

METHOD, SEED = "intrinsic_said", 3


def cases() -> Iterator[Case]:
    equations.PAPERS[METHOD] = "arXiv:2012.13255, section 3; the projection: the authors' code"
    yield from at_a_linear_layer()
    yield from at_other_places()
    for family, settings, sites in (
        ("llama", methods.SMALL_LLAMA, {"self_attn.q_proj": (8, 8), "self_attn.v_proj": (4, 8)}),
        ("gpt2", methods.SMALL_GPT2, {"attn.c_attn": (24, 8), "ln_1": (8,)}),
    ):
        yield from methods.model_cases(family, settings, iter([on_a_model(family, sites)]))


def projected(theta: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """P theta for the weight or bias of this name, row by row as (out, in)."""
    size = math.prod(shape)
    n = 2 ** math.ceil(math.log2(max(size, len(theta))))
    signs = torch.tensor([word % 2 * 2 - 1 for word in words(SEED, [name, "signs"], n)])
    order = torch.tensor(permutation(SEED, [name, "order"], n))
    gauss = torch.tensor(normal(SEED, [name, "gauss"], n), dtype=torch.float32).to(theta.dtype)
    return fastfood(theta, signs, order, gauss, size).reshape(shape)


def at_a_linear_layer() -> Iterator[Case]:
    said = {"d": 10, "said": True, "projection_seed": SEED}
    for variant, config, bias, conv1d in (
        ("plain", said, False, False),
        ("bias", said, True, False),
        ("did", said | {"said": False}, True, False),
        ("long", said | {"d": 24}, False, False),
        ("plain", said, True, True),
    ):
        at = "conv1d" if conv1d else "linear"
        draw = Draw(f"{METHOD}-{at}-{variant}")
        inputs = {"x": draw.normal(2, 3, 4), "weight": draw.normal(*((4, 6) if conv1d else (6, 4)), scale=0.5)}
        inputs |= {"bias": draw.normal(6)} if bias else {}
        scales = [f"{part}_scale" for part in ("weight", "bias")[: 1 + bias]] if config["said"] else []
        inputs |= {"shared.theta": draw.normal(config["d"] - len(scales))} | {name: draw.normal(1) for name in scales}

        def moved(t: Tensors, conv1d=conv1d) -> Tensors:
            plain = {"weight": t["weight"].mT if conv1d else t["weight"], "bias": t.get("bias")}
            return {
                part: value + t.get(f"{part}_scale", 1) * projected(t["shared.theta"], f"site.{part}", value.shape)
                for part, value in plain.items()
                if value is not None
            }

        def merged(t: Tensors, moved=moved, conv1d=conv1d) -> Tensors:
            found = {f"merged.{part}": value for part, value in moved(t).items()}
            return found | {"merged.weight": found["merged.weight"].mT} if conv1d else found

        yield site_case(
            METHOD,
            at,
            variant,
            inputs,
            lambda x, moved=moved, **t: functional.linear(x, **moved(t)),
            " ".join(("x", "shared.theta", *scales)),
            config=config,
            merged=merged,
            flags="FastfoodOrder FastfoodLength" + " TransposedWeight" * conv1d + " SaidScale" * bool(scales),
            comment="names of the streams: site.weight and site.bias",
        )


def at_other_places() -> Iterator[Case]:
    """An embedding, and a norm with a bias: each weight is as theta moves it."""
    for at, variant, shape, f in (
        ("embedding", "plain", (7, 5), lambda ids, weight: weight[ids.long()]),
        ("norm", "layer", (8,), lambda x, weight, bias: functional.layer_norm(x, (8,), weight, bias, 1e-5)),
    ):
        draw = Draw(f"{METHOD}-{at}-{variant}")
        config = {"d": 6, "said": True, "projection_seed": SEED}
        reads = {"ids": np.int32([[3, 0, 3], [6, 1, 2]])} if at == "embedding" else {"x": draw.normal(2, 3, 8)}
        weights = {"weight": draw.normal(*shape)} | ({} if at == "embedding" else {"bias": draw.normal(*shape)})
        scales = [f"{part}_scale" for part in weights]
        inputs = {"shared.theta": draw.normal(config["d"] - len(scales))} | {name: draw.normal(1) for name in scales}

        def moved(t: Tensors, weights=weights) -> Tensors:
            return {
                part: t[part] + t[f"{part}_scale"] * projected(t["shared.theta"], f"site.{part}", t[part].shape)
                for part in weights
            }

        yield site_case(
            METHOD,
            at,
            variant,
            reads | weights | inputs,
            lambda f=f, moved=moved, reads=reads, **t: f(*(t[name] for name in reads), **moved(t)),
            " ".join([name for name in reads if name == "x"] + list(inputs)),
            config=config | ({"norm": "layer_norm", "eps": 1e-5} if at == "norm" else {}),
            merged=lambda t, moved=moved: {f"merged.{part}": value for part, value in moved(t).items()},
            flags="FastfoodOrder FastfoodLength SaidScale" + " RepeatedRows" * (at == "embedding"),
            comment="names of the streams: " + " and ".join(f"site.{part}" for part in weights),
        )


def on_a_model(family: str, sites: dict[str, tuple[int, ...]]) -> methods.Adapted:
    here, embed = {"llama": ("model.layers", "model.embed_tokens"), "gpt2": ("transformer.h", "transformer.wte")}[
        family
    ]
    shapes = {f"{here}.{i}.{name}": shape for i in range(2) for name, shape in sites.items()} | {embed: (16, 8)}
    biased = [name for name in shapes if family == "gpt2" and name != embed]
    scales = {f"{name}.weight_scale": (1,) for name in shapes} | {f"{name}.bias_scale": (1,) for name in biased}
    tied = [embed, "lm_head"] if family == "gpt2" else [embed]
    options = {"d": 20 + len(scales), "said": True, "projection_seed": SEED}

    def advice(t: Tensors) -> dict[str, Callable]:
        def move(name: str, part: str, shape: tuple[int, ...]) -> torch.Tensor:
            scale = t.get(f"{name}.{part}_scale", 0)
            return scale * projected(t["shared.theta"], f"{name}.{part}", shape)

        def linear(name: str, shape: tuple[int, int]) -> Callable:
            return lambda f, x: f(x) + functional.linear(x, move(name, "weight", shape), move(name, "bias", shape[:1]))

        def norm(name: str, shape: tuple[int]) -> Callable:
            def moved(f: Callable, x: torch.Tensor) -> torch.Tensor:
                y = f(x)
                normal = (y - t[f"{name}.bias"]) / t[f"{name}.weight"]
                return y + normal * move(name, "weight", shape) + move(name, "bias", shape)

            return moved

        found = {name: (linear if len(shape) == 2 else norm)(name, shape) for name, shape in shapes.items()}
        found[embed] = lambda f, ids: f(ids) + move(embed, "weight", (16, 8))[ids]
        if family == "gpt2":
            found["lm_head"] = lambda f, x: f(x) + x @ move(embed, "weight", (16, 8)).mT
        return found

    return methods.Adapted(
        METHOD,
        options | {"targets": [*shapes, *tied[1:]]},
        {"shared.theta": (20,)} | scales,
        advice,
        flags="FastfoodOrder FastfoodLength SaidScale" + " FastfoodShort" * (family == "gpt2"),
        peft=False,
        comment="theta is longer than a norm, which it still moves as a whole; a tied head moves with the embedding"
        if family == "gpt2"
        else "",
    )
