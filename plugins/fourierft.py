"""FourierFT: y = W x + b + s F x, F the real part of the inverse Fourier transform of a matrix with few numbers.

Gao et al., 2024, arXiv:2405.03003, section 3.1: the numbers are at places drawn once, the same in all layers of a
shape. As in PEFT, which writes only the numbers, places are the first of torch's permutation of seed `places_seed`, and
the transform is divided by its size, in out. F is made for each product and never kept.

First values: standard normal, as in the paper; they change the model. `init = "zeros"` does not. Trained: c
(frequencies,), frequencies numbers a target.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refpeft import RefpeftError, fourier, hookimpl, torch_random
from refpeft.backend import xp_of
from refpeft.targets import patterned

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config:
    frequencies: int = 1000  # numbers of a target
    frequencies_pattern: dict[str, int] = field(default_factory=dict)  # for names that end in the key, an expression
    scaling: float = 150.0  # s
    places_seed: int = 777
    init: Literal["gaussian", "zeros"] = "gaussian"
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if min((self.frequencies, *self.frequencies_pattern.values())) < 1 or not 0 <= self.places_seed < 2**63:
            raise ValueError("expected frequencies of at least 1, and places_seed of at least 0 and less than 2^63")
        if not self.scaling:
            raise ValueError("expected scaling other than 0: nothing would be learned")

    def count(self, site):
        return patterned(self.frequencies_pattern, site, self.frequencies)


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        size = site.shape[0] * site.shape[1]
        if cfg.count(site) > size:
            raise RefpeftError(f"fourierft: frequencies is {cfg.count(site)}, but {site.name} has {size} numbers")
        if size > torch_random.LARGEST_CHOICE:
            raise RefpeftError(f"fourierft: {site.name} has {size} numbers: no more than 2^32 / 20 are drawn from")


@hookimpl
def peft_params(site, cfg, rng):
    return {"c": rng.standard_normal(cfg.count(site)) if cfg.init == "gaussian" else np.zeros(cfg.count(site))}


@hookimpl
def peft_linear(x, base, p, cfg, site):
    places = _places(cfg, site, p.c.data)
    return base(x) + fourier.spectral_linear(x, p.c * cfg.scaling, places=places, shape=site.shape)


@hookimpl
def peft_merge(weight, p, cfg, site):
    return weight + cfg.scaling * fourier.spectral_weight(p.c, _places(cfg, site, p.c), site.shape)


def _places(cfg, site, c):
    return torch_random.torch_choice(cfg.places_seed, site.shape[0] * site.shape[1], len(c), xp_of(c))
