"""Hard-concrete gates: numbers in [0, 1] that are exactly 0 or 1 often, and whose distribution is trained.

Louizos et al., 2018, arXiv:1712.01312, with the constants of diff pruning (Guo et al., 2021, arXiv:2012.07463): a gate
is min(1, max(0, s (HIGH - LOW) + LOW)), s = sigmoid(log u - log(1 - u) + log_alpha), u uniform in (0, 1). As HIGH is
-LOW, it is not 0 with the probability sigmoid(log_alpha).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import ops
from .backend import Array, matmul, xp_of
from .ops import expect, logistic
from .tensor import Tensor, op

if TYPE_CHECKING:
    from .layers import Train

LOW, HIGH = -1.5, 1.5
MIDDLE = 0.5
"""The u with which a gate is what it is outside of training."""

_LEAST = 1e-4  # of u and of 1 - u, as in the authors' code


@op
def hard_concrete(needs, log_alpha, *, u):
    """Gates of the shape of log_alpha; u an array of that shape, or MIDDLE."""
    gates, slope = _gates(log_alpha, u)
    return gates, (slope if needs[0] else None,)


@hard_concrete.backward
def _(g, slope):
    return (g * slope,)


@op
def gated_linear(needs, x, w, log_alpha, *, u):
    """x @ (gates * w).T: x (..., in), w and log_alpha (out, in). Keeps u, and computes the gates again going back."""
    expect("log_alpha", log_alpha, *w.shape)
    gates, _ = _gates(log_alpha, u)
    return matmul(x, (gates * w).T), (x, w, log_alpha, u, needs)


@gated_linear.backward
def _(g, x, w, log_alpha, u, needs):
    gates, slope = _gates(log_alpha, u)
    dx = matmul(g, gates * w) if needs[0] else None
    weighed = needs[1] or needs[2]
    dense = matmul(g.reshape(-1, g.shape[-1]).T, x.reshape(-1, x.shape[-1])) if weighed else None
    return dx, dense * gates if needs[1] else None, dense * w * slope if needs[2] else None


def _gates(log_alpha: Array, u: Array | float) -> tuple[Array, Array]:
    """The gates, and their derivatives by log_alpha."""
    xp, real = xp_of(log_alpha), log_alpha.dtype.type
    if u is not MIDDLE:
        expect("u", u, *log_alpha.shape)
        u = u.clip(real(_LEAST), real(1 - _LEAST))
        log_alpha = log_alpha + xp.log(u) - xp.log1p(-u)
    s = logistic(log_alpha)
    stretched = s * real(HIGH - LOW) + real(LOW)
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clip(0, 1), s * (1 - s) * real(HIGH - LOW) * inside


# ---- a difference at a site: w and log_alpha (out, in), and group (1,), which gates the whole matrix, where it is ----


def first_values(shape: tuple[int, ...], log_alpha: float, group: bool) -> dict[str, np.ndarray]:
    """A difference of zero, with all gates alike."""
    first = {"w": np.zeros(shape), "log_alpha": np.full(shape, log_alpha)}
    return first | ({"group": np.full(1, log_alpha)} if group else {})


def added(x: Tensor, p: Any, train: Train | None) -> Tensor:
    """What the difference adds to a linear layer's output; in training with gates that are drawn."""
    y = gated_linear(x, p.w, p.log_alpha, u=train.uniform(p.log_alpha).data if train else MIDDLE)
    if hasattr(p, "group"):
        y = y * hard_concrete(p.group, u=train.uniform(p.group).data if train else MIDDLE)
    return y


def difference(p: Any) -> Array:
    """The dense difference outside of training, from arrays."""
    gates, _ = _gates(p.log_alpha, MIDDLE)
    return gates * p.w * (_gates(p.group, MIDDLE)[0] if hasattr(p, "group") else 1)


def expected_open(p: Any) -> Tensor:
    """How many gates are not 0 on average."""
    return ops.sum(ops.sigmoid(p.log_alpha) * (ops.sigmoid(p.group) if hasattr(p, "group") else 1.0))
