"""P-tuning, P-tuning v2, and prefix tuning reparametrised. On models the witness is PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import methods
import numpy as np
import peft
import peft_witness
import reference
import torch
from common import Case, Draw, Tensors
from equations import PAPERS, prefix, prompt
from method_sites import site_case
from methods import SMALL_GPT2, SMALL_LLAMA, Adapted
from torch.nn import functional

TOKENS, HIDDEN = 3, 5

PAPERS |= {"p_tuning": "arXiv:2103.10385, section 3.2", "p_tuning_v2": "arXiv:2110.07602, section 3.2"}


def cases() -> Iterator[Case]:
    yield from rows_at_embedding()
    yield from prefixes_at_attention()
    for family, settings, embed, attentions, kv in (
        ("llama", SMALL_LLAMA, "model.embed_tokens", [f"model.layers.{i}.self_attn.attend" for i in range(2)], (1, 4)),
        ("gpt2", SMALL_GPT2, "transformer.wte", [f"transformer.h.{i}.attn.attend" for i in range(2)], (2, 4)),
    ):
        yield from methods.model_cases(family, settings, rows_on_model(family, settings, embed))
        yield from methods.model_cases(family, settings, prefixes_on_model(family, settings, attentions, kv))


# ---- rows ------------------------------------------------------------------------------------------------------

ENDS = (("l0", "l0_reverse"), ("l1", "l1_reverse"))


def network_shapes(encoder: str, dim: int) -> dict[str, tuple[int, ...]]:
    """The tensors of P-tuning; those of the LSTM are called as torch.nn.LSTM calls them."""
    shapes: dict[str, tuple[int, ...]] = {"rows": (TOKENS, dim)}
    if encoder == "lstm":
        for inputs, ends in zip((dim, 2 * HIDDEN), ENDS, strict=True):
            for end in ends:
                shapes |= {f"weight_ih_{end}": (4 * HIDDEN, inputs), f"weight_hh_{end}": (4 * HIDDEN, HIDDEN)}
                shapes |= {f"bias_ih_{end}": (4 * HIDDEN,), f"bias_hh_{end}": (4 * HIDDEN,)}
    widths = {"lstm": (2 * HIDDEN, 2 * HIDDEN, dim), "mlp": (dim, HIDDEN, HIDDEN, dim), "none": ()}[encoder]
    for number, (width, out) in enumerate(pairwise(widths)):
        shapes |= {f"mlp{number}": (out, width), f"mlp{number}_bias": (out,)}
    return shapes


def encoded(t: Tensors, keep: torch.Tensor | None = None, rate: float = 0.0) -> torch.Tensor:
    """The rows (tokens, dim) after the network. `keep` is of what the second layer of the LSTM reads."""
    x = t["rows"]
    if "weight_ih_l0" in t:
        zero = torch.zeros(2, 1, HIDDEN, dtype=x.dtype)
        for number, ends in enumerate(ENDS):
            if number and keep is not None:
                x = x * keep / (1 - rate)
            weights = [t[f"{name}_{end}"] for end in ends for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            # input (batch, time, width), states at first, weights, biases, layers, dropout, training, both ways, layout
            x = torch.lstm(x[None], (zero, zero), weights, True, 1, 0.0, False, True, True)[0][0]
    layers = sum(name.startswith("mlp") for name in t) // 2
    for number in range(layers):
        x = functional.linear(torch.relu(x) if number else x, t[f"mlp{number}"], t[f"mlp{number}_bias"])
    return x


FLAGS = {
    "lstm": "PromptFirst LstmGates EncoderActivation",
    "mlp": "PromptFirst EncoderActivation",
    "none": "PromptFirst",
}


def rows_at_embedding() -> Iterator[Case]:
    for variant, encoder, rate in (
        ("lstm", "lstm", 0.0),
        ("lstm-dropout", "lstm", 0.25),
        ("mlp", "mlp", 0.0),
        ("none", "none", 0.0),
    ):
        draw, shapes = Draw(f"p_tuning-embedding-{variant}"), network_shapes(encoder, 6)
        inputs = {"ids": np.int32([[3, 0, 3], [6, 1, 2]]), "weight": draw.normal(7, 6)}
        inputs |= {name: draw.normal(*shape, scale=0.7) for name, shape in shapes.items()}
        if rate:
            inputs["keep"] = (draw.generator.random((TOKENS, 2 * HIDDEN)) >= rate).astype(np.float32)

        def forward(ids, weight, keep=None, rate=rate, **letters):
            return prompt(lambda ids: weight[ids.long()], ids, encoded(letters, keep, rate))

        yield site_case(
            "p_tuning",
            "embedding",
            variant,
            inputs,
            forward,
            " ".join(shapes),
            config={"tokens": TOKENS, "encoder": encoder}
            | ({"hidden": HIDDEN} if encoder != "none" else {})
            | ({"dropout": rate} if rate else {}),
            flags=FLAGS[encoder] + " DropoutPlace DropoutScale" * bool(rate),
            comment="in training: `keep` (tokens, 2 hidden) is of what the LSTM's second layer reads" if rate else "",
        )


def rows_on_model(family: str, settings: dict, embed: str) -> Iterator[Adapted]:
    for encoder in ("lstm", "mlp"):
        shapes = {f"{embed}.{letter}": shape for letter, shape in network_shapes(encoder, 8).items()}

        def advice(t: Tensors, names=tuple(shapes)) -> reference.Advice:
            letters = {name.rpartition(".")[2]: t[name] for name in names}
            return {embed: lambda f, ids: prompt(f, ids, encoded(letters))}

        config = peft.PromptEncoderConfig(
            num_virtual_tokens=TOKENS,
            encoder_reparameterization_type=encoder.upper(),
            encoder_hidden_size=HIDDEN,
            **peft_witness.TASK,
        )
        yield Adapted(
            "p_tuning",
            {"tokens": TOKENS, "encoder": encoder, "hidden": HIDDEN},
            shapes,
            advice,
            flags=FLAGS[encoder] + " PromptMaskedLoss",
            comment="the first real token has position 3; logits and loss are of the real tokens alone",
            label=f"{encoder}-",
            virtual=encoder == "lstm",
            witness=peft_witness.prompt_encoder(
                family, settings, config, {in_peft(name): [f"{embed}.{name}"] for name in network_shapes(encoder, 8)}
            ),
        )


def in_peft(letter: str) -> str:
    """PEFT's name of a parameter of P-tuning's network."""
    if letter == "rows":
        return "embedding.weight"
    if letter.startswith("mlp"):
        return f"mlp_head.{2 * int(letter[3])}.{'bias' if letter.endswith('_bias') else 'weight'}"
    return f"lstm_head.{letter}"


# ---- keys and values -------------------------------------------------------------------------------------------


def shared_shapes(hidden: int, kv: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """What the layers share, where a network gives keys and values."""
    width = kv[0] * kv[1]
    shapes = {"shared.rows": (TOKENS, width), "shared.inner": (hidden, width), "shared.inner_bias": (hidden,)}
    return shapes if hidden else {}


def own_shapes(hidden: int, kv: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """What each layer has of its own."""
    width, flat = 2 * kv[0] * kv[1], (kv[0], TOKENS, kv[1])
    return {"outer": (width, hidden), "outer_bias": (width,)} if hidden else {"keys": flat, "values": flat}


def keys_and_values(t: Tensors, place: str, kv: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of one layer, each (kv_heads, tokens, head_dim). The network is that of arXiv:2101.00190, section 4.3."""
    if f"{place}keys" in t:
        return t[f"{place}keys"], t[f"{place}values"]
    inner = torch.tanh(functional.linear(t["shared.rows"], t["shared.inner"], t["shared.inner_bias"]))
    outer = functional.linear(inner, t[f"{place}outer"], t[f"{place}outer_bias"])
    keys, values = outer.chunk(2, dim=1)
    return tuple(half.unflatten(1, kv).transpose(0, 1) for half in (keys, values))


def prefixes_at_attention() -> Iterator[Case]:
    for method, variant, heads, kv_heads, hidden, rate in (
        ("prefix_tuning", "network", 2, 2, HIDDEN, 0.0),
        ("prefix_tuning", "network-gqa", 4, 2, HIDDEN, 0.0),
        ("prefix_tuning", "network-dropout", 2, 2, HIDDEN, 0.25),
        ("p_tuning_v2", "plain", 2, 2, 0, 0.0),
        ("p_tuning_v2", "gqa", 4, 2, 0, 0.0),
        ("p_tuning_v2", "dropout", 2, 2, 0, 0.25),
        ("p_tuning_v2", "network", 4, 2, HIDDEN, 0.0),
    ):
        draw, kv = Draw(f"{method}-attention-{variant}"), (kv_heads, 4)
        trained = shared_shapes(hidden, kv) | own_shapes(hidden, kv)
        inputs = {name: draw.normal(2, n, 4, 4) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
        inputs |= {name: draw.normal(*shape, scale=0.7) for name, shape in trained.items()}
        if rate:
            inputs["keep"] = (draw.generator.random((2, 2, kv_heads, TOKENS, 4)) >= rate).astype(np.float32)

        def forward(q, k, v, keep=None, kv=kv, rate=rate, **letters):
            pair = torch.stack(keys_and_values(letters, "", kv)).expand(2, 2, kv[0], TOKENS, 4)
            if keep is not None:
                pair = pair * keep / (1 - rate)
            seen = torch.ones(4, 4 + TOKENS, dtype=torch.bool).tril(TOKENS)
            k, v = torch.cat((pair[:, 0], k), dim=2), torch.cat((pair[:, 1], v), dim=2)
            return reference.attend(q, k, v, seen, None)

        flags = {
            "PrefixVisible": True,
            "PrefixKeysValues": True,
            "PrefixNetwork": hidden,
            "PrefixGroupedQuery": heads > kv_heads,
        }
        remarks = {
            "every query sees the prefix; among the tokens attention is causal": True,
            "a network gives keys and values": hidden,
            "in training: `keep` (batch, 2, kv_heads, tokens, head_dim) is of keys, then of values": rate,
        }
        yield site_case(
            method,
            "attention",
            variant,
            inputs,
            forward,
            " ".join(("q k v", *trained)),
            config={"tokens": TOKENS} | ({"hidden": hidden} if hidden else {}) | ({"dropout": rate} if rate else {}),
            flags=" ".join(flag for flag, here in (flags | {"DropoutScale": rate}).items() if here),
            comment="; ".join(remark for remark, here in remarks.items() if here),
        )


def prefixes_on_model(family: str, settings: dict, places: list[str], kv: tuple[int, int]) -> Iterator[Adapted]:
    def advice(t: Tensors) -> reference.Advice:
        def advise(place: str) -> Callable:
            return lambda f, q, k, v: prefix(f, q, k, v, *keys_and_values(t, f"{place}.", kv))

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
    of_network = peft_witness.prompt_encoder(family, settings, config, parts)
    for method, hidden in (("prefix_tuning", HIDDEN), ("p_tuning_v2", 0), ("p_tuning_v2", HIDDEN)):
        options = {"tokens": TOKENS} | ({"hidden": hidden} if hidden else {})
        own = {f"{place}.{letter}": shape for place in places for letter, shape in own_shapes(hidden, kv).items()}
        yield Adapted(
            method,
            options,
            shared_shapes(hidden, kv) | own,
            advice,
            first_position=TOKENS,
            flags="PrefixPositions PrefixVisible" + " PrefixNetwork" * bool(hidden),
            comment="a network whose first layer and rows all layers share gives keys and values" if hidden else "",
            label="network-" if hidden else "",
            virtual=not hidden,
            witness=of_network if hidden else peft_witness.model(family, settings, "prefix_tuning", options),
        )
