"""LoKr: W' = W + s C kron D, a Kronecker product; D, and with `decompose_both` C, of rank r; s = alpha / r.

Yeh et al., 2023, arXiv:2309.14859, section 3.3. C is (out1, in1) and D (out2, in2) with out1 out2 = out, in1 in2 = in;
out1 and in1 are the largest divisors up to `factor` and up to the square root of what they divide. A factor stays whole
where two matrices of rank r would not be smaller. There s stays alpha / r, as in PEFT; LyCORIS' code has 1 then.

First values, which leave the model as it is: uniform in +-1 / sqrt(columns), which is kaiming_uniform(a=sqrt(5)), but
for zeros, with `init = "lycoris"` in D (or its second part Db), with "peft" in C (or its first part Ca).
Trained: C, or Ca (out1, r) and Cb (r, in1); D, or Da and Db: out1 in1 + r (out2 + in2) numbers a target, in general.
"""

from dataclasses import dataclass, field
from math import isqrt
from typing import Literal

from refpeft import hookimpl
from refpeft.backend import xp_of
from refpeft.lowrank import Scaled
from refpeft.structured import kron_linear

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Scaled):
    r: int = 8
    alpha: float = 8.0
    factor: int = -1  # bound of C's sides; -1: none but the square root
    decompose_both: bool = False
    init: Literal["lycoris", "peft"] = "lycoris"
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha, likewise
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise ValueError("expected factor of at least 1, or -1")

    beyond = "D stays whole, and r only scales,"

    def most(self, site):
        return max(1, (max(self.split(side)[1] for side in site.shape) - 1) // 2)

    def split(self, side):
        """(what C has, what D has) of a side of the weight."""
        if self.factor > 0 and side % self.factor == 0:
            return self.factor, side // self.factor  # also beyond the square root, as LyCORIS and PEFT do
        most = min(isqrt(side), self.factor if self.factor > 0 else side)
        small = max(n for n in range(1, most + 1) if side % n == 0)
        return small, side // small


@hookimpl
def peft_params(site, cfg, rng):
    r, shapes = cfg.rank(site), {}
    for name, shape in zip("CD", zip(*map(cfg.split, site.shape), strict=True), strict=True):
        whole = r >= max(shape) / 2 or (name == "C" and not cfg.decompose_both)
        shapes |= {name: shape} if whole else {f"{name}a": (shape[0], r), f"{name}b": (r, shape[1])}
    zero = ("D", "Db") if cfg.init == "lycoris" else ("C", "Ca")
    bounds = {name: 0.0 if name in zero else columns**-0.5 for name, (_, columns) in shapes.items()}
    return {name: rng.uniform(-bounds[name], bounds[name], shape) for name, shape in shapes.items()}


@hookimpl
def peft_linear(x, base, p, cfg, site):
    return base(x) + kron_linear(x, cfg.scale(site) * _whole(p, "C"), _whole(p, "D"))


@hookimpl
def peft_merge(weight, p, cfg, site):
    return weight + xp_of(weight).kron(cfg.scale(site) * _whole(p, "C"), _whole(p, "D"))


def _whole(p, name):
    values = vars(p)
    return values[name] if name in values else values[f"{name}a"] @ values[f"{name}b"]
