"""Diff pruning: W' = W + z w, where few of the gates z stay open: a sparse difference whose places are learned.

Guo et al., 2021, arXiv:2012.07463, section 3. First phase, before the run: of every number of the targets w is trained,
and log_alpha of a hard-concrete gate (refpeft.gates) drawn in every pass; `structured`, group gates a whole matrix too.
`l0` times the expected number of open gates, sum sigmoid(log_alpha) sigmoid(group) (the authors' code adds up the two),
is added to the loss. Second phase, the run: the largest |z w| of all targets are kept, and trained on. The first holds
some ten times the targets' numbers in memory; without `prune` it is the run, and all there is.

First values, which leave the model as it is: w zero, log_alpha and group `alpha`; the run starts from the largest z w.
Trained: values, share of all targets' numbers (without `prune` w and log_alpha (out, in), group (1,)).
"""

from dataclasses import dataclass, replace

from refpeft import gates, hookimpl, sparse

FAMILY = "selective"


@dataclass(frozen=True)
class Config:
    share: float = 0.005  # of the targets' numbers that is kept
    gated_steps: int | None = None  # of the first phase; none: as many as the run has
    gated_lr: float = 5e-5  # of w in the first phase, constant
    gate_rate: float = 2000.0  # learning rate of the gates, as a multiple of w's
    alpha: float = 5.0  # the larger, the later gates close
    l0: float = 1.25e-7  # penalty of an open gate
    structured: bool = True
    prune: bool = True
    targets: tuple[str, ...] | str = ("all-linear",)
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all
    only_with = (("share", "prune", True), ("gated_steps", "prune", True), ("gated_lr", "prune", True))

    def __post_init__(self):
        if not 0 < self.share <= 1 or self.l0 < 0 or (self.gated_steps is not None and self.gated_steps < 1):
            raise ValueError("expected 0 < share <= 1, l0 of 0 or more, gated_steps of 1 or more")


@hookimpl
def peft_params(site, sites, cfg):
    if cfg.prune:
        return sparse.spread(site, sites, cfg.share)
    return gates.first_values(site.shape, cfg.alpha, cfg.structured)


@hookimpl
def peft_survey(sites, cfg, survey):
    if cfg.prune:
        first, steps = replace(cfg, prune=False), cfg.gated_steps or survey.steps
        with survey.trained("diff_pruning", first, steps, cfg.gated_lr) as gated:
            own = [layer for layer in gated.layers if layer.part is gated.parts[0]]  # a task's head is trained beside
            changes = {layer.site.name: gates.difference(layer.arrays) for layer in own}
        return sparse.largest(changes, sparse.how_many(sites, cfg.share), keep=True)


@hookimpl
def peft_check_values(site, p, cfg):
    if cfg.prune:
        sparse.check(site, p)


@hookimpl
def peft_penalty(p, cfg):
    return None if cfg.prune else cfg.l0 * gates.expected_open(p)


@hookimpl
def peft_rates(cfg):
    return {} if cfg.prune else dict.fromkeys(("log_alpha", "group")[: 1 + cfg.structured], cfg.gate_rate)


@hookimpl
def peft_linear(x, base, p, cfg, site, train):
    return base(x) + (sparse.added(x, p, site) if cfg.prune else gates.added(x, p, train))


@hookimpl
def peft_merge(weight, p, cfg):
    return sparse.merged(weight, p) if cfg.prune else weight + gates.difference(p)
