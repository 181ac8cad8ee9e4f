"""Cross-entropy on the GPU, beside the plain pairs in float64 on the host."""

import cupy
import numpy as np
import pytest

from refpeft import fused
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import losses
from refpeft.errors import RefpeftError
from refpeft.tensor import Tensor, parameter, plain

EPS = {"bfloat16": 2.0**-7, "float32": 2.0**-23}
LIMIT = {"bfloat16": 2, "float32": 16}
"""Of the distance, in units of eps of the largest expected value. Logits of up to 4 are rounded to bfloat16: e^z is off
by up to 4 / 512 of itself, half of the limit."""

every_dtype = pytest.mark.parametrize("dtype", EPS)


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    """Random numbers that are exact in bfloat16."""
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(bfloat16).astype("f8")


def targets_of(rows: int, words: int, kind: str = "i4") -> np.ndarray:
    """Of which some are ignored, and the first and the last word are among the others."""
    targets = np.random.default_rng(1).integers(0, words, rows).astype(kind)
    targets[: 2 * (rows // 3) : 2], targets[-1] = -100, words - 1
    return targets


def on_device(array: np.ndarray | None, dtype: str = "float32") -> cupy.ndarray | None:
    return None if array is None else cupy.asarray(array).astype(bfloat16 if dtype == "bfloat16" else dtype)


def close(got: cupy.ndarray, expected: np.ndarray, dtype: str, times: float | None = None) -> None:
    got, expected = to_host(got).astype("f8"), np.asarray(expected)
    assert got.shape == expected.shape
    limit = (times or LIMIT[dtype]) * EPS[dtype] * max(np.abs(expected).max(initial=0), 1e-30)
    assert np.abs(got - expected).max(initial=0) <= limit


def both(arrays: list[np.ndarray | None], dtype: str, run) -> list[tuple]:
    """(loss, gradient) of run(x, *others, place), by the plain pair in float64 on the host, and here.

    x and others of two axes are of `dtype` here, the rest of float32.
    """
    with plain():
        here = parameter(arrays[0])
        loss = run(here, *arrays[1:], np.asarray)
        loss.backward(np.asarray(0.7))
    first, *others = (on_device(a, dtype if a is not None and a.ndim == 2 else "float32") for a in arrays)
    there = parameter(first)
    got = run(there, *others, cupy.asarray)
    assert got.node.op.stands_in and got.dtype == np.float32 and got.shape == ()
    got.backward(cupy.asarray(np.float32(0.7)))
    assert there.grad.dtype == there.dtype
    return [(loss.data, here.grad), (got.data, there.grad)]


@every_dtype
@pytest.mark.parametrize("kind", ["i4", "i8"])
@pytest.mark.parametrize("rows, dim, words", [(9, 16, 24), (7, 8, 37), (40, 16, 300), (1, 8, 2), (3, 24, 8192 + 9)])
@pytest.mark.parametrize("extras", [False, True], ids=["alone", "bias_and_weights"])
def test_the_loss_of_a_frozen_head_and_its_gradient(
    dtype: str, kind: str, rows: int, dim: int, words: int, extras: bool
):
    head, targets = drawn(words, dim, seed=1, size=dim**-0.5), targets_of(rows, words, kind)
    bias, weights = (drawn(words, seed=2), abs(drawn(rows, seed=3))) if extras else (None, None)

    def run(x, weight, bias, weights, place):
        denominator = place(np.float32(3.5)) if extras else 3.5
        options = {"targets": place(targets), "denominator": denominator, "bias": bias, "weights": weights}
        return fused.linear_cross_entropy(x, weight=lambda: weight, **options)

    (loss, dx), (got, gradient) = both([drawn(rows, dim), head, bias, weights], dtype, run)
    close(got, loss, dtype)
    close(gradient, dx, dtype)


@every_dtype
@pytest.mark.parametrize("rows, words", [(9, 24), (7, 37), (5, 2), (1, 1), (4, 8192 + 9)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_logits_and_its_gradient(dtype: str, rows: int, words: int, weighted: bool):
    targets = targets_of(rows, words)

    def run(x, weights, place):
        return fused.cross_entropy(x, targets=place(targets), denominator=3.5, weights=weights)

    weights = abs(drawn(rows, seed=3)) if weighted else None
    (loss, dx), (got, gradient) = both([drawn(rows, words), weights], dtype, run)
    close(got, loss, dtype)
    close(gradient, dx, dtype, 1.1)  # rounded twice, as the gradient from above is not 1


@every_dtype
def test_logits_that_nobody_else_has_become_their_gradient(dtype: str):
    x, targets = on_device(drawn(6, 24), dtype), cupy.asarray(targets_of(6, 24))
    leaf = parameter(x)
    made = leaf * 1.0
    kept, address = fused.cross_entropy(made, targets=targets, denominator=2.0), made.data.data.ptr
    assert kept.node.saved[0].data.ptr != address and np.array_equal(to_host(made.data), to_host(x))
    spare = fused.cross_entropy(leaf * 1.0, targets=targets, denominator=2.0)
    assert np.array_equal(to_host(spare.data), to_host(kept.data))
    kept.backward()
    first = to_host(leaf.grad).copy()
    leaf.node.grad = None
    spare.backward()
    assert np.array_equal(to_host(leaf.grad), first)


@every_dtype
def test_chunks_of_rows_change_no_bit_and_hold_no_more_than_they_may(dtype: str, monkeypatch):
    rows, dim, words = 700, 8, 50
    x, head = on_device(drawn(rows, dim), dtype), on_device(drawn(words, dim, seed=1), dtype)
    options = {"weight": lambda: head, "targets": cupy.asarray(targets_of(rows, words)), "denominator": 9.0}
    found, sizes = [], []

    def noted(a, b, out):
        sizes.append(out.shape)
        return product(a, b, out=out)

    product = losses.product
    for most in (losses.AT_ONCE, 2 * 128 * 56 * x.itemsize):
        monkeypatch.setattr(losses, "AT_ONCE", most)
        monkeypatch.setattr(losses, "product", noted)
        sizes.clear()
        leaf = parameter(x)
        loss = fused.linear_cross_entropy(leaf, **options)
        loss.backward()
        found.append((to_host(loss.data), to_host(leaf.grad)))
    assert sizes == [(256, 50), (256, 8), (256, 50), (256, 8), (188, 50), (188, 8)]
    assert found[0][0] == found[1][0]
    close(found[1][1], found[0][1].astype("f8"), dtype, 2)  # cuBLAS may add up in another order for other shapes


@pytest.mark.parametrize(
    ("rows", "words"),
    [(8192, 128256), (8188, 128256), (4096, 49153), (100, 50257), (0, 10), (9, 2**29), (200, 2**20), (200, 2**21)],
)
def test_rows_at_once_are_few_enough_and_fill_tiles(rows: int, words: int):
    found, most = losses.rows_at_once(rows, words, 2), max(1, losses.AT_ONCE // (2 * losses._padded(words)))
    assert 1 <= found <= most
    if most >= 128:
        assert found % 128 == 0 or not rows
        assert -(-rows // found) == -(-rows // (most // 128 * 128))  # parts: no more than it takes
    else:
        assert found == most


def test_in_bfloat16_nothing_is_rounded_twice():
    """Logits, slope and gradient are rounded once each; another gradient from above is multiplied in float32."""
    rows, dim, words = 33, 16, 40
    x, head, targets = drawn(rows, dim), drawn(words, dim, seed=1, size=0.3), targets_of(rows, words)
    z = (x @ head.T).astype(bfloat16).astype("f8")
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    slope = (p - (np.arange(words) == targets[:, None])) * (targets >= 0)[:, None] / 7
    expected = slope.astype(bfloat16).astype("f8") @ head

    def gradient(g: float) -> np.ndarray:
        leaf = parameter(on_device(x, "bfloat16"))
        weight = on_device(head, "bfloat16")
        options = {"targets": cupy.asarray(targets), "denominator": 7}
        fused.linear_cross_entropy(leaf, weight=lambda: weight, **options).backward(cupy.asarray(g, "f4"))
        return to_host(leaf.grad)

    first = gradient(1.0)
    close(first, expected, "bfloat16", 0.6)
    assert np.array_equal(gradient(0.3), (first.astype("f4") * np.float32(0.3)).astype(bfloat16))


@every_dtype
def test_without_a_gradient_nothing_is_kept(dtype: str):
    x, head, targets = (on_device(drawn(*shape), dtype) for shape in ((5, 8), (12, 8), (5,)))
    targets = cupy.asarray(targets_of(5, 12))
    frozen = fused.linear_cross_entropy(Tensor(x), weight=lambda: head, targets=targets, denominator=2.0)
    wanted = fused.linear_cross_entropy(parameter(x), weight=lambda: head, targets=targets, denominator=2.0)
    assert frozen.node is None and np.array_equal(to_host(frozen.data), to_host(wanted.data))


@every_dtype
def test_no_rows_are_no_loss_and_a_target_that_is_no_word_is_seen(dtype: str):
    head = on_device(drawn(12, 8), dtype)
    leaf = parameter(on_device(np.zeros((0, 8)), dtype))
    loss = fused.linear_cross_entropy(leaf, weight=lambda: head, targets=cupy.zeros(0, "i4"), denominator=1.0)
    loss.backward()
    assert float(loss.data) == 0 and leaf.grad.shape == (0, 8)
    wrong = cupy.asarray(np.array([3, 12], "i4"))
    x = Tensor(on_device(drawn(2, 8), dtype))
    found = fused.linear_cross_entropy(x, weight=lambda: head, targets=wrong, denominator=1.0)
    assert np.isinf(float(found.data))


@every_dtype
def test_a_captured_loss_takes_another_denominator_and_other_targets(dtype: str):
    x, head = on_device(drawn(9, 8), dtype), on_device(drawn(37, 8, seed=1), dtype)
    targets, denominator = cupy.asarray(targets_of(9, 37)), cupy.asarray(np.float32(2))

    def step():
        leaf = parameter(x)
        loss = fused.linear_cross_entropy(leaf, weight=lambda: head, targets=targets, denominator=denominator)
        loss.backward()
        return loss.data, leaf.grad

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        step()
        stream.begin_capture()
        captured = step()
        graph = stream.end_capture()
        denominator.fill(5)
        targets[...] = targets[::-1].copy()
        graph.launch(stream)
        expected = step()
        stream.synchronize()
    for got, wanted in zip(captured, expected, strict=True):
        assert np.array_equal(to_host(got), to_host(wanted))


@every_dtype
def test_what_it_was_not_written_for_is_left_to_the_plain_pair(dtype: str):
    x, head = on_device(drawn(5, 8), dtype), on_device(drawn(12, 8), dtype)
    with pytest.raises(RefpeftError, match="targets"):
        fused.linear_cross_entropy(parameter(x), weight=lambda: head, targets=cupy.zeros(4, "i4"), denominator=1.0)
