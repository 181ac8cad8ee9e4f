"""The operations that models are made of, with gradients, from their equations or torch's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import Case, Draw, with_gradients
from random_numbers import words
from torch.nn import functional

ROPE = "arXiv:2104.09864, in Hugging Face's layout: pairs (j, j + dim / 2)"


def _case(
    name: str,
    variant: str,
    inputs: dict[str, np.ndarray],
    forward: Callable,
    wrt: str,
    *,
    spec: str,
    comment="",
    flags=(),
    **config,
) -> Case:
    """A case of `forward(**inputs)`; the upstream gradient g is drawn here."""
    case_id = f"{name}-{variant}"
    y = forward(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    inputs = inputs | {"g": Draw(f"{case_id} g").normal(*y.shape)}
    return Case(
        id=case_id,
        kind="fused",
        name=name,
        comment=comment,
        flags=flags,
        config=config,
        inputs=inputs,
        spec=spec,
        compute=with_gradients(forward, tuple(wrt.split())),
    )


def cases() -> Iterator[Case]:
    yield from _linear()
    yield from _norms()
    yield from _activations()
    yield from _embeddings()
    yield from _rope()
    yield from _attention()
    yield from _cross_entropy()
    yield from _dropout()


def _linear() -> Iterator[Case]:
    for variant, x, bias in (("plain", (5, 4), False), ("bias", (5, 4), True), ("3d-bias", (2, 3, 4), True)):
        draw = Draw(f"frozen_linear-{variant}")
        inputs = {"x": draw.normal(*x), "weight": draw.normal(6, 4)} | ({"bias": draw.normal(6)} if bias else {})
        yield _case(
            "frozen_linear",
            variant,
            inputs,
            lambda x, weight, bias=None: functional.linear(x, weight, bias),
            "x bias" if bias else "x",
            spec="x @ weight.T + bias, weight (out, in) frozen",
            flags=("TransposedWeight",),
        )
    for variant, rows in (("plain", (5,)), ("3d", (2, 3))):
        draw = Draw(f"hadamard_linear-{variant}")
        inputs = {
            "x": draw.normal(*rows, 4),
            "B": draw.normal(6, 2),
            "A": draw.normal(2, 4),
            "weight": draw.normal(6, 4),
        }
        yield _case(
            "hadamard_linear",
            variant,
            inputs,
            lambda x, B, A, weight: x @ (weight * (B @ A)).mT,
            "x B A",
            spec="x @ (weight * (B @ A)).T, weight (out, in) frozen",
            flags=("HadamardOfProducts",),
        )
    for variant, rows in (("plain", (5,)), ("3d", (2, 3))):
        draw = Draw(f"sparse_linear-{variant}")
        places = {"rows": np.int32([5, 0, 5]), "columns": np.int32([3, 0, 1])}
        yield _case(
            "sparse_linear",
            variant,
            {"x": draw.normal(*rows, 4), "values": draw.normal(3)} | places,
            lambda x, values, rows, columns: (
                x @ x.new_zeros(6, 4).index_put((rows.long(), columns.long()), values, accumulate=True).mT
            ),
            "x values",
            spec="x @ S.T, S (out, in) with values at rows and columns and zeros",
            flags=("SparseIndices",),
            out=6,
        )
        draw = Draw(f"add_columns-{variant}")
        yield _case(
            "add_columns",
            variant,
            {"y": draw.normal(*rows, 6), "z": draw.normal(*rows, 2), "columns": np.int32([4, 1])},
            lambda y, z, columns: y + z @ torch.eye(6, dtype=z.dtype)[columns.long()],
            "y z",
            spec="y with z added to its columns",
        )
    for variant, rows, alpha in (("plain", (5,), 2.0), ("3d", (2, 3), 0.25)):
        draw = Draw(f"addmm-{variant}")
        inputs = {"y": draw.normal(*rows, 6), "u": draw.normal(*rows, 2), "B": draw.normal(6, 2)}

        def addmm(y, u, B, alpha=alpha):
            return y + alpha * u @ B.mT

        yield _case(
            "addmm",
            variant,
            inputs,
            addmm,
            "y u B",
            spec="y + alpha u @ B.T, B (out, r)",
            alpha=alpha,
            flags=("Scaling", "TransposedFactor"),
        )


def _norms() -> Iterator[Case]:
    for variant, shape, eps, comment in (
        ("plain", (3, 8), 1e-6, ""),
        ("3d", (2, 3, 8), 1e-5, ""),
        ("small", (4, 8), 1e-2, "x is so small that eps decides: it is added to the mean square, under the root"),
    ):
        draw = Draw(f"norm-{variant}")
        scale = 0.05 if variant == "small" else 1.0
        x, w, b = draw.normal(*shape, scale=scale), draw.normal(8), draw.normal(8)
        flags = ("NormEps",) if variant == "small" else ()

        def rms_norm(x, w, eps=eps):
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w

        def layer_norm(x, w, b, eps=eps):
            return functional.layer_norm(x, x.shape[-1:], w, b, eps)

        yield _case(
            "rms_norm",
            variant,
            {"x": x, "w": w},
            rms_norm,
            "x w",
            eps=eps,
            comment=comment,
            flags=flags,
            spec="arXiv:1910.07467; eps under the root, as Llama",
        )
        yield _case(
            "layer_norm",
            variant,
            {"x": x + np.float32(0.3), "w": w, "b": b},
            layer_norm,
            "x w b",
            eps=eps,
            comment=comment,
            flags=(*flags, "NormVariance"),
            spec="arXiv:1607.06450; the variance is divided by n",
        )


def _activations() -> Iterator[Case]:
    far = np.float32([-90.0, -12.0, -5.0, -0.5, 0.0, 0.5, 5.0, 12.0, 90.0])
    for variant, x in (("plain", Draw("gelu-plain").normal(4, 6, scale=2.0)), ("far", far)):
        for approximate in (False, True):
            yield _case(
                "gelu",
                f"{'tanh' if approximate else 'exact'}-{variant}",
                {"x": x},
                lambda x, a="tanh" if approximate else "none": functional.gelu(x, approximate=a),
                "x",
                spec="arXiv:1606.08415",
                approximate=approximate,
                flags=("GeluVariant",),
                comment="the two forms differ by up to 5e-4: a case of one fails with the other",
            )
    draw = Draw("silu_mul-plain")
    inputs = {"gate": draw.normal(4, 6), "up": draw.normal(4, 6)}
    yield _case(
        "silu_mul",
        "plain",
        inputs,
        _silu_mul,
        "gate up",
        spec="arXiv:2002.05202, SwiGLU",
        flags=("GateAndUp",),
        comment="silu is of the gate, not of up",
    )
    inputs = {"gate": far, "up": Draw("silu_mul-far").normal(9)}
    yield _case(
        "silu_mul",
        "far",
        inputs,
        _silu_mul,
        "gate up",
        spec="arXiv:2002.05202, SwiGLU",
        flags=("Overflow",),
        comment="arguments far out: neither overflow nor NaN",
    )


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate * torch.sigmoid(gate) * up


def _embeddings() -> Iterator[Case]:
    for variant, ids in (("repeated", [[3, 1, 3], [0, 3, 6]]), ("vector", [2, 5, 2, 2])):
        inputs = {"table": Draw(f"embedding-{variant}").normal(7, 4), "ids": np.int32(ids)}
        yield _case(
            "embedding",
            variant,
            inputs,
            lambda table, ids: table[ids.long()],
            "table",
            spec="table[ids]",
            flags=("RepeatedRows",),
            comment="an id that occurs several times gets the sum of the gradients",
        )


def _rope() -> Iterator[Case]:
    def rotate(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    for variant, positions in (("plain", [[0, 1, 2, 3, 4]]), ("rows", [[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]])):
        draw = Draw(f"rope-{variant}")
        angle = np.array(positions)[:, None, :, None] * 10000.0 ** (-np.arange(0, 6, 2) / 6)
        inputs = {"x": draw.normal(2, 3, 5, 6), "cos": np.float32(np.cos(angle)), "sin": np.float32(np.sin(angle))}
        comment = "each row of the batch has its own positions" if variant == "rows" else ""
        yield _case(
            "rope", variant, inputs, rotate, "x", spec=ROPE, comment=comment, flags=("RopePairs", "RopeDirection")
        )


# ---- attention -------------------------------------------------------------------------------------------------


def visible(queries: int, keys: int, tokens: int, window: int | None, segments: list[int] | None) -> np.ndarray:
    """Which key a query sees in one row of the batch: the README's definition of masks. (queries, keys) of bool."""
    extra = keys - tokens  # keys before the tokens, of an adapter: all see them
    seen = np.zeros((queries, keys), bool)
    for i in range(queries):
        at = tokens - queries + i  # queries are the last tokens
        for j in range(keys):
            token = j - extra
            if token < 0:
                seen[i, j] = token <= at  # virtual tokens, which are queries too, come one after another
            else:
                near = window is None or at - token < window
                same = segments is None or segments[at] == segments[token]
                seen[i, j] = token <= at and near and same
    return seen


def attend(q, k, v, seen: torch.Tensor, scale: float | None) -> torch.Tensor:
    """softmax(scale q k^T) v over the keys that are seen; each key head serves heads / kv_heads heads in a row."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v


def _attention() -> Iterator[Case]:
    # name: batch, heads, key heads, queries, keys, tokens among the keys, head_dim, window, segments, scale
    packed = [[0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1]]
    padded = [[0, 0, 0, 0, 0, -1, -1], [0, 0, 0, -1, -1, -1, -1]]
    rows = {
        "causal": (2, 2, 2, 5, 5, 5, 4, None, None, None),
        "scale": (1, 2, 2, 4, 4, 4, 4, None, None, 0.3),
        "gqa": (2, 4, 2, 5, 5, 5, 4, None, None, None),
        "mqa": (1, 4, 1, 5, 5, 5, 4, None, None, None),
        "window": (1, 2, 2, 8, 8, 8, 4, 3, None, None),
        "packed": (2, 2, 2, 7, 7, 7, 4, None, packed, None),
        "padded": (2, 2, 2, 7, 7, 7, 4, None, padded, None),
        "packed-window": (2, 4, 2, 7, 7, 7, 4, 2, packed, None),
        "prefix": (2, 2, 2, 4, 7, 4, 4, None, None, None),
        "prefix-gqa": (1, 4, 2, 4, 6, 4, 4, None, None, None),
        "prefix-padded": (2, 2, 2, 7, 9, 7, 4, None, padded, None),
        "prefix-packed": (2, 2, 1, 7, 10, 7, 4, None, packed, None),
        "prefix-window": (1, 2, 2, 6, 8, 6, 4, 2, None, None),
        "cached": (2, 2, 2, 2, 6, 6, 4, None, None, None),
        "cached-window": (1, 2, 2, 3, 8, 8, 4, 3, None, None),
        "cached-prefix": (1, 4, 2, 1, 7, 5, 4, None, None, None),
        "long": (1, 2, 1, 270, 270, 270, 2, None, None, None),
        "long-window": (1, 1, 1, 270, 272, 270, 2, 100, None, None),
    }
    flags = {
        "causal": "CausalMask AttentionScale",
        "scale": "AttentionScale",
        "gqa": "GroupedQuery",
        "mqa": "GroupedQuery",
        "window": "SlidingWindow",
        "packed": "PackedDocuments",
        "padded": "Padding",
        "prefix": "PrefixVisible",
        "cached": "RightAligned",
        "long": "BlockEdge",
    }
    comments = {
        "window": "a query sees `window` tokens, itself included",
        "padded": "a segment of -1 is padding: its outputs are not compared and get no gradient",
        "prefix": "the first keys are an adapter's: every query sees them",
        "prefix-window": "the window does not hide the adapter's keys",
        "cached": "fewer queries than keys: they are the last tokens",
        "long": "more than 256 queries: the edge of a block",
    }
    for variant, (batch, heads, kv, queries, keys, tokens, dim, window, segments, scale) in rows.items():
        case_id = f"attention-{variant}"
        draw = Draw(case_id)
        q, k, v = (
            draw.normal(batch, heads, queries, dim),
            draw.normal(batch, kv, keys, dim),
            draw.normal(batch, kv, keys, dim),
        )
        g = draw.normal(batch, heads, queries, dim)
        inputs = {"q": q, "k": k, "v": v}
        if segments:
            inputs["segments"] = np.int32(segments)
            g = g * (inputs["segments"] >= 0)[:, None, tokens - queries :, None]
        rows_seen = [visible(queries, keys, tokens, window, s) for s in segments or [None]]
        seen = torch.from_numpy(np.stack(rows_seen)[:, None])

        def forward(q, k, v, segments=None, seen=seen, scale=scale, late=tokens - queries):
            y = attend(q, k, v, seen, scale)
            return y if segments is None else y * (segments >= 0)[:, None, late:, None]

        yield Case(
            id=case_id,
            kind="fused",
            name="attention",
            comment=comments.get(variant, ""),
            flags=tuple(dict.fromkeys(" ".join(flags.get(part, "") for part in variant.split("-")).split())),
            config={"tokens": tokens, "window": window, "scale": scale},
            spec="arXiv:1706.03762; masks: golden/README.md",
            inputs=inputs | {"g": np.float32(g)},
            compute=with_gradients(forward, ("q", "k", "v")),
        )


# ---- losses ----------------------------------------------------------------------------------------------------


def _cross_entropy() -> Iterator[Case]:
    spec = "sum of -log softmax(logits)[target] over rows with target >= 0, divided by denominator"
    rows = {
        "plain": ([3, 0, 6, 2], 4.0, 1.0),
        "ignored": ([3, -100, 6, -100, 0], 3.0, 1.0),
        "all-ignored": ([-100, -100], 1.0, 1.0),
        "global-count": ([3, 0, -100, 5], 11.0, 1.0),
        "large": ([3, 0, 6, 1], 4.0, 60.0),
    }
    comments = {
        "ignored": "rows with a negative target have no loss and no gradient, and do not count",
        "all-ignored": "no target at all: the loss and every gradient are 0, not NaN",
        "global-count": "the denominator is given: the supervised tokens of the whole batch, not of this part",
        "large": "large logits: the maximum is subtracted first",
    }
    flags = {
        "ignored": ("IgnoredTargets",),
        "all-ignored": ("IgnoredTargets",),
        "global-count": ("AccumulationMean",),
        "large": ("Overflow",),
    }
    for variant, (targets, denominator, size) in rows.items():
        draw = Draw(f"cross_entropy-{variant}")
        shared = {"spec": spec, "comment": comments.get(variant, ""), "flags": flags.get(variant, ())}

        def loss(logits, targets, denominator=denominator):
            return functional.cross_entropy(logits, targets.long(), ignore_index=-100, reduction="sum") / denominator

        inputs = {"logits": draw.normal(len(targets), 7, scale=size), "targets": np.int32(targets)}
        yield _case("cross_entropy", variant, inputs, loss, "logits", denominator=denominator, **shared)

        def head_loss(hidden, weight, targets, loss=loss):
            return loss(hidden @ weight.mT, targets)

        inputs = {
            "hidden": draw.normal(len(targets), 4, scale=size**0.5),
            "weight": draw.normal(7, 4, scale=size**0.5 / 2),
            "targets": np.int32(targets),
        }
        yield _case("linear_cross_entropy", variant, inputs, head_loss, "hidden", denominator=denominator, **shared)
    yield from _weighted_cross_entropy()


def _weighted_cross_entropy() -> Iterator[Case]:
    targets, weights = np.int32([3, -100, 6, 3, 0]), np.float32([0.5, 2.0, 4.0, 0.0, 1.0])

    def loss(logits, targets, weights):
        losses = functional.cross_entropy(logits, targets.long(), ignore_index=-100, reduction="none")
        return (weights * losses).sum() / 5.5

    def head_loss(hidden, weight, targets, weights):
        return loss(hidden @ weight.mT, targets, weights)

    shared = {
        "spec": "sum of -weights[row] log softmax(logits)[target] over rows with target >= 0, divided by denominator",
        "comment": "every row counts by a weight of its own; the denominator is given, here their sum",
        "flags": ("ClassWeights", "IgnoredTargets"),
        "denominator": 5.5,
    }
    draw = Draw("cross_entropy-weighted")
    inputs = {"logits": draw.normal(5, 7), "targets": targets, "weights": weights}
    yield _case("cross_entropy", "weighted", inputs, loss, "logits", **shared)
    inputs = {"hidden": draw.normal(5, 4), "weight": draw.normal(7, 4), "targets": targets, "weights": weights}
    yield _case("linear_cross_entropy", "weighted", inputs, head_loss, "hidden", **shared)


def _dropout() -> Iterator[Case]:
    spec = "arXiv:1207.0580; which elements: golden/README.md, Random numbers"
    for variant, rate, seed, purpose in (
        ("tenth", 0.1, 7, ["dropout", 0]),
        ("half", 0.5, 2**40 + 3, ["dropout", "a.b", 12]),
    ):
        keep = np.array([w >= round(rate * 2**32) for w in words(seed, purpose, 60)]).reshape(3, 4, 5)

        def forward(x, keep=keep, rate=rate):
            return x * torch.from_numpy(keep) / (1 - rate)

        yield _case(
            "dropout",
            variant,
            {"x": Draw(f"dropout-{variant}").normal(3, 4, 5)},
            forward,
            "x",
            spec=spec,
            rate=rate,
            seed=seed,
            purpose=purpose,
            flags=("DropoutScale", "DropoutMask"),
        )
