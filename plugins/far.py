"""FAR, freeze and reconfigure: some nodes (outputs) of each feed-forward layer learn, and the others are frozen.

Vucetic et al., 2022, arXiv:2205.01541. Priming: the targets are trained in full for a share of the run's steps. The
nodes whose rows of W changed most (the sum of |change|) learn, as large a share of each layer's, from their old values:
y = concat([x Wt^T + bt, x Wf^T + bf]) with the outputs in their old order, t those that learn, f the frozen ones, which
get no gradient. Computed is the equal f(x), the layer as it was, with x change^T + shift added to its outputs t, where
Wt = W[t] + change, bt = b[t] + shift: W may be quantized, and weight decay draws to where it was.

First values, which leave the model as it is: zero. Trained: change (n, in) and, where there is a bias, shift (n,), n =
share of out: n in, or n (in + 1), numbers a target. Constant: rows (n,), the numbers of the nodes.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import fused, hookimpl, ops, sparse
from refpeft.backend import to_host
from refpeft.tensor import Tensor

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    share: float = 0.1  # of a layer's nodes that learn, at least one
    priming: float = 0.1  # steps of priming as a share of the run's, at least one
    priming_lr: float = 5e-5  # constant
    targets: tuple[str, ...] | str = ("@gate", "@up", "@down")  # the feed-forward layers
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if not 0 < self.share <= 1 or self.priming <= 0 or self.priming_lr <= 0:
            raise ValueError("expected share to be more than 0 and at most 1, priming and its lr to be more than 0")

    def nodes(self, site):
        return max(1, round(self.share * site.shape[0]))


@hookimpl
def peft_params(site, cfg, bias):
    count = cfg.nodes(site)
    first = {"change": np.zeros((count, site.shape[1])), "rows": Tensor(np.arange(count, dtype=np.int32))}
    return first if bias is None else first | {"shift": np.zeros(count)}


@hookimpl
def peft_survey(sites, cfg, survey):
    changes = survey.changes(sites, max(1, round(cfg.priming * survey.steps)), cfg.priming_lr)
    sizes = {site: to_host(abs(changes[site.name]).sum(axis=1)) for site in sites}
    return {site.name: {"rows": np.sort(np.argsort(-size)[: cfg.nodes(site)])} for site, size in sizes.items()}


@hookimpl
def peft_check_values(site, p):
    sparse.check_rows(site, p.rows)


@hookimpl
def peft_linear(x, base, p):
    return fused.add_columns(base(x), ops.linear(x, p.change, getattr(p, "shift", None)), columns=p.rows.data)


@hookimpl
def peft_merge(weight, bias, p):
    weight = sparse.added_rows(weight, p.rows, p.change)
    return {"weight": weight} | ({"bias": sparse.added_rows(bias, p.rows, p.shift)} if hasattr(p, "shift") else {})
