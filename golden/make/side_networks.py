"""Methods that read all layers and leave them alone, on whole tiny models: a ladder side network, attention fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import equations
import methods
import torch
from common import Case, Tensors
from methods import SMALL_GPT2, SMALL_LLAMA, Adapted
from torch.nn import functional

equations.PAPERS |= {
    "ladder_side": "arXiv:2206.06522, section 3.2",
    "attention_fusion": "https://aclanthology.org/2022.findings-naacl.64",
}

WIDE = SMALL_LLAMA | {"hidden_size": 12, "head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


def cases() -> Iterator[Case]:
    for family, settings, variants in (
        ("llama", WIDE, ({}, {"output": "add", "temperature": 2.0, "drop": [0]})),
        ("gpt2", SMALL_GPT2, ({"drop": [1]},)),
    ):
        for options in variants:
            found = methods.model_cases(
                family, settings, iter([ladder(family, {"r": 2, "temperature": 1.0} | options)])
            )
            yield from (case for case in found if not options or case.at == "model")
    wide = ladder("llama", {"r": 2, "temperature": 1.0}, head=8)
    found = methods.model_cases("llama", WIDE | {"head_dim": 8}, iter([wide]))
    yield from (case for case in found if case.id.endswith("-model"))
    for family, settings, options in (
        ("llama", SMALL_LLAMA, {}),
        ("llama", SMALL_LLAMA, {"output": "add"}),
        ("gpt2", SMALL_GPT2, {}),
    ):
        yield from methods.model_cases(family, settings, iter([fusion(family, 8, options)]))


# ---- ladder side-tuning ----------------------------------------------------------------------------------------


def ladder(family: str, options: dict, head: int = 4) -> Adapted:
    gpt2 = family == "gpt2"
    dim, ff, heads, kv = (8, 12, 2, 2) if gpt2 else (12, 12, 4, 2)
    width, inner, head = dim // 2, ff // 2, head // 2
    places = [f"{'transformer.h' if gpt2 else 'model.layers'}.{i}.block_out" for i in range(2)]
    shapes = {f"{places[0]}.first": (width, dim)}
    for i, place in enumerate(places):
        if i not in options.get("drop", ()):
            side = {"ladder": (width, dim), "alpha": (1,), "norm1": (width,), "norm2": (width,)}
            side |= {"q": (heads * head, width), "k": (kv * head, width), "v": (kv * head, width)}
            side |= {"o": (width, heads * head)} | ({} if gpt2 else {"gate": (inner, width)})
            side |= {"up": (inner, width), "down": (width, inner)}
            shapes |= {f"{place}.{letter}": shape for letter, shape in side.items()}
    shapes |= {f"{places[1]}.norm": (width,), f"{places[1]}.last": (dim, width)}

    def advice(t: Tensors) -> dict[str, Callable]:
        states = []  # of the side network; the last is the newest

        def advise(place: str) -> Callable:
            own = {name.removeprefix(f"{place}."): t[name] for name in shapes if name.startswith(f"{place}.")}

            def read(f: Callable, x: torch.Tensor) -> torch.Tensor:
                h = f(x)
                if place == places[0]:
                    states[:] = [x @ own["first"].mT]
                if "alpha" in own:
                    m = torch.sigmoid(own["alpha"] / options["temperature"])
                    states.append(side_layer(m * h @ own["ladder"].mT + (1 - m) * states[-1], own, f.attention, head))
                if place == places[0]:
                    return h
                told = rms_norm(states[-1], own["norm"]) @ own["last"].mT
                return h + told if options.get("output") == "add" else told

            return read

        return {place: advise(place) for place in places}

    added, wide = options.get("output") == "add", head > 2
    comment = "; every second of the model's frequencies is not its first half" if wide else ""
    return Adapted(
        "ladder_side",
        options,
        shapes,
        advice,
        flags="LadderGate LadderOutput SideRotary",
        peft=False,
        comment=("what the side network gives is added to the last layer's" if added else "the head hears it alone")
        + comment,
        label="add-" if added else "wide-" if wide else "",
        virtual=not gpt2 and not added,
    )


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def side_layer(x: torch.Tensor, t: Tensors, attention: Callable, head: int) -> torch.Tensor:
    n = rms_norm(x, t["norm1"])
    q, k, v = ((n @ t[letter].mT).unflatten(-1, (-1, head)).transpose(1, 2) for letter in "qkv")
    x = x + attention(q, k, v).transpose(1, 2).flatten(2) @ t["o"].mT
    n = rms_norm(x, t["norm2"])
    up = n @ t["up"].mT
    inner = functional.silu(n @ t["gate"].mT) * up if "gate" in t else functional.gelu(up, approximate="tanh")
    return x + inner @ t["down"].mT


# ---- attention fusion ------------------------------------------------------------------------------------------


def fusion(family: str, dim: int, options: dict) -> Adapted:
    layer = "transformer.h" if family == "gpt2" else "model.layers"
    places = [f"{layer}.{i}.block_out" for i in range(2)]
    query = f"{places[1]}.query"

    def advice(t: Tensors) -> dict[str, Callable]:
        states = []

        def read(f: Callable, x: torch.Tensor, place: str) -> torch.Tensor:
            h = f(x)
            if place == places[0]:
                states[:] = [x]
            states.append(h)
            if place == places[0]:
                return h
            v = [rms_norm(state, torch.ones(dim)) for state in states]
            weights = torch.stack([state @ t[query] for state in v], dim=-1).softmax(-1)
            told = sum(weights[..., j, None] * state for j, state in enumerate(v))
            return h + told if options.get("output") == "add" else told

        return {place: lambda f, x, place=place: read(f, x, place) for place in places}

    return Adapted(
        "attention_fusion",
        options,
        {query: (dim,)},
        advice,
        flags="FusionStates",
        peft=False,
        comment="three states of each token: what the first layer reads, and what both give",
        label="add-" if options else "",
    )
