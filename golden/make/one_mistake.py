"""Cases that show one mistake alone, where the others of their method show it together with another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import methods
from common import Case
from linear_methods import Variant, cases_of, known, on_layers


def cases() -> Iterator[Case]:
    yield from dora_of_scale_one()
    yield from vera_of_equal_shapes()


def dora_of_scale_one() -> Iterator[Case]:
    config = {"r": 2, "alpha": 2.0, "rslora": False, "dropout": 0.0}
    comment = "alpha is r, so that there is no scale to forget"
    yield from cases_of(
        known("dora"),
        Variant("unit-scale", config, comment=comment),
        Variant("unit-scale-bias", config, bias=True, flags="BaseBias", comment=comment),
    )


def vera_of_equal_shapes() -> Iterator[Case]:
    """As many key heads as heads, so that all targets are square."""
    sites = {f"model.layers.{layer}.self_attn.{name}_proj": (8, 8) for layer in range(2) for name in "qv"}
    (found,) = on_layers(known("vera"), {"r": 3, "dropout": 0.0}, sites)
    found = replace(
        found, label="square-", settings={"num_key_value_heads": 2}, comment="all targets have the same shape"
    )
    yield from methods.model_cases("llama", methods.SMALL_LLAMA, iter([found]))
