"""Triplets (p_i, E_i, q_i) of an update P diag(E) Q: how important each is, and how many are kept when (AdaLoRA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from . import ops
from .backend import Array, xp_of
from .errors import RefpeftError
from .layers import Layer
from .tensor import Tensor


class Schedule:
    """For AdaLoRA's Config: what its options must be, and what follows from them."""

    def __post_init__(self):
        if not 1 <= self.target_r <= self.init_r or min(self.rank_pattern.values(), default=0) < 0:
            raise ValueError(f"init_r is {self.init_r} and target_r {self.target_r}: expected 1 <= target_r <= init_r")
        if self.alpha <= 0 or self.gamma < 0 or not 0 <= self.dropout < 1:
            raise ValueError("expected alpha above 0, gamma of at least 0, and dropout of at least 0 and less than 1")
        if min(self.tinit, self.tfinal) < 0 or self.delta_t < 1 or not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(
                "expected tinit and tfinal of at least 0, delta_t of at least 1, and beta1 and beta2 between 0 and 1"
            )

    @property
    def scale(self) -> float:
        """What the update is multiplied with; the 1e-5 is the authors', and so in every file."""
        return self.alpha / (self.init_r + 1e-5)

    def kept(self, t: int, total: int, first: int, targets: int) -> int | None:
        """How many of `first` triplets are kept after step t = 1, 2, ... `total`; None where none is chosen then."""
        last = total - self.tfinal
        if self.tinit >= last:
            raise RefpeftError(
                f"adalora: tinit is {self.tinit} and tfinal {self.tfinal}: expected them to be less than the run's "
                f"{total} steps together"
            )
        if t < last and (t <= self.tinit or t % self.delta_t):
            return None
        at_last = self.target_r * targets
        return int((first - at_last) * max(1 - (t - self.tinit) / (last - self.tinit), 0) ** 3 + at_last)


def distance(gram: Tensor) -> Tensor:
    """The squared Frobenius norm of the distance of a matrix (r, r) from the identity."""
    identity = Tensor(xp_of(gram.data).eye(len(gram.data), dtype=gram.dtype))
    return ops.sum((gram - identity) ** 2)


def averages(p: SimpleNamespace) -> dict[str, Array]:
    """What is kept of a site's numbers in training: averages of sensitivities, and of their distances from these."""
    fresh = {f"sensitivity_{name}": xp_of(array).zeros_like(array) for name, array in vars(p).items()}
    return fresh | {f"uncertainty_{name}": xp_of(array).zeros_like(array) for name, array in vars(p).items()}


# ---- a step ----------------------------------------------------------------------------------------------------------

KERNELS: dict[tuple[Callable[..., Any], type], Callable[..., Any]] = {}
"""What stands in for `note` and `keep` on arrays of a kind, or gives NotImplemented."""


def step(update: Callable[[], Any], layers: Sequence[Layer], cfg: Any, t: int, total: int) -> None:
    """One step of Algorithm 1, the t-th of `total`: `update` moves the numbers, and what is unimportant is set to 0."""
    kept = cfg.kept(t, total, sum(layer.p.E.data.size for layer in layers), len(layers))
    gradients = [vars(layer.grads) for layer in layers]
    if cfg.compat == "official":
        gradients = [{name: g.copy() for name, g in own.items()} for own in gradients]  # which `update` sets to 0
        update()
    if t < total - cfg.tfinal:
        _of_all(note, layers, gradients, cfg.beta1, cfg.beta2)
    if cfg.compat == "none":
        update()
    if kept is not None:
        _of_all(keep, layers, kept)


def _of_all(function: Callable[..., Any], layers: Sequence[Layer], *more: Any) -> None:
    """function(layers, *more), by a kernel where there is one."""
    kernel = KERNELS.get((function, type(layers[0].p.E.data)))
    if kernel is None or kernel(layers, *more) is NotImplemented:
        function(layers, *more)


def averages_of(layer: Layer, name: str) -> tuple[Array, Array]:
    """(sensitivity, uncertainty) of a site's P, E or Q."""
    return getattr(layer.state, f"sensitivity_{name}"), getattr(layer.state, f"uncertainty_{name}")


def note(layers: Sequence[Layer], gradients: Sequence[dict[str, Array]], beta1: float, beta2: float) -> None:
    """Moves the averages of all sites' numbers (eq. 8 to 10), by their gradients."""
    for layer, own in zip(layers, gradients, strict=True):
        for name, array in vars(layer.arrays).items():
            sensitivity, uncertainty = averages_of(layer, name)
            now = abs(array * own[name])
            sensitivity *= beta1
            sensitivity += (1 - beta1) * now
            uncertainty *= beta2
            uncertainty += (1 - beta2) * abs(now - sensitivity)


def importance(layer: Layer) -> Array:
    """That of each triplet of a site (eq. 7 and 11)."""
    averages = {name: averages_of(layer, name) for name in "PEQ"}
    of = {name: sensitivity * uncertainty for name, (sensitivity, uncertainty) in averages.items()}
    return of["E"] + of["P"].mean(axis=0) + of["Q"].mean(axis=1)


def keep(layers: Sequence[Layer], count: int) -> None:
    """Sets E to 0 but in the `count` most important triplets of all sites."""
    scores = [importance(layer) for layer in layers]
    chosen, start = most(xp_of(scores[0]).concatenate(scores), count), 0
    for layer, own in zip(layers, scores, strict=True):
        E = layer.arrays.E
        E *= chosen[start : start + own.size]
        start += own.size


def most(scores: Array, count: int) -> Array:
    """Which of them are the `count` largest: an array of bool."""
    xp = xp_of(scores)
    chosen = xp.ones(scores.size, bool)
    chosen[xp.argsort(scores)[: max(scores.size - count, 0)]] = False
    return chosen
