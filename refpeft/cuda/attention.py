"""Attention in bfloat16: by cuDNN where that is installed, or by the tiled kernels of our own."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cupy

from refpeft import fused
from refpeft.backend import Array, bfloat16
from refpeft.cuda import cudnn, flash, margins, rope
from refpeft.cuda.kernels import KernelError
from refpeft.cuda.override import override, say_once, works
from refpeft.tensor import Op, Pending, Tensor, needs_of

WORTH_A_PLAN, WORTH_A_PLAN_ONCE = 2**22, 2**26
"""Scores of an attention from which on cuDNN is asked first: where it is trained, and where it is not.

cuDNN takes about half a second to plan for a new shape. Rows of training steps come in few lengths; texts that are read
for evaluation or generation come in many.
"""


@override(fused.attention, "bfloat16")
def attention(needs, q, k, v, bias=None, *, mask, scale=None):
    """For all masks without a bias, and queries as wide as values. The module that computes it is saved first."""
    if any(array.ndim != 4 for array in (q, k, v)):
        return NotImplemented
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    q, k, v = (_aligned(array) for array in (q, k, v))
    by = _computing(q, k, v, bias, mask, scale, any(needs))
    if by is None:
        return NotImplemented
    y, lse = by.forward(q, k, v, mask, scale)
    return y, (by, needs, q, k, v, y, lse, mask, scale)


@attention.backward
def _(g, by, needs, *saved):
    return (*_gradients(g, by, needs, *saved), None)[: len(needs)]


def _gradients(
    g: Array, by: ModuleType, needs: tuple[bool, ...], q: Array, k: Array, v: Array, *saved: Any
) -> list[Array | None]:
    """Those of q, k and v that are wanted: side by side where these are that."""
    made = margins.heads_like((q, k, v))
    made = [array if need else None for array, need in zip(made, needs, strict=False)]
    by.backward(g, q, k, v, *saved, made)
    return made


# ---- heads that are turned -------------------------------------------------------------------------------------------


@fused.attention.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    """Rotary positions and the attention that reads them, where q, k and v are columns of what one product gave.

    The turned ones, and then the gradients, are columns of one array, too, which takes one launch each.
    """
    q, k, v, bias = (*inputs, None)[:4]
    if bias is not None or not (_waits(q) and _waits(k)):
        return None
    (q, tables), (k, others) = q.what, k.what
    cos, sin = (tables[name] for name in ("cos", "sin"))
    if others["cos"] is not cos or others["sin"] is not sin:
        return None
    arrays, needs = [x.data for x in (q, k, v)], needs_of((q, k, v))
    lie = margins.heads_beside(arrays)
    if lie is None or not all(rope.takes(x, cos, sin) for x in arrays):
        return None
    mask, scale = options["mask"], options.get("scale")
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    by = _computing(*arrays, None, mask, scale, any(needs))
    if by is None or not works(attention, needs, *arrays, mask=mask, scale=scale):
        return None
    turn = _Turn(cupy.ascontiguousarray(cos), cupy.ascontiguousarray(sin), q.shape[1] + k.shape[1])
    try:
        arrays = turn(lie, cupy.empty(lie.shape, bfloat16), [x.shape for x in arrays], 1.0)
        y, lse = by.forward(*arrays, mask, scale)
    except KernelError:
        return None  # and the pairs say so
    if not any(needs):
        return Tensor(y)
    return turned.made(y, needs, (q, k, v), (turn, by, needs, *arrays, y, lse, mask, scale))


def _waits(x: Any) -> bool:
    return type(x) is Pending and x.op is fused.rope and not x.there


class _Turn:
    """Turns the first heads of rows by these tables."""

    def __init__(self, cos: Array, sin: Array, heads: int):
        self.cos, self.sin, self.heads = cos, sin, heads

    def __call__(self, rows: Array, to: Array, shapes: list[tuple[int, ...]], sign: float) -> list[Array]:
        """Heads of these shapes, which lie side by side in rows (batch, time, all of them), turned; in `to`."""
        dim = shapes[0][3]
        rope.rotate(margins.heads_of(rows, dim), self.cos, self.sin, sign, margins.heads_of(to, dim), self.heads)
        parts = margins.columns(to, [shape[1] * dim for shape in shapes])
        return [margins.heads_of(part, dim) for part in parts]


turned = Op(None, "rope and attention")
turned.stands_in = True


@turned.backward
def _(g, turn, by, needs, *saved):
    made = _gradients(g, by, (True, True, True), *saved)
    lie = margins.heads_beside(made)
    turn(lie, lie, [x.shape for x in made], -1.0)
    return tuple([x if need else None for x, need in zip(made, needs, strict=True)])


def _aligned(array: Array) -> Array:
    """The array, or a copy where it is not read 16 bytes at a time as it is."""
    strides = [stride for stride, size in zip(array.strides[:3], array.shape, strict=False) if size > 1]
    fits = all(stride > 0 and stride % 16 == 0 for stride in strides)
    return array if fits and array.strides[3] == array.itemsize and array.data.ptr % 16 == 0 else array.copy(order="C")


def _computing(
    q: Array, k: Array, v: Array, bias: Array | None, mask: fused.Mask, scale: float, trained: bool
) -> ModuleType | None:
    """Which module takes this attention; None: neither does."""
    batch, heads, queries, _ = q.shape
    large = batch * heads * queries * k.shape[2] >= (WORTH_A_PLAN if trained else WORTH_A_PLAN_ONCE)
    if large and not cudnn.missing() and not cudnn.supports(q, k, v, mask, bias, scale, trained):
        return cudnn
    unfit = flash.supports(q, k, v, mask, bias)
    if large and bias is None:
        _say_what_is_slow(unfit)
    return None if unfit else flash


def _say_what_is_slow(unfit: str | None) -> None:
    """That the plain pair computes a large attention, and why; or our own kernels, where cuDNN is not installed."""
    if unfit:
        say_once(f"attention is computed by the plain pair, which is slower: {unfit}")
    elif cudnn.missing() and not cudnn.is_turned_off():
        say_once(f"attention is computed by refpeft's own kernels, which are slower than cuDNN's: {cudnn.missing()}")
