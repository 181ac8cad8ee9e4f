"""Methods on a base in NF4: DoRA's (QDoRA) and LoRA's (LoftQ) equations around the weight as it is decoded.

The witness is PEFT's layer on a dense weight with the decoded values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import equations
import methods
import numpy as np
import peft_witness
import torch
from common import Case, Compute, Draw, Tensors
from linear_methods import GPT2_SITES, LLAMA_SITES, Equation, known
from low_rank import LORA
from method_sites import site_case
from nf4 import BLOCK, decode, encode, f32, safe

CONFIG = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0, "quantizer": "nf4", "block": BLOCK}


def cases() -> Iterator[Case]:
    equations.PAPERS["qdora"] = "arXiv:2402.09353, section 4, on the weight of arXiv:2305.14314"
    equations.PAPERS["loftq"] = "arXiv:2310.08659, section 3"
    of_norms = "DoraNormOfDequantized DoraNormIsConstant Scaling"
    for method, like, flags in (("qdora", "dora", of_norms), ("loftq", "lora", "QuantizedBase Scaling")):
        equation = LORA if like == "lora" else known(like)
        yield at_one_layer(method, equation, "quantized-base", flags, conv1d=False)
        yield at_one_layer(method, equation, "plain", f"{flags} QuantizedLayout TransposedWeight", conv1d=True)
        for family, settings, sites in (
            ("llama", methods.SMALL_LLAMA, LLAMA_SITES),
            ("gpt2", methods.SMALL_GPT2, GPT2_SITES),
        ):
            flags_here = flags + " QuantizedLayout" * (family == "gpt2")
            found = methods.model_cases(family, settings, iter([on_layers(method, equation, sites, flags_here)]))
            yield from (case for case in found if family == "llama" or case.at == "model")


def decoded(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 holds of `weight` (out, in), in its dtype. Raises SystemExit where a code hangs on last bits."""
    values = f32(weight.detach().double().numpy())
    if not safe(values):
        raise SystemExit("quantized_bases: a value is too close to a boundary of NF4")
    parts = encode({"weight": torch.from_numpy(values)}, double=False)
    return decode(parts, list(weight.shape))["weight"].to(weight.dtype)


def turned(weight: torch.Tensor, conv1d: bool) -> torch.Tensor:
    """(out, in) from how a file has it, and the other way round."""
    return weight.mT.contiguous() if conv1d else weight


def value(equation: Equation, x: torch.Tensor, stored: torch.Tensor, bias, letters: Tensors, conv1d: bool):
    weight = decoded(turned(stored, conv1d))
    return equation.value(lambda x: torch.nn.functional.linear(x, weight, bias), x, weight, letters, CONFIG)


def at_one_layer(method: str, equation: Equation, variant: str, flags: str, conv1d: bool) -> Case:
    at, out, inp = "conv1d" if conv1d else "linear", 8, 12
    draw = Draw(f"{method}-{at}-{variant}")
    weight = draw.normal(out, inp, scale=0.3)
    inputs = {"x": draw.normal(2, 3, inp), "weight": np.ascontiguousarray(weight.T) if conv1d else weight}
    inputs["bias"] = draw.normal(out)
    shapes = equation.trained(CONFIG, out, inp)
    drawn = {letter: draw.normal(*shape, scale=0.5) for letter, shape in shapes.items()}
    inputs |= equation.start(drawn, weight, CONFIG)

    def merged(t: Tensors) -> Tensors:
        weight = decoded(turned(t["weight"], conv1d))
        return {"merged.weight": turned(equation.merged(weight, t, CONFIG), conv1d), "merged.bias": t["bias"]}

    settings = equation.peft(CONFIG, ["site"])
    of_peft = peft_witness.site(settings, equation.names.__getitem__, " ".join(shapes), conv1d)
    return site_case(
        method,
        at,
        variant,
        inputs,
        lambda x, weight, bias, **letters: value(equation, x, weight, bias, letters, conv1d),
        " ".join(("x", *shapes)),
        config=CONFIG,
        merged=merged,
        flags=flags,
        comment="the frozen weight is what NF4 holds of `weight`"
        + (", which is cut into blocks as (out, in)" if conv1d else ""),
        witness=on_decoded(of_peft, conv1d),
    )


def on_decoded(of_peft: Compute, conv1d: bool) -> Compute:
    return lambda t: of_peft(t | {"weight": turned(decoded(turned(t["weight"], conv1d)), conv1d)})


def on_layers(method: str, equation: Equation, sites: dict[str, tuple[int, int]], flags: str) -> methods.Adapted:
    letters = {site: equation.trained(CONFIG, *shape) for site, shape in sites.items()}
    conv1d = any(site.startswith("transformer.") for site in sites)

    def advice(t: Tensors) -> dict[str, Callable]:
        return {site: at_site(t, site) for site in sites}

    def at_site(t: Tensors, site: str) -> Callable:
        own = {letter: t[f"{site}.{letter}"] for letter in letters[site]}
        return lambda f, x: value(equation, x, t[f"{site}.weight"], t.get(f"{site}.bias"), own, conv1d)

    return methods.Adapted(
        method,
        CONFIG | {"targets": list(sites)},
        {f"{site}.{letter}": shape for site in sites for letter, shape in letters[site].items()},
        advice,
        flags=flags,
        peft=False,
        comment="the targets' frozen weights are what NF4 holds of them",
    )
