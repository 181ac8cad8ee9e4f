"""Attention and rotary positions, for float32 arrays of NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from refpeft import arena, fused

FLOAT = np.dtype(np.float32)

BLOCK = 64
"""Queries of a head treated at once: where attention is causal, keys after the last of them are left out."""

SCORES = 2**16
"""Scores treated at once, of as many heads and rows as fit: with their gradients they stay in a core's cache."""

CALM = 60
"""Size of scores up to which the sum of their exponentials is a number of float32."""

LATER = np.where(np.tri(BLOCK, k=-1, dtype=bool), FLOAT.type(-np.inf), FLOAT.type(0))
"""What is added to the scores of a block's own keys with its queries: keys that come later are not seen."""

ROTATED = 2**16
"""Numbers rotated at once."""

Span = tuple[slice, slice, slice]
"""Rows, and the queries and keys of theirs that belong together: whole rows, or a document.

The queries are right-aligned with the keys, and see all of them, or where attention is causal those up to their own.
"""


# ---- attention -------------------------------------------------------------------------------------------------------


@fused.attention.override(np.ndarray, "f4")
def attention(needs, q, k, v, bias=None, *, mask, scale=None):
    """By documents and blocks of scores that stay in cache: nothing is computed of padding, which gets zeros.

    Scores are made keys by queries, which is faster than queries by keys: then it is the queries, the smaller matrix,
    that BLAS transposes. Where something is trained, or of more than one query, it is not written for a bias, a window
    shorter than a document, or a text that asks another.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    fit = heads % kv_heads == 0 and k.shape == (batch, kv_heads, keys, dim) and v.shape[:3] == k.shape[:3]
    if not fit or mask.keys > keys or (mask.causal and queries > keys):
        return NotImplemented
    scale = FLOAT.type(dim**-0.5 if scale is None else scale)
    if queries == 1 and not any(needs):
        return _attend_once(q, k, v, bias, mask, scale), ()
    spans = _spans(mask, batch, queries, keys) if bias is None else None
    if spans is None:
        return NotImplemented
    how = _How(mask.causal, scale, abs(scale) * _longest(q) * _longest(k) < CALM)
    y = _in_heads((batch, heads, queries, v.shape[3]), [(rows, asking) for rows, asking, _ in spans])
    lse, scratch = arena.empty((batch, heads, queries), FLOAT), _Scratch()
    of_queries = [_grouped(a, kv_heads) for a in (q, y, lse)]
    for rows, some, asking, seen in _parts(spans, heads, kv_heads):
        at_queries, at_keys = (rows, some, slice(None), asking), (rows, some, seen)
        _attend(*(a[at_queries] for a in of_queries), k[at_keys], v[at_keys], how, scratch)
    scores_wanted = needs[0] or needs[1]
    return y, (needs, q, k, v if scores_wanted else None, y if scores_wanted else None, lse, spans, how)


@attention.backward
def _(g, needs, q, k, v, y, lse, spans, how):
    kv_heads, scratch = k.shape[1], _Scratch()
    asking, seen = ([(span[0], span[axis]) for span in spans] for axis in (1, 2))
    dq = _in_heads(q.shape, asking) if needs[0] else None
    dk = _in_heads(k.shape, seen) if needs[1] else None
    dv = _in_heads((*k.shape[:3], g.shape[3]), seen) if needs[2] else None
    delta = None if y is None else np.vecdot(g, y)
    of_queries = [None if a is None else _grouped(a, kv_heads) for a in (q, g, lse, delta, dq)]
    for rows, some, asking, seen in _parts(spans, q.shape[1], kv_heads):
        at_queries, at_keys = (rows, some, slice(None), asking), (rows, some, seen)
        parts = [None if a is None else a[at_queries] for a in of_queries]
        parts += [None if a is None else a[at_keys] for a in (k, v, dk, dv)]
        _attend_back(*parts, how, scratch)
    return (dq, dk, dv, None)[: len(needs)]


def _attend_once(q, k, v, bias, mask: fused.Mask, scale: np.float32) -> np.ndarray:
    """What a generated token sees, without a tape: every mask and bias, in few steps, and no copy of k or v."""
    batch, heads, _, dim = q.shape
    asking = (q * scale).reshape(batch, k.shape[1], -1, dim)
    scores = np.ascontiguousarray((k @ asking.swapaxes(-1, -2)).swapaxes(-1, -2))  # many rows are fast in a product
    if bias is not None:
        scores += bias.reshape(len(bias), *scores.shape[1:])
    hidden = mask.bias(0, 1, 1, k.shape[2], q)
    if hidden is not None:
        scores += hidden[:, None]
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    y = scores @ v
    y /= scores.sum(axis=-1, keepdims=True)
    return y.reshape(batch, heads, 1, -1)


class _How(NamedTuple):
    causal: bool
    scale: np.float32
    calm: bool  # whether the exponentials of scores neither overflow nor vanish, so that no maximum is needed


class _Scratch:
    """Memory by name, as large as was asked for so far."""

    def __init__(self):
        self._flat: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].size < size:
            self._flat[name] = arena.empty((size,), FLOAT)
        return self._flat[name][:size].reshape(shape)

    def product(self, name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.matmul(a, b, out=self(name, (*a.shape[:-1], b.shape[-1])))


def _attend(q, y, lse, k, v, how: _How, scratch: _Scratch) -> None:
    """Writes y, and the logarithm of each query's sum of exponentials.

    q and y are (rows, kv_heads, group, queries, dim), lse the same without dim, k and v (rows, kv_heads, keys, dim).
    """
    ones = np.ones(k.shape[2], FLOAT)
    for block, hi in _blocks(q.shape[3], k.shape[2], how.causal):
        _, p = _scores(q[..., block, :], k[:, :, :hi], how, scratch)
        if not how.calm:
            top = p.max(axis=-2, keepdims=True)
            p -= top
        np.exp(p, out=p)
        total = ones[:hi] @ p
        to = y[..., block, :]
        sums = scratch.product("sums", p.swapaxes(-1, -2), v[:, :, :hi])
        np.divide(sums.reshape(to.shape), total.reshape(*to.shape[:-1], 1), out=to)
        np.log(total, out=total)
        if not how.calm:
            total += top[:, :, 0]
        lse[..., block] = total.reshape(to.shape[:-1])


def _attend_back(q, g, lse, delta, dq, k, v, dk, dv, how: _How, scratch: _Scratch) -> None:
    """Writes those of dq, dk and dv that are not None; `delta` is the sum of g y, a query.

    Scores are made again. The first block sees all keys: it writes all of dk and dv, and later ones add to them.
    """
    first = True
    for block, hi in _blocks(q.shape[3], k.shape[2], how.causal):
        asking, p = _scores(q[..., block, :], k[:, :, :hi], how, scratch)
        back = g[..., block, :]
        if how.calm:  # p is short of a factor, which is given to all that it is multiplied with
            factor = np.exp(-lse[..., block, None])
        else:
            p -= _line(lse[..., block])
            factor = FLOAT.type(1)
        np.exp(p, out=p)
        back = _rows(np.multiply(back, factor, out=scratch("back", back.shape)))
        if dv is not None:
            _sum_up(dv[:, :, :hi], p, back, first, scratch)
        if v is not None:
            dscores = scratch.product("dscores", v[:, :, :hi], back.swapaxes(-1, -2))
            dscores -= _line(delta[..., block, None] * factor)
            dscores *= p
        if dq is not None:
            to = dq[..., block, :]
            sums = scratch.product("sums", dscores.swapaxes(-1, -2), k[:, :, :hi])
            np.multiply(sums.reshape(to.shape), how.scale, out=to)
        if dk is not None:
            _sum_up(dk[:, :, :hi], dscores, asking, first, scratch)
        first = False


def _scores(q, k, how: _How, scratch: _Scratch) -> tuple[np.ndarray, np.ndarray]:
    """(scale q, k (scale q)^T), the queries of a group's heads one after another; -inf for keys yet to come."""
    asking = _rows(np.multiply(q, how.scale, out=scratch("asking", q.shape)))
    scores = scratch.product("scores", k, asking.swapaxes(-1, -2))
    queries = q.shape[3]
    if how.causal and queries > 1:
        last = scores[:, :, -queries:].reshape(*k.shape[:2], queries, -1, queries)
        last += LATER[:queries, None, :queries]
    return asking, scores


def _sum_up(total: np.ndarray, by_key: np.ndarray, of_query: np.ndarray, first: bool, scratch: _Scratch) -> None:
    """Makes `total` (rows, kv_heads, keys, dim) the product, or adds it."""
    if first:
        np.matmul(by_key, of_query, out=total)
    else:
        total += scratch.product("more", by_key, of_query)


def _longest(a: np.ndarray) -> np.float32:
    """The length of the longest vector in the last axis."""
    return np.sqrt(np.vecdot(a, a).max())


def _rows(a: np.ndarray) -> np.ndarray:
    """(rows, kv_heads, group, queries, n) as (rows, kv_heads, group * queries, n)."""
    return a.reshape(*a.shape[:2], -1, a.shape[-1])


def _line(a: np.ndarray) -> np.ndarray:
    """(rows, kv_heads, group, queries) as (rows, kv_heads, 1, group * queries)."""
    return a.reshape(*a.shape[:2], 1, -1)


def _grouped(a: np.ndarray, kv_heads: int) -> np.ndarray:
    """A view of (batch, heads, ...) as (batch, kv_heads, group, ...)."""
    return a.reshape(a.shape[0], kv_heads, -1, *a.shape[2:])


def _in_heads(shape: tuple[int, ...], written: list[tuple[slice, slice]]) -> np.ndarray:
    """An array (batch, heads, time, dim) that is (batch, time, heads, dim) in memory, to be joined without a copy.

    `written` are the rows and times that will be; elsewhere it is zero.
    """
    batch, heads, time, dim = shape
    a = arena.empty((batch, time, heads, dim), FLOAT)
    if sum(_length(rows) * _length(times) for rows, times in written) < batch * time:
        a.fill(0)
    return a.transpose(0, 2, 1, 3)


def _length(part: slice) -> int:
    return part.stop - part.start


# ---- what is treated together ----------------------------------------------------------------------------------------


def _spans(mask: fused.Mask, batch: int, queries: int, keys: int) -> list[Span] | None:
    """What `mask` lets see one another; None where it takes more than spans to say so."""
    if mask.asking is not None:
        return None
    if mask.segments is None:
        spans = [(slice(0, batch), slice(0, queries), slice(0, keys))]
    else:
        spans = _documents(mask.segments, queries, keys)
    short = spans and mask.window is not None and mask.window < max(_length(seen) for _, _, seen in spans)
    return None if short else spans


def _documents(segments: np.ndarray, queries: int, keys: int) -> list[Span] | None:
    """Runs of equal numbers, without padding. Keys of adapters may be before the only document of a row, number 0."""
    extra, hidden = keys - segments.shape[1], keys - queries
    spans = []
    for row, numbers in enumerate(segments):
        edges = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
        runs = [(int(numbers[start]), start, stop) for start, stop in pairwise(edges) if numbers[start] >= 0]
        apart = len({number for number, _, _ in runs}) < len(runs)
        if apart or (extra and any(run[:2] != (0, 0) for run in runs)):
            return None
        for _, start, stop in runs:
            if stop + extra > hidden:
                asking = slice(max(start - hidden, 0), stop + extra - hidden)
                spans.append((slice(row, row + 1), asking, slice(start, stop + extra)))
    return spans


def _parts(spans: list[Span], heads: int, kv_heads: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """(rows, key heads, queries, keys) of the spans, with about SCORES scores in a block each."""
    for rows, asking, seen in spans:
        block = min(BLOCK, _length(asking)) * (heads // kv_heads) * (_length(seen))
        fit = max(SCORES // block, 1)
        rows_each, heads_each = max(fit // kv_heads, 1), min(fit, kv_heads)
        for row in range(rows.start, rows.stop, rows_each):
            for head in range(0, kv_heads, heads_each):
                some = slice(head, min(head + heads_each, kv_heads))
                yield slice(row, min(row + rows_each, rows.stop)), some, asking, seen


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """(queries, how many keys they see), last ones first: these see all keys."""
    for stop in range(queries, 0, -BLOCK):
        yield slice(max(stop - BLOCK, 0), stop), keys - (queries - stop) * causal


# ---- rotary positions ------------------------------------------------------------------------------------------------


@fused.rope.override(np.ndarray, "f4")
def rope(needs, x, *, cos, sin):
    """x [cos|cos] + exchanged(x) [-sin|sin], where `exchanged` copies each half of a head as if it were one item.

    Not for single tokens, which the plain pair rotates in fewer steps.
    """
    batch, _, time, dim = x.shape
    tables = (len(cos), 1, time, dim // 2)
    if cos.shape != tables or sin.shape != tables or len(cos) not in (1, batch) or dim % 2 or time == 1:
        return NotImplemented
    return _rotated(x, cos, sin), (cos, sin)


@rope.backward
def _(g, cos, sin):
    return (_rotated(g, cos, -sin),)


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    batch, heads, time, dim = x.shape
    cos, sin = np.concatenate((cos, cos), axis=-1), np.concatenate((-sin, sin), axis=-1)
    x, cos, sin = (a.transpose(0, 2, 1, 3) for a in (x, cos, sin))
    if x.strides[-1] != x.itemsize:
        x = x.copy()
    half = np.dtype((np.void, dim // 2 * x.itemsize))
    y = arena.empty((batch, time, heads, dim), FLOAT)
    times = min(max(ROTATED // (heads * dim), 1), time)
    rows = max(ROTATED // (time * heads * dim), 1)
    scratch = arena.empty((rows, times, heads, dim), FLOAT)
    for row in range(0, batch, rows):
        for start in range(0, time, times):
            some = slice(row, row + rows), slice(start, start + times)
            of_tables = some if len(cos) > 1 else (slice(None), some[1])
            exchanged = scratch[: min(rows, batch - row), : min(times, time - start)]
            np.copyto(exchanged.view(half), x[some].view(half)[..., ::-1])
            exchanged *= sin[of_tables]
            np.multiply(x[some], cos[of_tables], out=y[some])
            y[some] += exchanged
    return y.transpose(0, 2, 1, 3)
