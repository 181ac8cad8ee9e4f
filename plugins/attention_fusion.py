"""Attention fusion: the head reads a mixture of each token's hidden states of all layers; a learned query weighs them.

Cao et al., 2022, https://aclanthology.org/2022.findings-naacl.64, from its abstract, and from code of others that names
its equations 1 and 2: a_j = softmax over j of q . v_j, and the task's head reads the sum of a_j v_j; v_0 ... v_n are a
token's normalized hidden states, what the first layer reads and what each gives. Here v = h / sqrt(mean(h^2) + eps), so
that with all weight on the last one the model is as it was; the sum stands in place of what the last layer gives,
before the model's last normalization, or is added to it (`output = "add"`).

The states are constants, of which the tape has one a layer; nothing runs back through the model. Of T5 they are the
decoder's, which its head reads. First values: q zero, so that all layers count alike, which changes the model. Trained:
query (dim,), dim numbers in all.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refpeft import hookimpl, ops
from refpeft.side import EPS
from refpeft.targets import check_layers, stacks

FAMILY = "additive"


@dataclass(frozen=True)
class Config:
    output: Literal["replace", "add"] = "replace"  # of what the last layer gives
    targets: tuple[str, ...] | str = ("@block_out",)


@hookimpl
def peft_check(sites, cfg):
    check_layers("attention_fusion", cfg, stacks(sites)[-1])


@hookimpl
def peft_params(site, sites):
    if site not in stacks(sites)[-1]:
        return None
    return {"query": np.zeros(site.shape[0])} if site is sites[-1] else {}


def normalized(h):
    return h * (ops.mean(h * h, axis=-1, keepdims=True) + EPS) ** -0.5


@hookimpl
def peft_block(x, base, p, cfg, site, sites, memo):
    h = base(x)
    if site is stacks(sites)[-1][0]:
        memo.states = [normalized(x)]
    memo.states.append(normalized(h))
    if site is not sites[-1]:
        return h
    v = ops.stack(*memo.states, axis=2)  # (batch, time, layers + 1, dim)
    a = ops.softmax(v @ p.query.reshape(-1, 1), axis=2)
    fused = (a.transpose(0, 1, 3, 2) @ v)[:, :, 0]
    return fused if cfg.output == "replace" else h + fused
