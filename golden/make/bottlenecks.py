"""Adapters with a bottleneck, around parts of a layer: their equations, at one place and on whole tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import equations
import methods
import numpy as np
import torch
from common import Case, Draw, Tensors
from equations import ACTIVATIONS
from method_sites import site_case
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]

SMALL = {"size": 3, "activation": "relu"}
PRUNED = SMALL | {"sparsity": 0.4, "prune": "random"}
PHM = {"size": 4, "n": 2, "activation": "gelu_tanh", "norms": False}
HYPER = PHM | {"rank": 1}


def cases() -> Iterator[Case]:
    yield from block_cases(PFEIFFER, ("plain", SMALL, "BottleneckSkip BottleneckBias"))
    yield from block_cases(
        PARALLEL,
        ("plain", SMALL | {"scale": 4.0}, "ParallelInput ParallelScale"),
        ("unscaled", SMALL | {"scale": 1.0}, "ParallelInput"),
        ("learned", SMALL | {"scale": 4.0, "learn_scale": True}, "ParallelInput ParallelScale"),
        ("series", SMALL | {"scale": 0.5, "activation": "tanh", "placement": "series"}, "ParallelScale"),
    )
    yield from parallel_at_linear()
    yield behind_the_last_norm("pfeiffer", SMALL, letters(SMALL, 6, 6), bottleneck, "BottleneckBias")
    yield from block_cases(LIN, ("plain", SMALL | {"eps": 1e-5}, "BottleneckSkip BottleneckBias NormEps AdapterNorm"))
    yield from block_cases(COMPACTER, ("plain", HYPER, ""), ("rank", HYPER | {"rank": 2}, ""))
    yield from block_cases(COMPACTER_PP, ("plain", HYPER, ""))
    yield from block_cases(PHM_ADAPTER, ("plain", PHM, ""))
    yield from block_cases(
        SPARSE,
        ("plain", PRUNED, ""),
        ("large", PRUNED | {"size": 12, "sparsity": 0.75, "activation": "gelu_tanh"}, "GeluVariant"),
    )
    yield from model_cases(DROP, SMALL | {"robust": False, "drop": 1}, layers=(1,))
    places = ["model.layers.1.block_out", "model.layers.2.block_out"]
    three = replace(
        on_model(DROP, SMALL | {"robust": False, "drop": 1}, places),
        settings={"num_hidden_layers": 3},
        label="three-",
        comment="the first of three layers goes without",
    )
    found = methods.model_cases("llama", methods.SMALL_LLAMA, iter([three]))
    yield from (case for case in found if case.at == "model")


@dataclass(frozen=True)
class Block:
    """A method around parts of a layer.

    shapes  (config, in, out) -> shapes of the trained tensors of a place, by letter
    value   (f, x, letters, config) -> y, where f is what the model does there
    places  where it stands in every layer
    shared  config -> shapes of trained tensors that all places share
    constants  (draw, config, in, out) -> tensors of a place that are given and not trained, by letter
    penalty  (letters, config) -> a term of the objective for a place
    """

    method: str
    source: str
    shapes: Callable[[dict, int, int], Shapes]
    value: Callable[..., torch.Tensor]
    places: tuple[str, ...]
    shared: Callable[[dict], Shapes] = lambda config: {}
    constants: Callable[..., dict[str, np.ndarray]] = lambda draw, config, inp, out: {}
    penalty: Callable[[Tensors, dict], torch.Tensor] | None = None
    flags: str = ""


def block_cases(block: Block, *variants: tuple[str, dict, str]) -> Iterator[Case]:
    """Cases (name, config, flags) at a place of width 6, and of the first one on a tiny Llama and GPT-2."""
    equations.PAPERS[block.method] = block.source
    for name, config, flags in variants:
        yield _at_one_place(block, name, config, flags, "block", 6)
    yield from model_cases(block, variants[0][1])


def _at_one_place(block: Block, name: str, config: dict, flags: str, at: str, out: int) -> Case:
    draw = Draw(f"{block.method}-{at}-{name}")
    inputs = {"x": draw.normal(2, 3, 6)}
    inputs["weight"] = draw.normal(*((6, out) if at == "conv1d" else (out, 6)), scale=0.4)
    trained = block.shapes(config, 6, out) | block.shared(config)
    inputs |= {letter: draw.normal(*shape, scale=0.5) for letter, shape in trained.items()}
    inputs |= block.constants(draw, config, 6, out)

    def forward(x, weight, **letters):
        return block.value(lambda x: x @ (weight if at == "conv1d" else weight.mT), x, letters, config)

    return site_case(
        block.method,
        at,
        name,
        inputs,
        forward,
        " ".join(("x", *trained)),
        config=config,
        flags=f"{block.flags} {flags}",
        comment="what it stands at is x @ weight" + ".T" * (at != "conv1d"),
        penalty=(lambda t: block.penalty(t, config)) if block.penalty else None,
    )


def model_cases(block: Block, config: dict, layers: tuple[int, ...] = (0, 1)) -> Iterator[Case]:
    equations.PAPERS[block.method] = block.source
    for family, settings, prefix in (
        ("llama", methods.SMALL_LLAMA, "model.layers"),
        ("gpt2", methods.SMALL_GPT2, "transformer.h"),
    ):
        places = [f"{prefix}.{layer}.{place}" for layer in layers for place in block.places]
        yield from methods.model_cases(family, settings, iter([on_model(block, config, places)]))


def on_model(block: Block, config: dict, places: list[str]) -> methods.Adapted:
    letters, shared = block.shapes(config, 8, 8), block.shared(config)
    constants = {place: block.constants(Draw(f"{block.method} {place}"), config, 8, 8) for place in places}

    def advice(t: Tensors) -> dict[str, Callable]:
        common = {name: t[name] for name in shared}

        def advise(place: str) -> Callable:
            own = {letter: t[f"{place}.{letter}"] for letter in letters | constants[place]}
            return lambda f, x: block.value(f, x, own | common, config)

        return {place: advise(place) for place in places}

    return methods.Adapted(
        block.method,
        config,
        shared | {f"{place}.{letter}": shape for place in places for letter, shape in letters.items()},
        advice,
        constants={f"{place}.{letter}": drawn for place in places for letter, drawn in constants[place].items()},
        flags=block.flags,
        peft=False,
        comment=f"at {' and '.join(place.split('.')[-1] for place in places[: len(block.places)])} of layers",
    )


# ---- the equations ---------------------------------------------------------------------------------------------


def bottleneck(x: torch.Tensor, t: dict, config: dict) -> torch.Tensor:
    inner = ACTIVATIONS[config["activation"]](x @ t["down"].mT + t["down_bias"])
    return inner @ t["up"].mT + t["up_bias"]


def letters(config: dict, inp: int, out: int) -> Shapes:
    size = config["size"]
    return {"down": (size, inp), "down_bias": (size,), "up": (out, size), "up_bias": (out,)}


def pfeiffer_value(f, x, t, config) -> torch.Tensor:
    h = f(x)
    return h + bottleneck(h, t, config)


def behind_the_last_norm(
    method: str,
    config: dict,
    trained: Shapes,
    added: Callable[..., torch.Tensor],
    flags: str,
    constants: Callable[[Draw], dict[str, np.ndarray]] = lambda draw: {},
) -> Case:
    """Where a layer ends with a norm, as BERT's: the adapter reads what that gives, and is added to what that reads.

    added (what the norm gives, letters, config) -> what the adapter adds
    """
    draw = Draw(f"{method}-norm-layer")
    inputs = {"x": draw.normal(2, 3, 6), "weight": draw.normal(6, scale=0.3) + np.float32(1), "bias": draw.normal(6)}
    inputs |= {letter: draw.normal(*shape, scale=0.5) for letter, shape in trained.items()}

    def forward(x, weight, bias, **t):
        def norm(x):
            return functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

        return norm(x + added(norm(x), t, config))

    return site_case(
        method,
        "norm",
        "layer",
        inputs | constants(draw),
        forward,
        " ".join(("x", *trained)),
        config=config | {"norm": "layer_norm", "eps": 1e-5},
        flags=f"AdapterBeforeNorm {flags} NormEps",
        comment="a norm that ends its layer, as BERT's",
    )


def parallel_letters(config: dict, inp: int, out: int) -> Shapes:
    series = config.get("placement") == "series"
    return letters(config, out if series else inp, out) | ({"scale": (1,)} if config.get("learn_scale") else {})


def parallel_value(f, x, t, config) -> torch.Tensor:
    h = f(x)
    reads = h if config.get("placement") == "series" else x
    return h + t.get("scale", config["scale"]) * bottleneck(reads, t, config)


def lin_letters(config: dict, inp: int, out: int) -> Shapes:
    return letters(config, inp, out) | {"gain": (out,), "shift": (out,)}


def lin_value(f, x, t, config) -> torch.Tensor:
    h = f(x)
    return h + bottleneck(functional.layer_norm(h, h.shape[-1:], t["gain"], t["shift"], config["eps"]), t, config)


def parallel_at_linear() -> Iterator[Case]:
    """Beside and behind a single layer, whose output is of another width than its input."""
    beside = SMALL | {"scale": 1.0, "activation": "tanh"}
    yield _at_one_place(PARALLEL, "plain", beside, "ParallelInput", "linear", 5)
    yield _at_one_place(PARALLEL, "series", beside | {"placement": "series"}, "", "linear", 5)
    yield _at_one_place(PARALLEL, "plain", beside, "ParallelInput TransposedWeight", "conv1d", 5)


def phm(rule: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The sum of Kronecker products, the second factors of which are (out / n, in / n)."""
    return sum(torch.kron(a, b) for a, b in zip(rule, blocks, strict=True))


def compacter_letters(config: dict, inp: int, out: int) -> Shapes:
    n, rank, size = config["n"], config["rank"], config["size"]
    return {
        "down_s": (n, size // n, rank),
        "down_t": (n, rank, inp // n),
        "down_bias": (size,),
        "up_s": (n, out // n, rank),
        "up_t": (n, rank, size // n),
        "up_bias": (out,),
    }


def compacter_value(f, x, t, config) -> torch.Tensor:
    rule = t["shared.rule"]
    weights = {name: phm(rule, t[f"{name}_s"] @ t[f"{name}_t"]) for name in ("down", "up")}
    return pfeiffer_value(f, x, t | weights, config)


def phm_letters(config: dict, inp: int, out: int) -> Shapes:
    n, size = config["n"], config["size"]
    rules = {"down_rule": (n, n, n), "up_rule": (n, n, n)}
    biases = {"down_bias": (size,), "up_bias": (out,)}
    return {"down": (n, size // n, inp // n), "up": (n, out // n, size // n)} | rules | biases


def phm_value(f, x, t, config) -> torch.Tensor:
    weights = {name: phm(t[f"{name}_rule"], t[name]) for name in ("down", "up")}
    return pfeiffer_value(f, x, t | weights, config)


def masks(draw: Draw, config: dict, inp: int, out: int) -> dict[str, np.ndarray]:
    """Of 0 and 1, of the shapes of the two weights."""
    shapes = letters(config, inp, out)
    kept = {name: draw.generator.random(shapes[name]) >= config["sparsity"] for name in ("down", "up")}
    return {f"{name}_mask": mask.astype(np.int8) for name, mask in kept.items()}


def pruned_value(f, x, t, config) -> torch.Tensor:
    return pfeiffer_value(f, x, t | {name: t[name] * t[f"{name}_mask"] for name in ("down", "up")}, config)


def shared_rule(config: dict) -> Shapes:
    return {"shared.rule": (config["n"],) * 3}


COMPACTER = Block(
    "compacter",
    "arXiv:2106.04647",
    compacter_letters,
    compacter_value,
    ("attn_out", "mlp_out"),
    shared_rule,
    flags="KroneckerOrder SharedGradient",
)
COMPACTER_PP = replace(COMPACTER, method="compacter_pp", source="arXiv:2106.04647", places=("mlp_out",))
PHM_ADAPTER = Block(
    "phm_adapter",
    "arXiv:2106.04647; arXiv:2102.08597",
    phm_letters,
    phm_value,
    ("attn_out", "mlp_out"),
    flags="KroneckerOrder",
)
PFEIFFER = Block(
    "pfeiffer", "arXiv:2005.00052, equation 1; place as AdapterHub", letters, pfeiffer_value, ("block_out",)
)
SPARSE = Block(
    "sparse_adapter",
    "arXiv:2210.04284, section 2",
    letters,
    pruned_value,
    ("attn_out", "mlp_out"),
    constants=masks,
    flags="BottleneckSkip PrunedGradient",
)
PARALLEL = Block("parallel", "arXiv:2110.04366; arXiv:2304.01933", parallel_letters, parallel_value, ("mlp_out",))
LIN = Block("lin", "arXiv:2004.03829, section 3", lin_letters, lin_value, ("block_out",))
DROP = Block(
    "adapterdrop",
    "arXiv:2010.11918, section 3",
    letters,
    pfeiffer_value,
    ("block_out",),
    flags="AdapterDropFirst BottleneckSkip",
)
