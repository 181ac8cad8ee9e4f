"""LN tuning: gain g and bias b of every normalization are trained: y = g norm(x) + b.

Zhao et al., 2023, arXiv:2312.11420, section 3. First values: the frozen ones. Trained: dim numbers for an RMSNorm, 2
dim for a LayerNorm.
"""

from dataclasses import dataclass

from refpeft import hookimpl

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    targets: tuple[str, ...] | str = ("@norm",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all, and the last norm


@hookimpl
def peft_params(weight, bias):
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


@hookimpl
def peft_norm(x, base, p):
    return base(x, **vars(p))


@hookimpl
def peft_merge(p):
    return vars(p)
