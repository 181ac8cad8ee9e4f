"""C3A: y = W x + b + (1 / in) C x, C made of circulant blocks: every row of a block is the one above, turned by one.

Chen et al., 2024, arXiv:2407.19342, section 3: the first row of a block is trained, and products with blocks are
products of frequencies. 1 / in is that of the authors' code, in PEFT. A block has one number for each of its rows, and
any rank.

First values: `init`; all but zeros change the model a little. Trained: kernel (out / block_size, in / block_size,
block_size), in out / block_size numbers a target.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refpeft import fourier, hookimpl
from refpeft.backend import xp_of
from refpeft.structured import IN, OUT, check_divides
from refpeft.targets import patterned
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    block_size: int = 256  # divides both sides
    block_size_pattern: dict[str, int] = field(default_factory=dict)  # for names that end in the key, an expression
    init: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if min((self.block_size, *self.block_size_pattern.values())) < 1:
            raise ValueError("expected block_size of at least 1")

    def size(self, site):
        return patterned(self.block_size_pattern, site, self.block_size)


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        check_divides("c3a: block_size", cfg.size(site), [site], OUT, IN)


@hookimpl
def peft_params(site, cfg, rng):
    (out, width), size = site.shape, cfg.size(site)
    shape = (out // size, width // size, size)
    if cfg.init == "zeros":
        return {"kernel": np.zeros(shape)}
    if cfg.init == "gaussian":
        return {"kernel": rng.standard_normal(shape)}
    bound = (6 / (width + out)) ** 0.5 if cfg.init == "xavier_uniform" else width**-0.5
    return {"kernel": rng.uniform(-bound, bound, shape)}


@hookimpl
def peft_linear(x, base, p):
    return base(x) + fourier.circulant_linear(x * (1 / x.shape[-1]), p.kernel)


@hookimpl
def peft_merge(weight, p, site):
    identity = xp_of(weight).eye(site.shape[1], dtype=weight.dtype)
    return weight + fourier.circulant_linear(Tensor(identity), Tensor(p.kernel)).data.T / site.shape[1]
