"""Several methods at once on tiny models: each part from its own equation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import equations
import methods
import prompts
import torch
from bottlenecks import bottleneck, parallel_value
from common import Case, Draw, Tensors
from equations import houlsby, lora, prefix
from method_sites import site_case
from methods import SMALL_GPT2, SMALL_LLAMA, Adapted
from reference import Advice
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
TOKENS, HIDDEN = prompts.TOKENS, prompts.HIDDEN


class Family:
    """Names and sizes of a tiny model's places."""

    def __init__(self, name: str, layers: int = 2):
        llama = name == "llama"
        self.name, self.settings = name, SMALL_LLAMA | {"num_hidden_layers": layers} if llama else SMALL_GPT2
        self.layers = [f"{'model.layers' if llama else 'transformer.h'}.{i}" for i in range(layers)]
        self.attention = "self_attn" if llama else "attn"
        self.kv = (1, 4) if llama else (2, 4)
        parts = {"q_proj": 8, "v_proj": 4} if llama else {"c_attn": 24}
        self.low_rank = {f"{self.attention}.{part}": out for part, out in parts.items()}

    def biases(self, layer: str) -> Shapes:
        """Every bias of a layer; of Llama those that it has with attention_bias and mlp_bias."""
        if self.name == "llama":
            widths = {f"self_attn.{p}_proj": n for p, n in zip("qkvo", (8, 4, 4, 8), strict=True)}
            widths |= {"mlp.gate_proj": 12, "mlp.up_proj": 12, "mlp.down_proj": 8}
        else:
            widths = {"ln_1": 8, "ln_2": 8, "attn.c_attn": 24, "attn.c_proj": 8, "mlp.c_fc": 12, "mlp.c_proj": 8}
        return {f"{layer}.{part}.bias": (n,) for part, n in widths.items()}

    def with_biases(self) -> dict:
        return {"attention_bias": True, "mlp_bias": True} if self.name == "llama" else {}


def cases() -> Iterator[Case]:
    yield from gated_sites()
    for name in ("llama", "gpt2"):
        family = Family(name)
        for hybrid in (mam, lora_bitfit, s4, unipelt):
            yield from methods.model_cases(name, family.settings, iter([hybrid(family)]))
    three = Family("llama", layers=3)
    found = methods.model_cases("llama", three.settings, iter([s4(three)]))
    yield from (case for case in found if case.at == "model")


# ---- parts -----------------------------------------------------------------------------------------------------


def of(t: Tensors, place: str) -> Tensors:
    """The tensors of one place by their letters, and those that all share."""
    own = {name.rpartition(".")[2]: tensor for name, tensor in t.items() if name.rpartition(".")[0] == place}
    return own | {name: tensor for name, tensor in t.items() if name.startswith("shared.")}


def placed(place: str, letters: Shapes) -> Shapes:
    return {f"{place}.{letter}": shape for letter, shape in letters.items()}


def bottleneck_letters(size: int) -> Shapes:
    return {"down": (size, 8), "down_bias": (size,), "up": (8, size), "up_bias": (8,)}


# ---- recipes ---------------------------------------------------------------------------------------------------


def mam(family: Family) -> Adapted:
    equations.PAPERS["mam"] = "arXiv:2110.04366, section 4"
    options = {"tokens": TOKENS, "hidden": HIDDEN, "size": 3, "scale": 4.0}
    trained = prompts.shared_shapes(HIDDEN, family.kv)
    for layer in family.layers:
        trained |= placed(f"{layer}.{family.attention}.attend", prompts.own_shapes(HIDDEN, family.kv))
        trained |= placed(f"{layer}.mlp_out", bottleneck_letters(3))

    def advice(t: Tensors) -> Advice:
        def attend(place: str) -> Callable:
            return lambda f, q, k, v: prefix(f, q, k, v, *prompts.keys_and_values(t, f"{place}.", family.kv))

        def beside(place: str) -> Callable:
            return lambda f, x: parallel_value(f, x, of(t, place), {"scale": 4.0, "activation": "relu"})

        places = [f"{layer}.{family.attention}.attend" for layer in family.layers]
        parts = [f"{layer}.mlp_out" for layer in family.layers]
        return {place: attend(place) for place in places} | {place: beside(place) for place in parts}

    return Adapted(
        "mam",
        options,
        trained,
        advice,
        first_position=TOKENS,
        flags="PrefixPositions PrefixVisible PrefixNetwork ParallelInput ParallelScale",
        peft=False,
        comment="a prefix that a network gives, and an adapter beside the feed-forward part",
    )


def lora_bitfit(family: Family) -> Adapted:
    equations.PAPERS["lora_bitfit"] = "arXiv:2106.09685; arXiv:2106.10199"
    sites = {f"{layer}.{part}": out for layer in family.layers for part, out in family.low_rank.items()}
    trained = {f"{s}.{letter}": shape for s, out in sites.items() for letter, shape in (("A", (2, 8)), ("B", (out, 2)))}
    for layer in family.layers:
        trained |= family.biases(layer)
    if family.name == "gpt2":
        trained["transformer.ln_f.bias"] = (8,)

    def advice(t: Tensors) -> Advice:
        return {s: lambda f, x, s=s: lora(f, x, t[f"{s}.A"], t[f"{s}.B"], 3.0) for s in sites}

    return Adapted(
        "lora_bitfit",
        {"r": 2, "alpha": 6.0},
        trained,
        advice,
        flags="Scaling BaseBias",
        peft=False,
        settings=family.with_biases(),
        comment="LoRA at queries and values, and every bias that the model has",
    )


def s4(family: Family) -> Adapted:
    """Two groups, the first of one layer: adapters, LoRA and prefixes; then biases, prefixes and LoRA."""
    equations.PAPERS["s4"] = "arXiv:2301.01821"
    first, *others = family.layers
    groups = [1, len(others)]
    options = {"strategies": ["ALP", "BPL"], "groups": groups, "size": 3, "r": 2, "alpha": 6.0, "tokens": TOKENS}
    adapters = [f"{first}.{place}" for place in ("attn_out", "mlp_out")]
    prefixes = [f"{layer}.{family.attention}.attend" for layer in family.layers]
    sites = {f"{layer}.{part}": out for layer in family.layers for part, out in family.low_rank.items()}
    trained = {name: shape for place in adapters for name, shape in placed(place, bottleneck_letters(3)).items()}
    trained |= {f"{s}.{letter}": shape for s, o in sites.items() for letter, shape in (("A", (2, 8)), ("B", (o, 2)))}
    trained |= {f"{p}.{letter}": (family.kv[0], TOKENS, 4) for p in prefixes for letter in ("keys", "values")}

    def advice(t: Tensors) -> Advice:
        def behind(place: str) -> Callable:
            letters = [t[f"{place}.{letter}"] for letter in ("down", "down_bias", "up", "up_bias")]
            return lambda f, x: houlsby(f, x, *letters, "gelu_tanh")

        def attend(place: str) -> Callable:
            return lambda f, q, k, v: prefix(f, q, k, v, t[f"{place}.keys"], t[f"{place}.values"])

        low_rank = {s: lambda f, x, s=s: lora(f, x, t[f"{s}.A"], t[f"{s}.B"], 3.0) for s in sites}
        return low_rank | {place: behind(place) for place in adapters} | {place: attend(place) for place in prefixes}

    for layer in others:
        trained |= family.biases(layer)
    return Adapted(
        "s4",
        options,
        trained,
        advice,
        first_position=TOKENS,
        flags="LayerGroups PrefixPositions",
        peft=False,
        settings=family.with_biases(),
        comment="the first layer has adapters, LoRA and a prefix, the "
        + ("second biases, a prefix and LoRA" if groups == [1, 1] else "others biases, prefixes and LoRA"),
        label="" if groups == [1, 1] else "groups-",
    )


# ---- gates -----------------------------------------------------------------------------------------------------

UNIPELT = {"r": 2, "tokens": TOKENS, "hidden": HIDDEN, "size": 3}


def gate(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    """arXiv:2110.07577, section 3, of each token by itself: (batch, time, 1)."""
    return torch.sigmoid(functional.linear(x, t["gate"], t["gate_bias"]))


def gated_lora(f: Callable, x: torch.Tensor, t: Tensors) -> torch.Tensor:
    return f(x) + gate(x, t) * (x @ t["A"].mT @ t["B"].mT)


def gated_adapter(f: Callable, x: torch.Tensor, t: Tensors) -> torch.Tensor:
    h = f(x)
    return h + gate(h, t) * bottleneck(h, t, {"activation": "relu"})


def gated_prefix(f: Callable, q, k, v, gates: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """For each query by itself, the prefix as its gate makes it."""
    rows = []
    for i in range(q.shape[2]):
        gated = (
            torch.cat((gates[:, i, :, None, None] * pair.expand(len(q), *pair.shape), text), dim=2)
            for pair, text in ((keys, k), (values, v))
        )
        rows.append(f(q, *gated)[:, :, i])
    return torch.stack(rows, dim=2)


def gated_sites() -> Iterator[Case]:
    equations.PAPERS["unipelt"] = "arXiv:2110.07577, section 3; gates of each token"
    letters = {"gate": (1, 6), "gate_bias": (1,)}
    low_rank = letters | {"A": (2, 6), "B": (5, 2)}
    adapter = letters | {"down": (3, 6), "down_bias": (3,), "up": (6, 3), "up_bias": (6,)}
    for at, out, trained, value in (
        ("linear", 5, low_rank, gated_lora),
        ("conv1d", 5, low_rank, gated_lora),
        ("block", 6, adapter, gated_adapter),
    ):
        draw = Draw(f"unipelt-{at}-plain")
        inputs = {
            "x": draw.normal(2, 3, 6),
            "weight": draw.normal(*((6, out) if at == "conv1d" else (out, 6)), scale=0.4),
        }
        inputs |= {letter: draw.normal(*shape, scale=0.5) for letter, shape in trained.items()}

        def forward(x, weight, value=value, at=at, **letters):
            return value(lambda x: x @ (weight if at == "conv1d" else weight.mT), x, letters)

        yield site_case(
            "unipelt",
            at,
            "plain",
            inputs,
            forward,
            " ".join(("x", *trained)),
            config=UNIPELT,
            flags="GateInput GatePerToken" + " TransposedWeight" * (at == "conv1d"),
            comment="its gate reads what x @ weight.T gives" if at == "block" else "its gate reads x",
        )


def unipelt(family: Family) -> Adapted:
    trained = prompts.shared_shapes(HIDDEN, family.kv)
    one = {"gate": (1, 8), "gate_bias": (1,)}
    for layer in family.layers:
        for part, out in family.low_rank.items():
            trained |= placed(f"{layer}.{part}", one | {"A": (2, 8), "B": (out, 2)})
        trained |= placed(f"{layer}.{family.attention}.attend", prompts.own_shapes(HIDDEN, family.kv))
        trained |= placed(f"{layer}.attn_out", one) | placed(f"{layer}.mlp_out", one | bottleneck_letters(3))

    def advice(t: Tensors) -> Advice:
        gates: Tensors = {}

        def layer_advice(layer: str) -> Advice:
            place = f"{layer}.{family.attention}.attend"

            def around(f, x):
                gates[layer] = gate(x, of(t, f"{layer}.attn_out"))
                return f(x)

            def attend(f, q, k, v):
                pair = prompts.keys_and_values(t, f"{place}.", family.kv)
                return gated_prefix(f, q, k, v, gates[layer], *pair)

            def behind(f, x):
                return gated_adapter(f, x, of(t, f"{layer}.mlp_out"))

            low_rank = {
                f"{layer}.{part}": lambda f, x, s=f"{layer}.{part}": gated_lora(f, x, of(t, s))
                for part in family.low_rank
            }
            return low_rank | {f"{layer}.attn_out": around, place: attend, f"{layer}.mlp_out": behind}

        return layer_advice(family.layers[0]) | layer_advice(family.layers[1])

    return Adapted(
        "unipelt",
        UNIPELT,
        trained,
        advice,
        first_position=TOKENS,
        flags="GateInput GatePerToken GateAttention PrefixPositions PrefixNetwork",
        peft=False,
        comment="LoRA at queries and values, a prefix, and an adapter behind the feed-forward part, with a gate each",
    )
