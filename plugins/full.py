"""Full fine-tuning: every weight W and bias b of the targets is trained in place of the frozen one.

The baseline of all others (the survey arXiv:2303.15647).

First values: the frozen ones. Trained: as many numbers as the targets have. Where the checkpoint ties two weights
(the head to the token embedding) they stay one parameter with both gradients, unless `tie` is false.
"""

from dataclasses import dataclass

from refpeft import RefpeftError, hookimpl

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    tie: bool = True  # tied weights stay one
    targets: tuple[str, ...] | str = ("*",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


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
def peft_merge(p):
    return vars(p)
