"""QDoRA: DoRA on quantized weights: y = (m / |V|) V x + b, V = Q + s B A, Q the frozen weight as it is decoded.

Turgutlu et al., 2024, https://www.answer.ai/posts/2024-04-26-fsdp-qdora-llama3.html: QLoRA (arXiv:2305.14314) with DoRA
(arXiv:2402.09353) in place of LoRA. A recipe: it brings the method `dora` along, with these options, and wants a
quantizer, whichever. Its files are those of DoRA.

First values, which leave the quantized model as it is: those of `dora`, m the norms of Q's rows.
Trained: A (r, in), B (out, r) and m (out,), r (in + out) + out numbers a target.
"""

from dataclasses import asdict, dataclass, field

from refpeft import RefpeftError, hookimpl
from refpeft.lowrank import Scaled
from refpeft.targets import select

FAMILY = "reparametrisation"


@dataclass(frozen=True)
class Config(Scaled):
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # rate, in training
    rslora: bool = False  # scale by alpha / sqrt(r)
    rank_pattern: dict[str, int] = field(default_factory=dict)  # r for names that end in the key, a regular expression
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # alpha, likewise
    targets: tuple[str, ...] | str = ("@q", "@v")
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_check(sites, cfg):
    for site in select(sites, cfg, lambda site: site.kind == "linear"):
        if not site.quantized:
            raise RefpeftError(f"qdora: {site.name} is dense: give a quantizer, such as nf4, or take dora")


@hookimpl
def peft_companions(cfg):
    return {"dora": asdict(cfg)}
