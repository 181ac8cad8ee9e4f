"""Activations: one launch each way. Inputs are kept alone: outputs and slopes are computed again."""

from __future__ import annotations

import cupy
import numpy as np

from refpeft import fused, ops
from refpeft.backend import Array
from refpeft.cuda import margins
from refpeft.cuda.elementwise import of_one
from refpeft.cuda.kernels import Source
from refpeft.cuda.maps import mapped, merged, strides_of, takes
from refpeft.cuda.norms import aligned
from refpeft.cuda.override import override

source = Source("activations.cu")

_BLOCK = 256  # threads


@override(fused.silu_mul, "bfloat16", "float32")
def silu_mul(needs, gate, up):
    if not takes(gate, up) or gate.shape != up.shape or gate.dtype != up.dtype:
        return NotImplemented
    return _product(gate, up), (gate, up, needs)


@silu_mul.recomputed
def _(gate, up, needs):
    return _product(gate, up)


def _product(gate: Array, up: Array) -> Array:
    y = margins.rows(gate.shape, gate.dtype)
    if y.size:
        gate, up, groups, *rows = _side_by_side(gate, up, y)
        source("silu_mul_forward", y.dtype)(-(-groups // _BLOCK), _BLOCK, gate, up, y, np.uint32(groups), *rows)
    return y


@silu_mul.backward(again=True)
def _(g, gate, up, needs, again=False):
    if all(needs):
        grads = tuple(margins.like((gate, up)))
    else:
        grads = tuple(margins.rows(gate.shape, gate.dtype) if need else None for need in needs)
    y = cupy.empty(gate.shape, gate.dtype) if again else None
    if gate.size:
        gate, up, groups, *rows = _side_by_side(gate, up, next(grad for grad in grads if grad is not None))
        source("silu_mul_backward", gate.dtype)(
            -(-groups // _BLOCK), _BLOCK, gate, up, aligned(g), *grads, y, np.uint32(groups), *rows
        )
    return (*grads, y) if again else grads


def _side_by_side(gate: Array, up: Array, made: Array) -> tuple:
    """Both arrays as the kernels read them, the groups of eight, the width of a row, and the steps between rows."""
    gate, up = (array if _step(array) else aligned(array) for array in (gate, up))
    if all(array.flags.c_contiguous for array in (gate, up, made)):
        width, steps = gate.size, [0, 0, 0]
    else:
        width, steps = gate.shape[-1], [_step(array) for array in (gate, up, made)]
    return gate, up, gate.size // width * -(-width // 8), *map(np.int64, (width, *steps))


def _step(array: Array) -> int | None:
    """How many numbers lie between the rows of an array, the columns of a wider one: None where they are not even."""
    sizes, (steps,) = merged(array.shape, [strides_of(array, array.shape)])
    if len(sizes) == 1 and array.ndim > 1 and steps[0] == 1:
        steps = [array.shape[-1], 1]
    in_eights = array.shape[-1:] and array.shape[-1] % 8 == 0 and array.data.ptr % 16 == 0
    return steps[0] if len(steps) == 2 and steps[1] == 1 and steps[0] % 8 == 0 and in_eights else None


for _op, _name in ((ops.relu, "relu"), (ops.tanh, "tanh"), (ops.sigmoid, "sigmoid"), (ops.silu, "silu")):
    of_one(_op, _name, f"{_name}_slope", "bfloat16", "float32")


@override(fused.gelu, "bfloat16", "float32")
def gelu(needs, x, *, approximate):
    if not takes(x):
        return NotImplemented
    name = "gelu_tanh" if approximate else "gelu"
    return mapped(name, x, dtype=x.dtype), (x if needs[0] else None, f"{name}_slope")


@gelu.backward
def _(g, x, slope):
    return (mapped(slope, g, x, dtype=x.dtype),)
