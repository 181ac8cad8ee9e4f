"""Methods at one place: forward, gradients, merged weights. The witness is PEFT where it has the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import equations
import numpy as np
import peft_witness
import reference
import torch
from common import Case, Draw, Tensors, with_gradients
from equations import ACTIVATIONS, PAPERS, houlsby, ia3, lora, lora_scale, prefix
from torch.nn import functional


def cases() -> Iterator[Case]:
    yield from lora_sites()
    yield from ia3_sites()
    yield from ia3_at_conv1d()
    yield from other_sites()


def site_case(
    method: str,
    at: str,
    variant: str,
    inputs: dict[str, np.ndarray],
    forward: Callable,
    wrt: str,
    *,
    config: dict | None = None,
    merged: Callable[[Tensors], Tensors] | None = None,
    penalty: Callable[[Tensors], torch.Tensor] | None = None,
    comment="",
    flags="",
    witness=None,
) -> Case:
    """forward(**inputs) at one site, gradients of `wrt`; `merged` gives the weight with the adapter folded in.

    `penalty` is a term of the objective; there are its gradients by `wrt` without x, too.
    """
    flags += " MergedWeight" * bool(merged) + " PenaltyWeight" * bool(penalty)
    case_id = f"{method}-{at}-{variant}"
    y = forward(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    gradients = with_gradients(forward, tuple(wrt.split()))

    def compute(tensors: Tensors) -> Tensors:
        found = gradients(tensors) | (merged(tensors) if merged else {})
        return found | (penalised(tensors) if penalty else {})

    def penalised(tensors: Tensors) -> Tensors:
        leaves = {name: tensors[name].clone().requires_grad_() for name in wrt.split() if name != "x"}
        term = penalty(tensors | leaves)
        term.backward()
        reached = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"penalty": term, **{f"penalty.grad.{name}": grad for name, grad in reached.items()}}

    return Case(
        id=case_id,
        kind="method",
        name=method,
        at=at,
        comment=comment,
        flags=tuple(dict.fromkeys(flags.split())),
        config=config or {},
        inputs=inputs | {"g": Draw(f"{case_id} g").normal(*y.shape)},
        compute=compute,
        spec=PAPERS[method],
        witnesses={peft_witness.VERSION: witness} if witness else {},
    )


def linear_inputs(case_id: str, rows: tuple[int, ...] = (2, 3), out: int = 6, inp: int = 5, bias: bool = False):
    draw = Draw(case_id)
    inputs = {"x": draw.normal(*rows, inp), "weight": draw.normal(out, inp, scale=inp**-0.5)}
    return draw, inputs | ({"bias": draw.normal(out)} if bias else {})


def lora_sites() -> Iterator[Case]:
    rows = [  # variant, r, alpha, rslora, rows of x, bias, rate of dropout, comment, flags
        (
            "plain",
            2,
            6.0,
            False,
            (2, 3),
            False,
            0.0,
            "alpha / r is 3, and B is not zero, so a wrong scale shows",
            "Scaling",
        ),
        ("two-axes", 2, 6.0, False, (4,), False, 0.0, "x without a time axis", "Scaling"),
        ("small-alpha", 4, 1.0, False, (2, 3), False, 0.0, "alpha / r is 1 / 4: an inverted scale shows", "Scaling"),
        ("bias", 2, 3.0, False, (2, 3), True, 0.0, "the base has a bias, which is not scaled", "Scaling BaseBias"),
        ("rslora", 4, 3.0, True, (2, 3), False, 0.0, "alpha / sqrt(r)", "RsLoraScale"),
        ("rank-one", 1, 2.0, False, (2, 3), False, 0.0, "", "Scaling"),
        (
            "dropout",
            2,
            6.0,
            False,
            (2, 3),
            True,
            0.25,
            "in training: the mask `keep` is given; only the adapter's input is dropped",
            "DropoutPlace DropoutScale",
        ),
    ]
    for variant, r, alpha, rslora, shape, bias, rate, comment, flags in rows:
        draw, inputs = linear_inputs(f"lora-linear-{variant}", shape, bias=bias)
        inputs |= {"A": draw.normal(r, 5, scale=0.5), "B": draw.normal(6, r, scale=0.5)}
        config = {"r": r, "alpha": alpha, "rslora": rslora, "dropout": rate}
        if rate:
            inputs["keep"] = (draw.generator.random((*shape, 5)) >= rate).astype(np.float32)
        scale = lora_scale(config)

        def forward(x, weight, A, B, bias=None, keep=None, scale=scale, rate=rate):
            return lora(lambda x: functional.linear(x, weight, bias), x, A, B, scale, keep, rate)

        def merged(t, scale=scale):
            return {"merged.weight": t["weight"] + scale * t["B"] @ t["A"]}

        yield site_case(
            "lora",
            "linear",
            variant,
            inputs,
            forward,
            "x A B",
            config=config,
            merged=merged,
            comment=comment,
            flags=f"{flags} TransposedFactor",
            witness=None if rate else peft_witness.lora(config),
        )

    config = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}
    for variant, out in (("plain", 6), ("square", 5)):
        draw = Draw(f"lora-conv1d-{variant}")
        inputs = {
            "x": draw.normal(2, 3, 5),
            "weight": draw.normal(5, out),
            "bias": draw.normal(out),
            "A": draw.normal(2, 5, scale=0.5),
            "B": draw.normal(out, 2, scale=0.5),
        }
        yield site_case(
            "lora",
            "conv1d",
            variant,
            inputs,
            lambda x, weight, bias, A, B: lora(lambda x: x @ weight + bias, x, A, B, 3.0),
            "x A B",
            config=config,
            merged=lambda t: {"merged.weight": t["weight"] + 3.0 * (t["B"] @ t["A"]).mT},
            flags="TransposedWeight Scaling",
            comment="GPT-2's layer: weight is stored (in, out); A and B are as ever",
            witness=peft_witness.lora(config, conv1d=True),
        )

    draw = Draw("lora-embedding-plain")
    inputs = {
        "ids": np.int32([[3, 0, 3], [6, 1, 3]]),
        "weight": draw.normal(7, 5),
        "A": draw.normal(2, 7, scale=0.5),
        "B": draw.normal(5, 2, scale=0.5),
    }
    yield site_case(
        "lora",
        "embedding",
        "plain",
        inputs,
        lambda ids, weight, A, B: weight[ids.long()] + 3.0 * A.mT[ids.long()] @ B.mT,
        "A B",
        config=config,
        merged=lambda t: {"merged.weight": t["weight"] + 3.0 * (t["B"] @ t["A"]).mT},
        flags="Scaling RepeatedRows",
        comment="A is (r, vocab), B is (dim, r): the update of the table is scale (B A)^T",
        witness=peft_witness.lora(config),
    )


def ia3_sites() -> Iterator[Case]:
    for variant, feedforward, bias, out in (
        ("output", False, False, 6),
        ("output-bias", False, True, 6),
        ("output-square", False, True, 5),
        ("input", True, False, 6),
        ("input-bias", True, True, 6),
        ("input-square", True, True, 5),
    ):
        draw, inputs = linear_inputs(f"ia3-linear-{variant}", out=out, bias=bias)
        inputs["gain"] = draw.normal(5 if feedforward else out, scale=0.4) + np.float32(1)

        def forward(x, weight, gain, bias=None, feedforward=feedforward):
            return ia3(lambda x: functional.linear(x, weight, bias), x, gain, feedforward)

        def merged(t, feedforward=feedforward):
            if feedforward:
                return {"merged.weight": t["weight"] * t["gain"]}
            scaled = {"merged.weight": t["weight"] * t["gain"][:, None]}
            return scaled | ({"merged.bias": t["bias"] * t["gain"]} if "bias" in t else {})

        comment = "the feed-forward layer's input is scaled" if feedforward else "the output is scaled, its bias too"
        config = {"feedforward": feedforward}
        yield site_case(
            "ia3",
            "linear",
            variant,
            inputs,
            forward,
            "x gain",
            config=config,
            merged=merged,
            comment=comment,
            flags="Ia3InputSide" + " BaseBias" * bias,
            witness=peft_witness.ia3(config),
        )


def ia3_at_conv1d() -> Iterator[Case]:
    for variant, feedforward in (("output", False), ("input", True)):
        draw = Draw(f"ia3-conv1d-{variant}")
        inputs = {"x": draw.normal(2, 3, 5), "weight": draw.normal(5, 6, scale=0.4), "bias": draw.normal(6)}
        inputs["gain"] = draw.normal(5 if feedforward else 6, scale=0.4) + np.float32(1)
        config = {"feedforward": feedforward}

        def merged(t, feedforward=feedforward):
            side = t["gain"][:, None] if feedforward else t["gain"]
            return {"merged.weight": t["weight"] * side, "merged.bias": t["bias"] * (1 if feedforward else t["gain"])}

        yield site_case(
            "ia3",
            "conv1d",
            variant,
            inputs,
            lambda x, weight, bias, gain, feedforward=feedforward: ia3(
                lambda x: x @ weight + bias, x, gain, feedforward
            ),
            "x gain",
            config=config,
            merged=merged,
            comment="GPT-2's layer: weight is stored (in, out)",
            flags="Ia3InputSide BaseBias TransposedWeight",
            witness=peft_witness.ia3(config, conv1d=True),
        )


def _rms_norm(x, weight, bias=None):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _layer_norm(x, weight, bias):
    return functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def other_sites() -> Iterator[Case]:
    _, inputs = linear_inputs("bitfit-linear-plain", bias=True)
    yield site_case(
        "bitfit",
        "linear",
        "plain",
        inputs,
        functional.linear,
        "x bias",
        comment="the bias is trained, the weight is not: there is no grad.weight",
    )
    draw = Draw("bitfit-conv1d-plain")
    yield site_case(
        "bitfit",
        "conv1d",
        "plain",
        {"x": draw.normal(2, 3, 5), "weight": draw.normal(5, 6, scale=0.4), "bias": draw.normal(6)},
        lambda x, weight, bias: x @ weight + bias,
        "x bias",
        merged=lambda t: {"merged.weight": t["weight"], "merged.bias": t["bias"]},
        comment="GPT-2's layer: weight is stored (in, out)",
    )
    for norm, forward in (("rms", _rms_norm), ("layer", _layer_norm)):
        for method in ("bitfit", "ln_tuning"):
            if method == "bitfit" and norm == "rms":
                continue
            draw = Draw(f"{method}-norm-{norm}")
            inputs = {"x": draw.normal(2, 3, 6), "weight": draw.normal(6)} | (
                {"bias": draw.normal(6)} if norm == "layer" else {}
            )
            trained = {"bitfit": "bias", "ln_tuning": "weight bias" if norm == "layer" else "weight"}[method]
            config = {"norm": f"{norm}_norm", "eps": 1e-5}
            yield site_case(method, "norm", norm, inputs, forward, f"x {trained}", config=config, flags="NormEps")
    draw = Draw("ln_tuning-norm-merged")
    yield site_case(
        "ln_tuning",
        "norm",
        "merged",
        {"x": draw.normal(2, 3, 6), "weight": draw.normal(6), "bias": draw.normal(6)},
        _layer_norm,
        "x weight bias",
        config={"norm": "layer_norm", "eps": 1e-5},
        merged=lambda t: {"merged.weight": t["weight"], "merged.bias": t["bias"]},
        flags="NormEps",
        comment="the norm as it is then",
    )
    for activation in ACTIVATIONS:
        draw = Draw(f"houlsby-block-{activation}")
        inputs = {
            "x": draw.normal(2, 3, 6),
            "weight": draw.normal(6, 6, scale=0.4),
            "down": draw.normal(3, 6, scale=0.4),
            "down_bias": draw.normal(3, scale=0.3),
            "up": draw.normal(6, 3, scale=0.5),
            "up_bias": draw.normal(6, scale=0.3),
        }

        def adapted(x, weight, activation=activation, **letters):
            return houlsby(lambda x: x @ weight.mT, x, **letters, activation=activation)

        yield site_case(
            "houlsby",
            "block",
            activation,
            inputs,
            adapted,
            "x down down_bias up up_bias",
            config={"size": 3, "activation": activation, "norms": False},
            flags="BottleneckSkip BottleneckBias" + " GeluVariant" * activation.startswith("gelu"),
            comment="the sub-layer that it stands behind is x @ weight.T",
        )
    draw = Draw("prompt_tuning-embedding-plain")
    inputs = {"ids": np.int32([[3, 0, 3], [6, 1, 2]]), "weight": draw.normal(7, 5), "prompt": draw.normal(2, 5)}
    yield site_case(
        "prompt_tuning",
        "embedding",
        "plain",
        inputs,
        lambda ids, weight, prompt: equations.prompt(lambda ids: weight[ids.long()], ids, prompt),
        "prompt",
        config={"tokens": 2},
        flags="PromptFirst",
        comment="rows before the tokens, the same in every row of the batch",
    )
    for variant, heads, kv in (("plain", 2, 2), ("gqa", 4, 2)):
        draw = Draw(f"prefix_tuning-attention-{variant}")
        inputs = {
            "q": draw.normal(2, heads, 4, 4),
            "k": draw.normal(2, kv, 4, 4),
            "v": draw.normal(2, kv, 4, 4),
            "keys": draw.normal(kv, 3, 4),
            "values": draw.normal(kv, 3, 4),
        }

        def forward(q, k, v, keys, values):
            seen = torch.ones(4, 7, dtype=torch.bool).tril(3)
            return prefix(lambda q, k, v: reference.attend(q, k, v, seen, None), q, k, v, keys, values)

        yield site_case(
            "prefix_tuning",
            "attention",
            variant,
            inputs,
            forward,
            "q k v keys values",
            config={"tokens": 3},
            flags="PrefixVisible PrefixKeysValues" + " PrefixGroupedQuery" * (variant == "gqa"),
            comment="every query sees the prefix; among the tokens attention is causal",
        )
