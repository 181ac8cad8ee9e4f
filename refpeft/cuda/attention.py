"""Attention in bfloat16: by cuDNN where that is installed, or by the tiled kernels of our own."""

from __future__ import annotations

from types import ModuleType

from refpeft import fused
from refpeft.backend import Array
from refpeft.cuda import cudnn, flash
from refpeft.cuda.override import override

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
def _(g, by, needs, q, k, v, y, lse, mask, scale):
    return (*by.backward(g, q, k, v, y, lse, mask, scale, needs[:3]), None)[: len(needs)]


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
    return None if flash.supports(q, k, v, mask, bias) else flash
