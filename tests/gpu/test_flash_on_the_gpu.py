"""Our own attention by tiles: what the plain pair says in float64, for every mask, and nothing beyond the arrays.

Errors are in units of bfloat16's eps (2^-7) of the largest number expected. A result that is rounded once is off by
half a unit; the weights, which are rounded before they are multiplied, and y in the gradients, add to that.
"""

from dataclasses import replace
from typing import NamedTuple

import cupy
import numpy as np
import pytest

from refpeft import tensor
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import flash, margins
from refpeft.fused import Mask, attention
from refpeft.tensor import parameter

EPS = 2.0**-7


class Asked(NamedTuple):
    """Inputs of attention and the gradient of its output, float64 numbers that bfloat16 has, and the mask."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    mask: Mask
    scale: float

    def expected(self) -> list[np.ndarray]:
        """The output and the gradients of q, k and v, by the plain pair."""
        inputs = [parameter(array) for array in (self.q, self.k, self.v)]
        with tensor.plain():
            y = attention(*inputs, mask=self.mask, scale=self.scale)
            y.backward(self.g)
        return [y.data, *(leaf.grad for leaf in inputs)]

    def there(self) -> tuple[list[cupy.ndarray], Mask]:
        """q, k, v, g and the mask on the device."""
        numbers = (None if of is None else cupy.asarray(of) for of in (self.mask.segments, self.mask.asking))
        segments, asking = numbers
        arrays = [cupy.asarray(array).astype(bfloat16) for array in self[:4]]
        return arrays, replace(self.mask, segments=segments, asking=asking)

    def found(self) -> list[cupy.ndarray]:
        """The output and the gradients, by the kernels."""
        (q, k, v, g), mask = self.there()
        return both(q, k, v, g, mask, self.scale)


def both(q, k, v, g, mask, scale, needs=(True, True, True)) -> list:
    assert flash.supports(q, k, v, mask, None) is None
    y, lse = flash.forward(q, k, v, mask, scale)
    assert lse.dtype == np.float32 and lse.shape == q.shape[:3]
    made = [margins.heads(array.shape) if need else None for array, need in zip((q, k, v), needs, strict=True)]
    flash.backward(g, q, k, v, y, lse, mask, scale, made)
    return [y, *made]


def asked(mask: Mask, heads=(2, 1), queries=None, keys=None, dim=64, batch=2, scores=1.0) -> Asked:
    """Normal numbers for this mask, whose scores have about the given standard deviation."""
    draw = np.random.default_rng(heads[0] * 1000 + dim)
    keys = mask.keys if keys is None else keys
    queries = keys if queries is None else queries
    shapes = [(heads[0], queries), (heads[1], keys), (heads[1], keys), (heads[0], queries)]
    arrays = [draw.standard_normal((batch, *shape, dim)).astype(bfloat16).astype("f8") for shape in shapes]
    return Asked(*arrays, mask, scores * dim**-0.5)


def off(got, expected) -> float:
    got = to_host(got).astype("f8")
    assert got.shape == expected.shape
    largest = max(float(np.abs(expected).max(initial=0)), 1e-3)  # of one key the gradient is 0, but for float32's eps
    return float(np.abs(got - expected).max(initial=0)) / (EPS * largest)


def agree(found: list, expected: list) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == bfloat16
        assert off(got, wanted) <= 2


def documents(*rows: list[int]) -> np.ndarray:
    """Segments: each row is lengths of documents, a last negative one of padding."""
    return np.array([np.repeat([-1 if n < 0 else i for i, n in enumerate(row)], np.abs(row)) for row in rows], np.int32)


PACKED = documents([70, 1, 60, -19], [150])
PADDED = documents([150], [33, -117])
ASKING = documents([40, 30], [10, -60])

CASES = {
    "causal": asked(Mask(150)),
    "later queries": asked(Mask(150), queries=70),
    "one query": asked(Mask(150), queries=1),
    "one key": asked(Mask(1)),
    "window": asked(Mask(150, window=40)),
    "window of one": asked(Mask(70, window=1)),
    "encoder": asked(Mask(150, causal=False)),
    "more queries than keys": asked(Mask(33, causal=False), queries=70),
    "packed": asked(Mask(150, segments=PACKED)),
    "packed, in windows": asked(Mask(150, window=20, segments=PACKED)),
    "padded": asked(Mask(150, segments=PADDED)),
    "packed encoder": asked(Mask(150, segments=PACKED, causal=False)),
    "padded encoder": asked(Mask(150, segments=PADDED, causal=False)),
    "later queries of padded rows": asked(Mask(150, segments=PADDED), queries=9),
    "prefix": asked(Mask(150), queries=150, keys=170),
    "prefix, packed": asked(Mask(150, segments=PACKED), queries=150, keys=170),
    "prefix, in windows": asked(Mask(150, window=20), queries=150, keys=170),
    "virtual tokens": asked(Mask(150, segments=PACKED), queries=170, keys=170),
    "virtual tokens, in windows": asked(Mask(150, window=20), queries=170, keys=170),
    "virtual tokens of an encoder": asked(Mask(150, segments=PACKED, causal=False), queries=170, keys=170),
    "another text": asked(Mask(70, causal=False), queries=33),
    "another text, padded": asked(Mask(150, segments=PADDED, asking=np.zeros_like(ASKING), causal=False), queries=70),
    "another text, with a prefix": asked(Mask(150, segments=PACKED, asking=ASKING, causal=False), queries=70, keys=155),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mask_means_what_it_means_to_the_plain_pair(case: str):
    agree(CASES[case].found(), CASES[case].expected())


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 40, 64, 72, 80, 96, 112, 128, 160, 256])
def test_every_head_dimension(dim: int):
    case = asked(Mask(100), dim=dim, batch=1)
    agree(case.found(), case.expected())


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 31, 64, 129])
def test_groups_of_heads_and_odd_lengths(heads: tuple[int, int], length: int):
    case = asked(Mask(length), heads=heads, dim=32)
    agree(case.found(), case.expected())


@pytest.mark.parametrize("scores", [0.01, 30.0])
def test_even_weights_and_sharp_ones(scores: float):
    case = asked(Mask(150), scores=scores)
    agree(case.found(), case.expected())


def test_the_second_number_of_a_row_is_the_log_of_its_sum():
    case = CASES["causal"]
    (q, k, v, _), mask = case.there()
    _, lse = flash.forward(q, k, v, mask, case.scale)
    scores = case.scale * case.q @ case.k.swapaxes(-1, -2)
    scores[..., np.triu(np.ones((150, 150), bool), 1)] = -np.inf
    np.testing.assert_allclose(to_host(lse), np.log(np.exp(scores).sum(axis=-1)), rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_nothing_is_zero_and_learns_nothing():
    """The plain pair gives NaN there."""
    asking = documents([70], [10, -60])  # no key of padding
    case = asked(Mask(100, segments=documents([100], [100]), asking=asking, causal=False), queries=70)
    y, dq, dk, dv = (to_host(array).astype("f8") for array in case.found())
    assert not y[1, :, 10:].any() and not dq[1, :, 10:].any()
    case.g[1, :, 10:] = 0
    asking[1, 10:] = 0
    expected = case.expected()  # what hidden rows would see, had they a gradient, does not matter
    for got, wanted in zip((dk, dv), expected[2:], strict=True):
        assert off(got, wanted) <= 2


def test_the_same_bits_in_every_run():
    case = asked(Mask(300, segments=np.repeat(PACKED, 2, axis=1)), heads=(4, 2), dim=128)
    first = [to_host(array).tobytes() for array in case.found()]
    for _ in range(3):
        assert [to_host(array).tobytes() for array in case.found()] == first


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_that_are_needed(needs: tuple[bool, ...]):
    case = CASES["causal"]
    (q, k, v, g), mask = case.there()
    _, *gradients = both(q, k, v, g, mask, case.scale, needs)
    for found, wanted, need in zip(gradients, case.expected()[1:], needs, strict=True):
        assert (found is not None) == need
        assert found is None or off(found, wanted) <= 2


# ---- where arrays lie ------------------------------------------------------------------------------------------------


def inside(shape: tuple[int, ...], around: float) -> tuple[cupy.ndarray, cupy.ndarray]:
    """Numbers (batch, time, heads, dim) that are all `around`, and (batch, heads, time, dim) in the midst of them."""
    batch, heads, time, dim = shape
    wide = cupy.full((batch + 2, time + 2, heads + 2, dim + 16), around, np.float32).astype(bfloat16)
    return wide, wide[1:-1, 1:-1, 1:-1, 8:-8].transpose(0, 2, 1, 3)


def between_nan(array: cupy.ndarray) -> cupy.ndarray:
    _, view = inside(array.shape, np.nan)
    view[...] = array
    return view


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("case", ["causal", "prefix, packed", "padded encoder"])
def test_nothing_beyond_the_arrays_is_read_or_written(monkeypatch, case: str, dim: int):
    """Inputs lie between NaN, and outputs between numbers that must stay what they are."""
    made = []

    def heads(shape):
        made.append(inside(shape, 7))
        return made[-1][1]

    monkeypatch.setattr(margins, "heads", heads)
    case = asked(CASES[case].mask, queries=150, keys=CASES[case].k.shape[2], dim=dim)
    arrays, mask = case.there()
    agree(both(*map(between_nan, arrays), mask, case.scale), case.expected())
    assert len(made) == 4
    for wide, view in made:
        view[...] = cupy.full(view.shape, 7, np.float32).astype(bfloat16)
        assert (to_host(wide) == 7).all()


def test_a_gradient_of_any_layout():
    case = CASES["causal"]
    (q, k, v, g), mask = case.there()
    odd = cupy.zeros((*g.shape[:3], g.shape[3] + 1), bfloat16)[..., 1:]  # rows at no multiple of 16 bytes
    odd[...] = g
    agree(both(q, k, v, odd, mask, case.scale), case.expected())


def test_what_it_is_not_for_is_said():
    (q, k, v, _), mask = CASES["causal"].there()
    assert "bias" in flash.supports(q, k, v, mask, cupy.zeros((1, 2, 150, 150), np.float32))
    assert "bfloat16" in flash.supports(q.astype(np.float32), k, v, mask, None)
    assert "dimensions" in flash.supports(*(array[..., :12] for array in (q, k, v)), mask, None)
    assert "fit" in flash.supports(q, k, v[:, :, :-1], mask, None)
    assert "keys" in flash.supports(q, k[:, :, 1:], v[:, :, 1:], replace(mask, keys=149), None)
    assert "16 bytes" in flash.supports(*(array[..., 4:60] for array in (q, k, v)), mask, None)
