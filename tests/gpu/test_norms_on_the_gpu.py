"""Norms on the GPU beside the plain pairs in float64 on the host, and norms of sums beside both one after the other."""

import contextlib

import cupy
import numpy as np
import pytest
from test_rows_on_the_gpu import FLOAT32, agree, all_needs, bits, both, close, drawn, on_device, some, turned

from refpeft import fused, tensor
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import blas
from refpeft.tape import ADDED, Total
from refpeft.tensor import Pending, Tensor, parameter


@both
@pytest.mark.parametrize(
    "shape", [(3, 8), (2, 5, 3, 64), (9, 72), (5, 128), (2, 520), (7, 768), (3, 1024), (3, 2048), (2, 16384)], ids=str
)
def test_norms_of_any_width(shape: tuple[int, ...], dtype: np.dtype):
    x, w, b = drawn(*shape), 1 + drawn(shape[-1], seed=1) / 4, drawn(shape[-1], seed=2)
    for gains in {FLOAT32, dtype}:
        agree(fused.rms_norm, [x, w], [dtype, gains], (True, True), eps=1e-5)
    agree(fused.layer_norm, [x + 4, w, b], [dtype, FLOAT32, FLOAT32], (True, False, False), eps=1e-5)


@some
@both
@pytest.mark.parametrize("needs", all_needs(3), ids=str)
def test_norms_whatever_is_trained(needs: tuple[bool, ...], dtype: np.dtype, view):
    x, w, b = drawn(4, 70, 24), drawn(24, seed=1), drawn(24, seed=2)
    agree(fused.rms_norm, [x, w], [dtype, FLOAT32], needs[:2], view=view, eps=1e-5)
    agree(fused.layer_norm, [x, w, b], [dtype, FLOAT32, FLOAT32], needs, view=view, eps=1e-5)


def test_the_gains_of_many_rows_are_summed_in_parts_with_the_same_bits():
    x, w, b, g = drawn(9000, 8), drawn(8, seed=1), drawn(8, seed=2), drawn(9000, 8, seed=3)
    found = []
    for _ in range(2):
        tensors = [parameter(on_device(x)), parameter(on_device(w, FLOAT32)), parameter(on_device(b, FLOAT32))]
        fused.layer_norm(*tensors, eps=1e-5).backward(on_device(g))
        found.append([t.grad for t in tensors])
    n = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    close(found[0][1], (g * n).sum(0), FLOAT32, 256)
    close(found[0][2], g.sum(0), FLOAT32, 256)
    assert all(bits(one) == bits(other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_the_gradient_of_a_norm_is_added_to_one_that_is_there(name: str):
    x, w, g, there = drawn(3, 64), drawn(64, seed=1), drawn(3, 64, seed=2), drawn(3, 64, seed=3)
    op, vectors = getattr(fused, name), 1 if name == "rms_norm" else 2
    pair = op.overrides[cupy.ndarray, bfloat16]
    gains = [on_device(w, FLOAT32)] * vectors
    _, saved = pair.forward((True,) * (1 + vectors), on_device(x), *gains, eps=1e-5)
    alone = pair.vjp(on_device(g), *saved, into=(None,) * (1 + vectors))
    into = [on_device(there), *(cupy.ones(64, "f4") for _ in gains)]
    assert pair.vjp(on_device(g), *saved, into=tuple(into)) == (ADDED,) * (1 + vectors)
    host = parameter(x)
    with tensor.plain():
        op(host, *[w] * vectors, eps=1e-5).backward(g)
    close(into[0], there + host.grad, bfloat16, 1.01)
    for one, more in zip(alone[1:], into[1:], strict=True):
        close(more, 1 + to_host(one).astype("f8"), FLOAT32, 4)
    unlike = turned(on_device(there))  # no place to add to
    dx = pair.vjp(on_device(g), *saved, into=(unlike, *[None] * vectors))[0]
    assert bits(dx) == bits(alone[0]) and bits(unlike) == bits(on_device(there))


@pytest.mark.parametrize("dim", [72, 576, 2048])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_a_norm_is_made_again_to_the_bit(name: str, dim: int):
    pair = getattr(fused, name).overrides[cupy.ndarray, bfloat16]
    w = on_device(drawn(dim, seed=1), FLOAT32)
    vectors = [w] if name == "rms_norm" else [w, w]
    y, saved = pair.forward((True, *[False] * len(vectors)), on_device(drawn(5, dim)), *vectors, eps=1e-5)
    assert bits(pair.again(*saved)) == bits(y)
    kept = sum(part.nbytes for part in saved[1:] if isinstance(part, cupy.ndarray) and part is not w)
    assert kept == 5 * 4 * len(vectors)


@pytest.mark.parametrize("needs", [needs for needs in all_needs(2) if any(needs)], ids=str)
@pytest.mark.parametrize("dim", [72, 576, 2048])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_the_way_back_through_a_norm_makes_it_again(name: str, dim: int, needs: tuple[bool, ...]):
    pair = getattr(fused, name).overrides[cupy.ndarray, bfloat16]
    x, g, there = (on_device(drawn(5, dim, seed=seed)) for seed in range(3))
    vectors = [on_device(drawn(dim, seed=seed), FLOAT32) for seed in ((3,) if name == "rms_norm" else (3, 4))]
    needs = needs if name == "rms_norm" else (*needs, True)
    y, saved = pair.forward(needs, x, *vectors, eps=1e-5)
    for onto in (None, there):
        how = {"into": (None,) * len(needs), "onto": (onto, *[None] * len(vectors))}
        *gradients, again = pair.vjp(g, *saved, **how, again=True)
        assert bits(again) == bits(y)
        for one, other in zip(gradients, pair.vjp(g, *saved, **how), strict=True):
            one, other = (each.array if isinstance(each, Total) else each for each in (one, other))
            assert one is other is None or bits(one) == bits(other)


@pytest.mark.parametrize("shape", [(3, 7), (2, 16392), (0, 8)], ids=str)
def test_norms_of_other_widths_and_of_nothing_are_the_plain_ones(shape: tuple[int, ...]):
    x, w = parameter(on_device(drawn(*shape))), on_device(drawn(shape[-1], seed=1), FLOAT32)
    y = fused.rms_norm(x, Tensor(w), eps=1e-5)
    assert y.dtype == bfloat16 and y.node.op is not fused.rms_norm.overrides[cupy.ndarray, bfloat16]
    y.backward(on_device(drawn(*shape)))
    assert x.grad.dtype == bfloat16 and x.grad.shape == shape


# ---- a norm of a sum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dim", [8, 64, 576, 2048])
def test_in_training_a_norm_adds_up_what_it_reads_to_the_same_bits(dim: int, centred: bool):
    rng = np.random.default_rng(0)
    numbers = [rng.standard_normal((2, 5, dim)) for _ in range(3)] + [rng.standard_normal(dim) for _ in range(2)]
    results = []
    for together in (True, False):
        a, b, g = (cupy.asarray(array).astype(bfloat16) for array in numbers[:3])
        gain, shift = (cupy.asarray(array).astype("f4") for array in numbers[3:])
        a, b = parameter(a), parameter(b)
        with blas.lowered(gain) if together else contextlib.nullcontext():
            total = a + b
            assert (type(total) is Pending) == together
            if centred:
                normed = fused.layer_norm(total, gain, shift, eps=1e-5)
            else:
                normed = fused.rms_norm(total, gain, eps=1e-5)
            assert not together or total.there
            (normed * 1.0 + total).backward(g)
        results.append([to_host(array).tobytes() for array in (normed.data, total.data, a.grad, b.grad)])
    assert results[0] == results[1]


def test_a_sum_that_no_norm_reads_is_computed_when_it_is_asked_for():
    a = parameter(cupy.ones((2, 8), bfloat16))
    with blas.lowered(cupy.ones(4, "f4")):
        total = a + a
        assert total.shape == (2, 8) and total.dtype == bfloat16 and total.ndim == 2 and not total.there
        (total * 2.0).backward()
    assert (to_host(a.grad) == 4).all()
