"""P-tuning: rows P before the token embeddings, given by a network: [P; E[ids]], P = MLP(LSTM(R)), or MLP(R).

Liu et al., 2021, arXiv:2103.10385, section 3.2. R (tokens, dim) is trained with the network. `encoder = "lstm"`: an
LSTM of two layers in both directions, then two linear layers with ReLU between them, as in the authors' code (there,
rows also stand between parts of the text; here all come first, as in PEFT). "mlp": three linear layers with ReLU, as in
PEFT by default. "none": P = R. A file in PEFT's form has P alone, and is read as "none". Positions as in prompt_tuning.

First values, torch's, with which the model is changed at the start: R standard normal, the LSTM uniform in +-1 /
sqrt(hidden), linear layers in +-1 / sqrt(inputs). Trained, h = hidden: tokens dim numbers, and with "mlp" h (dim + 1) +
h (h + 1) + dim (h + 1), with "lstm" 8 h (dim + h + 2) + 8 h (3 h + 2) + 2 h (2 h + 1) + dim (2 h + 1).
"""

from dataclasses import dataclass
from typing import Literal

from refpeft import hookimpl
from refpeft.prompts import check_tokens, encoded, lstm_values, mlp_values, with_rows

FAMILY = "soft prompt"


@dataclass(frozen=True)
class Config:
    tokens: int = 20  # how many rows
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    hidden: int = 0  # width of the MLP, or of the LSTM in each direction; 0: dim, or dim / 2, as the authors have it
    dropout: float = 0.0  # rate, between the layers of the LSTM, in training
    head_reads: Literal["text", "prompt"] = "text"  # of an encoder that classifies; PEFT: "prompt", the first row
    targets: tuple[str, ...] | str = ("@embed",)
    only_with = (("dropout", "encoder", "lstm"),)

    def __post_init__(self):
        check_tokens(self)
        if self.hidden and self.encoder == "none":
            raise ValueError('hidden has no effect with encoder = "none": leave it out')


@hookimpl
def peft_params(site, cfg, rng):
    dim = site.shape[1]
    values = {"rows": rng.standard_normal((cfg.tokens, dim))}
    if cfg.encoder == "mlp":
        hidden = cfg.hidden or dim
        values |= mlp_values(rng, (dim, hidden, hidden, dim))
    elif cfg.encoder == "lstm":
        hidden = cfg.hidden or dim // 2
        values |= lstm_values(rng, dim, hidden) | mlp_values(rng, (2 * hidden, 2 * hidden, dim))
    return values


@hookimpl
def peft_embedding(ids, base, p, cfg, train):
    return with_rows(encoded(p, cfg.dropout, train), base(ids))
