"""LT-SFT, lottery tickets: W' = W + S, S sparse: the numbers that full fine-tuning changes most, trained from W again.

Ansell et al., 2021, arXiv:2110.07560, section 3. Before the first step all numbers of the targets are trained for
`full_steps`. Those with the largest |change|, of all targets together, are then trained from their old values, and no
others. With `l1`, that times the mean |W' - W| over all numbers of the targets is added to the loss in both phases.
The first phase takes the memory and the time of full fine-tuning; `full_lr` is constant.

First values, which leave the model as it is: zero. Trained: values, share of the numbers of all targets together.
Constant: their indices (2, values).
"""

from dataclasses import dataclass

from refpeft import hookimpl, ops, sparse

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    share: float = 0.043  # of the targets' numbers that is trained; so many of mBERT's in the paper
    full_steps: int | None = None  # of the first phase; none: as many as the run has
    full_lr: float = 5e-5  # learning rate of the first phase
    l1: float = 0.0  # the paper has 0.1 for languages
    targets: tuple[str, ...] | str = ("all-linear",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if not 0 < self.share <= 1 or self.l1 < 0:
            raise ValueError("expected share to be more than 0 and at most 1, and l1 to be 0 or more")
        if (self.full_steps is not None and self.full_steps < 1) or self.full_lr <= 0:
            raise ValueError("expected full_steps to be 1 or more, and full_lr to be more than 0")


@hookimpl
def peft_params(site, sites, cfg):
    return sparse.spread(site, sites, cfg.share)


@hookimpl
def peft_survey(sites, cfg, survey):
    changes = survey.changes(sites, cfg.full_steps or survey.steps, cfg.full_lr, l1=cfg.l1)
    return sparse.largest(changes, sparse.how_many(sites, cfg.share))


@hookimpl
def peft_penalty(sites, p, cfg):
    return ops.sum(ops.abs(p.values)) * (cfg.l1 / sparse.how_many(sites, 1)) if cfg.l1 else None


@hookimpl
def peft_check_values(site, p):
    sparse.check(site, p)


@hookimpl
def peft_linear(x, base, p, site):
    return base(x) + sparse.added(x, p, site)


@hookimpl
def peft_merge(weight, p):
    return sparse.merged(weight, p)
