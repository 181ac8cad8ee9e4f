"""The faster pairs of attention and rotary positions: what the plain ones say in float64, and nothing of padding."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import RefpeftError, fused, tensor
from refpeft.arena import Arena, using
from refpeft.cpu import attention as faster
from refpeft.tensor import Tensor, parameter

EPS = float(np.finfo("f4").eps)
NEEDS = st.tuples(*[st.booleans()] * 3)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def in_heads(batch, heads, time, dim, seed):
    """Normal numbers (batch, heads, time, dim), a view of something wider as q, k and v made at once are."""
    wide = normal((batch, time, 3 * heads * dim), seed)
    return wide[:, :, : heads * dim].reshape(batch, time, heads, dim).swapaxes(1, 2)


# ---- attention -------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """Inputs of attention, the gradient of its output (zero at padding), the mask, and which queries are no padding."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    mask: fused.Mask
    real: np.ndarray

    def times(self, factor):
        """The same with larger or smaller scores."""
        return self._replace(q=self.q * np.float32(factor))

    def results(self, needs, dtype):
        """The output, and the gradients of those of q, k and v that need one."""
        arrays = [a.astype(dtype, copy=False) for a in (self.q, self.k, self.v)]
        inputs = [(parameter if need else Tensor)(a) for a, need in zip(arrays, needs, strict=True)]
        y = fused.attention(*inputs, mask=self.mask)
        if any(needs):
            y.backward(self.g.astype(dtype))
        return y, [x.grad for x, need in zip(inputs, needs, strict=True) if need]

    def agrees(self, needs=(True, True, True)):
        """That the faster pair is taken, and says what the plain one says in float64, but zero at padding."""
        with tensor.plain():
            expected, gradients = self.results(needs, "f8")
        y, found = self.results(needs, "f4")
        assert not any(needs) or y.node.op is not fused.attention
        real = self.real[:, None, :, None]
        size = max(1, *(float(np.abs(a).max()) for a in (self.q, self.k)))
        for ours, exact in zip((y.data, *found), (expected.data * real, *gradients), strict=True):
            assert ours.dtype == np.float32 and ours.shape == exact.shape
            assert np.abs(ours - exact).max() <= 16 * EPS * size * max(1, np.abs(exact).max())
        assert (y.data[np.broadcast_to(~real, y.shape)] == 0).all()


def asked(
    batch=2,
    kv_heads=2,
    group=1,
    dim=4,
    width=4,
    tokens=6,
    queries=None,
    extra=0,
    segments=None,
    causal=True,
    window=None,
):
    keys, heads = tokens + extra, kv_heads * group
    queries = keys if queries is None else queries
    mask = fused.Mask(tokens, window, None if segments is None else np.array(segments), causal)
    real = np.ones((batch, keys), bool)
    if segments is not None:
        real[:, extra:] = mask.segments >= 0
    real = real[:, keys - queries :]
    shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, width), (heads, queries, width)
    q, k, v, g = (in_heads(batch, *shape, seed) for seed, shape in enumerate(shapes))
    return Asked(q, k, v, g * real[:, None, :, None], mask, real)


@contextmanager
def blocks(queries, scores):
    """Within it, so many queries and scores are treated at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster, "BLOCK", queries)
        patch.setattr(faster, "SCORES", scores)
        yield


@st.composite
def documents(draw, batch, tokens):
    """The documents' numbers in rows, with padding before, between or after them."""
    rows = []
    for row in range(batch):
        numbers = draw(st.lists(st.integers(-1, tokens), min_size=tokens, max_size=tokens))
        rows.append(sorted(numbers, key=lambda n: (n + row) % (tokens + 2)))
    return rows


@st.composite
def anything(draw):
    """Every kind of input that the faster pair is for."""
    batch, tokens, extra = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["whole", "padded", "packed"]))
    segments = None
    if kind == "packed":
        extra, segments = 0, draw(documents(batch, tokens))
    elif kind == "padded":
        segments = [[0] * n + [-1] * (tokens - n) for n in (draw(st.integers(1, tokens)) for _ in range(batch))]
    causal = draw(st.booleans())
    return asked(
        batch=batch,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 4, 5])),
        width=draw(st.sampled_from([1, 4])),
        tokens=tokens,
        queries=draw(st.integers(1 if segments is None else 2, tokens + extra)),
        extra=extra,
        segments=segments,
        causal=causal,
        window=draw(st.none() | st.integers(tokens + extra, 20)) if causal else None,
    )


@given(anything(), NEEDS, st.sampled_from([(1, 1), (3, 20), (3, 100), (64, 2**16)]), st.sampled_from([1, 40]))
def test_attention_is_the_plain_one_whatever_the_blocks(this, needs, sizes, factor):
    with blocks(*sizes):
        this.times(factor).agrees(needs)


@pytest.mark.parametrize("causal", [True, False])
def test_more_queries_than_a_block_and_more_heads_than_fit(causal):
    time = 2 * faster.BLOCK + 40
    asked(1, 2, 3, 8, 8, time, causal=causal).agrees()
    asked(1, 2, 3, 8, 8, time, causal=causal, segments=[[0] * 100 + [1] * (time - 110) + [-1] * 10]).agrees()


@pytest.mark.parametrize("factor", [1, 15, 1e3, 1e10])
def test_scores_of_any_size_neither_overflow_nor_vanish(factor):
    this = asked(tokens=9, dim=8).times(factor)
    y, gradients = this.results((True, True, True), "f4")
    assert all(np.isfinite(a).all() for a in (y.data, *gradients))
    if factor < 1e10:
        this.agrees()


@given(anything(), st.booleans(), st.sampled_from([None, 1, 2, 30]), st.sampled_from([1, 40]))
def test_a_generated_token_sees_what_the_plain_pair_lets_it_see(this, biased, window, factor):
    tokens, segments = this.mask.keys, this.mask.segments
    if segments is not None:
        segments = np.where(np.arange(tokens) == tokens - 1, 0, segments)
    mask = fused.Mask(tokens, window, segments)
    q, k, v = this.q[:, :, -1:] * np.float32(factor), this.k, this.v
    bias = normal((1, q.shape[1], 1, k.shape[2]), 7) if biased else None
    wide = [None if a is None else a.astype("f8") for a in (q, k, v, bias)]
    with tensor.plain():
        expected = fused.attention(Tensor(wide[0]), *wide[1:], mask=mask).data
    got = fused.attention(Tensor(q), k, v, bias, mask=mask).data
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected).max() <= 16 * EPS * max(1, np.abs(q).max(), np.abs(k).max()) * np.abs(v).max()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_without_a_maximum_may_be_as_large_as_that_is_allowed(group, sign):
    this = asked(group=group, dim=1, tokens=200)
    edge = np.float32(np.sqrt(faster.CALM) * 0.999)
    this = this._replace(q=np.full_like(this.q, edge), k=np.full_like(this.k, sign * edge), v=this.v * np.float32(1e3))
    y, gradients = this.results((True, True, True), "f4")
    assert all(np.isfinite(a).all() for a in gradients)
    with tensor.plain():
        expected, _ = this.results((False,) * 3, "f8")
    assert np.abs(y.data - expected.data).max() <= 16 * EPS * np.abs(expected.data).max()


def test_a_scale_is_taken_and_may_be_negative():
    q, k, v, *_ = asked()
    for scale in (0.3, -2.0):
        with tensor.plain():
            expected = fused.attention(Tensor(q), k, v, mask=fused.Mask(6), scale=scale).data
        got = fused.attention(Tensor(q), k, v, mask=fused.Mask(6), scale=scale).data
        assert np.abs(got - expected).max() < 32 * EPS


def test_nothing_is_computed_of_padding_and_of_other_documents():
    this = asked(1, tokens=9, segments=[[0, 0, 0, 1, 1, 1, 1, -1, -1]])
    y, gradients = this.results((True, True, True), "f4")
    for start, stop, others in ((0, 3, slice(3, 9)), (3, 7, [0, 1, 2, 7, 8])):
        q, k, v = (a.copy() for a in (this.q, this.k, this.v))
        for a in (q, k, v):
            a[:, :, others] = np.nan
        spoilt, of_spoilt = this._replace(q=q, k=k, v=v).results((True, True, True), "f4")
        for got, want in zip((spoilt.data, *of_spoilt), (y.data, *gradients), strict=True):
            assert np.abs(got[:, :, start:stop] - want[:, :, start:stop]).max() < 32 * EPS


def test_heads_are_side_by_side_in_memory_so_that_joining_them_copies_nothing():
    this = asked(group=3, segments=[[0] * 6, [0] * 5 + [-1]])
    out, saved = fused.attention.overrides[np.ndarray, np.dtype("f4")].forward((True,) * 3, *this[:3], mask=this.mask)
    for a in (out, *fused.attention.overrides[np.ndarray, np.dtype("f4")].vjp(this.g, *saved)):
        assert np.shares_memory(a, a.transpose(0, 2, 1, 3).reshape(2, 6, -1))


def test_inputs_and_the_gradient_are_left_as_they_were_and_dirty_memory_does_no_harm():
    this = asked(2, 4, 2, 16, 16, 100, segments=[[0] * 60 + [1] * 40, [0] * 90 + [-1] * 10])
    before = [a.copy() for a in this[:4]]
    alone, gradients = this.results((True, True, True), "f4")
    with using(Arena()):
        for _ in range(3):
            y, found = this.results((True, True, True), "f4")
            for a, b in zip((alone.data, *gradients), (y.data, *found), strict=True):
                assert np.array_equal(a, b)
    assert all(np.array_equal(a, b) for a, b in zip(before, this, strict=False))


def test_the_tape_holds_no_more_bytes_than_the_plain_one():
    this = asked(2, 2, 3, 8, 8, 50)
    leaves = [parameter(a) for a in this[:3]]

    def kept():
        saved = fused.attention(*leaves, mask=this.mask).node.saved
        return sum(a.nbytes for a in saved if isinstance(a, np.ndarray))

    with tensor.plain():
        plain = kept()
    assert kept() <= plain


@pytest.mark.parametrize(
    ("this", "bias"),
    [
        (asked(), np.ones((1, 2, 6, 6), "f4")),
        (asked(window=3), None),
        (asked(segments=[[0, 0, 0, 1, 1, 1]] * 2, window=2), None),
        (asked(segments=[[0, 1, 0, 1, 2, 2]] * 2), None),
        (asked(segments=[[0, 0, 0, 1, 1, 1]] * 2, extra=2), None),
        (asked(segments=[[-1, 0, 0, 0, 0, 0]] * 2, extra=2), None),
    ],
    ids=[
        "bias",
        "window",
        "window in documents",
        "split documents",
        "extra keys",
        "padding after extra keys",
    ],
)
def test_what_it_was_not_written_for_is_left_to_the_plain_pair(this, bias):
    leaves = [parameter(a) for a in this[:3]]
    y = fused.attention(*leaves, bias, mask=this.mask)
    assert y.node.op is fused.attention
    with tensor.plain():
        assert np.array_equal(y.data, fused.attention(*leaves, bias, mask=this.mask).data)


def test_wrong_inputs_are_the_plain_pairs_errors():
    q, k, v, _, mask, _ = asked()
    for wrong in ((q[:, :1], k, v), (q, k[:1], v), (q, k, v[:, :, :3]), (q, k[:, :, :3], v[:, :, :3])):
        with pytest.raises(RefpeftError, match=r"attention\("):
            fused.attention(*map(Tensor, wrong), mask=mask)


# ---- rotary positions ------------------------------------------------------------------------------------------------


def angles(batch, time, half):
    found = np.random.default_rng(5).uniform(0, 6, (batch, 1, time, half))
    return {"cos": np.cos(found).astype("f4"), "sin": np.sin(found).astype("f4")}


LAYOUTS = {
    "in heads": lambda a: a,
    "plain": np.ascontiguousarray,
    "turned": np.asfortranarray,
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
}


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.sampled_from([2, 4, 6, 64])),
    st.sampled_from(list(LAYOUTS)),
    st.booleans(),
    st.sampled_from([1, 30, 200, 2**15]),
)
def test_rope_is_the_plain_one_in_every_layout(shape, layout, shared, at_once):
    batch, _, time, dim = shape
    x, g = (LAYOUTS[layout](in_heads(*shape, seed)) for seed in (1, 2))
    tables = angles(1 if shared else batch, time, dim // 2)
    wide = {name: table.astype("f8") for name, table in tables.items()}
    exact = parameter(x.astype("f8"))
    with tensor.plain():
        expected = fused.rope(exact, **wide)
        expected.backward(g.astype("f8"))
    ours = parameter(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster, "ROTATED", at_once)
        got = fused.rope(ours, **tables)
        assert got.node.op is not fused.rope
        got.backward(g)
    for a, b in ((got.data, expected.data), (ours.grad, exact.grad)):
        assert a.shape == shape and np.abs(a - b).max() <= 2 * EPS * np.abs(b).max()


def test_rotated_heads_are_side_by_side_in_memory():
    y = fused.rope(Tensor(in_heads(2, 3, 5, 4, 0)), **angles(2, 5, 2)).data
    assert np.shares_memory(y, y.transpose(0, 2, 1, 3).reshape(2, 5, -1))


def test_wrong_tables_are_the_plain_pairs_errors():
    x = Tensor(in_heads(2, 3, 5, 4, 0))
    for wrong in (angles(2, 4, 2), angles(2, 5, 3), angles(3, 5, 2)):
        with pytest.raises(RefpeftError, match=r"rope\("):
            fused.rope(x, **wrong)
