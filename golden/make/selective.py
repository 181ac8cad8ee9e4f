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

FAMILIES = (("llama", methods.SMALL_LLAMA), ("gpt2", methods.SMALL_GPT2))


def cases() -> Iterator[Case]:
    equations.PAPERS |= {
        "top_layers": "arXiv:2101.00190, section 5.2 (FT-Top2); arXiv:1911.03090",
        "by_type": "arXiv:2303.15647, selective methods",
        "trainable_tokens": "as PEFT: rows in place of frozen ones",
    }
    yield from parts_of_models()
    yield from rows()
    yield from shira()
    yield from chosen_by_data("fish_mask", "arXiv:2111.09839, section 3", {"share": 0.25})
    yield from chosen_by_data("lt_sft", "arXiv:2110.07560, section 3", {"share": 0.25, "l1": 0.3}, penalty=mean_change)
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
    yield from cases_of(equation, *shapes_of(config), square)


def mean_change(weight: torch.Tensor, t: Tensors, config: dict) -> torch.Tensor:
    return config["l1"] * (scattered(weight, t, config) - weight).abs().mean()


def chosen_by_data(method: str, source: str, config: dict, **more: Callable) -> Iterator[Case]:
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
    yield from cases_of(equation, *shapes_of(config), Variant("square", config, out=5, inp=5), models=config)


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
