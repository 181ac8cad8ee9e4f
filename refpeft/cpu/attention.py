"""Attention and rotary positions, for float32 arrays of NumPy."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from refpeft import arena, fused

FLOAT = np.dtype(np.float32)

BLOCK = 64
"""Queries of a head treated at once: where attention is causal, keys after the last of them are left out."""

SCORES = 2**17
"""Scores treated at once, of as many heads and rows as fit: with their gradients they stay in a core's cache."""

CALM = 70
"""Size of scores whose exponentials, and sums of them, are numbers of float32, so that their maximum need not be known.

A score is at most as large as the product of the lengths of a query and a key.
"""

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
    y = _in_heads((batch, heads, queries, v.shape[3]), [(rows, asking) for rows, asking, _ in spans])
    lse = arena.empty((batch, heads, queries), FLOAT)
    of_queries, scratch = [_grouped(a, kv_heads) for a in (q, y, lse)], _Scratch()
    for rows, some, asking, seen in _parts(spans, heads, kv_heads):
        of_part = [a[rows, some, asking] for a in of_queries] + [a[rows, some, seen] for a in (k, v)]
        _attend(*of_part, mask.causal, scale, scratch)
    scores_wanted = needs[0] or needs[1]
    return y, (needs, q, k, v if scores_wanted else None, y if scores_wanted else None, lse, spans, mask.causal, scale)


@attention.backward
def _(g, needs, q, k, v, y, lse, spans, causal, scale):
    kv_heads, scratch = k.shape[1], _Scratch()
    asked, seen = ([(span[0], span[axis]) for span in spans] for axis in (1, 2))
    dq = _in_heads(q.shape, asked) if needs[0] else None
    dk = _in_heads(k.shape, seen) if needs[1] else None
    dv = _in_heads((*k.shape[:3], g.shape[3]), seen) if needs[2] else None
    delta = None if y is None else np.vecdot(g, y, out=arena.like(lse))
    of_queries = [None if a is None else _grouped(a, kv_heads) for a in (q, g, lse, delta, dq)]
    for rows, some, asking, seen in _parts(spans, q.shape[1], kv_heads):
        of_part = [None if a is None else a[rows, some, asking] for a in of_queries]
        of_part += [None if a is None else a[rows, some, seen] for a in (k, v, dk, dv)]
        _attend_back(*of_part, causal, scale, scratch)
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


def _attend(q, y, lse, k, v, causal: bool, scale: np.float32, scratch: _Scratch) -> None:
    """Writes y, and the logarithm of each query's sum of exponentials.

    q and y are (rows, kv_heads, queries, group, dim), lse the same without dim, k and v (rows, kv_heads, keys, dim).
    """
    ones = np.ones(k.shape[2], FLOAT)
    calm = abs(scale) * _longest(q) * _longest(k) < CALM
    for block, hi in _blocks(q.shape[2], k.shape[2], causal):
        _, p = _scores(q[:, :, block], k[:, :, :hi], causal, scale, scratch)
        if not calm:
            top = p.max(axis=-2, keepdims=True)
            p -= top
        np.exp(p, out=p)
        total = ones[:hi] @ p
        _put(y[:, :, block], p.swapaxes(-1, -2), v[:, :, :hi], (1 / total)[..., None], scratch)
        np.log(total, out=total)
        if not calm:
            total += top[:, :, 0]
        lse[:, :, block] = total.reshape(lse[:, :, block].shape)


def _attend_back(q, g, lse, delta, dq, k, v, dk, dv, causal: bool, scale: np.float32, scratch: _Scratch) -> None:
    """Writes those of dq, dk and dv that are not None; `delta` is the sum of g y, a query. Scores are made again."""
    several = q.shape[2] > BLOCK
    sum_k, sum_v = _Sum("dk", dk, several, scratch), _Sum("dv", dv, several, scratch)
    for block, hi in _blocks(q.shape[2], k.shape[2], causal):
        asking, p = _scores(q[:, :, block], k[:, :, :hi], causal, scale, scratch)
        p -= _line(lse[:, :, block])
        np.exp(p, out=p)
        back = g[:, :, block, 0] if g.shape[3] == 1 else _rows(g[:, :, block], "back", scratch)
        sum_v.add(p, back)
        if v is not None:
            dscores = scratch.product("dscores", v[:, :, :hi], back.swapaxes(-1, -2))
            dscores -= _line(delta[:, :, block])
            dscores *= p
            sum_k.add(dscores, asking)
        if dq is not None:
            _put(dq[:, :, block], dscores.swapaxes(-1, -2), k[:, :, :hi], scale, scratch)
    sum_k.write()
    sum_v.write()


def _scores(q, k, causal: bool, scale: np.float32, scratch: _Scratch) -> tuple[np.ndarray, np.ndarray]:
    """(scale q as rows, k (scale q)^T), -inf for keys that are yet to come."""
    asking = _rows(q, "asking", scratch)
    asking *= scale
    scores = scratch.product("scores", k, asking.swapaxes(-1, -2))
    queries, group = q.shape[2:4]
    if causal and queries > 1:
        own = scores[:, :, -queries:]
        own += _later(BLOCK, group)[:queries, : queries * group]
    return asking, scores


@functools.cache
def _later(queries: int, group: int) -> np.ndarray:
    """What is added to the scores (keys, queries * group) of a block with itself: -inf where the key is the later."""
    return np.where(np.tri(queries, k=-1, dtype=bool), FLOAT.type(-np.inf), FLOAT.type(0)).repeat(group, axis=1)


def _rows(a: np.ndarray, name: str, scratch: _Scratch) -> np.ndarray:
    """A copy of (rows, kv_heads, queries, group, dim) as matrices (rows, kv_heads, queries * group, dim).

    Where there is one head, heads stay side by side in memory: longer runs of numbers are faster to copy.
    """
    single = a.shape[3] == 1
    copy = scratch(name, a.swapaxes(1, 2).shape).swapaxes(1, 2) if single else scratch(name, a.shape)
    np.copyto(copy, a)
    return copy.reshape(*a.shape[:2], -1, a.shape[4])


def _put(to, a, b, factor: np.ndarray | np.float32, scratch: _Scratch) -> None:
    """Writes factor a b to (rows, kv_heads, queries, group, dim): a factor for each row of a, (..., 1), or for all.

    One head's product can be written in its place: then `a` is multiplied. Those of a group have to be copied there.
    """
    if to.shape[3] == 1:
        a *= factor
        np.matmul(a, b, out=to[:, :, :, 0])
    else:
        product = scratch.product("product", a, b).reshape(to.shape)
        np.multiply(product, factor if factor.ndim == 0 else factor.reshape(*to.shape[:-1], 1), out=to)


class _Sum:
    """What blocks add to `to` (rows, kv_heads, keys, dim), or to nothing if that is None.

    The first block has all keys, and later ones fewer. If there are several, they are added up in one piece of memory.
    """

    def __init__(self, name: str, to: np.ndarray | None, several: bool, scratch: _Scratch):
        self._to, self._scratch, self._begun = to, scratch, False
        self._total = scratch(name, to.shape) if several and to is not None else to

    def add(self, by_key: np.ndarray, of_query: np.ndarray) -> None:
        if self._begun:
            part = self._total[:, :, : by_key.shape[2]]
            part += self._scratch.product("product", by_key, of_query)
        elif self._to is not None:
            np.matmul(by_key, of_query, out=self._total)
            self._begun = self._total is not self._to

    def write(self) -> None:
        if self._begun:
            np.copyto(self._to, self._total)


def _line(a: np.ndarray) -> np.ndarray:
    """A number for each query of the group's heads, beside each other below keys: (rows, kv_heads, 1, ...)."""
    return a.reshape(*a.shape[:2], 1, -1)


def _grouped(a: np.ndarray, kv_heads: int) -> np.ndarray:
    """A view of (batch, heads, queries, ...) as (batch, kv_heads, queries, group, ...)."""
    return a.reshape(a.shape[0], kv_heads, -1, *a.shape[2:]).swapaxes(2, 3)


def _longest(a: np.ndarray) -> np.float32:
    """The length of the longest vector in the last axis; infinite, or NaN, where numbers are too large for it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.vecdot(a, a).max())


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
        block = min(BLOCK, _length(asking)) * (heads // kv_heads) * _length(seen)
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
    rows = min(max(ROTATED // (time * heads * dim), 1), batch)
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
