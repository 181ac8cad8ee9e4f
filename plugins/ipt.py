"""Intrinsic prompt tuning: a prompt that a fixed decoder makes of a few numbers: P = W2 tanh(W1 z + b1) + b2; [P; E].

Qin et al., 2021, arXiv:2110.07867, section 3. The decoder is one half of an auto-encoder of the `prompts` of other
tasks, X: Enc(X) = U X + u, fitted by Adam so that the mean square of Dec(Enc(X)) - X becomes small (without the tasks'
own losses, for which their data would be needed); of as many tasks as can be had: the authors have 100. Without
`prompts` the decoder is random, and the subspace is no better than any other.

First values, which change the model: z normal of deviation 0.02, as in the authors' code; W1, b1, W2, b2 (and U, u
before the fit) uniform in +-1 / sqrt(their inputs). The decoder is constant and kept with the adapter: (tokens dim)
(hidden + 1) + hidden (d + 1) numbers. Trained: z (d,), d numbers in all.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import hookimpl
from refpeft.prompts import check_tokens, with_rows
from refpeft.tensor import Tensor
from refpeft.transfer import decoded, decoder_values, fitted_decoder, prompt

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    d: int = 250  # how many numbers are trained; 5 to 250 in the paper
    tokens: int = 20  # how many rows
    hidden: int = 768  # width of the decoder
    prompts: tuple[str, ...] = ()  # adapter directories with prompts of other tasks, of as many tokens
    fit_steps: int = 200  # of Adam, for the auto-encoder
    fit_lr: float = 1e-3
    targets: tuple[str, ...] | str = ("@embed",)

    def __post_init__(self):
        check_tokens(self)
        if min(self.d, self.hidden, self.fit_steps) < 1 or self.fit_lr <= 0:
            raise ValueError("expected d, hidden and fit_steps of at least 1, and fit_lr of more than 0")


@hookimpl
def peft_params(site, cfg, rng):
    decoder = decoder_values(rng, cfg.d, cfg.hidden, cfg.tokens * site.shape[1])
    return {"z": 0.02 * rng.standard_normal(cfg.d)} | {name: Tensor(array) for name, array in decoder.items()}


@hookimpl
def peft_fit(site, cfg, rng):
    if not cfg.prompts:
        return None
    rows = np.stack([prompt(source, site, cfg.tokens).reshape(-1) for source in cfg.prompts])
    return fitted_decoder(rng, rows, cfg.d, cfg.hidden, cfg.fit_steps, cfg.fit_lr)


@hookimpl
def peft_embedding(ids, base, p, cfg, site):
    rows = decoded(p.z.reshape(1, cfg.d), p)
    return with_rows(rows.reshape(cfg.tokens, site.shape[1]), base(ids))
