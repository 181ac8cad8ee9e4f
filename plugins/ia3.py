"""(IA)^3: learned gains on keys, values and the feed-forward layer: y = gain (W x + b), or y = W (gain x) + b.

Liu et al., 2022, arXiv:2205.05638, section 3.3. The second form is for `feedforward` targets: scaling what the last
feed-forward matrix reads is scaling the inner activation (behind the gate, where there is one), as in the paper and in
PEFT. T5, the paper's model, has gains in cross-attention too. In GPT-2, queries, keys and values come from one layer
and are all scaled, as in PEFT.

First values: ones, so the model is unchanged. Trained: a number for each output of a target, for each input of
`feedforward` ones.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, hookimpl
from refpeft.targets import matcher

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    feedforward: tuple[str, ...] | str = ("@down",)  # which of the targets are scaled at their input
    targets: tuple[str, ...] | str = ("@k", "@v", "@down")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def at_input(self, site):
        return any(hits(site) for hits in matcher(self.feedforward).values())


@hookimpl
def peft_check(sites, cfg):
    for target, hits in matcher(cfg.feedforward).items():
        if not any(map(hits, sites)):
            raise RefpeftError(f"ia3: feedforward names {target!r}, which is none of the targets")


@hookimpl
def peft_params(site, cfg):
    out, width = site.shape
    return {"gain": np.ones(width if cfg.at_input(site) else out)}


@hookimpl
def peft_linear(x, base, p, cfg, site):
    return base(x * p.gain) if cfg.at_input(site) else base(x) * p.gain


@hookimpl
def peft_merge(weight, bias, p, cfg, site):
    if cfg.at_input(site):
        return weight * p.gain
    return {"weight": weight * p.gain[:, None], "bias": None if bias is None else bias * p.gain}
