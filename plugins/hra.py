"""HRA: y = W H_1 ... H_r x + b, H_i = I - 2 u_i u_i^T / |u_i|^2 the reflection along a learned direction.

Yuan et al., 2024, arXiv:2405.17484, section 3.1. The product is I - U T U^T with T^-1 = |u_i|^2 / 2 on the diagonal and
u_i . u_j above it, so that it costs as much as LoRA of this rank.

First values: two columns of U each are equal, uniform in +-sqrt(2 / r), so that reflections cancel up to rounding.
Trained: U (in, r), r in numbers a target. Without the paper's Gram-Schmidt variant (its lambda = infinity, PEFT's
apply_GS): it has no value at these first values.
"""

from dataclasses import dataclass

from refpeft import RefpeftError, fused, hookimpl, ops
from refpeft.backend import xp_of
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    r: int = 8  # reflections
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.r < 2 or self.r % 2:
            raise ValueError(f"r is {self.r}: expected an even number, as reflections start in equal pairs; say, 8")


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        if cfg.r > site.shape[1]:
            raise RefpeftError(f"hra: r is {cfg.r}, more than the {site.shape[1]} inputs of {site.name}")


@hookimpl
def peft_params(site, cfg, rng):
    bound = (2 / cfg.r) ** 0.5
    return {"U": rng.uniform(-bound, bound, (site.shape[1], cfg.r // 2)).repeat(2, axis=1)}


@hookimpl
def peft_linear(x, base, p):  # x, a row, times H_r ... H_1 is x - x U T^T U^T
    return base(fused.addmm(x, ops.linear(x, p.U.T), ops.solve(_inverse(p.U).T, p.U.T).T, alpha=-1.0))


@hookimpl
def peft_merge(weight, p):
    U = Tensor(p.U)
    return weight - (weight @ p.U) @ ops.solve(_inverse(U), U.T).data


def _inverse(U):
    """T^-1 (r, r)."""
    xp, r = xp_of(U.data), U.shape[1]
    upper = xp.triu(xp.ones((r, r), U.dtype)) - xp.eye(r, dtype=U.dtype) / 2
    least = xp.eye(r, dtype=U.dtype) * xp.finfo(U.dtype).tiny  # a column of zeros reflects nothing
    return (U.T @ U) * Tensor(upper) + Tensor(least)
