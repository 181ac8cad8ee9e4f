"""Methods that train a part of the model's own numbers: layers, types of layers, rows, places, tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import equations
import methods
import numpy as np
import torch
from common import Case, Draw, Tensors
from linear_methods import Equation, Variant, cases_of, shapes_of
from method_sites import site_case
from models import weight_shapes
from ops import hard_concrete
from torch.nn import functional

FAMILIES = (("llama", methods.SMALL_LLAMA), ("gpt2", methods.SMALL_GPT2))


def cases() -> Iterator[Case]:
    equations.PAPERS |= {
        "top_layers": "arXiv:2101.00190, section 5.2 (FT-Top2); arXiv:1911.03090",
        "by_type": "arXiv:2303.15647, selective methods",
        "far": "arXiv:2205.01541: freeze and reconfigure",
        "trainable_tokens": "as PEFT: rows in place of frozen ones",
    }
    yield from parts_of_models()
    yield from full_at_places()
    yield from rows()
    yield from shira()
    yield from chosen_by_data("fish_mask", "arXiv:2111.09839", {"share": 0.25})
    yield from chosen_by_data("lt_sft", "arXiv:2110.07560, section 3", {"share": 0.25, "l1": 0.3}, penalty=mean_change)
    yield from diff_pruning()
    yield from far()
    yield from trainable_tokens()


# ---- whole weights ---------------------------------------------------------------------------------------------


def parts_of_models() -> Iterator[Case]:
    for family, settings in FAMILIES:
        last, attention = {
            "llama": ("model.layers.1.", "self_attn."),
            "gpt2": ("transformer.h.1.", "attn."),
        }[family]
        shapes = weight_shapes(family, settings)
        in_the_last = {name: shape for name, shape in shapes.items() if name.startswith(last)}
        of_attention = {name: shape for name, shape in shapes.items() if attention in name}
        yield from methods.model_cases(
            family,
            settings,
            iter(
                (
                    _trained("top_layers", {"count": 1}, in_the_last, "the last layer; what follows it is frozen"),
                    _trained("by_type", {"types": ["attention"]}, of_attention, "queries, keys, values and output"),
                )
            ),
        )


def _trained(method: str, options: dict, shapes: dict, comment: str) -> methods.Adapted:
    return methods.Adapted(method, options, shapes, lambda t: {}, peft=False, comment=comment)


def full_at_places() -> Iterator[Case]:
    """What is trained has the names that it has in models; weight and bias are the frozen ones, for the penalty."""
    config = {"l1": 0.3}
    places: dict[str, tuple[tuple[int, ...], Callable]] = {
        "linear": ((6, 4), functional.linear),
        "norm": ((4,), lambda x, weight, bias: functional.layer_norm(x, (4,), weight, bias, 1e-5)),
        "embedding": ((7, 4), lambda ids, weight, bias: weight[ids.long()]),
    }
    for at, (shape, f) in places.items():
        draw = Draw(f"full-{at}-penalty")
        reads = {"ids": np.int32([[3, 0, 3], [6, 1, 2]])} if at == "embedding" else {"x": draw.normal(2, 3, 4)}
        weights = {"weight": draw.normal(*shape)} | ({} if at == "embedding" else {"bias": draw.normal(shape[0])})
        trained = {f"site.{name}": array + draw.normal(*array.shape, scale=0.3) for name, array in weights.items()}

        def forward(weight, bias=None, f=f, **t):
            x = t["ids"] if "ids" in t else t["x"]
            return f(x, t["site.weight"], t.get("site.bias"))

        yield site_case(
            "full",
            at,
            "penalty",
            reads | weights | trained,
            forward,
            " ".join(("x",) * ("x" in reads) + tuple(trained)),
            config=config | ({"norm": "layer_norm", "eps": 1e-5} if at == "norm" else {}),
            merged=lambda t: {
                f"merged.{name}": t[f"site.{name}"] for name in ("weight", "bias") if f"site.{name}" in t
            },
            penalty=lambda t: config["l1"] * (t["site.weight"] - t["weight"]).abs().mean(),
            flags="PenaltyOfChange",
            comment="site.weight stands in for weight, and the penalty is of what it differs by",
        )


# ---- numbers of a weight ---------------------------------------------------------------------------------------


def changed_rows(weight: torch.Tensor, t: Tensors, config: dict) -> torch.Tensor:
    selection = torch.eye(len(weight), dtype=weight.dtype)[config["rows"]]
    return weight + selection.mT @ t["change"]


def rows() -> Iterator[Case]:
    config = {"rows": [3, 1]}
    equation = Equation(
        "rows",
        "arXiv:2303.15647, selective methods",
        lambda config, out, inp: {"change": (len(config["rows"]), inp)},
        lambda f, x, weight, t, config: f(x) + x @ (changed_rows(weight, t, config) - weight).mT,
        merged=changed_rows,
        flags="RowsAreOutputs",
    )
    yield from cases_of(equation, *shapes_of(config), models=config)


def scattered(weight: torch.Tensor, t: Tensors, config: dict) -> torch.Tensor:
    row, column = t["indices"].long()
    return weight.index_put((row, column), t["values"], accumulate=True)


def places(draw: Draw, config: dict, out: int, inp: int) -> dict[str, np.ndarray]:
    chosen = np.sort(draw.generator.permutation(out * inp)[: config["r"] * (out + inp)])
    return at(chosen, inp)


def at(places: np.ndarray, inp: int) -> dict[str, np.ndarray]:
    return {"indices": np.stack(np.divmod(places, inp)).astype(np.int32)}


def shira() -> Iterator[Case]:
    config = {"r": 1}
    equation = Equation(
        "shira",
        "arXiv:2406.13175, section 3; as many as in PEFT",
        lambda config, out, inp: {"values": (config["r"] * (out + inp),)},
        lambda f, x, weight, t, config: f(x) + x @ (scattered(weight, t, config) - weight).mT,
        merged=scattered,
        constants=places,
        flags="SparseIndices",
    )
    square = Variant("square", config, out=5, inp=5, comment="indices are rows, then columns")
    yield from cases_of(equation, *shapes_of(config), square, models=config)


def mean_change(weight: torch.Tensor, t: Tensors, config: dict) -> torch.Tensor:
    return config["l1"] * (scattered(weight, t, config) - weight).abs().mean()


def chosen_by_data(method: str, source: str, config: dict, *only: Variant, **more: Callable) -> Iterator[Case]:
    """The places, which a method finds in the training data, are given."""

    def count(config: dict, out: int, inp: int) -> int:
        return round(config["share"] * out * inp)

    def chosen(draw: Draw, config: dict, out: int, inp: int) -> dict[str, np.ndarray]:
        return at(np.sort(draw.generator.permutation(out * inp)[: count(config, out, inp)]), inp)

    equation = Equation(
        method,
        source,
        lambda config, out, inp: {"values": (count(config, out, inp),)},
        lambda f, x, weight, t, config: f(x) + x @ (scattered(weight, t, config) - weight).mT,
        merged=scattered,
        constants=chosen,
        flags="SparseIndices",
        **more,
    )
    variants = only or (*shapes_of(config), Variant("square", config, out=5, inp=5))
    yield from cases_of(equation, *variants, models=None if only else config)


# ---- a gated difference ----------------------------------------------------------------------------------------


def diff_pruning() -> Iterator[Case]:
    """The first phase, in which gates are trained; and the second, with places that are given."""

    def trained(config: dict, out: int, inp: int) -> dict[str, tuple[int, ...]]:
        group = {"group": (1,)} if config.get("structured", True) else {}
        return {"w": (out, inp), "log_alpha": (out, inp)} | group

    def started(letters: dict, weight: np.ndarray, config: dict) -> dict[str, np.ndarray]:
        return letters | {name: 3 * letters[name] for name in letters.keys() & {"log_alpha"}}

    source = "arXiv:2012.07463, section 3; arXiv:1712.01312"
    config = {"prune": False, "l0": 0.3, "gate_rate": 1.0}
    equation = Equation(
        "diff_pruning",
        source,
        trained,
        lambda f, x, weight, t, config: f(x) + x @ gated(t).mT,
        merged=lambda weight, t, config: weight + gated(t),
        penalty=open_gates,
        start=started,
        flags="HardConcrete",
    )
    alone = Variant("unstructured", config | {"structured": False}, comment="no gate of the whole matrix")
    yield from cases_of(equation, *shapes_of(config), alone, models=config)
    draw = Draw("diff_pruning-linear-drawn")
    inputs = {"x": draw.normal(2, 3, 4), "weight": draw.normal(6, 4), "bias": draw.normal(6), "w": draw.normal(6, 4)}
    inputs |= {"log_alpha": draw.normal(6, 4), "group": np.float32([0.7])}
    yield site_case(
        "diff_pruning",
        "linear",
        "drawn",
        inputs | {"u": draw.uniform(6, 4), "u_group": np.float32([0.4])},
        lambda x, weight, bias, u, u_group, **t: (
            functional.linear(x, weight, bias)
            + x @ (hard_concrete(t["log_alpha"], u) * t["w"]).mT * hard_concrete(t["group"], u_group)
        ),
        "x w log_alpha group",
        config=config,
        penalty=lambda t: open_gates(t["weight"], t, config),
        flags="HardConcrete",
        comment="in training: u and u_group are given",
    )
    yield from chosen_by_data("diff_pruning", source, {"share": 0.25}, Variant("pruned", {"share": 0.25}))


def gated(t: Tensors) -> torch.Tensor:
    """The difference outside of training: gates of u = 1 / 2."""
    half = torch.full_like(t["w"], 0.5)
    group = hard_concrete(t["group"], half[0, :1]) if "group" in t else 1
    return hard_concrete(t["log_alpha"], half) * t["w"] * group


def open_gates(weight: torch.Tensor, t: Tensors, config: dict) -> torch.Tensor:
    """The expected number of gates that are not 0, as log(1.5 / 1.5) = 0."""
    group = torch.sigmoid(t["group"]) if "group" in t else 1
    return config["l0"] * (torch.sigmoid(t["log_alpha"]) * group).sum()


FAR_SITES = {
    "llama": {f"model.layers.{i}.mlp.{name}_proj": (12, 8) for i in range(2) for name in ("gate", "up")},
    "gpt2": {f"transformer.h.{i}.mlp.c_fc": (12, 8) for i in range(2)},
}


def far() -> Iterator[Case]:
    """Nodes that learn and frozen ones; which, a method finds in the training data, is given."""
    config = {"share": 0.25}
    variants = (
        ("linear", "plain", (2, 3), False, "outputs 4 and 1 learn, in this order"),
        ("linear", "bias", (2, 3), True, "the nodes that learn have biases of their own"),
        ("linear", "two-axes", (4,), False, ""),
        ("conv1d", "plain", (2, 3), True, "weight is (in, out), change is not"),
    )
    for at, name, rows, bias, comment in variants:
        draw = Draw(f"far-{at}-{name}")
        shape = (4, 8) if at == "conv1d" else (8, 4)
        inputs = {"x": draw.normal(*rows, 4), "weight": draw.normal(*shape), "change": draw.normal(2, 4)}
        inputs |= {"bias": draw.normal(8), "shift": draw.normal(2)} if bias else {}

        def forward(x, weight, change, rows, bias=None, shift=None, at=at):
            weight = weight.mT if at == "conv1d" else weight
            return halves(x, weight, bias, change, shift, rows)

        def merged(t, at=at):
            weight = moved(t["weight"].mT if at == "conv1d" else t["weight"], t["change"], t["rows"])
            bias = {"merged.bias": moved(t["bias"], t["shift"], t["rows"])} if "bias" in t else {}
            return {"merged.weight": weight.mT if at == "conv1d" else weight, **bias}

        yield site_case(
            "far",
            at,
            name,
            inputs | {"rows": np.int32([4, 1])},
            forward,
            "x change shift" if bias else "x change",
            config=config,
            merged=merged,
            flags="RowsAreOutputs" + " TransposedWeight" * (at == "conv1d"),
            comment=comment,
        )
    for family, settings in FAMILIES:
        yield from methods.model_cases(family, settings, iter([_far_on(FAR_SITES[family], config, family == "gpt2")]))


def _far_on(sites: dict[str, tuple[int, int]], config: dict, bias: bool) -> methods.Adapted:
    count = {site: round(config["share"] * out) for site, (out, _) in sites.items()}
    shapes = {f"{site}.change": (count[site], inp) for site, (_, inp) in sites.items()}
    shapes |= {f"{site}.shift": (count[site],) for site in sites if bias}
    draw = Draw("far-constants")
    rows = {
        f"{site}.rows": draw.generator.permutation(out)[: count[site]].astype(np.int32)
        for site, (out, _) in sites.items()
    }

    def advice(t: Tensors) -> dict[str, Callable]:
        return {site: lambda f, x, site=site: at_site(t, site, x) for site in sites}

    def at_site(t: Tensors, site: str, x: torch.Tensor) -> torch.Tensor:
        weight = t[f"{site}.weight"].mT if bias else t[f"{site}.weight"]
        letters = (t.get(f"{site}.{name}") for name in ("bias", "change", "shift", "rows"))
        return halves(x, weight, *letters)

    targets = config | {"targets": list(sites)}
    return methods.Adapted("far", targets, shapes, advice, constants=rows, flags="RowsAreOutputs", peft=False)


def halves(x, weight, bias, change, shift, rows) -> torch.Tensor:
    """concat([x Wt^T + bt, x Wf^T + bf]), its outputs put into their old order."""
    learning = rows.long()
    frozen = torch.tensor([row for row in range(len(weight)) if row not in rows.tolist()])
    learned = functional.linear(x, weight[learning] + change, None if bias is None else bias[learning] + shift)
    still = functional.linear(x, weight[frozen], None if bias is None else bias[frozen])
    return torch.cat([learned, still], dim=-1)[..., torch.argsort(torch.cat([learning, frozen]))]


def moved(array: torch.Tensor, change: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return array.index_add(0, rows.long(), change)


# ---- tokens ----------------------------------------------------------------------------------------------------

TOKENS = {"token_indices": [5, 2]}


def replaced(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return table.index_put((torch.tensor(TOKENS["token_indices"]),), rows)


def trainable_tokens() -> Iterator[Case]:
    draw = Draw("trainable_tokens-embedding-plain")
    yield site_case(
        "trainable_tokens",
        "embedding",
        "plain",
        {"ids": np.int32([[5, 0, 5], [6, 1, 2]]), "weight": draw.normal(7, 5), "tokens": draw.normal(2, 5)},
        lambda ids, weight, tokens: replaced(weight, tokens)[ids.long()],
        "tokens",
        config=TOKENS,
        merged=lambda t: {"merged.weight": replaced(t["weight"], t["tokens"])},
        flags="RepeatedRows TokensReplace",
        comment="rows of the tokens 5 and 2, in this order",
    )
    for (family, settings), embed, head in zip(
        FAMILIES, ("model.embed_tokens", "transformer.wte"), ("lm_head", "transformer.wte"), strict=True
    ):
        yield from methods.model_cases(family, settings, iter([_tokens_of(embed, head)]))


def _tokens_of(embed: str, head: str) -> methods.Adapted:
    def advice(t: Tensors) -> dict[str, Callable]:
        table, other = (replaced(t[f"{name}.weight"], t[f"{name}.tokens"]) for name in (embed, head))
        return {embed: lambda f, ids: table[ids], "lm_head": lambda f, x: x @ other.mT}

    return methods.Adapted(
        "trainable_tokens",
        TOKENS,
        dict.fromkeys((f"{embed}.tokens", f"{head}.tokens"), (2, 8)),
        advice,
        flags="TokensReplace TokensOfHead",
        peft=False,
        comment="the head is tied and shares the rows" if embed == head else "the head has rows of its own",
    )
