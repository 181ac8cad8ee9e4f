"""SHiRA: W' = W + S, with S sparse: chosen numbers of a weight are trained, a share so small that it is switched fast.

Bhardwaj et al., 2024, arXiv:2406.13175, section 3. `mask` chooses them: at random (SHiRA-Rand, as in PEFT), or those of
largest magnitude (SHiRA-WM). There are as many as LoRA of rank r would train.

First values, which leave the model as it is: zero. Trained: values (r (in + out),) a target. Constant: their indices.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import RefpeftError, hookimpl, sparse
from refpeft.backend import to_host, xp_of

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    r: int = 8
    mask: Literal["random", "magnitude"] = "random"
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"r is {self.r}: expected 1 or more")


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        out, width = site.shape
        most = out * width // (out + width)
        if cfg.r > most:
            raise RefpeftError(f"shira: r is {cfg.r}, more numbers than {site.name} has: expected {most} or less")


@hookimpl
def peft_params(site, cfg, rng, weight):
    out, width = site.shape
    count = cfg.r * (out + width)
    if cfg.mask == "magnitude":
        places = to_host(xp_of(weight).argpartition(-abs(weight).reshape(-1), count - 1)[:count])
    else:
        places = _random(rng, out * width, count)
    return sparse.constant_at(places, width)


@hookimpl
def peft_check_values(site, p):
    sparse.check(site, p)


@hookimpl
def peft_linear(x, base, p, site):
    return base(x) + sparse.added(x, p, site)


@hookimpl
def peft_merge(weight, p):
    return sparse.merged(weight, p)


def _random(rng, size, count):
    """`count` distinct numbers below `size`: the first that are drawn, or of a permutation where those are too few."""
    drawn = rng.uniform(0, size, 2 * count).astype(np.int64)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)[:count]] if len(first) >= count else rng.permutation(size)[:count]
