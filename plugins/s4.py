"""S4: groups of layers, small ones at both ends, with methods of their own each: adapters, LoRA, prefixes, biases.

Chen et al., 2023, arXiv:2301.01821, section 4, found by search: four groups whose sizes grow and shrink (a spindle),
all of them trained, a method with as many numbers in each layer; the first group has adapters and LoRA, the second
adapters and prefixes, the third adapters, prefixes and biases, the last prefixes, biases and LoRA. The spindle here: a
sixth of the layers at each end, and the rest halved.

A recipe: `houlsby` (without its norms), `lora`, `prefix_tuning` and `bitfit` do the work; see there for first values,
which change the model, and what each trains of a layer; their numbers add up. Models of Llama's kind have no biases:
`create` gives their linear layers some. The encoder and the decoder of T5 are grouped alike.
"""

from collections import Counter
from dataclasses import dataclass

from refpeft import RefpeftError, hookimpl
from refpeft.targets import homes

FAMILY = "hybrid"


@dataclass(frozen=True)
class Config:
    strategies: tuple[str, ...] = ("AL", "AP", "APB", "PBL")  # of each group: A adapters, L LoRA, P prefixes, B biases
    groups: tuple[int, ...] = ()  # sizes, in layers from the first on; none: the spindle, of four groups
    size: int = 64  # of the adapters' bottlenecks
    r: int = 8  # of LoRA
    alpha: float = 16.0
    tokens: int = 20  # length of the prefixes
    create: bool = False  # add a bias to linear layers that have none

    def __post_init__(self):
        if not all(strategy and set(strategy) <= set("ALPB") for strategy in self.strategies):
            raise ValueError("expected strategies of the letters A (adapters), L (LoRA), P (prefixes) and B (biases)")
        if len(self.strategies) != (len(self.groups) or 4):
            raise ValueError(f"{len(self.strategies)} strategies are for as many groups: give `groups`, their sizes")


def layers_of(letter, sites, cfg):
    """The layers whose group has this letter."""
    stacks = Counter(home.rpartition(".")[0] for home in homes(sites))
    count = max(stacks.values())
    if min(stacks.values()) < count:
        raise RefpeftError(f"s4 groups layers by their numbers, and this model has stacks of {sorted(stacks.values())}")
    end, middle = max(1, count // 6), (count - 2 * max(1, count // 6)) // 2
    groups = cfg.groups or (end, middle, count - 2 * end - middle, end)
    starts = [sum(groups[:number]) for number in range(len(groups) + 1)]
    if starts[-1] != count or min(groups) < 1:
        raise RefpeftError(f"s4.groups is {list(groups)}: expected sizes that add up to the model's {count} layers")
    chosen = [number for number, strategy in enumerate(cfg.strategies) if letter in strategy]
    return [layer for number in chosen for layer in range(starts[number], starts[number + 1])]


@hookimpl
def peft_check(sites, cfg):
    with_biases = layers_of("B", sites, cfg)
    if with_biases and not cfg.create and all(site.bias is None for site in sites if site.index in with_biases):
        raise RefpeftError("s4 trains biases (B), and these layers have none: set s4.create = true to add them")


@hookimpl
def peft_companions(cfg, sites):
    layers = {letter: layers_of(letter, sites, cfg) for letter in "ALPB"}
    without = any(site.kind == "linear" and site.bias is None for site in sites if site.index in layers["B"])
    options = {
        "A": ("houlsby", {"size": cfg.size, "norms": False}),
        "L": ("lora", {"r": cfg.r, "alpha": cfg.alpha}),
        "P": ("prefix_tuning", {"tokens": cfg.tokens}),
        "B": ("bitfit", {"create": cfg.create and without}),
    }
    return {name: own | {"layers": layers[letter]} for letter, (name, own) in options.items() if layers[letter]}
