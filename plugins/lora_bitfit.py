"""LoRA beside every linear layer that it is pointed at, with all biases trained: y = W x + b + s B A x, b trained too.

The survey arXiv:2303.15647 has such pairs (reparametrisation with selection) among hybrids; LoRA is that of Hu et al.,
2021, arXiv:2106.09685, BitFit that of Ben Zaken et al., 2021, arXiv:2106.10199. A recipe: the methods `lora` and
`bitfit` do the work; see there for first values, which leave the model as it is. Models of Llama's kind have no biases:
`create` gives their linear layers some, which start at zero.

Trained: r (in + out) numbers a target of LoRA, and every bias, those of norms too.
"""

from dataclasses import dataclass

from refpeft import RefpeftError, hookimpl

FAMILY = "hybrid"


@dataclass(frozen=True)
class Config:
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # rate, of what A reads, in training
    create: bool = False  # add a bias to linear layers that have none
    lora: tuple[str, ...] | str = ("@q", "@v")  # the targets of LoRA
    biases: tuple[str, ...] | str = ("*",)  # those of BitFit
    layers: tuple[int, ...] | None = None  # numbers of the layers; none: all


@hookimpl
def peft_check(sites, cfg):
    if not cfg.create and all(site.bias is None for site in sites):
        raise RefpeftError(
            "lora_bitfit trains biases, and this model has none: set lora_bitfit.create = true to add them"
        )


@hookimpl
def peft_companions(cfg):
    lora = {"r": cfg.r, "alpha": cfg.alpha, "dropout": cfg.dropout, "targets": cfg.lora, "layers": cfg.layers}
    return {"lora": lora, "bitfit": {"create": cfg.create, "targets": cfg.biases, "layers": cfg.layers}}
