"""Operations and random numbers: cases of the kinds `op`, `fused` and `random`."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refpeft import fourier, fused, gates, ops
from refpeft.backend import COMPUTE_DTYPES, Array, cast
from refpeft.rng import Stream, philox4x32
from refpeft.tensor import Tensor, parameter

from ..vectors import Arrays, Case

_OF_OPS = ("condition", "indices", "places", "signs", "order", "gauss", "u")
_OF_FUSED = ("weight", "segments", "targets", "weights", "ids", "cos", "sin", "rows", "columns")
"""Inputs without a gradient."""


def placed(arrays: Arrays, xp: ModuleType) -> dict[str, Array]:
    """`arrays` where `xp` has its own."""
    return {name: xp.asarray(array) for name, array in arrays.items()}


def gradients(y: Tensor, g: Array, leaves: dict[str, Tensor]) -> dict[str, Array]:
    """The answer of most cases: y, and the gradient of sum(y * g) by every leaf."""
    y.backward(cast(g, y.dtype))
    return {"y": y.data, **{f"grad.{name}": leaf.grad for name, leaf in leaves.items()}}


def _apart(
    given: Arrays, constants: tuple[str, ...], dtype: str, xp: ModuleType
) -> tuple[Array, dict[str, Array], dict[str, Tensor]]:
    """The gradient that comes in, the constants by name, the leaves by name, which are all hidden states."""
    arrays = placed(given, xp)
    g = arrays.pop("g")
    found = {name: arrays.pop(name) for name in constants if name in arrays}
    return g, found, {name: parameter(cast(array, np.dtype(dtype))) for name, array in arrays.items()}


def run_op(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    op = next((getattr(module, case.name) for module in (ops, fourier, gates) if hasattr(module, case.name)), None)
    if op is None:
        raise NotImplementedError(f"refpeft has no operation {case.name!r}")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in case.config.items()}
    if case.name == "getitem":
        options["key"] = tuple(slice(*part) if isinstance(part, list) else part for part in case.config["key"])
    g, constants, leaves = _apart(given, _OF_OPS, dtype, xp)
    return gradients(op(*leaves.values(), **options, **constants), g, leaves)


def run_fused(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    function, config = getattr(fused, case.name, None), case.config
    if function is None:
        raise NotImplementedError(f"refpeft has no operation {case.name!r}")
    g, constants, leaves = _apart(given, _OF_FUSED, dtype, xp)
    if case.name == "attention":
        segments = constants.get("segments")
        options = {"mask": fused.Mask(config["tokens"], config["window"], segments), "scale": config["scale"]}
    elif case.name == "dropout":
        options = {"rate": config["rate"], "stream": Stream(config["seed"], *config["purpose"], xp=xp)}
    else:
        options = constants | config
        if "weight" in constants:  # frozen ones are asked for whenever they are needed
            options["weight"] = lambda: constants["weight"]
    answer = gradients(function(*leaves.values(), **options), g, leaves)
    if case.name == "attention" and segments is not None:
        real = (segments >= 0)[:, None, config["tokens"] - g.shape[2] :, None]
        answer["y"] = cast(answer["y"], COMPUTE_DTYPES[dtype]) * real
    return answer


def run_random(case: Case, given: Arrays, dtype: str, xp: ModuleType) -> Arrays:
    if case.name == "philox4x32":
        counter = (xp.asarray([number], "u4") for number in given["counter"])
        return {"words": xp.concatenate(philox4x32(*counter, *map(int, given["key"]))).astype("i8")}
    if case.name != "stream":
        raise NotImplementedError(f"refpeft has no random numbers {case.name!r}")
    count = {name: array.size for name, array in case.expected().items()}

    def fresh() -> Stream:
        return Stream(case.config["seed"], *case.config["purpose"], xp=xp)

    return {
        "bits": fresh().bits(count["bits"]).astype("i8"),
        "uniform": fresh().uniform(size=count["uniform"]),
        "normal": fresh().standard_normal(count["normal"]),
        "permutation": fresh().permutation(count["permutation"]),
    }
