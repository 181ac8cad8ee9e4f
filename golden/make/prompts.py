"""Soft prompts that a network gives: prefix tuning reparametrised, at attention and on models. The witness is PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import methods
import numpy as np
import peft
import peft_witness
import reference
import torch
from common import Case, Draw, Tensors
from equations import prefix
from method_sites import site_case
from methods import SMALL_GPT2, SMALL_LLAMA, Adapted
from torch.nn import functional

TOKENS, HIDDEN = 3, 5


def cases() -> Iterator[Case]:
    yield from prefixes_at_attention()
    for family, settings, attentions, kv in (
        ("llama", SMALL_LLAMA, [f"model.layers.{i}.self_attn.attend" for i in range(2)], (1, 4)),
        ("gpt2", SMALL_GPT2, [f"transformer.h.{i}.attn.attend" for i in range(2)], (2, 4)),
    ):
        yield from methods.model_cases(family, settings, prefixes_on_model(family, settings, attentions, kv))


# ---- keys and values -------------------------------------------------------------------------------------------


def shared_shapes(kv: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    width = kv[0] * kv[1]
    return {"shared.rows": (TOKENS, width), "shared.inner": (HIDDEN, width), "shared.inner_bias": (HIDDEN,)}


def own_shapes(kv: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    width = 2 * kv[0] * kv[1]
    return {"outer": (width, HIDDEN), "outer_bias": (width,)}


def reparametrised(t: Tensors, place: str, kv: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv:2101.00190, section 4.3: (keys, values) of one layer, each (kv_heads, tokens, head_dim)."""
    inner = torch.tanh(functional.linear(t["shared.rows"], t["shared.inner"], t["shared.inner_bias"]))
    outer = functional.linear(inner, t[f"{place}outer"], t[f"{place}outer_bias"])
    keys, values = outer.chunk(2, dim=1)
    return tuple(half.unflatten(1, kv).transpose(0, 1) for half in (keys, values))


def prefixes_at_attention() -> Iterator[Case]:
    comment = "every query sees the prefix; among the tokens attention is causal; a network gives keys and values"
    for variant, heads, kv_heads, rate in (
        ("network", 2, 2, 0.0),
        ("network-gqa", 4, 2, 0.0),
        ("network-dropout", 2, 2, 0.25),
    ):
        draw, kv = Draw(f"prefix_tuning-attention-{variant}"), (kv_heads, 4)
        inputs = {
            "q": draw.normal(2, heads, 4, 4),
            "k": draw.normal(2, *kv[:1], 4, 4),
            "v": draw.normal(2, *kv[:1], 4, 4),
        }
        trained = shared_shapes(kv) | own_shapes(kv)
        inputs |= {name: draw.normal(*shape, scale=0.7) for name, shape in trained.items()}
        if rate:
            inputs["keep"] = (draw.generator.random((2, 2, kv_heads, TOKENS, 4)) >= rate).astype(np.float32)

        def forward(q, k, v, keep=None, kv=kv, rate=rate, **letters):
            pair = torch.stack(reparametrised(letters, "", kv)).expand(2, 2, kv[0], TOKENS, 4)
            if keep is not None:
                pair = pair * keep / (1 - rate)
            seen = torch.ones(4, 4 + TOKENS, dtype=torch.bool).tril(TOKENS)
            k, v = torch.cat((pair[:, 0], k), dim=2), torch.cat((pair[:, 1], v), dim=2)
            return reference.attend(q, k, v, seen, None)

        dropped = "; in training: `keep` (batch, 2, kv_heads, tokens, head_dim) is of keys, then of values"
        yield site_case(
            "prefix_tuning",
            "attention",
            variant,
            inputs,
            forward,
            " ".join(("q k v", *trained)),
            config={"tokens": TOKENS, "hidden": HIDDEN} | ({"dropout": rate} if rate else {}),
            flags="PrefixVisible PrefixNetwork"
            + " PrefixGroupedQuery" * (heads > kv_heads)
            + " DropoutScale" * bool(rate),
            comment=comment + dropped * bool(rate),
        )


def prefixes_on_model(family: str, settings: dict, places: list[str], kv: tuple[int, int]) -> Iterator[Adapted]:
    own = {f"{place}.{letter}": shape for place in places for letter, shape in own_shapes(kv).items()}

    def advice(t: Tensors) -> reference.Advice:
        def advise(place: str) -> Callable:
            return lambda f, q, k, v: prefix(f, q, k, v, *reparametrised(t, f"{place}.", kv))

        return {place: advise(place) for place in places}

    config = peft.PrefixTuningConfig(
        num_virtual_tokens=TOKENS, prefix_projection=True, encoder_hidden_size=HIDDEN, **peft_witness.TASK
    )
    parts = {
        "embedding.weight": ["shared.rows"],
        "transform.0.weight": ["shared.inner"],
        "transform.0.bias": ["shared.inner_bias"],
        "transform.2.weight": [f"{place}.outer" for place in places],
        "transform.2.bias": [f"{place}.outer_bias" for place in places],
    }
    yield Adapted(
        "prefix_tuning",
        {"tokens": TOKENS, "hidden": HIDDEN},
        shared_shapes(kv) | own,
        advice,
        first_position=TOKENS,
        flags="PrefixPositions PrefixVisible PrefixNetwork",
        comment="a network whose first layer and rows all layers share gives keys and values",
        label="network-",
        witness=peft_witness.prompt_encoder(family, settings, config, parts),
    )
