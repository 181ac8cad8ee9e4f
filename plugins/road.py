"""RoAd: y = R (W x + b), R of rotations and gains in planes of two outputs.

Liao and Monz, 2024, arXiv:2409.00119, section 3.2. The planes are made of outputs j and j + group_size / 2 of a group.
On both the new value is a1 cos(t1) times its own minus (or, in the second half, plus) a2 sin(t2) times the other's.
`numbers` of an angle and a gain each: 1 for a plane (RoAd_1), 2, one for each output (RoAd_2), or 4, others for
cosine and sine too (RoAd_4).

First values: angles zero and gains one, so the model is unchanged. Trained: theta and alpha, each (out / 2,), (out,) or
(2 out,): numbers out in all.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import fourier, hookimpl, ops
from refpeft.structured import OUT, check_divides
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    numbers: Literal[1, 2, 4] = 1  # the variant: RoAd_1, RoAd_2 or RoAd_4
    group_size: int = 64
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"group_size is {self.group_size}: expected an even number, as planes have two sides")


@hookimpl
def peft_check(sites, cfg):
    check_divides("road: group_size", cfg.group_size, sites, OUT)


@hookimpl
def peft_params(site, cfg):
    count = site.shape[0] * cfg.numbers // 2
    return {"theta": np.zeros(count), "alpha": np.ones(count)}


@hookimpl
def peft_linear(x, base, p, cfg):
    return _turned(base(x), p.theta, p.alpha, cfg)


@hookimpl
def peft_merge(weight, bias, p, cfg):
    theta, alpha = Tensor(p.theta), Tensor(p.alpha)
    turned = None if bias is None else _turned(Tensor(bias), theta, alpha, cfg).data
    return {"weight": _turned(Tensor(weight.T), theta, alpha, cfg).data.T, "bias": turned}


def _turned(y, theta, alpha, cfg):
    half, shape = cfg.group_size // 2, y.shape
    per_plane = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[cfg.numbers]  # of cosine and sine, of the two outputs
    theta, alpha = (values.reshape(-1, *per_plane, half) for values in (theta, alpha))
    cosine, sine = alpha[:, 0] * fourier.cos(theta[:, 0]), alpha[:, -1] * fourier.sin(theta[:, -1])
    own = ops.concat(cosine[:, :1], cosine[:, -1:], axis=1).reshape(-1)  # a number for each output
    others = ops.concat(-sine[:, :1], sine[:, -1:], axis=1).reshape(-1)
    planes = y.reshape(*shape[:-1], -1, 2, half)
    swapped = ops.concat(planes[..., 1:, :], planes[..., :1, :], axis=-2).reshape(*shape)
    return y * own + swapped * others
