"""A frozen layer with a low-rank method on it, y = x W^T + alpha (x A^T) B^T, as one op.

Each of its parts is a product that adds to what another one left. A wide product reads what it adds to while it
computes, which costs little; a narrow one, such as u B^T, takes as long as its memory does. So narrow products come
first and write, wide ones add: forward and backward, nothing of the layer's size is read and written for the sake of a
sum. A method says base(x) and then addmm(...): base(x) waits until it is known what comes after it.

Where there is room behind the rows of x and W (refpeft.cuda.margins), the narrow products are part of the wide ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cupy

from refpeft import fused, ops
from refpeft.backend import Array, bfloat16
from refpeft.cuda import blas, margins
from refpeft.cuda.blas import low, product
from refpeft.cuda.linear import low_weight, rows_of, weight_gradient, write_bias
from refpeft.tape import ADDED
from refpeft.tensor import Op, Pending, Tensor, is_made_again, needs_of

_linear = ops.linear.overrides[cupy.ndarray, bfloat16]


@fused.frozen_linear.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    x, bias = (*inputs, None)[:2]
    wanted = blas.is_training() and type(x) is Tensor and type(x.data) is cupy.ndarray and x.dtype == bfloat16
    if not wanted or isinstance(bias, Tensor):
        return None
    weight = options["weight"]
    shape = (*x.shape[:-1], weight.shape[0])
    compute = partial(fused.frozen_linear.alone, *inputs, **options)
    return Pending(fused.frozen_linear, compute, shape, bfloat16, (x, weight, bias))


@fused.addmm.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    y, u, B = inputs
    if type(y) is not Pending or y.op is not fused.frozen_linear or y.there or not _fit(y, u, B):
        return None
    x, weight, bias = y.what
    alpha = float(options["alpha"])
    A = _down_projection(u, x)
    room = None if A is None else _room(x.data, u.data, weight, A.data, B.data, alpha)
    out = _forward(x.data, u.data, weight, bias, B.data, alpha, room)
    parents = (x, u if A is None else A, B)
    needs = needs_of(parents)
    if True not in needs:
        return Tensor(out)
    kept_x = x.data if A is not None and needs[1] else None
    kept_u = u.data if needs[2] else None
    if kept_u is not None and is_made_again(x):
        kept_u = kept_u.copy()  # lest it keep x, behind whose rows it is
    values = None if A is None else A.data, B.data, alpha
    return layer.made(out, needs, parents, (kept_x, kept_u, weight, *values, room, needs))


def _fit(y: Pending, u: Any, B: Any) -> bool:
    """Whether addmm of these is what it is for: rows of bfloat16 and float32 factors of their widths."""
    if not (isinstance(u, Tensor) and isinstance(B, Tensor)) or (u.dtype, B.ndim) != (bfloat16, 2):
        return False
    return u.shape == (*y.shape[:-1], B.shape[1]) and y.shape[-1] == B.shape[0]


def _down_projection(u: Tensor, x: Tensor) -> Tensor | None:
    """The A of u = x A^T, where u was made of this very x, and of nothing else; None otherwise."""
    if u.node is None or u.node.op is not _linear or u.node.parents[0] is not x.node or len(u.node.parents) > 2:
        return None
    if x.node is None and not margins.lies_behind(u.data, x.data):
        return None
    return Tensor(u.node.saved[0], u.node.parents[1])


def _room(x: Array, u: Array, weight: Any, A: Array, B: Array, alpha: float) -> margins.Room | None:
    """The weight's room for both factors, where u lies behind the rows of x; None otherwise."""
    if not margins.lies_behind(u, x):
        return None
    return margins.room(weight, A, B, alpha, margins.distance(x, u))


def _forward(
    x: Array, u: Array, weight: Any, bias: Array | None, B: Array, alpha: float, room: margins.Room | None
) -> Array:
    y = cupy.empty((*x.shape[:-1], len(B)), bfloat16)
    if bias is not None:
        write_bias(y, bias)
    if room is not None:
        product(rows_of(margins.together(x, u)), room.forward.T, out=rows_of(y), add=bias is not None)
        return y
    product(rows_of(u), low(B).T, out=rows_of(y), alpha=alpha, add=bias is not None)
    product(rows_of(x), low_weight(weight).T, out=rows_of(y), add=True)
    return y


layer = Op(_forward, "frozen_linear and addmm")
layer.stands_in = True


@layer.backward(into=True)
def _(g, x, u, weight, A, B, alpha, room, needs, into):
    g = low(g)
    du = dA = dB = dx = None
    if needs[1] or (A is not None and needs[0]):
        place = None if room is None else margins.scratch(g, B.shape[1])
        du = cupy.empty((*g.shape[:-1], B.shape[1]), bfloat16) if place is None else place
        product(rows_of(g), low(B), out=rows_of(du), alpha=alpha)
    if needs[2]:
        dB = weight_gradient(g, u, into[2], B.dtype, alpha)
    if A is None:
        dA = du if needs[1] else None  # the gradient of u, which has its own way
    elif needs[1]:
        dA = weight_gradient(du, x, into[1], A.dtype)
    if needs[0]:
        adds = into[0] is not None and margins.step(into[0]) is not None
        dx = into[0] if adds else cupy.empty((*g.shape[:-1], weight.shape[1]), bfloat16)
        _add_gradient(g, du, weight, A, room, dx, adds)
        dx = ADDED if adds else dx
    return dx, dA, dB


def _add_gradient(
    g: Array, du: Array | None, weight: Any, A: Array | None, room: margins.Room | None, dx: Array, adds: bool
) -> None:
    """g W + du A into dx, or added to what is there."""
    if room is not None and margins.lies_behind(du, g):
        product(rows_of(margins.together(g, du)), room.backward, out=rows_of(dx), add=adds)
        return
    if A is not None:
        product(rows_of(du), low(A), out=rows_of(dx), add=adds)
    product(rows_of(g), low_weight(weight), out=rows_of(dx), add=adds or A is not None)
