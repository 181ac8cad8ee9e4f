"""Merged and taken apart again: the weights that come back are those that were given, bit for bit.

Who subtracts what was added, or divides by what was multiplied, gets others: those of gains of 0 are lost.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from common import Case, Compute, Draw, Tensors
from compositions import (
    BOFT,
    C3A,
    DORA,
    HIRA,
    HRA,
    INPUT,
    LOHA,
    LORA_2,
    OFT,
    OLORA,
    OUTPUT,
    ROAD,
    drawn_letters,
    equation,
    of,
)
from torch.nn import functional

KEPT = "who subtracts gets the weight up to rounding"
LOST = "gains of 0 and of 1e-9: division does not bring the weight back"
ROWS: tuple[tuple, ...] = (  # variant, method and options, sides (out, in), (in, out) in files, flags, comment
    ("lora", LORA_2, (6, 8), False, "UnmergeDrift Scaling", KEPT),
    ("conv1d", LORA_2, (6, 8), True, "UnmergeDrift TransposedWeight", KEPT),
    ("dora", DORA, (6, 8), False, "UnmergeDrift DoraNormOfRows", "alpha is not r, and there is a bias; " + KEPT),
    ("output", OUTPUT, (6, 8), False, "UnmergeDrift Ia3InputSide BaseBias", LOST),
    ("input", INPUT, (6, 8), False, "UnmergeDrift Ia3InputSide BaseBias", LOST),
    ("oft", OFT, (6, 8), False, "UnmergeDrift OftSide", KEPT),
    ("boft", BOFT, (6, 8), False, "UnmergeDrift OftSide", KEPT),
    ("hra", HRA, (6, 8), False, "UnmergeDrift ReflectionOrder", KEPT),
    ("road", ROAD, (8, 6), False, "UnmergeDrift RoadPlanes BaseBias", "a plane's numbers are 0; " + LOST),
    ("loha", LOHA, (6, 8), False, "UnmergeDrift HadamardOfProducts", KEPT),
    ("hira", HIRA, (6, 8), False, "UnmergeDrift", "what is taken off must not be of the merged weight; " + KEPT),
    ("c3a", C3A, (12, 8), False, "UnmergeDrift CirculantScale", KEPT),
    ("olora", OLORA, (6, 8), False, "UnmergeDrift FrozenWeightKept", "in the end the frozen weight is whole; " + KEPT),
    (
        "adalora",
        of("adalora", init_r=3, target_r=2, alpha=6.0, dropout=0.0),
        (6, 8),
        False,
        "UnmergeDrift AdaloraScale",
        KEPT,
    ),
)


def cases() -> Iterator[Case]:
    for variant, config, sides, conv1d, flags, comment in ROWS:
        yield restored(variant, config, sides, conv1d, flags, comment)


def restored(variant: str, config: dict, sides: tuple[int, int], conv1d: bool, flags: str, comment: str) -> Case:
    """Weights are numbers that bfloat16 has, too, so that equal means equal in every dtype."""
    own = equation(config["method"])
    case_id = f"{own.method}-restored-{'plain' if variant == own.method else variant}"
    draw, (out, inp) = Draw(case_id), sides
    x, weight, bias = draw.normal(2, 3, inp), short(draw.normal(out, inp, scale=0.4)), short(draw.normal(out))
    trained = drawn_letters(config, draw, weight, 0.3)
    if "gain" in trained:
        trained["gain"][[1, 2]] = 0, 1e-9
    if "alpha" in trained:
        trained["alpha"][:4] = 0
    options = {name: value for name, value in config.items() if name != "method"}
    return Case(
        id=case_id,
        kind="method",
        name=own.method,
        at="restored",
        level="must" if LOST in comment else "may",
        comment=comment,
        flags=tuple(flags.split()),
        spec=own.source,
        config=options | {"conv1d": conv1d},
        inputs={"x": x, "weight": np.ascontiguousarray(weight.T) if conv1d else weight, "bias": bias, **trained},
        compute=there_and_back(config, conv1d),
        exact=("restored.weight", "restored.bias"),
    )


def short(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def there_and_back(config: dict, conv1d: bool) -> Compute:
    def compute(t: Tensors) -> Tensors:
        weight, bias = t["weight"].mT if conv1d else t["weight"], t["bias"]

        def value(x: torch.Tensor) -> torch.Tensor:
            return equation(config["method"]).value(lambda x: functional.linear(x, weight, bias), x, weight, t, config)

        zero = torch.zeros(weight.shape[1], dtype=weight.dtype)
        merged = (value(torch.diag(zero + 1)) - value(zero)).mT  # what it computes is affine
        return {
            "merged.weight": merged.mT if conv1d else merged,
            "merged.bias": value(zero),
            "restored.weight": t["weight"],
            "restored.bias": bias,
            "y": value(t["x"]),
        }

    return compute
