"""bfloat16 on the GPU: every op and every method, beside float64 on the host; the dtype of every op's result."""

import cupy
import numpy as np
import pytest
import tiny
from cases import FUSED, OPS, Case, Place
from variants import TO_FIT, needed_quantizer

from refpeft import fused, manager, ops, sites, tensor
from refpeft.backend import bfloat16, to_host
from refpeft.models.base import Model
from refpeft.tensor import astype, checkpoint, parameter

METHODS = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "method")
OPTIONS = TO_FIT | {"lora": {"dropout": 0.2}, "bitfit": {"create": True}}
OPTIONS["randlora"] = TO_FIT["randlora"] | {"alpha": 10}  # at 640 scores are in the hundreds: gradients are noise
LOSSES = {fused.cross_entropy, fused.linear_cross_entropy}
EPS = 2.0**-7


def rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(bfloat16).astype("f8") if array.dtype.kind == "f" else array


def off(got, expected) -> float:
    """The distance in units of bfloat16's eps of the largest expected value."""
    got, expected = to_host(got).astype("f8"), np.asarray(to_host(expected)).astype("f8")
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max(initial=0) / (EPS * max(np.abs(expected).max(initial=0), 1e-30)))


@pytest.mark.parametrize("values", [False, True], ids=["activations", "values"])
@pytest.mark.parametrize("case", OPS + FUSED, ids=str)
def test_an_op_is_that_of_the_host_in_float64_rounded(case: Case, values: bool):
    """With `values` all inputs but the first are float32, as trained values are."""
    arrays = [rounded(array) for array in case.arrays()]
    here = [parameter(array) for array in arrays]
    dtypes = [bfloat16] + [np.dtype("f4") if values else bfloat16] * (len(arrays) - 1)
    there = [parameter(cupy.asarray(array).astype(dtype)) for array, dtype in zip(arrays, dtypes, strict=True)]
    expected, got = case(*here), case(*there, place=Place("f4", cupy))
    assert isinstance(got.data, cupy.ndarray)
    assert got.dtype == (np.float32 if case.op in LOSSES else bfloat16)
    assert off(got.data, expected.data) <= 2
    g = rounded(np.cos(np.arange(expected.data.size, dtype="f8")).reshape(expected.shape))
    expected.backward(g)
    got.backward(cupy.asarray(g).astype(got.dtype))
    for one, other, dtype in zip(here, there, dtypes, strict=True):
        assert other.grad.dtype == dtype
        assert off(other.grad, one.grad) <= 4


def test_rounding_and_computing_again_keep_the_dtypes_too():
    """Of these nodes the table of ops has no case, as functions make them."""
    x = parameter(cupy.full(3, 1 + 2.0**-10, "f4"))
    y = checkpoint(ops.tanh, astype(x, bfloat16))
    z = astype(y, np.dtype("f4"))
    assert (y.dtype, z.dtype) == (bfloat16, np.float32)
    z.backward()
    assert x.grad.dtype == np.float32 and off(x.grad, 1 - np.tanh(np.ones(3)) ** 2) <= 2


def learned(model, method: str, like: Model | None = None) -> dict:
    """The loss and the gradients of a step, with the values of `like`: decompositions may choose other signs."""
    sites.attach(model, method, OPTIONS.get(method))
    tiny.scramble(model.adapters[-1])
    for (_, value), (_, other) in zip(model.trained(), like.trained() if like else (), strict=like is not None):
        value.data = model.xp.asarray(other.data)
    model.mode.training = True
    loss = model.loss(tiny.batch())
    loss.backward()
    assert loss.dtype == np.float32
    return {"loss": loss.data} | {name: t.grad for name, t in model.trained() if t.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_what_it_learns_on_the_host(name: str, method: str):
    """The device's gradients are about as far from the host's in float32 as those of the plain pairs in bfloat16 are.

    A tiny model has few numbers, and one that falls on the other side of a bend, such as relu's, counts for many: the
    most that was seen is 0.0028 of the gradients' squares.
    """
    models = [
        tiny.model(name, "float32", needed_quantizer(method)),
        tiny.low(name, needed_quantizer(method)),
        tiny.low(name, needed_quantizer(method), xp=cupy),
    ]
    with tensor.plain():
        exact, rough = learned(models[0], method), learned(models[1], method)
    there = learned(models[2], method, like=models[1])
    assert there.keys() == exact.keys()
    assert abs(float(there["loss"]) - float(exact["loss"])) < 0.02 * float(exact["loss"])
    total = {which: 0.0 for which in ("exact", "rough", "there")}
    for key, value in exact.items():
        if key == "loss":
            continue
        assert there[key].dtype == np.float32
        total["exact"] += float(np.square(value.astype("f8")).sum())
        total["rough"] += float(np.square(rough[key] - value.astype("f8")).sum())
        total["there"] += float(np.square(to_host(there[key]) - value.astype("f8")).sum())
    assert total["there"] <= max(10 * total["rough"], 4e-3 * total["exact"])


def test_it_writes_what_the_plain_pairs_write():
    from refpeft.generate import generate

    prompts = [tiny.ids(1, n)[0].tolist() for n in (7, 3)]
    made = generate(tiny.low("llama", xp=cupy), prompts, 12)
    with tensor.plain():
        assert made == generate(tiny.low("llama", xp=cupy), prompts, 12)
