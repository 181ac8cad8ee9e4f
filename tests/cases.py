"""Every op and fused pair with inputs and an independent NumPy formula: one table for test_ops, test_fused and gpu/."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import fourier, fused, gates, lowrank, ops
from refpeft.rng import Stream
from refpeft.tensor import Op, Tensor


@dataclass(frozen=True)
class Place:
    """Where and in what precision a case is computed."""

    dtype: str = "f8"
    xp: ModuleType = np

    def __call__(self, array: Any) -> Any:
        array = np.asarray(array)
        return self.xp.asarray(array.astype(self.dtype) if array.dtype.kind == "f" else array)


HOST = Place()


@dataclass(frozen=True)
class Case:
    """An op at inputs of these shapes (None: an input left out); `want(*arrays, **options)` is what it should give."""

    op: Op
    shapes: tuple[tuple[int, ...] | None, ...]
    want: Callable[..., Any]
    options: Callable[[Place], dict[str, Any]] = field(default=lambda place: {})
    domain: Callable[[np.ndarray], np.ndarray] = lambda x: x
    note: str = ""

    def __str__(self) -> str:
        return f"{self.op.name} {self.note}".strip()

    def arrays(self, place: Place = HOST) -> list:
        """The inputs that are not None."""
        rng = Stream(7, "case", str(self))
        return [place(self.domain(rng.standard_normal(shape))) for shape in self.shapes if shape is not None]

    def __call__(self, *tensors: Any, place: Place = HOST) -> Tensor:
        return self.op(*self.filled(tensors), **self.options(place))

    def expected(self, *arrays: np.ndarray) -> np.ndarray:
        return np.asarray(self.want(*self.filled(arrays), **self.options(HOST)))

    def filled(self, inputs: Any) -> list:
        """`inputs` with None where an input is left out."""
        given = iter(inputs)
        return [None if shape is None else next(given) for shape in self.shapes]


# ---- domains: where an op is defined and smooth ----------------------------------------------------------------------


def positive(x: np.ndarray) -> np.ndarray:
    return np.abs(x) + 0.5


def apart(x: np.ndarray) -> np.ndarray:
    """Distinct values, 0.1 apart and none near 0, in the order of `x`."""
    ranks = x.reshape(-1).argsort().argsort().reshape(x.shape)
    return 0.1 * ranks - 0.05 * x.size + 0.03


def invertible(x: np.ndarray) -> np.ndarray:
    return x + 3 * np.eye(x.shape[-1]) if x.shape[-1] == x.shape[-2] else x


# ---- formulas --------------------------------------------------------------------------------------------------------


def circulant(w):
    outs, ins, size = w.shape
    row, column = np.indices((outs * size, ins * size))
    return w[row // size, column // size, (column - row) % size]


def waves(c, places, shape):
    """A matrix as a sum of cosines."""
    down, across = np.indices(shape)
    terms = (
        a * np.cos(2 * np.pi * (place // shape[1] * down / shape[0] + place % shape[1] * across / shape[1]))
        for a, place in zip(c, places, strict=True)
    )
    return sum(terms) / (shape[0] * shape[1])


def fastfood(x, *, signs, order, gauss, size):
    rows, columns = np.indices((len(gauss), len(gauss)))
    H = (-1.0) ** np.bitwise_count(rows & columns)
    mixed = H @ (signs * np.pad(x, (0, len(gauss) - len(x))))
    return (H @ (gauss * mixed[order]))[:size] / np.sqrt(size * (gauss.astype("f8") ** 2).sum())


def hard_concrete(log_alpha, *, u):
    return np.clip(3 * sigmoid(np.log(u / (1 - u)) + log_alpha) - 1.5, 0, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis=-1):
    e = np.exp(x)
    return e / e.sum(axis=axis, keepdims=True)


def rms_norm(x, w, *, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def layer_norm(x, w, b, *, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b


def rope(x, *, cos, sin):
    """The pairs (j, j + dim/2) as complex numbers, turned."""
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * (cos + 1j * sin)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def gelu(x, *, approximate):
    if approximate:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def dropout(x, *, rate, stream):
    words = stream.bits(x.size).reshape(x.shape)
    return np.where(words >= rate * 2**32, x / (1 - rate), 0)


def seen(mask, batch, queries, keys):
    """Which keys each query sees, one at a time: (batch, queries, keys) booleans."""
    out = np.zeros((batch, queries, keys), bool)
    extra = keys - mask.keys
    for b, i, j in np.ndindex(out.shape):
        row = i + keys - queries
        if j > row and mask.causal:
            continue
        if j < extra:
            out[b, i, j] = True  # keys of an adapter: seen by all
            continue
        near = mask.window is None or row - j < mask.window
        if mask.asking is not None:
            out[b, i, j] = mask.segments[b, j - extra] == mask.asking[b, i]
            continue
        same = mask.segments is None or (row >= extra and mask.segments[b, j - extra] == mask.segments[b, row - extra])
        out[b, i, j] = near and same
    return out


def attention(q, k, v, bias=0, *, mask, scale=None):
    batch, heads, queries, dim = q.shape
    k, v = (np.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * (dim**-0.5 if scale is None else scale)
    scores = np.where(seen(mask, batch, queries, k.shape[2])[:, None], scores + bias, -np.inf)
    return np.einsum("bhqk,bhkd->bhqd", softmax(scores), v)


def cross_entropy(logits, *, targets, denominator):
    return sum(-np.log(softmax(row))[t] for row, t in zip(logits, targets, strict=True) if t >= 0) / denominator


# ---- the table -------------------------------------------------------------------------------------------------------

EPS = 1e-5
WEIGHT = Stream(3, "weight").standard_normal((5, 4))
TABLE = Stream(3, "table").standard_normal((7, 3))
ANGLES = Stream(3, "angles").uniform(0, 6, (2, 1, 5, 3))
UNIFORM = Stream(3, "uniform").uniform(0.1, 0.9, (3, 4))
TARGETS = np.array([2, -100, 0, 6, -100, 2])
SEGMENTS = np.array([[0, 0, 1, 1, 1, -1], [3, 3, 3, 3, 3, 3]])


def weight(array: np.ndarray) -> Callable[[Place], Callable[[], Any]]:
    return lambda place: lambda: place(array)


def given(**options: Any) -> Callable[[Place], dict[str, Any]]:
    """Options where functions of the place are called, arrays are put there, and the rest is passed on."""

    def one(place: Place, value: Any) -> Any:
        return value(place) if callable(value) else place(value) if isinstance(value, np.ndarray) else value

    return lambda place: {name: one(place, value) for name, value in options.items()}


def mask(keys: int, window: int | None = None, segments: np.ndarray | None = None, **more) -> Callable:
    return lambda place: fused.Mask(
        keys,
        window,
        None if segments is None else place(segments),
        **{name: place(value) if isinstance(value, np.ndarray) else value for name, value in more.items()},
    )


def stream(place: Place) -> Stream:
    return Stream(5, "mask", xp=place.xp)


OPS = [
    Case(ops.add, ((3, 4), (4,)), np.add),
    Case(ops.sub, ((3, 1), (2, 3, 4)), np.subtract),
    Case(ops.mul, ((3, 4), (3, 1)), np.multiply),
    Case(ops.div, ((3, 4), (1, 4)), np.divide, domain=positive),
    Case(ops.neg, ((3, 4),), np.negative),
    Case(ops.power, ((3, 4),), lambda x, exponent: x**exponent, given(exponent=2.5), positive),
    Case(ops.power, ((3, 4),), lambda x, exponent: x * x * x, given(exponent=3), note="of negative numbers"),
    Case(ops.exp, ((3, 4),), np.exp),
    Case(ops.log, ((3, 4),), np.log, domain=positive),
    Case(ops.sqrt, ((3, 4),), np.sqrt, domain=positive),
    Case(ops.abs, ((3, 4),), np.abs, domain=apart),
    Case(ops.maximum, ((3, 4), (4,)), np.maximum),
    Case(
        ops.where,
        ((3, 4), (4,)),
        lambda a, b, condition: np.where(condition, a, b),
        given(condition=np.arange(12).reshape(3, 4) % 3 == 0),
    ),
    Case(ops.relu, ((3, 4),), lambda x: np.maximum(x, 0), domain=apart),
    Case(ops.tanh, ((3, 4),), np.tanh),
    Case(ops.sigmoid, ((3, 4),), sigmoid),
    Case(ops.silu, ((3, 4),), lambda x: x * sigmoid(x)),
    Case(fourier.sin, ((3, 4),), np.sin),
    Case(fourier.cos, ((3, 4),), np.cos),
    Case(fourier.circulant_linear, ((2, 3, 8), (3, 2, 4)), lambda x, w: np.einsum("bti,oi->bto", x, circulant(w))),
    Case(fourier.circulant_linear, ((2, 9), (1, 3, 3)), lambda x, w: x @ circulant(w).T, note="odd sizes"),
    Case(
        fourier.spectral_linear,
        ((2, 3, 4), (3,)),
        lambda x, c, places, shape: np.einsum("bti,oi->bto", x, waves(c, places, shape)),
        given(places=np.array([1, 23, 10]), shape=(6, 4)),
    ),
    Case(gates.hard_concrete, ((3, 4),), hard_concrete, given(u=UNIFORM), note="drawn"),
    Case(gates.hard_concrete, ((3, 4),), hard_concrete, given(u=gates.MIDDLE)),
    Case(
        gates.gated_linear,
        ((2, 5, 4), (3, 4), (3, 4)),
        lambda x, w, log_alpha, u: np.einsum("bti,oi->bto", x, w * hard_concrete(log_alpha, u=u)),
        given(u=UNIFORM),
    ),
    Case(
        fourier.fastfood,
        ((5,),),
        fastfood,
        given(
            signs=np.array([1, -1, -1, 1, -1, 1, 1, 1], "i1"),
            order=np.array([3, 1, 7, 0, 6, 2, 5, 4]),
            gauss=np.array([0.5, -1.0, 2.0, 0.1, -0.3, 1.2, -2.0, 0.7], "f4"),
            size=6,
        ),
    ),
    Case(ops.softmax, ((3, 4),), softmax),
    Case(ops.softmax, ((3, 4, 2),), softmax, given(axis=1), note="axis 1"),
    Case(ops.log_softmax, ((3, 4),), lambda x: np.log(softmax(x))),
    Case(ops.sum, ((3, 4),), np.sum),
    Case(ops.sum, ((2, 3, 4),), np.sum, given(axis=(0, -1), keepdims=True), note="two axes"),
    Case(ops.max, ((3, 4),), np.max, domain=apart),
    Case(ops.max, ((2, 3, 4),), np.max, given(axis=1), apart, "axis 1"),
    Case(ops.reshape, ((3, 4),), lambda x, shape: x.reshape(shape), given(shape=(2, -1))),
    Case(ops.transpose, ((2, 3, 4),), lambda x, axes: x.transpose(axes), given(axes=(1, -1, 0))),
    Case(ops.transpose, ((2, 3, 4),), lambda x: x.T, note="reversed"),
    Case(ops.broadcast_to, ((3, 1),), lambda x, shape: np.broadcast_to(x, shape), given(shape=(2, 3, 4))),
    Case(ops.concat, ((3, 2), (3, 1), (3, 4)), lambda *xs, axis: np.concatenate(xs, axis), given(axis=-1)),
    Case(ops.stack, ((3, 2), (3, 2)), lambda *xs, axis: np.stack(xs, axis), given(axis=1)),
    Case(
        ops.getitem,
        ((3, 4, 5),),
        lambda x, key: x[key],
        given(key=(slice(None, None, -2), ..., None, 1)),
    ),
    Case(
        ops.take,
        ((4, 3),),
        lambda x, indices: x[indices],
        given(indices=np.array([[2, 0, 2], [1, 2, -1]])),
    ),
    Case(ops.matmul, ((3, 4), (4, 2)), np.matmul),
    Case(ops.matmul, ((2, 3, 4), (4, 2)), np.matmul, note="one matrix for a stack"),
    Case(ops.matmul, ((3, 4), (2, 4, 2)), np.matmul, note="a stack for one matrix"),
    Case(ops.matmul, ((2, 1, 3, 4), (5, 4, 2)), np.matmul, note="stacks that broadcast"),
    Case(ops.solve, ((3, 3), (3, 2)), np.linalg.solve, domain=invertible),
    Case(ops.solve, ((2, 3, 3), (3, 2)), np.linalg.solve, domain=invertible, note="a stack"),
    Case(ops.linear, ((2, 3, 4), (5, 4), (5,)), lambda x, w, b: np.einsum("bti,oi->bto", x, w) + b),
    Case(ops.linear, ((3, 4), (5, 4)), lambda x, w: np.einsum("ti,oi->to", x, w), note="without bias"),
]

FUSED = [
    Case(
        fused.frozen_linear,
        ((2, 3, 4), (5,)),
        lambda x, b, weight: np.einsum("bti,oi->bto", x, weight()) + b,
        given(weight=weight(WEIGHT)),
    ),
    Case(
        fused.frozen_linear,
        ((3, 4),),
        lambda x, weight: np.einsum("ti,oi->to", x, weight()),
        given(weight=weight(WEIGHT)),
        note="without bias",
    ),
    Case(
        fused.addmm,
        ((2, 3, 5), (2, 3, 4), (5, 4)),
        lambda y, u, B, alpha: y + alpha * np.einsum("btr,or->bto", u, B),
        given(alpha=1.5),
    ),
    Case(
        fused.hadamard_linear,
        ((2, 3, 4), (5, 2), (2, 4)),
        lambda x, B, A, weight: np.einsum("bti,oi,or,ri->bto", x, weight(), B, A),
        given(weight=weight(WEIGHT)),
    ),
    Case(
        lowrank.row_gains,
        ((5,), (5, 2), (2, 4)),
        lambda m, B, A, weight, alpha: m / np.linalg.norm(weight() + alpha * B @ A, axis=1),
        given(weight=weight(WEIGHT), alpha=0.5),
    ),
    Case(
        fused.sparse_linear,
        ((2, 3, 5), (4,)),
        lambda x, values, rows, columns, out: np.stack(
            [
                sum(v * x[..., c] for v, r, c in zip(values, rows, columns, strict=True) if r == o) + 0 * x[..., 0]
                for o in range(out)
            ],
            -1,
        ),
        given(rows=np.array([2, 0, 2, 1], np.int32), columns=np.array([4, 0, 1, 4], np.int32), out=4),
    ),
    Case(
        fused.add_columns,
        ((2, 3, 5), (2, 3, 2)),
        lambda y, z, columns: y + z @ np.eye(5)[columns],
        given(columns=np.array([3, 0], np.int32)),
    ),
    Case(
        fused.embedding,
        ((4, 3),),
        lambda table, ids: table[ids],
        given(ids=np.array([[2, 0, 2], [1, 2, 2]], np.int32)),
    ),
    Case(
        fused.pick,
        ((2, 4, 3),),
        lambda x, rows: np.stack([x[i, j] for i, j in zip(*rows, strict=True)]),
        lambda place: {"rows": (place(np.array([1, 0, 1])), place(np.array([3, 1, 0])))},
    ),
    Case(fused.rms_norm, ((2, 3, 8), (8,)), rms_norm, given(eps=EPS)),
    Case(fused.layer_norm, ((2, 3, 8), (8,), (8,)), layer_norm, given(eps=EPS)),
    Case(fused.silu_mul, ((2, 3, 4), (2, 3, 4)), lambda gate, up: gate * sigmoid(gate) * up),
    Case(fused.gelu, ((4, 5),), gelu, given(approximate=False), lambda x: 2 * x, "exact"),
    Case(fused.gelu, ((4, 5),), gelu, given(approximate=True), lambda x: 2 * x, "by tanh"),
    Case(fused.dropout, ((6, 5),), dropout, given(rate=0.3, stream=stream)),
    Case(fused.rope, ((2, 4, 5, 6),), rope, given(cos=np.cos(ANGLES), sin=np.sin(ANGLES))),
    Case(
        fused.rope,
        ((2, 4, 5, 6),),
        rope,
        given(cos=np.cos(ANGLES[:1]), sin=np.sin(ANGLES[:1])),
        note="the same in all rows",
    ),
    Case(fused.attention, ((2, 2, 6, 4),) * 3, attention, given(mask=mask(6)), note="causal"),
    Case(
        fused.attention,
        ((2, 4, 6, 4), (2, 2, 6, 4), (2, 2, 6, 3)),
        attention,
        given(mask=mask(6), scale=0.7),
        note="of groups, values of another width, own scale",
    ),
    Case(fused.attention, ((2, 2, 6, 4),) * 3, attention, given(mask=mask(6, window=2)), note="sliding window"),
    Case(
        fused.attention,
        ((2, 2, 6, 4),) * 3,
        attention,
        given(mask=mask(6, segments=SEGMENTS)),
        note="packed and padded",
    ),
    Case(
        fused.attention,
        ((2, 4, 6, 4), (2, 2, 9, 4), (2, 2, 9, 4)),
        attention,
        given(mask=mask(6, 3, SEGMENTS)),
        note="everything at once, and three more keys",
    ),
    Case(
        fused.attention,
        ((2, 2, 8, 4), (2, 2, 8, 4), (2, 2, 8, 4)),
        attention,
        given(mask=mask(6, None, SEGMENTS)),
        note="two virtual tokens, which are queries too",
    ),
    Case(
        fused.attention,
        ((2, 4, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4), (1, 4, 6, 6)),
        attention,
        given(mask=mask(6)),
        note="with a bias of positions",
    ),
    Case(
        fused.attention,
        ((2, 4, 6, 4), (2, 2, 9, 4), (2, 2, 9, 4), (2, 4, 6, 9)),
        attention,
        given(mask=mask(6, None, SEGMENTS, causal=False)),
        note="in both directions, with padding, three more keys and a bias of each row",
    ),
    Case(
        fused.attention,
        ((2, 2, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4)),
        attention,
        given(mask=mask(6, causal=False)),
        note="in both directions",
    ),
    Case(
        fused.attention,
        ((2, 4, 8, 4), (2, 4, 6, 4), (2, 4, 6, 4)),
        attention,
        given(mask=mask(6, None, SEGMENTS, causal=False, asking=np.array([[0] * 4 + [1] * 4, [3] * 8]))),
        note="across texts, with more queries than keys",
    ),
    Case(
        fused.attention,
        ((2, 4, 1, 4), (2, 2, 7, 4), (2, 2, 7, 4)),
        attention,
        given(mask=mask(7)),
        note="one query, as in generation",
    ),
    Case(
        fused.attention,
        ((2, 2, 2, 4), (2, 2, 8, 4), (2, 2, 8, 4)),
        attention,
        given(mask=mask(6, 4, SEGMENTS)),
        note="the last two queries, a prefix, window and padding",
    ),
    Case(
        fused.cross_entropy,
        ((6, 7),),
        cross_entropy,
        given(targets=TARGETS, denominator=3),
    ),
    Case(
        fused.linear_cross_entropy,
        ((6, 3),),
        lambda h, weight, targets, denominator: cross_entropy(h @ weight().T, targets=targets, denominator=denominator),
        given(weight=weight(TABLE), targets=TARGETS, denominator=3),
    ),
]
