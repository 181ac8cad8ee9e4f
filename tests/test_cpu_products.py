"""Rows times a weight, by blocks and in threads: the same as the plain product, whatever the sizes and layouts."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refpeft import fused
from refpeft.cpu import products
from refpeft.tensor import Tensor

EPS = float(np.finfo("f4").eps)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 2 * products.FEW),
    width=st.sampled_from([1, 7, 64, 600, 40_000]),
    out=st.sampled_from([1, 3, 32, 96, 97, 1000]),
    turned=st.booleans(),
    number=st.integers(1, 3),
)
def test_it_is_the_product(count, width, out, turned, number):
    rows, weight = normal((count, width)), normal((out, width), 1)
    wide = np.full((count, out + 2), 7, "f4")
    much, products._MUCH = products._MUCH, 64
    try:
        with products.threads(number):
            products.product(rows, np.asfortranarray(weight) if turned else weight, wide[:, 1:-1])
    finally:
        products._MUCH = much
    exact = rows.astype("f8") @ weight.T.astype("f8")
    reach = np.abs(rows).astype("f8") @ np.abs(weight.T)
    assert (np.abs(wide[:, 1:-1] - exact) <= EPS * width**0.5 * reach).all()
    assert (wide[:, [0, -1]] == 7).all()


@pytest.mark.parametrize(("count", "blocks"), [(0, 0), (1, 1), (3, 1), (4, 32), (16, 32), (32, 31), (33, 0)])
def test_few_rows_are_multiplied_by_rows_or_blocks_of_the_weight(count, blocks):
    weight = normal((100, 1000))
    assert products._block(normal((count, 1000)), weight) == blocks
    assert products._block(normal((count, 1000)), np.asfortranarray(weight)) == 0  # as GPT-2's: BLAS takes it as it is


def test_only_the_thread_that_asked_shares_its_products_out(monkeypatch):
    seen = []
    plain = products._product
    monkeypatch.setattr(products, "_product", lambda *a: (seen.append(threading.current_thread().name), plain(*a)))
    x, weight = Tensor(normal((2, 1, 512))), normal((1024, 512), 1)
    with products.threads(2):
        y = fused.frozen_linear(x, weight=lambda: weight)
        assert sorted(seen) == ["MainThread", "product_0"]
        seen.clear()
        other = threading.Thread(target=fused.frozen_linear, args=(x,), kwargs={"weight": lambda: weight}, name="other")
        other.start()
        other.join()
        assert seen == ["other"]
    seen.clear()
    z = fused.frozen_linear(x, weight=lambda: weight)
    assert seen == ["MainThread"]
    assert np.array_equal(y.data, z.data)
