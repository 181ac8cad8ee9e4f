"""The trained values as one flat buffer, and AdamW on it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .backend import Array, xp_of
from .errors import RefpeftError
from .tensor import Tensor


class Flat:
    """All trained values in one buffer and all their gradients in another; the tensors become views of them.

    Optimizing, clipping, saving and comparing are then one operation each. The order is that of the names given.
    """

    def __init__(self, params: Iterable[tuple[str, Tensor]]):
        self.params = dict(params)
        if not self.params:
            raise RefpeftError("nothing is trained: attach a method to the model first")
        tensors = list(self.params.values())
        xp, dtype = xp_of(tensors[0].data), tensors[0].data.dtype
        self.values = xp.concatenate([t.data.reshape(-1) for t in tensors])
        self.grads = xp.zeros(self.values.size, dtype)
        at = 0
        for tensor in tensors:
            part = slice(at, at + tensor.data.size)
            tensor.node.grad = self.grads[part].reshape(tensor.data.shape)
            tensor.data = self.values[part].reshape(tensor.data.shape)
            at = part.stop

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter, by name, in order."""
        return {name: list(tensor.shape) for name, tensor in self.params.items()}

    def clip(self, limit: float) -> Array:
        """Scales the gradients so that their norm is at most `limit` (0: leaves them); returns the norm before.

        As torch.nn.utils.clip_grad_norm_: the factor is limit / (norm + 1e-6), and at most 1.
        """
        xp = xp_of(self.grads)
        norm = xp.sqrt((self.grads * self.grads).sum())
        if limit:
            self.grads *= xp.minimum(self.grads.dtype.type(limit) / (norm + self.grads.dtype.type(1e-6)), 1)
        return norm


class AdamW:
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101), as torch.optim.AdamW computes it."""

    def __init__(
        self, flat: Flat, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ):
        self.flat, self.betas, self.eps, self.weight_decay = flat, betas, eps, weight_decay
        xp = xp_of(flat.values)
        self.m, self.v = xp.zeros_like(flat.values), xp.zeros_like(flat.values)
        self.step_count = 0

    def step(self, lr: float) -> None:
        """One update from the gradients, which are zeroed."""
        xp, p, g = xp_of(self.m), self.flat.values, self.flat.grads
        real = p.dtype.type
        (b1, b2), t = self.betas, self.step_count + 1
        if self.weight_decay:
            p *= real(1 - lr * self.weight_decay)
        self.m *= real(b1)
        self.m += real(1 - b1) * g
        self.v *= real(b2)
        self.v += real(1 - b2) * (g * g)
        root = xp.sqrt(self.v)
        root *= real(1 / math.sqrt(1 - b2**t))
        root += real(self.eps)
        p -= real(lr / (1 - b1**t)) * (self.m / root)
        g.fill(0)
        self.step_count = t

    @property
    def state(self) -> dict[str, Array]:
        """The arrays that a checkpoint holds, by name."""
        return {"values": self.flat.values, "m": self.m, "v": self.v}
