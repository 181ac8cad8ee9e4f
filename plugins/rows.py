"""Chosen rows of weights are trained: W' = W, with W[rows] + change in its rows; a row makes one output.

Selection within a matrix: the survey arXiv:2303.15647, section on selective methods, which has it from Vucetic et al.,
2022, arXiv:2205.01541. What is trained is the change, so that weight decay draws a row back to where it was.

First values, which leave the model as it is: zero. Without `rows`, the `count` longest rows of each weight. Trained:
change (rows, in), rows in numbers a target; the rows' numbers are kept with it.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import RefpeftError, fused, hookimpl, ops, sparse
from refpeft.backend import to_host
from refpeft.tensor import Tensor

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    rows: tuple[int, ...] = ()  # numbers of the rows; none: the longest ones
    count: int = 8  # how many, where they are not given
    only_with = (("count", "rows", ()),)
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if len(set(self.rows)) < len(self.rows) or self.count < 1:
            raise ValueError("expected rows to be named once, and count to be 1 or more")


@hookimpl
def peft_check(sites, cfg):
    for site in sites:
        out = site.shape[0]
        if cfg.rows and not 0 <= min(cfg.rows) <= max(cfg.rows) < out:
            wrong = next(row for row in cfg.rows if not 0 <= row < out)
            raise RefpeftError(f"rows names {wrong}: {site.name} has rows 0 to {out - 1}")
        if not cfg.rows and cfg.count > out:
            raise RefpeftError(f"rows.count is {cfg.count}: {site.name} has {out} rows")


@hookimpl
def peft_params(site, cfg, weight):
    rows = cfg.rows or np.sort(np.argsort(-to_host((weight * weight).sum(axis=1)), kind="stable")[: cfg.count])
    return {"change": np.zeros((len(rows), site.shape[1])), "rows": Tensor(np.array(rows, np.int32))}


@hookimpl
def peft_check_values(site, p):
    sparse.check_rows(site, p.rows)


@hookimpl
def peft_linear(x, base, p):
    return fused.add_columns(base(x), ops.linear(x, p.change), columns=p.rows.data)


@hookimpl
def peft_merge(weight, p):
    return sparse.added_rows(weight, p.rows, p.change)
