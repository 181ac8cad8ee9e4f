"""VeRA: y = W x + b + beta * (B (d * (A x))): frozen random A and B that all targets share, trained gains d and beta.

Kopiczko et al., 2023, arXiv:2310.11454, section 3.1. Targets of several shapes use the first columns of A and the first
rows of B, as in PEFT. A and B are in the adapter's file; with `torch_seed` they are those that PEFT draws with torch's
generator on CPUs, and a file in PEFT's form has the seed instead (save_projection = false).

First values (section 3.2), which leave the model as it is: A and B uniform in +-sqrt(6 / columns), which is Kaiming's
initialization, d all `d_initial`, beta zero. Trained: d (r,) and beta (out,), called b here: r + out numbers a target.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import hookimpl, ops
from refpeft.tensor import Tensor
from refpeft.torch_random import torch_uniform

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0  # rate, of what A reads, in training
    torch_seed: int | None = None  # of A and B, as PEFT draws them; none: from the run's own seed
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.r < 1 or not self.d_initial or not 0 <= self.dropout < 1:
            raise ValueError("expected r of at least 1, d_initial other than 0, and dropout from 0 to less than 1")
        if self.torch_seed is not None and self.torch_seed < 0:
            raise ValueError("expected torch_seed of at least 0, or none")


@hookimpl
def peft_shared(sites, cfg, rng):
    out, width = (max(sides) for sides in zip(*(site.shape for site in sites), strict=True))
    wanted = [((6 / columns) ** 0.5, (rows, columns)) for rows, columns in ((cfg.r, width), (out, cfg.r))]
    if cfg.torch_seed is not None:
        drawn = torch_uniform(cfg.torch_seed, *wanted)
    else:
        drawn = [rng.uniform(-bound, bound, shape) for bound, shape in wanted]
    return dict(zip("AB", map(Tensor, drawn), strict=True))


@hookimpl
def peft_params(site, cfg):
    return {"d": np.full(cfg.r, cfg.d_initial), "b": np.zeros(site.shape[0])}


@hookimpl
def peft_linear(x, base, p, cfg, site, shared, train):
    dropped = train.dropout(x, cfg.dropout) if train else x
    A, B = _parts(shared, site)
    return base(x) + p.b * ops.linear(p.d * ops.linear(dropped, A), B)


@hookimpl
def peft_merge(weight, p, site, shared):
    A, B = _parts(shared, site)
    return weight + p.b[:, None] * (B * p.d) @ A


def _parts(shared, site):
    """A and B as far as this site goes."""
    out, width = site.shape
    return shared.A[:, :width], shared.B[:out]
