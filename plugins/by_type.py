"""Layers of chosen types are trained, every weight and bias of theirs, in place of the frozen one; the rest is frozen.

Selection by type: the survey arXiv:2303.15647, section on selective methods; for the attention layers alone Touvron et
al., 2022, arXiv:2203.09795, section 4. Types: attention (queries, keys, values, output, norms of queries and keys, what
positions say there), mlp, norm, embedding (of tokens, positions, distances, texts of a pair), head. For single layers,
use `full` with targets.

First values: the frozen ones. Trained: as many numbers as the chosen layers have. A head that is tied to the token
embedding stays one parameter with it.
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import RefpeftError, hookimpl
from refpeft.targets import matches

FAMILY = "selective"

ROLES = {
    "attention": {"q", "k", "v", "o", "qk_norm", "pos_q", "pos_k", "relative"},
    "mlp": {"gate", "up", "down"},
    "norm": {"norm"},
    "embedding": {"embed", "position", "distance", "type", "embed_proj"},
    "head": {"head"},
}


@dataclass(frozen=True)
class Config:
    types: tuple[Literal["attention", "mlp", "norm", "embedding", "head"], ...] = ("attention",)
    targets: tuple[str, ...] | str = ("*",)  # among these
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all

    def chooses(self, site):
        return any(is_of(name, site) for name in self.types)


def is_of(name, site):
    return any(matches(f"@{role}", site) for role in ROLES[name])


@hookimpl
def peft_check(sites, cfg):
    for name in cfg.types:
        if not any(is_of(name, site) for site in sites):
            raise RefpeftError(f"by_type: none of the {len(sites)} layers that it was pointed at is of type {name!r}")
    names = {site.name for site in sites if cfg.chooses(site)}
    for site in sites:
        if site.tied and cfg.chooses(site) and site.tied not in names:
            raise RefpeftError(f"by_type: {site.name} shares its weight with {site.tied}: choose 'embedding' too")


@hookimpl
def peft_params(site, cfg, weight, bias):
    if not cfg.chooses(site):
        return None
    return {"weight": f"{site.tied}.weight" if site.tied else weight} | ({} if bias is None else {"bias": bias})


@hookimpl
def peft_linear(x, base, p):
    return base(x, **vars(p))


@hookimpl
def peft_embedding(ids, base, p):
    return base(ids, **vars(p))


@hookimpl
def peft_norm(x, base, p):
    return base(x, **vars(p))


@hookimpl
def peft_merge(p):
    return vars(p)
