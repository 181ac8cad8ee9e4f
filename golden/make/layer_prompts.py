"""Prompts with gates in layers (LLaMA-Adapter); special tokens, also in every layer. On models the witness is PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import equations
import methods
import peft_witness
import torch
from common import Case, Draw, Tensors
from method_sites import site_case
from methods import SMALL_GPT2, SMALL_LLAMA, Adapted
from torch.nn import functional

TOKENS = 3

equations.PAPERS |= {
    "llama_adapter": "arXiv:2303.16199, section 3.2; gate as the authors' code, or as PEFT",
    "pre_embed": "arXiv:2106.09685, section 5.1",
    "pre_layer": "arXiv:2106.09685, section 5.1",
}


def cases() -> Iterator[Case]:
    yield embedded_at_a_site()
    for family, settings in (("llama", SMALL_LLAMA), ("gpt2", SMALL_GPT2)):
        yield from methods.model_cases(family, settings, gated_on(family, settings))
        yield from methods.model_cases(family, settings, special_tokens_on(family, settings))
    window = SMALL_LLAMA | {"sliding_window": 3}
    for family, settings in (("mistral", window), ("qwen3", SMALL_LLAMA)):
        found = methods.model_cases(family, settings, gated_on(family, settings))
        yield from (case for case in found if case.at == "model")
    grouped = SMALL_LLAMA | {"head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    comment = "heads 0 and 1 read key head 0, heads 2 and 3 key head 1, of the prompt as well"
    flags = "AdaptionSoftmax AdaptionGate PrefixGroupedQuery"
    one = _gated("llama", grouped, {"tokens": TOKENS}, [0, 1], flags=flags, comment=comment, label="grouped-")
    yield from (case for case in methods.model_cases("llama", grouped, iter([one])) if case.at == "model")


# ---- LLaMA-Adapter ---------------------------------------------------------------------------------------------


def gated_on(family: str, settings: dict) -> Iterator[Adapted]:
    comment = "the prompt has a softmax of its own, and no positions; its part comes before the output layer"
    if family == "qwen3":
        comment += "; its keys are normalized as the layer's are"
    flags = "AdaptionSoftmax AdaptionGate" + " PrefixGroupedQuery" * (family != "gpt2")
    flags += " QueryKeyNorm" * (family == "qwen3")
    both = [0, 1]
    yield _gated(family, settings, {"tokens": TOKENS}, both, flags=flags, comment=comment, virtual=family == "llama")
    if family in ("llama", "mistral"):
        options = {"tokens": TOKENS, "count": 1, "compat": "peft"}
        comment = "the last layer alone, one gate for all heads, without tanh; " + comment
        witness = {"peft": True, "witness": peft_witness.adaption_prompt(family, settings, options)}
        label = {"label": "peft-", "virtual": family == "llama"}
        yield _gated(family, settings, options, both[1:], flags=flags, comment=comment, **label, **witness)


def _gated(family: str, settings: dict, options: dict, layers: list[int], peft: bool = False, **more) -> Adapted:
    name = "transformer.h.{}.attn" if family == "gpt2" else "model.layers.{}.self_attn"
    places = [f"{name.format(i)}.attend" for i in layers]
    gates = 1 if options.get("compat") == "peft" else settings.get("n_head", settings.get("num_attention_heads"))

    def advice(t: Tensors) -> dict[str, Callable]:
        def advise(place: str) -> Callable:
            letters = t[f"{place}.prompt"], t[f"{place}.gate"]
            return lambda f, q, k, v: gated(f, q, k, v, *keys_and_values(t, place, letters[0], k), letters[1], options)

        return {place: advise(place) for place in places}

    shapes = {f"{place}.{letter}": s for place in places for letter, s in (("prompt", (TOKENS, 8)), ("gate", (gates,)))}
    return Adapted("llama_adapter", options, shapes, advice, peft=peft, **more)


def keys_and_values(t: Tensors, place: str, prompt: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the layer's own projections make of a prompt: (kv_heads, tokens, head_dim) each."""
    here, (kv_heads, head_dim) = place.removesuffix(".attend"), (k.shape[1], k.shape[3])
    if f"{here}.c_attn.weight" in t:
        both = (prompt @ t[f"{here}.c_attn.weight"] + t[f"{here}.c_attn.bias"]).chunk(3, dim=-1)[1:]
    else:
        both = [prompt @ t[f"{here}.{p}_proj.weight"].mT for p in "kv"]
    keys, values = (y.unflatten(-1, (kv_heads, head_dim)).transpose(0, 1) for y in both)
    if f"{here}.k_norm.weight" in t:
        keys = keys / (keys.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t[f"{here}.k_norm.weight"]
    return keys, values


def gated(f: Callable, q, k, v, keys, values, gate: torch.Tensor, options: dict) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
    scores = functional.softmax(q @ keys.mT / q.shape[-1] ** 0.5, dim=-1)
    gate = gate if options.get("compat") == "peft" else torch.tanh(gate)
    return f(q, k, v) + gate[:, None, None] * (scores @ values)


# ---- special tokens --------------------------------------------------------------------------------------------


def embedded_at_a_site() -> Case:
    draw = Draw("pre_embed-embedding-plain")
    return site_case(
        "pre_embed",
        "embedding",
        "plain",
        {"ids": draw.integers(0, 7, 2, 3), "weight": draw.normal(7, 5), "prompt": draw.normal(2, 5)},
        lambda ids, weight, prompt: equations.prompt(lambda ids: weight[ids.long()], ids, prompt),
        "prompt",
        config={"tokens": 2},
        flags="PromptFirst",
        comment="rows before the tokens, the same in every row of the batch",
    )


def special_tokens_on(family: str, settings: dict) -> Iterator[Adapted]:
    embed, layer = (
        ("transformer.wte", "transformer.h.0") if family == "gpt2" else ("model.embed_tokens", "model.layers.0")
    )

    def embeddings(t: Tensors) -> dict[str, Callable]:
        return {embed: lambda f, ids: equations.prompt(f, ids, t[f"{embed}.prompt"])}

    def activations(t: Tensors) -> dict[str, Callable]:
        def replaced(f: Callable, x: torch.Tensor) -> torch.Tensor:
            rows = t[f"{layer}.block_out.rows"].expand(len(x), TOKENS, -1)
            return torch.cat((rows, f(x)[:, TOKENS:]), dim=1)

        return {embed: lambda f, ids: equations.prompt(f, ids, t[f"{embed}.rows"]), f"{layer}.block_out": replaced}

    options, flags = {"tokens": TOKENS}, "PromptFirst PromptMaskedLoss"
    witness = peft_witness.model(family, settings, "prompt_tuning", options)
    shapes = {f"{embed}.prompt": (TOKENS, 8)}
    yield Adapted("pre_embed", options, shapes, embeddings, flags=flags, witness=witness)
    yield Adapted(
        "pre_layer",
        options,
        {f"{place}.rows": (TOKENS, 8) for place in (embed, f"{layer}.block_out")},
        activations,
        flags=f"{flags} PreLayerReplaced",
        comment="the special tokens' output of each layer but the last is replaced by what is trained",
        peft=False,
        virtual=True,
    )
