"""VB-LoRA: LoRA whose A and B are put together from one bank of vectors that all targets share: y = W x + b + B A x.

Li et al., 2024, arXiv:2405.15179, section 3: every piece of vector_length numbers of a row of A, or of a column of B,
is a mixture of the `topk` vectors with the largest logits, weighted by the softmax of these; only they have gradients.

First values: the bank uniform in +-0.02, logits normal of deviation 0.1, as the authors' code has them; they change the
model a little. Trained: the bank (num_vectors, vector_length), once; logits_A (r, in / vector_length, num_vectors) and
logits_B (out / vector_length, r, num_vectors), r num_vectors (in + out) / vector_length numbers a target.
"""

from dataclasses import dataclass

from refpeft import fused, hookimpl, ops
from refpeft.backend import xp_of
from refpeft.lowrank import Ranked
from refpeft.structured import IN, OUT, check_divides
from refpeft.tensor import Tensor

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Ranked):
    r: int = 4
    num_vectors: int = 256  # of the bank
    vector_length: int = 256  # divides both sides
    topk: int = 2
    dropout: float = 0.0  # rate, of what A reads, in training
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def __post_init__(self):
        if min(self.r, self.vector_length, self.topk) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("expected r, vector_length and topk of at least 1, and dropout from 0 to less than 1")
        if self.topk > self.num_vectors:
            raise ValueError(f"topk is {self.topk}, more than the {self.num_vectors} vectors of the bank")


@hookimpl
def peft_check(sites, cfg):
    check_divides("vblora: vector_length", cfg.vector_length, sites, IN, OUT)


@hookimpl
def peft_shared(cfg, rng):
    return {"bank": rng.uniform(-0.02, 0.02, (cfg.num_vectors, cfg.vector_length))}


@hookimpl
def peft_params(site, cfg, rng):
    out, width = (side // cfg.vector_length for side in site.shape)
    shapes = {"logits_A": (cfg.r, width, cfg.num_vectors), "logits_B": (out, cfg.r, cfg.num_vectors)}
    return {name: 0.1 * rng.standard_normal(shape) for name, shape in shapes.items()}


@hookimpl
def peft_linear(x, base, p, cfg, shared, train):
    A, B = _factors(p.logits_A, p.logits_B, shared.bank, cfg)
    dropped = train.dropout(x, cfg.dropout) if train else x
    return fused.addmm(base(x), ops.linear(dropped, A), B, alpha=1.0)


@hookimpl
def peft_merge(weight, p, cfg, shared):
    A, B = _factors(*map(Tensor, (p.logits_A, p.logits_B, shared.bank)), cfg)
    return weight + B.data @ A.data


def _factors(logits_A, logits_B, bank, cfg):
    A, B = (_mixtures(logits, bank, cfg.topk) for logits in (logits_A, logits_B))
    return A.reshape(cfg.r, -1), B.transpose(0, 2, 1).reshape(-1, cfg.r)


def _mixtures(logits, bank, topk):
    xp = xp_of(logits.data)
    least = xp.sort(logits.data, axis=-1)[..., -topk, None]  # logits that equal it count, too
    none = Tensor(xp.full((), -xp.inf, logits.dtype))
    return ops.softmax(ops.where(logits, none, condition=logits.data >= least)) @ bank
