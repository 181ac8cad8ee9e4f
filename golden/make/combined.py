"""Adapters of one method on one layer put together with weights. The witness is PEFT's add_weighted_adapter."""

from __future__ import annotations

from collections.abc import Iterator

import bottlenecks
import peft_witness
import torch
from common import Case, Compute, Draw, Tensors
from compositions import LORA_2, LORA_3, OUTPUT, drawn_letters, in_peft
from equations import ACTIVATIONS, PAPERS, lora_scale
from models import precision
from torch.nn import functional

LORA_4 = LORA_2 | {"r": 4, "alpha": 1.0}
EQUAL = LORA_2 | {"alpha": 1.0}
BESIDE = {"method": "parallel", "size": 3, "activation": "tanh", "scale": 4.0}
PLACES = ("first", "second", "third")

ROWS: tuple[tuple, ...] = (  # method, variant, adapters, weights, PEFT's type, flags, comment
    ("lora", "two", (LORA_2, LORA_4), (0.7, 1.5), "cat", "", "other ranks and scales"),
    ("lora", "negative", (LORA_2, LORA_4, EQUAL), (0.7, -0.4, 0.5), "cat", "", "one is taken off"),
    (
        "lora",
        "equal-ranks",
        (LORA_2, EQUAL),
        (0.5, 0.5),
        "cat",
        "",
        "of factors added up there would be products of two adapters",
    ),
    (
        "lora",
        "rslora",
        (LORA_3, LORA_2),
        (0.7, 0.6),
        None,
        "RsLoraScale",
        "the first has alpha / sqrt(r); PEFT's answer is sqrt(5) times as much",
    ),
    (
        "ia3",
        "gains",
        (OUTPUT, OUTPUT),
        (0.25, 0.5),
        "linear",
        "",
        "one gain, the weighted sum; gains are not multiplied",
    ),
    ("parallel", "average", (BESIDE, BESIDE), (0.5, 0.5), None, "CombinedAverage", "the mean of what the two add"),
    ("parallel", "unequal", (BESIDE, BESIDE | {"size": 2}), (0.25, 0.75), None, "CombinedAverage", "a weighted mean"),
    ("lora", "same", (LORA_2, LORA_2), (0.7, 0.6), "cat", "", "of equal ranks and scales, still not factor by factor"),
    ("parallel", "square", (BESIDE, BESIDE), (0.5, 0.5), None, "CombinedAverage", "a mean, at a square layer"),
)


def cases() -> Iterator[Case]:
    for method, variant, adapters, weights, kind, flags, comment in ROWS:
        draw, (out, inp) = Draw(f"{method}-combined-{variant}"), (6, 6 if variant == "square" else 5)
        inputs = {"x": draw.normal(2, 3, inp), "weight": draw.normal(out, inp, scale=inp**-0.5)}
        inputs["bias"] = draw.normal(out)
        config = dict(zip(PLACES, adapters, strict=False)) | {"weights": list(weights)}
        for place, own in zip(PLACES, adapters, strict=False):
            if method == "parallel":
                drawn = {n: draw.normal(*s, scale=0.5) for n, s in bottlenecks.letters(own, inp, out).items()}
            else:
                drawn = drawn_letters(own, draw, inputs["weight"], 0.5)
            inputs |= {f"{place}.{letter}": array for letter, array in drawn.items()}
        yield Case(
            id=f"{method}-combined-{variant}",
            kind="method",
            name=method,
            at="combined",
            level="must" if method == "lora" else "may",
            comment=comment,
            flags=(*flags.split(), "CombinedScale", *(("CombinedCrossTerms",) if method == "lora" else ())),
            spec="golden/README.md, Methods; " + (PAPERS | {"parallel": bottlenecks.PARALLEL.source})[method],
            config=config,
            inputs=inputs,
            compute=together(method, config),
            witnesses={peft_witness.VERSION: weighted(method, config, kind)} if kind else {},
        )


def parts(t: Tensors, config: dict) -> list[tuple[float, Tensors, dict]]:
    """(its weight, its letters, its options) of each adapter."""
    places = [place for place in PLACES if place in config]
    letters = [{n.partition(".")[2]: v for n, v in t.items() if n.startswith(f"{place}.")} for place in places]
    return list(zip(config["weights"], letters, (config[place] for place in places), strict=True))


def together(method: str, config: dict) -> Compute:
    def compute(t: Tensors) -> Tensors:
        own, frozen = parts(t, config), functional.linear(t["x"], t["weight"], t["bias"])
        if method == "lora":
            delta = sum(w * lora_scale(options) * letters["B"] @ letters["A"] for w, letters, options in own)
            return {"y": frozen + t["x"] @ delta.mT, "merged.weight": t["weight"] + delta}
        if method == "ia3":
            gain = sum(w * letters["gain"] for w, letters, _ in own)
            return {"y": frozen * gain, "merged.weight": gain[:, None] * t["weight"], "merged.bias": gain * t["bias"]}
        return {"y": frozen + sum(w * options["scale"] * beside(t["x"], letters) for w, letters, options in own)}

    return compute


def beside(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    inner = ACTIVATIONS[BESIDE["activation"]](functional.linear(x, t["down"], t["down_bias"]))
    return functional.linear(inner, t["up"], t["up_bias"])


def weighted(method: str, config: dict, kind: str) -> Compute:
    def compute(t: Tensors) -> Tensors:
        with precision():
            return answer(t)

    def answer(t: Tensors) -> Tensors:
        adapters = {place: config[place] for place in PLACES if place in config}
        model, _ = in_peft(adapters, t)
        options = {"combination_type": kind} if method == "lora" else {}
        model.base_model.add_weighted_adapter(list(adapters), config["weights"], "sum", **options)
        model.base_model.set_adapter("sum")
        found = {"y": model(t["x"])}
        merged = model.merge_and_unload().site
        found["merged.weight"] = merged.weight
        return found | ({"merged.bias": merged.bias} if method == "ia3" else {})

    return compute
