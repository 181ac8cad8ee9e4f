"""FISH Mask: W' = W + S, with S sparse: the numbers of W with the largest Fisher information are trained.

Sung et al., 2021, arXiv:2111.09839. It is estimated once, before the first step, as the mean over rows of the training
data of the squared gradient of log p: that of the data's own tokens (the empirical Fisher), a row's log p being the
mean over its tokens, as in the authors' code. The largest of all targets together are chosen, so that a target may have
many or none. Meanwhile a dense copy of the targets' weights, their gradients and their information are held.

First values, which leave the model as it is: zero. Trained: values, share of the numbers of all targets together.
Constant: their indices (2, values).
"""

from dataclasses import dataclass

from refpeft import hookimpl, sparse

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    share: float = 0.005  # of the targets' numbers that is trained
    samples: int = 128  # rows of data that are looked at, or as many as there are; the authors' script has 1,024
    targets: tuple[str, ...] | str = ("all-linear",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if not 0 < self.share <= 1 or self.samples < 1:
            raise ValueError("expected share to be more than 0 and at most 1, and samples to be 1 or more")


@hookimpl
def peft_params(site, sites, cfg):
    return sparse.spread(site, sites, cfg.share)


@hookimpl
def peft_survey(sites, cfg, survey):
    information = {}
    for gradients in survey.gradients(sites, min(cfg.samples, survey.rows)):
        for name, gradient in gradients.items():
            information[name] = information.get(name, 0) + gradient * gradient
    return sparse.largest(information, sparse.how_many(sites, cfg.share))


@hookimpl
def peft_check_values(site, p):
    sparse.check(site, p)


@hookimpl
def peft_linear(x, base, p, site):
    return base(x) + sparse.added(x, p, site)


@hookimpl
def peft_merge(weight, p):
    return sparse.merged(weight, p)
