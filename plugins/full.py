"""Full fine-tuning: every weight W and bias b of the targets is trained in place of the frozen one.

The baseline of all others (the survey arXiv:2303.15647).

With `l1`, that times the mean of |W - W0| over all targets, W0 their frozen weights, is added to the loss, as in the
first phase of lottery tickets (Ansell et al., 2021, arXiv:2110.07560).

First values: the frozen ones. Trained: as many numbers as the targets have. Where the checkpoint ties two weights
(the head to the token embedding) they stay one parameter with both gradients, unless `tie` is false.
"""

from dataclasses import dataclass
from math import prod

from refpeft import RefpeftError, hookimpl, ops
from refpeft.tensor import Tensor

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    tie: bool = True  # tied weights stay one
    l1: float = 0.0  # penalty of the mean change
    targets: tuple[str, ...] | str = ("*",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if self.l1 < 0:
            raise ValueError(f"l1 is {self.l1:g}: expected 0 or more")


@hookimpl
def peft_check(sites, cfg):
    names = {site.name for site in sites}
    for site in sites:
        if cfg.tie and site.tied and site.tied not in names:
            raise RefpeftError(f"full: {site.name} shares its weight with {site.tied}: target both, or set tie = false")


@hookimpl
def peft_params(site, cfg, weight, bias):
    first = {"weight": f"{site.tied}.weight" if cfg.tie and site.tied else weight}
    return first if bias is None else first | {"bias": bias}


@hookimpl
def peft_linear(x, base, p):
    return base(x, **vars(p))


@hookimpl
def peft_embedding(ids, base, p):
    return base(ids, **vars(p))


@hookimpl
def peft_norm(x, base, p):
    return base(x, **vars(p))


@hookimpl
def peft_penalty(site, sites, p, cfg):
    numbers = sum(prod(site.shape) for site in sites)
    return ops.sum(ops.abs(p.weight - Tensor(site.weight()))) * (cfg.l1 / numbers) if cfg.l1 else None


@hookimpl
def peft_merge(p):
    return vars(p)
