"""MAM, mix-and-match adapters: prefix tuning in attention, and a scaled parallel adapter at the feed-forward part.

He et al., 2022, arXiv:2110.04366, section 4: a short prefix, as attention gains most from few numbers, and the larger
share of them at the feed-forward part, where y = f(x) + s (U relu(D x + d) + u). A recipe: the methods `prefix_tuning`
(with its network where `hidden` is not 0) and `parallel` do the work; see there for first values, which change the
model. Defaults are the paper's, with the width of the network in the authors' code.

Trained, with w = kv_heads head_dim: tokens w + hidden (w + 1) numbers, and in each layer 2 w (hidden + 1), or without
`hidden` 2 tokens w, and 2 size dim + size + dim. AdapterHub's MAMConfig starts real tokens at position 0, and its
adapter reads the residual stream before the normalization; here it reads what the part beside it reads.
"""

from dataclasses import dataclass

from refpeft import hookimpl

FAMILY = "hybrid"


@dataclass(frozen=True)
class Config:
    tokens: int = 30  # length of the prefix
    hidden: int = 800  # width of the network that gives it; 0: none, keys and values are trained themselves
    size: int = 512  # of the bottleneck
    scale: float = 4.0
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_companions(cfg):
    return {
        "prefix_tuning": {"tokens": cfg.tokens, "hidden": cfg.hidden, "layers": cfg.layers},
        "parallel": {"size": cfg.size, "scale": cfg.scale, "layers": cfg.layers},
    }
