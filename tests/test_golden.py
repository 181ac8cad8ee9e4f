"""refpeft against the golden vectors, in float64 and float32, without torch: one driver for each kind of case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from refpeft import fused, ops
from refpeft.conformance.compare import compare
from refpeft.conformance.vectors import Arrays, Case, cases
from refpeft.rng import Stream, philox4x32
from refpeft.tensor import Tensor, parameter

# ---- operations ------------------------------------------------------------------------------------------------


def gradients(y: Tensor, g: np.ndarray, leaves: dict[str, Tensor]) -> Arrays:
    """The answer of most cases: y, and the gradient of every leaf."""
    y.backward(g)
    return {"y": y.data, **{f"grad.{name}": leaf.grad for name, leaf in leaves.items()}}


def run_op(case: Case, given: Arrays, dtype: str) -> Arrays:
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in case.config.items()}
    if case.name == "getitem":
        options["key"] = tuple(slice(*part) if isinstance(part, list) else part for part in case.config["key"])
    options |= {name: given.pop(name) for name in ("condition", "indices") if name in given}
    g = given.pop("g")
    leaves = {name: parameter(array) for name, array in given.items()}
    return gradients(getattr(ops, case.name)(*leaves.values(), **options), g, leaves)


def run_fused(case: Case, given: Arrays, dtype: str) -> Arrays:
    g, config = given.pop("g"), case.config
    constants = {
        name: given.pop(name) for name in ("weight", "segments", "targets", "ids", "cos", "sin") if name in given
    }
    leaves = {name: parameter(array) for name, array in given.items()}
    arguments = list(leaves.values())
    if case.name == "frozen_linear":
        y = fused.frozen_linear(*arguments, weight=lambda: constants["weight"])
    elif case.name == "linear_cross_entropy":
        options = {"targets": constants["targets"], **config}
        y = fused.linear_cross_entropy(*arguments, weight=lambda: constants["weight"], **options)
    elif case.name == "attention":
        mask = fused.Mask(keys=config["tokens"], window=config["window"], segments=constants.get("segments"))
        answer = gradients(fused.attention(*arguments, mask=mask, scale=config["scale"]), g, leaves)
        if "segments" in constants:
            answer["y"] = answer["y"] * (constants["segments"] >= 0)[:, None, config["tokens"] - g.shape[2] :, None]
        return answer
    elif case.name == "dropout":
        y = fused.dropout(*arguments, rate=config["rate"], stream=Stream(config["seed"], *config["purpose"]))
    else:
        y = getattr(fused, case.name)(*arguments, **constants, **config)
    return gradients(y, g, leaves)


def run_random(case: Case, given: Arrays, dtype: str) -> Arrays:
    if case.name == "philox4x32":
        counter = [np.array([c], "u4") for c in given["counter"]]
        words = philox4x32(*counter, *(int(k) for k in given["key"]))
        return {"words": np.concatenate(words).astype("i8")}
    want = case.expected()

    def fresh() -> Stream:
        return Stream(case.config["seed"], *case.config["purpose"])

    return {
        "bits": fresh().bits(want["bits"].size).astype("i8"),
        "uniform": fresh().uniform(size=want["uniform"].size),
        "normal": fresh().standard_normal(want["normal"].size),
        "permutation": fresh().permutation(want["permutation"].size),
    }


DRIVERS: dict[str, Callable[[Case, Arrays, str], Arrays]] = {"op": run_op, "fused": run_fused, "random": run_random}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case, dtype):
    answer = DRIVERS[case.kind](case, case.given(dtype), dtype)
    assert not [result.problem for result in compare(case, answer, dtype) if result.problem]
