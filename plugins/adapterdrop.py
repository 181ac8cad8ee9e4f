"""Bottlenecks that the first n layers go without: y + U f(D y + d) + u from layer n on, y the layer's output.

Rücklé et al., 2021, arXiv:2010.11918, section 3. `robust` training draws n anew for every step, from 0 up to the last
adapted layer, so that one adapter serves with any n; afterwards n is `drop`. Without it the first `drop` layers have no
adapters at all (specialized training). Below the first adapter nothing runs backwards, which is what makes it fast. In
T5, n is of the encoder's and of the decoder's layers.

The adapters are those of `pfeiffer`. First values: D and U normal of deviation 0.02, d and u zero: nearly the identity.
Trained: down (size, dim), down_bias, up (dim, size), up_bias: 2 size dim + size + dim numbers a layer.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import RefpeftError, hookimpl
from refpeft.bottleneck import behind_layer, bottleneck, check_size, normal_values
from refpeft.targets import check_runs

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    size: int = 64  # of the bottleneck
    drop: int = 0  # n: how many layers go without, in training only where it is not robust
    robust: bool = True  # train with a random n
    activation: Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"] = "relu"
    init_std: float = 0.02  # of the first weights
    targets: tuple[str, ...] | str = ("@block_out", "@mlp_norm")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        check_size(self)
        if self.drop < 0 or not (self.drop or self.robust):
            raise ValueError(f"drop is {self.drop}: expected 1 or more layers without adapters, or robust = true")


@hookimpl
def peft_check(sites, cfg):
    check_runs("adapterdrop", sites)
    last = max(site.index for site in sites)
    if cfg.drop > last:
        raise RefpeftError(
            f"adapterdrop: drop is {cfg.drop}, and the last of these layers is number {last}: expected {last} or less"
        )


@hookimpl
def peft_params(site, sites, cfg, rng):
    if not behind_layer(site, sites) or (site.index < cfg.drop and not cfg.robust):
        return None
    return normal_values(rng, cfg.size, site.shape[0], cfg.init_std)


@hookimpl
def peft_block(x, base, p, cfg, site, sites, train):
    h = base(x)
    return h if skipped(cfg, site, sites, train) else h + bottleneck(h, p, cfg.activation)


@hookimpl
def peft_norm(x, base, p, cfg, site, sites, train):
    h = base(x)
    return h if skipped(cfg, site, sites, train) else base(x + bottleneck(h, p, cfg.activation))


def skipped(cfg, site, sites, train):
    return site.index < (train.draw(1 + max(other.index for other in sites)) if train and cfg.robust else cfg.drop)
