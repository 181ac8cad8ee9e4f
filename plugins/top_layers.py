"""The last layers alone are trained: every weight and bias of theirs, in place of the frozen one.

FT-Top2 of Li and Liang, 2021, arXiv:2101.00190, section 5.2, and "freeze all but the last k" of Lee et al., 2019,
arXiv:1911.03090. What comes after the last layer (its normalization, the output head) stays frozen without `head`. The
layers of a decoder come after those of its encoder.

First values: the frozen ones. Trained: as many numbers as these layers have.
"""

from dataclasses import dataclass

from refpeft import RefpeftError, hookimpl
from refpeft.targets import homes

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    count: int = 2  # how many of the last layers
    head: bool = False  # train the normalization after the last layer and the output head too
    targets: tuple[str, ...] | str = ("*",)
    exclude: tuple[str, ...] | str = ()


@hookimpl
def peft_check(sites, cfg):
    layers = len(homes(sites))
    if not 1 <= cfg.count <= layers:
        raise RefpeftError(f"top_layers: count is {cfg.count}: expected 1 to {layers}, the layers that there are")
    if cfg.head and not any("head" in site.roles for site in sites):
        raise RefpeftError("top_layers: there is no output head: leave out `head`")
    for site in sites:
        if cfg.head and site.tied:
            raise RefpeftError(
                f"top_layers: {site.name} shares its weight with {site.tied}, which stays frozen: leave out `head`"
            )


@hookimpl
def peft_params(site, sites, cfg, weight, bias):
    layers = homes(sites)
    after = site in sites[max(i for i, other in enumerate(sites) if other.home) :]
    if site.home not in layers[-cfg.count :] and not (cfg.head and after and {"norm", "head"} & set(site.roles)):
        return None
    return {"weight": weight} | ({} if bias is None else {"bias": bias})


@hookimpl
def peft_linear(x, base, p):
    return base(x, **vars(p))


@hookimpl
def peft_norm(x, base, p):
    return base(x, **vars(p))


@hookimpl
def peft_merge(p):
    return vars(p)
