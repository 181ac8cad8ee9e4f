"""One transformer block, and the loss of a batch in parts: with the gradients of everything.

Blocks are transformers' own layers in float64 throughout, the witness is reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import reference
import torch
from common import Case, Compute, Draw, Tensors
from models import (
    GPT2,
    LLAMA,
    NOT_WEIGHTS,
    ORACLE,
    PACKED,
    additive_mask,
    by_transformers,
    config_of,
    draw_weights,
    precision,
    tokens,
    transformers_model,
    weight_shapes,
    with_segments,
)


def cases() -> Iterator[Case]:
    yield from _blocks()
    yield _ragged()
    yield from _targets()


# ---- one block -------------------------------------------------------------------------------------------------------

NOT_WEIGHTS_OF_BLOCK = ("x", "g", "positions", "segments")


def _blocks() -> Iterator[Case]:
    one = {"num_hidden_layers": 1}
    rows = [
        (
            "llama-block",
            "llama",
            LLAMA | one,
            None,
            "GroupedQuery GateAndUp",
            "everything between two residuals, twice",
        ),
        ("llama-block-packed", "llama", LLAMA | one, PACKED, "PackedDocuments", ""),
        ("mistral-block-window", "mistral", LLAMA | one | {"sliding_window": 2}, None, "SlidingWindow", ""),
        ("qwen3-block", "qwen3", LLAMA | one, None, "QueryKeyNorm", "q and k are normed head by head"),
        (
            "gpt2-block",
            "gpt2",
            GPT2 | {"n_layer": 1},
            None,
            "TransposedWeight GeluVariant FusedQueryKeyValue",
            "x already has its positions",
        ),
        ("gpt2-block-packed", "gpt2", GPT2 | {"n_layer": 1}, PACKED, "PackedDocuments TransposedWeight", ""),
    ]
    for case_id, family, settings, segments, flags, comment in rows:
        draw = Draw(case_id)
        config = config_of(family, settings)
        shapes = {n: s for n, s in weight_shapes(family, settings).items() if ".0." in n}
        inputs = {"x": draw.normal(2, 7, 16)}
        if segments:
            packed = with_segments(tokens(draw, 24), segments, packed=True)
            inputs |= {name: packed[name] for name in ("positions", "segments")}
        g = draw.normal(2, 7, 16)
        if segments:
            g = g * (inputs["segments"] >= 0)[..., None]
        yield Case(
            id=case_id,
            kind="block",
            name=family,
            comment=comment,
            flags=tuple(flags.split()),
            config=config,
            inputs=inputs | draw_weights(draw, shapes) | {"g": np.float32(g)},
            compute=_by_transformers_layer(family, settings),
            witnesses={"golden/make/reference.py": _by_reference_layer(config)},
            oracle=ORACLE,
            spec="golden/README.md, Models",
        )


def _answer(y: torch.Tensor, x: torch.Tensor, weights: Tensors, t: Tensors) -> Tensors:
    if "segments" in t:
        y = y * (t["segments"] >= 0)[..., None]
    y.backward(t["g"])
    return {"y": y, "grad.x": x.grad, **{f"grad.{n}": w.grad for n, w in weights.items()}}


def _by_transformers_layer(family: str, settings: dict) -> Compute:
    def compute(t: Tensors) -> Tensors:
        with precision():
            model = transformers_model(family, settings)
            body = model.transformer if family == "gpt2" else model.model
            model.load_state_dict({n: w for n, w in t.items() if n not in NOT_WEIGHTS_OF_BLOCK}, strict=False)
            x = t["x"].clone().requires_grad_()
            time = x.shape[1]
            positions = t["positions"].long() if "positions" in t else torch.arange(time)[None]
            mask = additive_mask(t.get("segments", torch.zeros(1, time)), settings.get("sliding_window"))
            if family == "gpt2":
                y = body.h[0](x, attention_mask=mask)
            else:
                y = body.layers[0](x, attention_mask=mask, position_embeddings=body.rotary_emb(x, positions))
            return _answer(y, x, {n: w for n, w in model.named_parameters() if n in t}, t)

    return compute


def _by_reference_layer(config: dict) -> Compute:
    def compute(t: Tensors) -> Tensors:
        weights = {n: w.clone().requires_grad_() for n, w in t.items() if n not in NOT_WEIGHTS_OF_BLOCK}
        x = t["x"].clone().requires_grad_()
        positions = t["positions"].long() if "positions" in t else torch.arange(x.shape[1])[None]
        if config["model_type"] == "gpt2":  # x has its positions: take nothing from the table of positions
            positions = torch.zeros_like(positions)
            table = {"transformer.wpe.weight": torch.zeros(1, x.shape[-1])}
            return _answer(
                reference.model(config, weights | table).layers(x, positions, t.get("segments")), x, weights, t
            )
        return _answer(reference.model(config, weights).layers(x, positions, t.get("segments")), x, weights, t)

    return compute


# ---- losses ----------------------------------------------------------------------------------------------------------


def accumulation(
    case_id: str,
    draw: Draw,
    inputs: dict[str, np.ndarray],
    parts: list[list[int]],
    flags: tuple[str, ...],
    comment: str,
) -> Case:
    """A batch of a tiny Llama, whose weights are drawn, in parts: each one's loss is a sum over the batch's count."""
    small = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    family, settings = "llama", LLAMA | small

    def in_parts(t: Tensors) -> Tensors:
        weights = {n: w.clone().requires_grad_() for n, w in t.items() if n not in NOT_WEIGHTS}
        count, total = (t["targets"] >= 0).sum(), torch.zeros(())
        for rows in parts:
            own = (t["targets"][rows] >= 0).sum()
            if own:
                more = [t[name][rows] if name in t else None for name in ("positions", "segments")]
                logits = reference.model(config, weights)(t["ids"][rows], *more)
                loss = reference.mean_loss(logits, t["targets"][rows]) * own / count
                loss.backward()
                total = total + loss.detach()
        return {"loss": total, **{f"grad.{n}": w.grad for n, w in weights.items()}}

    def whole(t: Tensors) -> Tensors:
        return {name: out for name, out in by_transformers(family, settings)(t).items() if name != "logits"}

    config = config_of(family, settings)
    return Case(
        id=case_id,
        kind="loss",
        name="accumulation",
        comment=comment,
        flags=flags,
        config={"parts": parts, "model": config},
        inputs=inputs | draw_weights(draw, weight_shapes(family, settings)),
        compute=whole,
        witnesses={"the parts, in golden/make/reference.py": in_parts},
        oracle=ORACLE,
        spec="mean of -log p over the targets of all parts",
    )


def _ragged() -> Case:
    draw = Draw("accumulation-ragged")
    inputs = tokens(draw, 16, batch=3)
    inputs["targets"][1, 2:] = -100  # 4, 2 and 6 targets: a mean of means is wrong
    return accumulation(
        "accumulation-ragged",
        draw,
        inputs,
        parts=[[0], [1, 2]],
        flags=("AccumulationMean",),
        comment="the batch in parts gives the loss and the gradients of the whole",
    )


def targets_of(t: Tensors) -> Tensors:
    """What each position must predict, from which tokens are learned and which belong together."""
    ids, learned, segments = (t[name].tolist() for name in ("ids", "learned", "segments"))
    targets = [[-100] * len(row) for row in ids]
    for row in range(len(ids)):
        for at in range(len(ids[row]) - 1):
            if learned[row][at + 1] and segments[row][at] == segments[row][at + 1] >= 0:
                targets[row][at] = ids[row][at + 1]
    return {"targets": torch.tensor(targets, dtype=torch.int32)}


def _targets() -> Iterator[Case]:
    rows = [
        (
            "prompt",
            [[0, 0, 0, 1, 1, 1, 0]],
            [[0, 0, 0, 0, 0, 0, -1]],
            "the last prompt token predicts the first of the answer",
        ),
        ("packed", [[1, 1, 1, 1, 1, 0, 1]], [[0, 0, 0, 1, 1, 1, 1]], "the last token of a document predicts nothing"),
    ]
    for variant, learned, segments, comment in rows:
        ids = Draw(f"targets-{variant}").integers(5, 30, 1, 7)
        yield Case(
            id=f"targets-{variant}",
            kind="loss",
            name="targets",
            comment=comment,
            flags=("LabelShift",),
            inputs={"ids": ids, "learned": np.int32(learned), "segments": np.int32(segments)},
            compute=targets_of,
            oracle="scalar Python",
            spec="targets[t] = ids[t + 1] where token t + 1 is learned and of the same document, else -100",
        )
