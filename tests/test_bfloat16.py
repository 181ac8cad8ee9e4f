"""bfloat16 in the autograd, on the host: pairs compute in float32, results are rounded once, values stay float32."""

import contextlib

import numpy as np
import pytest
import tiny
from cases import FUSED, OPS, Case, Place
from variants import TO_FIT, needed_quantizer

from refpeft import fused, manager, ops, sites
from refpeft.backend import bfloat16, may_round_factors
from refpeft.tensor import Tensor, astype, op, parameter, plain

METHODS = sorted(name for name, listing in manager.catalogue().items() if listing.kind == "method")
OPTIONS = TO_FIT | {"lora": {"dropout": 0.2}, "bitfit": {"create": True}}
LOSSES = {fused.cross_entropy, fused.linear_cross_entropy}


def rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(bfloat16).astype("f4")


@pytest.mark.parametrize("case", OPS + FUSED, ids=str)
def test_an_op_of_bfloat16_is_that_of_float32_rounded_once(case: Case):
    place = Place("f4")
    arrays = [rounded(array) for array in case.arrays(place)]
    leaves = [[parameter(array) for array in arrays], [parameter(array.astype(bfloat16)) for array in arrays]]
    with plain():
        wide, low = (case(*each, place=place) for each in leaves)
    assert low.dtype == (np.float32 if case.op in LOSSES else bfloat16)
    assert np.array_equal(low.data, wide.data.astype(low.dtype))
    g = rounded(np.cos(np.arange(wide.data.size, dtype="f4")).reshape(wide.shape))
    wide.backward(g)
    low.backward(g.astype(low.dtype))
    for here, there in zip(*leaves, strict=True):
        assert there.grad.dtype == bfloat16
        assert np.array_equal(there.grad, here.grad.astype(bfloat16))


@pytest.mark.parametrize("case", [case for case in OPS + FUSED if len(case.arrays()) > 1], ids=str)
def test_values_in_float32_keep_their_dtype_and_their_gradients_too(case: Case):
    first, *rest = case.arrays(Place("f4"))
    leaves = [parameter(first.astype(bfloat16)), *map(parameter, rest)]
    out = case(*leaves, place=Place("f4"))
    assert out.dtype == (np.float32 if case.op in LOSSES else bfloat16)
    out.backward()
    assert [leaf.grad.dtype for leaf in leaves] == [bfloat16] + [np.float32] * len(rest)


def test_maths_on_values_alone_stays_in_float32():
    a, b = parameter(np.ones((2, 3), "f4")), Tensor(np.ones((3, 2), "f4"))
    assert (a @ b * 2.0).dtype == np.float32


@pytest.mark.parametrize("dtype", [bfloat16, np.dtype("f4")], ids=str)
@pytest.mark.parametrize("kind", ["an op", "one that moves", "a loss", "as it is defined"])
def test_factors_may_be_rounded_where_results_are(kind: str, dtype: np.dtype):
    """In a pair that is widened, both ways, and nowhere else."""
    seen = []

    @op(moves=kind == "one that moves", float32=kind == "a loss")
    def look(needs, x):
        seen.append(may_round_factors())
        return x * 1, ()

    @look.backward
    def _(g):
        seen.append(may_round_factors())
        return (g,)

    with plain() if kind == "as it is defined" else contextlib.nullcontext():
        look(parameter(np.ones(3, dtype))).backward()
    assert seen == [kind == "an op" and dtype == bfloat16] * 2
    assert not may_round_factors()


def test_numbers_do_not_widen_bfloat16():
    x = Tensor(np.ones(3, bfloat16))
    for y in (x * 2, 2.5 * x, x + np.float64(1.5), x / 3, x - np.ones(3)):
        assert y.dtype == bfloat16


def test_astype_rounds_and_gives_gradients_in_the_dtype_of_what_it_was_given():
    x = parameter(np.full(3, 1 + 2.0**-10, "f4"))
    y = astype(x, bfloat16)
    assert astype(x, x.dtype) is x and y.dtype == bfloat16 and (y.data == 1).all()
    ops.sum(astype(y, np.dtype("f4")) * 3.0).backward()
    assert x.grad.dtype == np.float32 and (x.grad == 3).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_bfloat16_learns_under_every_method(name: str, method: str):
    models = [make(name, quantizer=needed_quantizer(method)) for make in (tiny.low, single)]
    losses = []
    for model in models:
        sites.attach(model, method, OPTIONS.get(method))
        model.mode.training = True
        loss = model.loss(tiny.batch())
        loss.backward()
        losses.append(loss.data)
        assert loss.dtype == np.float32
        gradients = [tensor.grad for _, tensor in model.trained() if tensor.grad is not None]
        assert gradients and all(g.dtype == np.float32 and np.isfinite(g).all() for g in gradients)
    assert abs(losses[0] - losses[1]) < 0.02 * losses[1]


def single(name: str, **options):
    return tiny.model(name, "float32", **options)


@pytest.mark.parametrize("trained", [True, False])
def test_a_loss_reads_logits_as_they_were_computed_and_others_in_float32(trained: bool, monkeypatch):
    model, seen = tiny.low(), []
    if trained:
        sites.attach(model, "bitfit", {"create": True, "targets": ["lm_head"]})
    whole, by_rows = fused.cross_entropy, fused.linear_cross_entropy

    def noted(op):
        return lambda logits, **options: (seen.append(logits.dtype), op(logits, **options))[1]

    monkeypatch.setattr(fused, "cross_entropy", noted(whole))
    monkeypatch.setattr(fused, "linear_cross_entropy", noted(by_rows))
    loss = model.loss(tiny.batch())
    assert seen == [bfloat16] and loss.dtype == model(tiny.ids()).dtype == np.float32
