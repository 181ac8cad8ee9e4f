"""Attention against a dense one with an explicit mask: every kind of mask, blocks of queries, and what is kept."""

import cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import fused
from refpeft.conformance.gradcheck import gradcheck
from refpeft.tensor import Tensor, parameter

EPS = float(np.finfo("f8").eps)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def inputs(batch=2, heads=4, kv_heads=2, queries=6, keys=6, dim=4):
    return normal((batch, heads, queries, dim)), *(normal((batch, kv_heads, keys, dim), i) for i in (1, 2))


def dense_gradients(q, k, v, g, mask):
    """The gradients by q, k and v, by the textbook: with the whole matrix of probabilities, head by head."""
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    seen = cases.seen(mask, batch, queries, k.shape[2])
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in np.ndindex(batch, heads):
        kv = h // group
        scores = np.where(seen[b], q[b, h] @ k[b, kv].T / np.sqrt(dim), -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        dp = g[b, h] @ v[b, kv].T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / np.sqrt(dim)
        dv[b, kv] += p.T @ g[b, h]
        dq[b, h] = ds @ k[b, kv]
        dk[b, kv] += ds.T @ q[b, h]
    return dq, dk, dv


def check(mask, q, k, v):
    """Values and gradients against the dense ones."""
    leaves = [parameter(a) for a in (q, k, v)]
    y = fused.attention(*leaves, mask=mask)
    g = normal(y.shape, 9)
    y.backward(g)
    expected = (cases.attention(q, k, v, mask=mask), *dense_gradients(q, k, v, g, mask))
    for got, want in zip((y.data, *(leaf.grad for leaf in leaves)), expected, strict=True):
        assert np.abs(got - want).max() <= 64 * EPS * max(np.abs(want).max(), 1)


@st.composite
def masks(draw):
    """A mask with the number of queries, of keys, and of the adapter's keys before them."""
    tokens, extra = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    queries = draw(st.integers(1, tokens + extra))
    window = draw(st.none() | st.integers(1, 10))
    rows = st.lists(st.integers(-1, 2), min_size=tokens, max_size=tokens)
    segments = draw(st.none() | st.lists(rows, min_size=2, max_size=2))
    array = None if segments is None else np.array([sorted(row, key=lambda n: n % 4) for row in segments])
    return fused.Mask(tokens, window, array), queries, tokens + extra


@given(masks(), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.sampled_from([1, 2, 3, 256]))
def test_every_mask_in_every_block_size_is_the_dense_one(found, heads, block):
    mask, queries, keys = found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "QUERY_BLOCK", block)
        check(mask, *inputs(heads=heads[0], kv_heads=heads[1], queries=queries, keys=keys))


@pytest.mark.parametrize("window", [None, 100, 400])
def test_more_queries_than_one_block(window):
    time = 2 * fused.QUERY_BLOCK + 40
    segments = np.stack([np.repeat([0, 1, -1], [300, time - 310, 10]), np.zeros(time, int)])
    check(fused.Mask(time, window, segments), *inputs(heads=2, kv_heads=1, queries=time, keys=time))


def test_gradients_are_the_finite_differences_across_blocks(monkeypatch):
    monkeypatch.setattr(fused, "QUERY_BLOCK", 4)
    q, k, v = inputs(batch=1, queries=9, keys=11)
    assert gradcheck(lambda *x: fused.attention(*x, mask=fused.Mask(9, 5)), q, k, v) < 1e-7


def test_a_query_sees_nothing_of_later_tokens():
    q, k, v = inputs()
    before = fused.attention(Tensor(q), k, v, mask=fused.Mask(6)).data
    k[:, :, 4:], v[:, :, 4:] = 100, 100
    after = fused.attention(Tensor(q), k, v, mask=fused.Mask(6)).data
    assert np.array_equal(before[:, :, :4], after[:, :, :4])
    assert not np.array_equal(before[:, :, 4], after[:, :, 4])


def test_packed_documents_are_the_documents_alone():
    q, k, v = inputs(batch=1, queries=9, keys=9)
    packed = fused.attention(Tensor(q), k, v, mask=fused.Mask(9, None, np.array([[0] * 4 + [1] * 5]))).data
    first, second = (
        fused.attention(Tensor(q[:, :, part]), k[:, :, part], v[:, :, part], mask=fused.Mask(n)).data
        for part, n in ((slice(0, 4), 4), (slice(4, 9), 5))
    )
    assert np.abs(packed - np.concatenate((first, second), axis=2)).max() < 1e-15


def test_padding_on_either_side_leaves_the_tokens_alone():
    q, k, v = inputs(batch=1, queries=5, keys=5)
    alone = fused.attention(Tensor(q), k, v, mask=fused.Mask(5)).data
    for before, after in ((0, 3), (3, 0)):
        widths = ((0, 0), (0, 0), (before, after), (0, 0))
        padded = [np.pad(a, widths, constant_values=7.0) for a in (q, k, v)]
        segments = np.array([[-1] * before + [0] * 5 + [-1] * after])
        y = fused.attention(Tensor(padded[0]), *padded[1:], mask=fused.Mask(8, None, segments)).data
        assert np.abs(y[:, :, before : before + 5] - alone).max() < 1e-15


def test_one_query_at_a_time_is_all_at_once():
    q, k, v = inputs(queries=7, keys=7)
    for window in (None, 3):
        whole = fused.attention(Tensor(q), k, v, mask=fused.Mask(7, window)).data
        for i in range(7):
            one = fused.attention(
                Tensor(q[:, :, i : i + 1]), k[:, :, : i + 1], v[:, :, : i + 1], mask=fused.Mask(i + 1, window)
            )
            assert np.abs(one.data[:, :, 0] - whole[:, :, i]).max() < 1e-14


def test_scores_far_apart_neither_overflow_nor_warn():
    q, k, v = inputs()
    for dtype in ("f4", "f8"):
        leaves = [parameter(a.astype(dtype)) for a in (100 * q, 100 * k, v)]
        y = fused.attention(*leaves, mask=fused.Mask(6))
        y.backward()
        assert all(np.isfinite(a).all() for a in (y.data, *(leaf.grad for leaf in leaves)))


def test_the_tape_keeps_nothing_of_the_size_of_the_scores():
    time = 300
    q, k, v = (parameter(a) for a in inputs(queries=time, keys=time))
    y = fused.attention(q, k, v, mask=fused.Mask(time))
    kept = {id(a): a for a in y.node.saved if isinstance(a, np.ndarray)}
    rows = 2 * 4 * time * 8  # a number for each query
    assert sum(a.nbytes for a in kept.values()) == sum(a.data.nbytes for a in (q, k, v, y)) + rows


@pytest.mark.parametrize("trained, arrays", [((0,), "qkvy"), ((1,), "qkvy"), ((2,), "qk"), ((0, 2), "qkvy")])
def test_it_keeps_what_the_trained_inputs_need(trained, arrays):
    named = dict(zip("qkv", inputs(), strict=True))
    tensors = [parameter(a) if i in trained else Tensor(a) for i, a in enumerate(named.values())]
    y = fused.attention(*tensors, mask=fused.Mask(6))
    named["y"] = y.data
    kept = {id(a) for a in y.node.saved if isinstance(a, np.ndarray) and a.ndim == 4}
    assert kept == {id(named[letter]) for letter in arrays}


def test_what_attention_holds_at_once_grows_with_the_keys_not_their_square(monkeypatch):
    sizes = []
    blocks = fused._score_blocks

    def watched(*args):
        for found in blocks(*args):
            sizes.append(found[2].size)
            yield found

    monkeypatch.setattr(fused, "_score_blocks", watched)
    time = 1000
    q, k, v = (parameter(a) for a in inputs(batch=1, heads=2, kv_heads=1, queries=time, keys=time))
    fused.attention(q, k, v, mask=fused.Mask(time)).backward()
    assert len(sizes) == 8 and max(sizes) <= 2 * fused.QUERY_BLOCK * time
