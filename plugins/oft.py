"""OFT: y = W R^T x + b, R block-diagonal of rotations (I + S) (I - S)^-1, S skew-symmetric (the Cayley transform).

Qiu et al., 2023, arXiv:2306.07280, section 3: all angles between the rows of W stay. PEFT 0.21 has this sign only with
its Neumann series, which is `neumann` here: I + 2 S + ... + 2 S^(terms - 2) + S^(terms - 1), without an inverse and a
rotation only while S is small. Its exact form turns the other way; in a file such an S is negated.

First values: S zero, so the model is unchanged. Trained: what is above the diagonals of S, in (block_size - 1) / 2
numbers a target, or block_size (block_size - 1) / 2 with `block_share`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import hookimpl
from refpeft.structured import IN, cayley, check_divides, eye, skew, times_blocks
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    block_size: int = 32  # of the blocks of R
    block_share: bool = False  # all blocks are equal
    cayley: Literal["exact", "neumann"] = "exact"
    terms: int = 5  # of neumann
    only_with = (("terms", "cayley", "neumann"),)
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.block_size < 2 or self.terms < 4:
            raise ValueError("expected block_size of at least 2 and terms of at least 4")


@hookimpl
def peft_check(sites, cfg):
    check_divides("oft: block_size", cfg.block_size, sites, IN)


@hookimpl
def peft_params(site, cfg):
    blocks = 1 if cfg.block_share else site.shape[1] // cfg.block_size
    return {"S": np.zeros((blocks, cfg.block_size * (cfg.block_size - 1) // 2))}


@hookimpl
def peft_linear(x, base, p, cfg):
    return base(times_blocks(x, _rotation(p.S, cfg)))


@hookimpl
def peft_merge(weight, p, cfg):
    return times_blocks(Tensor(weight), _rotation(Tensor(p.S), cfg).transpose(0, 2, 1)).data


def _rotation(S, cfg):
    S = skew(S, cfg.block_size)
    if cfg.cayley == "exact":
        return cayley(S)
    identity = eye(cfg.block_size, S)
    series = 2 * identity + S
    for _ in range(cfg.terms - 3):
        series = 2 * identity + S @ series
    return identity + S @ series
