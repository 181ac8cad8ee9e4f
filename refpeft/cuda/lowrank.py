"""A frozen layer with a low-rank method on it, y = x W^T + alpha (x A^T) B^T, as one op.

Each of its parts is a product that adds to what another one left. A wide product reads what it adds to while it
computes, which costs little; a narrow one, such as u B^T, takes as long as its memory does. So narrow products come
first and write, wide ones add: forward and backward, nothing of the layer's size is read and written for the sake of a
sum. A method says base(x) and then addmm(...): base(x) waits until it is known what comes after it.

Where there is room behind the rows of x and W (refpeft.cuda.margins), the narrow products are part of the wide ones.
"""

from __future__ import annotations

from typing import Any

import cupy

from refpeft import fused, ops
from refpeft.backend import Array, bfloat16
from refpeft.cuda import blas
from refpeft.cuda.blas import low, product
from refpeft.cuda.linear import low_weight, rows_of, weight_gradient, write_bias
from refpeft.tensor import ADDED, Op, Pending, Tensor, needs_of

_linear = ops.linear.overrides[cupy.ndarray, bfloat16]


@fused.frozen_linear.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    x, bias = (*inputs, None)[:2]
    wanted = blas.is_training() and type(x) is Tensor and type(x.data) is cupy.ndarray and x.dtype == bfloat16
    if not wanted or isinstance(bias, Tensor):
        return None
    weight = options["weight"]
    shape = (*x.shape[:-1], weight.shape[0])
    return Pending(lambda: fused.frozen_linear.alone(*inputs, **options), shape, (x, weight, bias))


@fused.addmm.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    y, u, B = inputs
    if type(y) is not Pending or y.there or not _fit(y, u, B):
        return None
    x, weight, bias = y.what
    alpha = float(options["alpha"])
    out = _forward(x.data, u.data, weight, bias, B.data, alpha)
    through = _down_projection(u, x)
    if through is None:
        parents, A = (x, u, B), None
    else:
        parents, A = (x, through[0], B), through[1]
    needs = needs_of(parents)
    if True not in needs:
        return Tensor(out)
    saved = (x.data if A is not None and needs[1] else None, u.data if needs[2] else None)
    return layer.made(out, needs, parents, (*saved, weight, A, B.data, alpha, needs))


def _fit(y: Pending, u: Any, B: Any) -> bool:
    """Whether addmm of these is what it is for: rows of bfloat16 and float32 factors of their widths."""
    if not (isinstance(u, Tensor) and isinstance(B, Tensor)) or (u.dtype, B.ndim) != (bfloat16, 2):
        return False
    return u.shape == (*y.shape[:-1], B.shape[1]) and y.shape[-1] == B.shape[0]


def _down_projection(u: Tensor, x: Tensor) -> tuple[Tensor, Array] | None:
    """The A of u = x A^T, as a parent and as an array, where u was made of this very x; None otherwise."""
    if u.node is None or u.node.op is not _linear or u.node.parents[0] is not x.node or x.node is None:
        return None
    A = u.node.saved[0]
    return Tensor(A, u.node.parents[1]), A


def _forward(x: Array, u: Array, weight: Any, bias: Array | None, B: Array, alpha: float) -> Array:
    y = cupy.empty((*x.shape[:-1], len(B)), bfloat16)
    if bias is not None:
        write_bias(y, bias)
    product(rows_of(u), low(B).T, out=rows_of(y), alpha=alpha, add=bias is not None)
    product(rows_of(x), low_weight(weight).T, out=rows_of(y), add=True)
    return y


layer = Op(_forward, "frozen_linear and addmm")
layer.stands_in = True


@layer.backward(into=True)
def _(g, x, u, weight, A, B, alpha, needs, into):
    g = low(g)
    du = dA = dB = dx = None
    if needs[1] or (A is not None and needs[0]):
        du = product(rows_of(g), low(B), alpha=alpha)
    if needs[2]:
        dB = weight_gradient(g, u, into[2], B.dtype, alpha)
    if A is not None and needs[1]:
        dA = weight_gradient(du, x, into[1], A.dtype)
    if needs[0]:
        adds = into[0] is not None and into[0].flags.c_contiguous
        dx = into[0] if adds else cupy.empty((*g.shape[:-1], weight.shape[1]), bfloat16)
        if A is not None:
            product(du, low(A), out=rows_of(dx), add=adds)
        product(rows_of(g), low_weight(weight), out=rows_of(dx), add=adds or A is not None)
        dx = ADDED if adds else dx
    through = dA if A is not None or du is None else du.reshape(*g.shape[:-1], -1)
    return dx, through, dB
