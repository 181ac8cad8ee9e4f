"""BOFT: y = s * (W R^T x) + b, R a product of butterfly factors, each block-diagonal after a permutation.

Liu et al., 2023, arXiv:2311.06243, section 4: R = B_m ... B_1. B_i turns parts of block_size inputs, each made of two
halves that lie 2^(i-1) halves apart, by (I - S) (I + S)^-1 with S = (A - A^T) / 2, as the authors' code does; so m
factors connect 2^(m-1) block_size inputs. With one factor it is OFT with gains s. PEFT 0.21 computes one factor,
whatever its config says, where it cannot compile its CUDA extension.

First values: A zero, s one, so the model is unchanged. Trained: A (m, in / block_size, block_size, block_size) and s
(out,): butterfly_factors in block_size + out numbers a target; of A the symmetric half does nothing.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import hookimpl
from refpeft.structured import IN, cayley, check_divides, times_blocks
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    block_size: int = 4  # of the blocks of a factor
    butterfly_factors: int = 2  # m
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.block_size < 2 or self.butterfly_factors < 1 or (self.butterfly_factors > 1 and self.block_size % 2):
            raise ValueError(
                "expected block_size of at least 2, and even for several factors, and butterfly_factors of at least 1"
            )


@hookimpl
def peft_check(sites, cfg):
    reach = cfg.block_size * 2 ** (cfg.butterfly_factors - 1)
    check_divides("boft: block_size 2^(butterfly_factors - 1)", reach, sites, IN)


@hookimpl
def peft_params(site, cfg):
    out, width = site.shape
    n = cfg.block_size
    return {"A": np.zeros((cfg.butterfly_factors, width // n, n, n)), "s": np.ones(out)}


@hookimpl
def peft_linear(x, base, p):
    for number, blocks in reversed(list(enumerate(_rotations(p.A)))):
        x = _turned(x, blocks, 2**number)
    y, bias = base(x), base.bias
    return y + (p.s - 1) * (y if bias is None else y - bias)


@hookimpl
def peft_merge(weight, bias, p, site):
    weight = Tensor(weight)
    for number, blocks in enumerate(_rotations(Tensor(p.A))):
        weight = _turned(weight, blocks.transpose(0, 2, 1), 2**number)
    if bias is not None:  # the frozen one stays; what a method below has added is scaled
        bias = bias + (p.s - 1) * (bias if site.bias is None else bias - site.bias)
    return {"weight": weight.data * p.s[:, None], "bias": bias}


def _rotations(A):
    return cayley(0.5 * (A.transpose(0, 1, 3, 2) - A))


def _turned(x, blocks, apart):
    """x (..., in) times a factor, the halves of whose blocks lie `apart` halves from each other."""
    if apart == 1:
        return times_blocks(x, blocks)
    half = blocks.shape[-1] // 2
    halves = x.reshape(-1, 2, apart, half).transpose(0, 2, 1, 3).reshape(*x.shape)
    return times_blocks(halves, blocks).reshape(-1, apart, 2, half).transpose(0, 2, 1, 3).reshape(*x.shape)
