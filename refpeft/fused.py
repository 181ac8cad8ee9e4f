"""The operations that models are made of, each one pair with a hand-written backward.

Frozen weights come in as callables, `weight() -> array (out, in)`, which are asked again in the backward pass: a
quantized weight is dequantized twice and never kept on the tape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .backend import Array, matmul, xp_of
from .ops import expect, logistic
from .rng import Stream
from .special import erf
from .tape import Slice
from .tensor import op

QUERY_BLOCK = 256
"""Queries that attention treats at once: what it holds beside its inputs is (batch, heads, QUERY_BLOCK, keys)."""

LOGITS_AT_ONCE = 2**22
"""How many logits the fused cross-entropy holds at once: 16 MiB of float32."""

LOGITS_ON_GPU = 2**28
"""Bytes of those that it holds there of a frozen head: about 1,000 rows of 128,256 words in bfloat16."""

ATTENTION_ON_GPU = 5 * 2**28
"""Bytes that cuDNN's attention may work in there, going back; where it wants more, that is done in parts."""


def logits_at_once(on_host: bool, itemsize: int) -> int:
    """How many logits of a head that is not frozen are there at once: on a GPU beside as many of their derivatives."""
    return LOGITS_AT_ONCE if on_host else LOGITS_ON_GPU // (2 * itemsize)


# ---- linear --------------------------------------------------------------------------------------------------------


@op
def frozen_linear(needs, x, bias=None, *, weight):
    """x @ weight().T + bias: x (..., in), weight() (out, in), bias (out,) or None. Keeps nothing of `x`."""
    dense = weight()
    y = matmul(x.reshape(-1, x.shape[-1]), dense.T).reshape(*x.shape[:-1], dense.shape[0])  # one product for the batch
    if bias is not None:
        expect("bias", bias, y.shape[-1])
        y += bias
    return y, (weight if needs[0] else None, needs)


@frozen_linear.backward
def _(g, weight, needs):
    dx = None
    if weight is not None:
        dense = weight()
        dx = matmul(g.reshape(-1, g.shape[-1]), dense).reshape(*g.shape[:-1], dense.shape[1])
    bias = len(needs) > 1 and needs[1]
    return (dx, g.reshape(-1, g.shape[-1]).sum(axis=0) if bias else None)[: len(needs)]


@op
def addmm(needs, y, u, B, *, alpha):
    """y + alpha u @ B.T: y (..., out), u (..., r), B (out, r). What a low-rank method adds to a frozen layer."""
    alpha = y.dtype.type(alpha)
    delta = matmul(u, B.T)
    expect("y", y, *delta.shape)
    delta *= alpha
    delta += y
    return delta, (alpha, B if needs[1] else None, u if needs[2] else None, needs[0])


@addmm.backward
def _(g, alpha, B, u, y_needed):
    rows = g.reshape(-1, g.shape[-1])
    du = None if B is None else matmul(rows, alpha * B).reshape(*g.shape[:-1], B.shape[1])
    dB = None if u is None else alpha * matmul(rows.T, u.reshape(-1, u.shape[-1]))
    return g if y_needed else None, du, dB


@op
def hadamard_linear(needs, x, B, A, *, weight):
    """x @ (weight() * (B @ A)).T: x (..., in), weight() (out, in), B (out, r), A (r, in). Keeps nothing dense."""
    changed = weight() * matmul(B, A)
    return matmul(x.reshape(-1, x.shape[-1]), changed.T).reshape(*x.shape[:-1], len(B)), (weight, x, B, A, needs)


@hadamard_linear.backward
def _(g, weight, x, B, A, needs):
    dense, rows = weight(), g.reshape(-1, g.shape[-1])
    dx = matmul(rows, dense * matmul(B, A)).reshape(x.shape) if needs[0] else None
    product = matmul(rows.T, x.reshape(-1, x.shape[-1])) * dense  # the gradient of B @ A
    return dx, matmul(product, A.T) if needs[1] else None, matmul(B.T, product) if needs[2] else None


@op
def sparse_linear(needs, x, values, *, rows, columns, out):
    """x (..., in) times a matrix (out, in) with `values` (k,) at k distinct places and zeros: (..., out).

    The dense matrix is made and dropped again, both ways; nothing of its size is kept.
    """
    expect("values", values, *rows.shape)
    y = matmul(x, _sparse(values, rows, columns, out, x.shape[-1]).T)
    return y, (x, values, rows, columns, out, needs)


@sparse_linear.backward
def _(g, x, values, rows, columns, out, needs):
    dx = matmul(g, _sparse(values, rows, columns, out, x.shape[-1])) if needs[0] else None
    dense = matmul(g.reshape(-1, out).T, x.reshape(-1, x.shape[-1])) if needs[1] else None
    return dx, None if dense is None else dense[rows, columns]


def _sparse(values: Array, rows: Array, columns: Array, out: int, width: int) -> Array:
    dense = xp_of(values).zeros((out, width), values.dtype)
    dense[rows, columns] = values
    return dense


@op
def add_columns(needs, y, z, *, columns):
    """y (..., out) with z (..., k) added to k distinct columns of it, given by an array."""
    expect("z", z, *y.shape[:-1], len(columns))
    total = y.copy()
    total[..., columns] += z
    return total, (columns, needs)


@add_columns.backward
def _(g, columns, needs):
    return g if needs[0] else None, g[..., columns] if needs[1] else None


@op
def embedding(needs, table, *, ids):
    """table[ids]: table (vocab, dim), ids integers of any shape. Gives (*ids.shape, dim)."""
    return table[ids], (ids, table.shape)


@embedding.backward
def _(g, ids, shape):
    xp = xp_of(g)
    dt = xp.zeros(shape, g.dtype)
    xp.add.at(dt, ids, g)
    return (dt,)


@op(moves=True)
def pick(needs, x, *, rows):
    """x[rows], rows one array of integers for each of the leading axes, which say no place twice."""
    return x[rows], (x.shape, rows)


@pick.backward
def _(g, shape, rows):
    return (Slice(shape, rows, g),)


# ---- norms and activations -----------------------------------------------------------------------------------------


@op
def rms_norm(needs, x, w, *, eps):
    """x / sqrt(mean(x^2) + eps) * w over the last axis (Zhang & Sennrich, 2019, arXiv:1910.07467)."""
    expect("w", w, x.shape[-1])
    r = 1 / xp_of(x).sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    n = x * r
    return n * w, (n, r if needs[0] else None, w if needs[0] else None, needs[1])


@rms_norm.backward
def _(g, n, r, w, w_needed):
    dw = (g * n).reshape(-1, n.shape[-1]).sum(axis=0) if w_needed else None
    if r is None:
        return None, dw
    gw = g * w
    return r * (gw - n * (gw * n).mean(axis=-1, keepdims=True)), dw


@op
def layer_norm(needs, x, w, b, *, eps):
    """(x - mean) / sqrt(var + eps) * w + b over the last axis (Ba et al., 2016, arXiv:1607.06450)."""
    expect("w", w, x.shape[-1])
    expect("b", b, x.shape[-1])
    n = x - x.mean(axis=-1, keepdims=True)
    r = 1 / xp_of(x).sqrt((n * n).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    n *= r
    return n * w + b, (n if needs[0] or needs[1] else None, r if needs[0] else None, w if needs[0] else None, needs)


@layer_norm.backward
def _(g, n, r, w, needs):
    rows = g.reshape(-1, g.shape[-1])
    dw = (g * n).reshape(rows.shape).sum(axis=0) if needs[1] else None
    db = rows.sum(axis=0) if needs[2] else None
    if not needs[0]:
        return None, dw, db
    gw = g * w
    return r * (gw - gw.mean(axis=-1, keepdims=True) - n * (gw * n).mean(axis=-1, keepdims=True)), dw, db


@op
def silu_mul(needs, gate, up):
    """gate sigmoid(gate) up: the gated unit of Llama's MLP (Shazeer, 2020, arXiv:2002.05202, SwiGLU)."""
    expect("up", up, *gate.shape)
    y = logistic(gate)
    y *= gate
    y *= up
    return y, (gate, up if needs[0] else None, needs[1])


@silu_mul.backward
def _(g, gate, up, up_needed):
    s = logistic(gate)
    dgate = None if up is None else g * up * s * (1 + gate * (1 - s))
    return dgate, g * gate * s if up_needed else None


@op
def gelu(needs, x, *, approximate):
    """x Phi(x) (Hendrycks & Gimpel, 2016, arXiv:1606.08415), exact, or with the paper's tanh if `approximate`.

    The derivative is kept in place of x: as many bytes, and nothing to compute again.
    """
    xp, real = xp_of(x), x.dtype.type
    if approximate:
        c, k = real(math.sqrt(2 / math.pi)), real(0.044715)
        square = x * x
        phi = logistic(2 * c * x * (1 + k * square))
        slope = phi + x * phi * (1 - phi) * 2 * c * (1 + 3 * k * square) if needs[0] else None
    else:
        phi = (1 + erf(x * real(math.sqrt(0.5)))) * real(0.5)
        slope = phi + x * xp.exp(x * x * real(-0.5)) * real(1 / math.sqrt(2 * math.pi)) if needs[0] else None
    return x * phi, (slope,)


@gelu.backward
def _(g, slope):
    return (g * slope,)


@op
def dropout(needs, x, *, rate, stream: Stream):
    """x with each element zero with probability `rate`, the others divided by 1 - rate.

    Element i of x in row-major order is kept where word i of `stream` is at least rate 2^32.
    """
    if not 0 <= rate < 1:
        raise ValueError("expected a rate of at least 0 and less than 1")
    keep = stream.keeps(x.size, rate).reshape(x.shape)
    scale = x.dtype.type(1 / (1 - rate))
    return x * keep * scale, (keep if needs[0] else None, scale)


@dropout.backward
def _(g, keep, scale):
    return (g * keep * scale,)


# ---- attention -----------------------------------------------------------------------------------------------------


@op
def rope(needs, x, *, cos, sin):
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864), in Hugging Face's layout: pairs (j, j + dim/2).

    x (batch, heads, time, dim); cos and sin (batch or 1, 1, time, dim / 2).
    """
    expect("cos", cos, cos.shape[0], 1, x.shape[2], x.shape[3] // 2)
    expect("sin", sin, *cos.shape)
    return _rotate(x, cos, sin), (cos, sin)


@rope.backward
def _(g, cos, sin):
    return (_rotate(g, cos, -sin),)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    y = xp_of(x).empty(x.shape, x.dtype)
    y[..., :half] = a * cos - b * sin
    y[..., half:] = b * cos + a * sin
    return y


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see.

    The last `keys` keys are the row's tokens, and queries are right-aligned with them, unless they are of another text
    (`asking`). Keys before these are the adapters' (a prefix, or the keys of virtual tokens): every later query sees
    them, whatever its document.
    """

    keys: int
    window: int | None = None
    """How many tokens back a query sees, itself included; None: all."""
    segments: Array | None = None
    """(batch, keys) integers: a token sees tokens of its own number only (packed documents; -1 for padding)."""
    causal: bool = True
    """Whether a query sees no later key."""
    asking: Array | None = None
    """(batch, queries) the queries' numbers, where they are of another text (cross-attention): it goes with `segments`,
    and is not causal."""
    padded: bool = False
    """Whether `segments` are known to be 0 and, behind these, -1: padding on the right, and nothing else."""

    def bias(self, start: int, stop: int, queries: int, keys: int, like: Array) -> Array | None:
        """What to add to the scores of queries start..stop with the first `keys` keys: 0 or -inf, or None for nothing.

        `queries` is how many there are in all. The result is (batch or 1, stop - start, keys), in the dtype of `like`.
        """
        xp, total = xp_of(like), keys + (queries - stop) * self.causal
        extra = total - self.keys  # adapters' keys
        row = xp.arange(start, stop)[:, None] + (total - queries)
        column = xp.arange(keys)[None, :]
        if self.window is None and self.segments is None and (queries == 1 or not self.causal):
            return None
        seen = column <= row if self.causal else column >= 0
        own = column < extra
        if self.window is not None:
            seen &= (row - column < self.window) | own
        seen = seen[None]
        if self.segments is not None:
            # virtual tokens are queries too, of number 0: where attention is causal, they see none but `own` keys
            tokens = xp.pad(self.segments, ((0, 0), (extra, 0)))
            asking = tokens[:, total - queries :] if self.asking is None else self.asking
            seen = seen & ((asking[:, start:stop, None] == tokens[:, None, :keys]) | own)
        return xp.where(seen, like.dtype.type(0), like.dtype.type(-np.inf))


@op
def attention(needs, q, k, v, bias=None, *, mask: Mask, scale=None):
    """softmax(scale q k^T + bias + mask) v: q (batch, heads, queries, dim), k and v (batch, kv_heads, keys, dim).

    heads is a multiple of kv_heads; scale is dim**-0.5 where it is None; bias is (batch or 1, heads, queries, keys).
    Blocked over queries: backward keeps the output and one number a row, nothing of size queries x keys (Dao et al.,
    2022, arXiv:2205.14135; blocks over queries need no rescaling, and skip the keys that are still to come).
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key heads")
    if (queries > keys and mask.causal) or mask.keys > keys:
        raise ValueError(f"{queries} queries and a mask of {mask.keys} keys need as many keys, found {keys}")
    expect("k", k, batch, kv_heads, keys, dim)
    expect("v", v, batch, kv_heads, keys, v.shape[-1])
    if bias is not None:
        expect("bias", bias, batch if bias.shape[0] == batch else 1, heads, queries, keys)
    xp = xp_of(q)
    scale = q.dtype.type(dim**-0.5 if scale is None else scale)
    y = xp.empty(q.shape[:-1] + v.shape[-1:], q.dtype)
    lse = xp.empty(q.shape[:-1], q.dtype)  # log of the sum of exponentials, a row
    for block, hi, s in _score_blocks(q, k, bias, mask, scale):
        top = s.max(axis=-1, keepdims=True)
        s -= top
        xp.exp(s, out=s)
        total = s.sum(axis=-1, keepdims=True)
        y[:, :, block] = _ungroup(matmul(s, v[:, :, :hi]) / total, heads)
        lse[:, :, block] = _ungroup(top + xp.log(total), heads)[..., 0]
    scores_wanted = needs[0] or needs[1] or needs[3:] == (True,)
    return y, (needs, q, k, v if scores_wanted else None, bias, y if scores_wanted else None, lse, mask, scale)


@attention.backward
def _(g, needs, q, k, v, bias, y, lse, mask, scale):
    xp, kv, heads = xp_of(q), k.shape[1], q.shape[1]
    dq = xp.zeros(q.shape, q.dtype) if needs[0] else None
    dk = xp.zeros(k.shape, k.dtype) if needs[1] else None
    dv = xp.zeros(k.shape[:-1] + g.shape[-1:], k.dtype) if needs[2] else None
    dbias = xp.zeros(bias.shape, bias.dtype) if needs[3:] == (True,) else None
    delta = None if y is None else (g * y).sum(axis=-1, keepdims=True)
    for block, hi, s in _score_blocks(q, k, bias, mask, scale):
        s -= _group(lse[:, :, block, None], kv)
        p = xp.exp(s, out=s)
        gb = _group(g[:, :, block], kv)
        if dv is not None:
            dv[:, :, :hi] += matmul(p.swapaxes(-1, -2), gb)
        if y is None:
            continue
        ds = matmul(gb, v[:, :, :hi].swapaxes(-1, -2))
        ds -= _group(delta[:, :, block], kv)
        ds *= p
        if dbias is not None:
            each = _ungroup(ds, heads)
            dbias[:, :, block, :hi] = each if len(bias) == len(q) else each.sum(axis=0, keepdims=True)
        ds *= scale
        if dq is not None:
            dq[:, :, block] = _ungroup(matmul(ds, k[:, :, :hi]), heads)
        if dk is not None:
            dk[:, :, :hi] += matmul(ds.swapaxes(-1, -2), _group(q[:, :, block], kv))
    return (dq, dk, dv, dbias)[: len(needs)]


def _score_blocks(q: Array, k: Array, bias: Array | None, mask: Mask, scale: np.generic):
    """Yields (slice of queries, number of keys they can reach, scores (batch, kv_heads, group * queries, keys))."""
    queries, kv = q.shape[2], k.shape[1]
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        hi = k.shape[2] - (queries - stop) * mask.causal
        s = matmul(_group(q[:, :, start:stop], kv), k[:, :, :hi].swapaxes(-1, -2))
        s *= scale
        if bias is not None:
            s += _group(bias[:, :, start:stop, :hi], kv)
        hidden = mask.bias(start, stop, queries, hi, q)
        if hidden is not None:
            grouped = s.reshape(q.shape[0], kv, -1, stop - start, hi)
            grouped += hidden[:, None, None]
        yield slice(start, stop), hi, s


def _group(a: Array, kv_heads: int) -> Array:
    """(batch, heads, n, d) as (batch, kv_heads, heads / kv_heads * n, d): the heads of one key head side by side."""
    return a.reshape(a.shape[0], kv_heads, -1, a.shape[-1])


def _ungroup(a: Array, heads: int) -> Array:
    return a.reshape(a.shape[0], heads, -1, a.shape[-1])


# ---- losses --------------------------------------------------------------------------------------------------------


@op(float32=True)
def cross_entropy(needs, logits, *, targets, denominator, weights=None):
    """The sum of -log softmax(logits)[target] over rows with a target of at least 0, divided by `denominator`.

    logits (n, vocab), targets (n,) integers, weights (n,): how much each row counts; None: 1.
    """
    expect("targets", targets, logits.shape[0])
    xp = xp_of(logits)
    losses, slope = _row_losses(logits, targets, weights, needs[0])
    scale = logits.dtype.type(1) / xp.asarray(denominator, logits.dtype)
    return losses.sum() * scale, (slope, scale)


@cross_entropy.backward
def _(g, slope, scale):
    return (slope * (g * scale),)


def _row_losses(logits: Array, targets: Array, weights: Array | None, slope_wanted: bool) -> tuple[Array, Array | None]:
    """-log p of each row's target (0 where the target is negative), and its derivative by the logits."""
    xp = xp_of(logits)
    kept = targets >= 0
    index = xp.where(kept, targets, 0)[:, None]
    z = logits - logits.max(axis=-1, keepdims=True)
    at_target = xp.take_along_axis(z, index, axis=-1)[:, 0]
    xp.exp(z, out=z)
    total = z.sum(axis=-1, keepdims=True)
    counts = kept if weights is None else (kept * weights).astype(logits.dtype)
    losses = (xp.log(total[:, 0]) - at_target) * counts
    if not slope_wanted:
        return losses, None
    z /= total
    picked = xp.take_along_axis(z, index, axis=-1)
    xp.put_along_axis(z, index, picked - 1, axis=-1)
    z *= counts[:, None]
    return losses, z


@op(float32=True)
def linear_cross_entropy(needs, hidden, *, weight, targets, denominator, bias=None, weights=None):
    """cross_entropy(hidden @ weight().T + bias) for a frozen head, in chunks of rows: logits never exist as a whole.

    hidden (n, dim), weight() (vocab, dim), bias (vocab,), targets and weights (n,). The gradient of `hidden` is made
    with the loss and kept in its place, so that no logit is computed twice.
    """
    expect("targets", targets, hidden.shape[0])
    xp, dense = xp_of(hidden), weight()
    rows = max(1, LOGITS_AT_ONCE // dense.shape[0])
    loss = xp.zeros((), hidden.dtype)
    dx = xp.empty(hidden.shape, hidden.dtype) if needs[0] else None
    for at in range(0, hidden.shape[0], rows):
        part = slice(at, at + rows)
        logits = matmul(hidden[part], dense.T)
        if bias is not None:
            logits += bias
        losses, slope = _row_losses(logits, targets[part], None if weights is None else weights[part], needs[0])
        loss += losses.sum()
        if dx is not None:
            matmul(slope, dense, out=dx[part])
        del logits, slope  # before the next ones are made
    scale = hidden.dtype.type(1) / xp.asarray(denominator, hidden.dtype)
    return loss * scale, (dx, scale)


@linear_cross_entropy.backward
def _(g, dx, scale):
    return (dx * (g * scale),)
