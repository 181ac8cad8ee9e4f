"""Losses and what they are taken of: targets, positions, batches in parts, weights of classes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from blocks import accumulation, targets_of
from common import Case, Draw, Tensors
from models import PACKED, tokens, with_segments
from torch.nn import functional

EOS = 2


def cases() -> Iterator[Case]:
    yield from _targets()
    yield from _positions()
    yield from _answers()
    yield from _accumulation()
    yield from _classes()


def _targets() -> Iterator[Case]:
    rows = [  # variant, learned, segments, flags, comment
        (
            "edges",
            [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0, 0, 0]],
            [[0, 1, 2, 2, 3, 3, 3, 4, 5], [0, 0, 0, 1, 1, 2, -1, -1, -1]],
            "LabelShift PackedDocuments",
            "documents of one token predict nothing; what is learned of a document's first token has no place",
        ),
        (
            "turns",
            [[0, 0, 0, 1, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0, 0, 0, 0]],
            [[0] * 10, [0] * 6 + [-1] * 4],
            "LabelShift",
            "several answers in a conversation, some of one token",
        ),
        (
            "pad-is-eos",
            [[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]],
            [[0] * 5 + [-1] * 3, [0] * 8],
            "PadIsEos",
            "the token of padding ends answers, too: there it is learned, as padding it is not",
        ),
        (
            "nothing",
            [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]],
            [[0] * 5, [0] * 5, [0, 0, -1, -1, -1]],
            "IgnoredTargets LabelShift",
            "rows of which nothing is learned stay",
        ),
    ]
    for variant, learned, segments, flags, comment in rows:
        case_id = f"targets-{variant}"
        ids = Draw(case_id).integers(5, 30, *np.shape(learned))
        if variant == "pad-is-eos":
            ids[np.int32(segments) < 0] = EOS
            ids[0, 4] = ids[1, 5] = ids[1, 7] = EOS
        yield Case(
            id=case_id,
            kind="loss",
            name="targets",
            comment=comment,
            flags=tuple(flags.split()),
            inputs={"ids": ids, "learned": np.int32(learned), "segments": np.int32(segments)},
            compute=targets_of,
            oracle="scalar Python",
            spec="targets[t] = ids[t + 1] where token t + 1 is learned and of the same document, else -100",
        )


def _answers() -> Iterator[Case]:
    for variant, start, lengths, comment in (
        ("plain", 0, [5, 3, 1], "as T5's: the token of padding starts them"),
        ("start", 3, [4, 2], "another token starts them, and 0 is a token like others"),
    ):
        case_id = f"answers-{variant}"
        answers = Draw(case_id).integers(4, 30, len(lengths), max(lengths))
        if variant == "start":
            answers[0, 1] = 0
        answers[np.arange(max(lengths)) >= np.array(lengths)[:, None]] = 0
        yield Case(
            id=case_id,
            kind="loss",
            name="answers",
            comment=comment,
            flags=("DecoderShift",),
            config={"start": start},
            inputs={"answers": answers, "lengths": np.int32(lengths)},
            compute=partial(_shifted, start=start),
            oracle="scalar Python",
            spec="arXiv:1910.10683; said[0] = start, said[t] = answers[t - 1]; targets are the answers",
        )


def _shifted(t: Tensors, start: int) -> Tensors:
    said, targets = torch.zeros_like(t["answers"]), torch.full_like(t["answers"], -100)
    for row, length in enumerate(t["lengths"].tolist()):
        for at in range(length):
            said[row, at] = t["answers"][row, at - 1] if at else start
            targets[row, at] = t["answers"][row, at]
    return {"said": said, "targets": targets}


def _positions() -> Iterator[Case]:
    def compute(t: Tensors) -> Tensors:
        rows = t["segments"].tolist()
        counted = [[row[:at].count(row[at]) if row[at] >= 0 else 0 for at in range(len(row))] for row in rows]
        return {"positions": torch.tensor(counted, dtype=torch.int32)}

    yield Case(
        id="positions-packed",
        kind="loss",
        name="positions",
        comment="each document starts at 0, also one of a single token, and one without padding behind it",
        flags=("PackedDocuments",),
        inputs={"segments": np.int32([[0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 2, -1, -1], [0] * 7])},
        compute=compute,
        oracle="scalar Python",
        spec="the number of tokens of the same document before it; 0 at padding",
    )


def _accumulation() -> Iterator[Case]:
    draw = Draw("accumulation-empty-part")
    inputs = tokens(draw, 16, batch=4)
    inputs["targets"][1] = inputs["targets"][3, 3:] = -100
    yield accumulation(
        "accumulation-empty-part",
        draw,
        inputs,
        parts=[[0], [1], [2, 3]],
        flags=("AccumulationMean", "IgnoredTargets"),
        comment="a part without any target adds 0 to the loss and to the gradients, not NaN",
    )
    draw = Draw("accumulation-ignored-rows")
    inputs = tokens(draw, 16, batch=4)
    inputs["targets"][0] = inputs["targets"][2, 1:] = -100
    yield accumulation(
        "accumulation-ignored-rows",
        draw,
        inputs,
        parts=[[0, 1], [2, 3]],
        flags=("AccumulationMean", "IgnoredTargets"),
        comment="a row without targets, and one with a single one: neither rows nor parts count, targets do",
    )
    draw = Draw("accumulation-packed")
    packed = [*PACKED, [0, 0, 0, 0, 0, 0, 0]]
    yield accumulation(
        "accumulation-packed",
        draw,
        with_segments(tokens(draw, 16, batch=3), packed, packed=True),
        parts=[[0], [1, 2]],
        flags=("AccumulationMean", "PackedDocuments"),
        comment="packed rows in parts: documents count by their targets, too",
    )


def _classes() -> Iterator[Case]:
    """Weights of labels: torch's own weighted mean."""

    def loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, targets.long(), weight=weights, ignore_index=-100)

    def by_hand(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        asked = (targets >= 0).nonzero()[:, 0]
        labels = targets[asked].long()
        losses = logits[asked].logsumexp(-1) - logits[asked, labels]
        return (weights[labels] * losses).sum() / weights[labels].sum()

    rows = [  # variant, targets, weights, flags, comment
        ("weighted", [2, 0, 1, 2, 2], [0.5, 4.0, 1.0], "", "divided by the sum of the weights of the rows' labels"),
        ("ignored", [2, -100, 1, -100, 0], [0.25, 3.0, 1.5], "IgnoredTargets", "an ignored row adds to neither sum"),
        ("zero", [0, 1, 1, 2], [0.0, 1.0, 2.0], "", "a label of weight 0 is as if it were ignored"),
        ("parts", [0, 2, 1, -100, 1], [0.5, 4.0, 1.0], "AccumulationMean", "parts add up to the loss of the whole"),
    ]
    for variant, targets, weights, more, comment in rows:
        draw = Draw(f"classes-{variant}")
        inputs = {"logits": draw.normal(len(targets), 3), "targets": np.int32(targets), "weights": np.float32(weights)}
        yield Case(
            id=f"classes-{variant}",
            kind="loss",
            name="classes",
            comment=comment,
            flags=("ClassWeights", *more.split()),
            config={"parts": [[0, 1], [2, 3, 4]]} if variant == "parts" else {},
            inputs=inputs,
            compute=partial(_answer, loss),
            witnesses={"the two sums, in torch": partial(_answer, by_hand)},
            spec="sum of weights[target] (-log softmax(logits)[target]) / sum of weights[target], over targets >= 0",
        )


def _answer(loss, t: Tensors) -> Tensors:
    logits = t["logits"].clone().requires_grad_()
    value = loss(logits, t["targets"], t["weights"])
    value.backward()
    return {"loss": value, "grad.logits": logits.grad}
