"""BitFit: only biases are trained: y = W x + b, or g norm(x) + b, with b in place of the frozen bias.

Ben Zaken et al., 2021, arXiv:2106.10199, section 3. First values: the frozen biases. Trained: out numbers for every
target that has a bias. Models of Llama's kind and T5 have none: `create` gives linear layers one, which starts at zero.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, hookimpl
from refpeft.errors import warn

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    create: bool = False  # add a bias to linear layers that have none
    targets: tuple[str, ...] | str = ("*",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_check(sites, cfg):
    if not cfg.create and all(site.bias is None for site in sites):
        raise RefpeftError(
            f"bitfit trains biases, and none of the {len(sites)} layers that it was pointed at has one (models like "
            "Llama and T5 have no biases at all); set bitfit.create = true to add them, or take another method"
        )
    if cfg.create and all(site.bias is not None or site.kind != "linear" for site in sites):
        warn("bitfit: create has no effect: all linear targets have a bias")


@hookimpl
def peft_params(site, cfg, bias):
    if bias is not None:
        return {"bias": bias}
    return {"bias": np.zeros(site.shape[0])} if cfg.create and site.kind == "linear" else None


@hookimpl
def peft_linear(x, base, p):
    return base(x, bias=p.bias)


@hookimpl
def peft_norm(x, base, p):
    return base(x, bias=p.bias)


@hookimpl
def peft_merge(p):
    return {"bias": p.bias}
