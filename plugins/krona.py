"""KronA: y = W x + b + s (A kron B) x, a Kronecker product of two small matrices beside a frozen layer.

Edalati et al., 2022, arXiv:2212.10650, section 3. At a feed-forward part (targets = ["@mlp_out"]) it is the paper's
KronA^B, beside f: f(x) + s (A kron B) x; with `residual`, KronA^B_res, + gain x, too. A is (a_out, a_in) and B (out /
a_out, in / a_in). An a_out or a_in of 0 is the largest divisor up to the square root: A and B are smallest then.

First values, which leave the model as it is: A uniform in +-1 / sqrt(a_in), B and the gain zero.
Trained: A, B and the gain (1,): a_out a_in + out in / (a_out a_in) numbers a target, 1 more with `residual`.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, hookimpl
from refpeft.backend import xp_of
from refpeft.structured import kron_linear

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    scale: float = 1.0
    a_out: int = 0  # A's rows; 0: near the square root of the layer's outputs
    a_in: int = 0  # A's columns; 0: near the square root of its inputs
    residual: bool = False  # of a feed-forward part: a gain of its input, too
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if min(self.a_out, self.a_in) < 0 or not self.scale:
            raise ValueError("expected a_out and a_in of at least 1, or 0, and scale other than 0")


def _sides(site):
    """The layer's outputs and inputs, by the option that cuts them; a part of a layer has as many of both."""
    return dict(zip(("a_out", "a_in"), site.shape * (2 // len(site.shape)), strict=True))


def _divisors(side):
    return [n for n in range(1, side + 1) if side % n == 0]


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        for name, side in _sides(site).items():
            wish, fit = getattr(cfg, name), _divisors(side)
            if wish and wish not in fit:
                near = min(fit, key=lambda n: abs(n - wish))
                raise RefpeftError(f"krona: {name} = {wish} does not divide the {side} of {site.name}; {near} does")
        if cfg.residual and site.kind == "linear":
            raise RefpeftError(f"krona: residual is for parts of layers, as @mlp_out; {site.name} is a linear layer")


@hookimpl
def peft_params(site, cfg, rng):
    sides = _sides(site)
    A = [getattr(cfg, name) or max(n for n in _divisors(side) if n * n <= side) for name, side in sides.items()]
    B = [side // n for side, n in zip(sides.values(), A, strict=True)]
    values = {"A": rng.uniform(-(A[1] ** -0.5), A[1] ** -0.5, tuple(A)), "B": np.zeros(B)}
    return values | ({"gain": np.zeros(1)} if cfg.residual else {})


@hookimpl
def peft_linear(x, base, p, cfg):
    return base(x) + kron_linear(x, cfg.scale * p.A, p.B)


@hookimpl
def peft_block(x, base, p, cfg):
    y = base(x) + kron_linear(x, cfg.scale * p.A, p.B)
    return y + p.gain * x if cfg.residual else y


@hookimpl
def peft_merge(weight, p, cfg):
    return weight + cfg.scale * xp_of(weight).kron(p.A, p.B)
