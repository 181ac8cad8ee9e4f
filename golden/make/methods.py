"""Methods of fine-tuning, from their papers' equations: on one site, and on a whole tiny Llama and GPT-2.

The witness is PEFT wherever it has the method. Names and layouts of the trained tensors: golden/README.md, Methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import peft_witness
import reference
import torch
from common import Case, Draw, Tensors, with_gradients
from models import GPT2, LLAMA, config_of, draw_weights, tokens, weight_shapes
from torch.nn import functional

SMALL = {"vocab_size": 16}
SMALL_LLAMA = (
    LLAMA | SMALL | {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
)
SMALL_GPT2 = GPT2 | SMALL | {"n_embd": 8, "n_head": 2, "n_inner": 12}

PAPERS = {
    "full": "every weight is trained",
    "lora": "arXiv:2106.09685, section 4.1; rsLoRA: arXiv:2312.03732",
    "ia3": "arXiv:2205.05638, section 3.3; sides as PEFT",
    "bitfit": "arXiv:2106.10199",
    "ln_tuning": "arXiv:2312.11420",
    "houlsby": "arXiv:1902.00751, section 2.1",
    "prompt_tuning": "arXiv:2104.08691",
    "prefix_tuning": "arXiv:2101.00190; positions as PEFT",
}


# ---- the equations: what stands in for f at a site -------------------------------------------------------------


def lora(
    f: Callable, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, keep=None, rate=0.0
) -> torch.Tensor:
    dropped = x if keep is None else x * keep / (1 - rate)
    return f(x) + scale * (dropped @ A.mT) @ B.mT


def lora_scale(config: dict) -> float:
    return config["alpha"] / (config["r"] ** 0.5 if config.get("rslora") else config["r"])


def ia3(f: Callable, x: torch.Tensor, gain: torch.Tensor, feedforward: bool) -> torch.Tensor:
    return f(x * gain) if feedforward else f(x) * gain


ACTIVATIONS = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def houlsby(f: Callable, x: torch.Tensor, down, down_bias, up, up_bias, activation: str) -> torch.Tensor:
    """The adapter has its own skip connection, and stands before the residual of the sub-layer is added."""
    h = f(x)
    return h + ACTIVATIONS[activation](h @ down.mT + down_bias) @ up.mT + up_bias


def prompt(f: Callable, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows.expand(len(ids), *rows.shape), f(ids)), dim=1)


def prefix(f: Callable, q, k, v, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """keys and values are (kv_heads, virtual tokens, head_dim); keys are not rotated."""
    keys, values = (t.expand(len(q), *t.shape) for t in (keys, values))
    return f(q, torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2))


# ---- one site --------------------------------------------------------------------------------------------------


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
    comment="",
    flags="",
    witness=None,
) -> Case:
    """forward(**inputs) at one site, gradients of `wrt`; `merged` gives the weight with the adapter folded in."""
    case_id = f"{method}-{at}-{variant}"
    y = forward(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    gradients = with_gradients(forward, tuple(wrt.split()))

    def compute(tensors: Tensors) -> Tensors:
        return gradients(tensors) | (merged(tensors) if merged else {})

    return Case(
        id=case_id,
        kind="method",
        name=method,
        at=at,
        comment=comment,
        flags=tuple(flags.split()),
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

    draw = Draw("lora-conv1d-plain")
    inputs = {
        "x": draw.normal(2, 3, 5),
        "weight": draw.normal(5, 6),
        "bias": draw.normal(6),
        "A": draw.normal(2, 5, scale=0.5),
        "B": draw.normal(6, 2, scale=0.5),
    }
    config = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}
    yield site_case(
        "lora",
        "conv1d",
        "plain",
        inputs,
        lambda x, weight, bias, A, B: lora(lambda x: x @ weight + bias, x, A, B, 3.0),
        "x A B",
        config=config,
        merged=lambda t: {"merged.weight": t["weight"] + 3.0 * (t["B"] @ t["A"]).mT},
        flags="TransposedWeight Scaling",
        comment="GPT-2's layer: weight is stored (in, out); A and B are as ever",
        witness=peft_witness.lora(config),
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
    for variant, feedforward, bias in (
        ("output", False, False),
        ("output-bias", False, True),
        ("input", True, False),
        ("input-bias", True, True),
    ):
        draw, inputs = linear_inputs(f"ia3-linear-{variant}", bias=bias)
        inputs["gain"] = draw.normal(5 if feedforward else 6, scale=0.4) + np.float32(1)

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
            flags="BottleneckSkip" + " GeluVariant" * activation.startswith("gelu"),
            comment="the sub-layer that it stands behind is x @ weight.T",
        )
    draw = Draw("prompt_tuning-embedding-plain")
    inputs = {"ids": np.int32([[3, 0, 3], [6, 1, 2]]), "weight": draw.normal(7, 5), "prompt": draw.normal(2, 5)}
    yield site_case(
        "prompt_tuning",
        "embedding",
        "plain",
        inputs,
        lambda ids, weight, prompt: globals()["prompt"](lambda ids: weight[ids.long()], ids, prompt),
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
            flags="PrefixVisible" + " PrefixGroupedQuery" * (variant == "gqa"),
            comment="every query sees the prefix; among the tokens attention is causal",
        )


# ---- a whole model ---------------------------------------------------------------------------------------------


@dataclass
class Adapted:
    """A method on a model: what it trains, and where it stands."""

    method: str
    options: dict
    trained: dict[str, tuple[int, ...]]  # names and shapes, <site>.<letter>
    advice: Callable[[Tensors], reference.Advice]  # from the trained tensors
    first_position: int = 0
    flags: str = ""
    comment: str = ""
    peft: bool = True
    settings: dict = field(default_factory=dict)  # changes of the model's config


def full(family: str, settings: dict, **changes) -> Adapted:
    shapes = weight_shapes(family, settings | changes)
    return Adapted("full", {}, shapes, lambda t: {}, peft=False, settings=changes, comment="everything is trained")


def on_llama() -> Iterator[Adapted]:
    layers = [f"model.layers.{i}" for i in range(2)]
    yield full("llama", SMALL_LLAMA, tie_word_embeddings=True)
    yield from _lora([(f"{here}.self_attn.{p}_proj", out) for here in layers for p, out in (("q", 8), ("v", 4))])
    gains = {f"{here}.self_attn.{p}_proj.gain": (4,) for here in layers for p in "kv"}
    yield _ia3(gains | {f"{here}.mlp.down_proj.gain": (12,) for here in layers}, "down_proj")
    biased = {"attention_bias": True, "mlp_bias": True}
    widths = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8, "gate_proj": 12, "up_proj": 12, "down_proj": 8}
    parents = {name: "mlp" if width == 12 or name == "down_proj" else "self_attn" for name, width in widths.items()}
    biases = {f"{here}.{parents[p]}.{p}.bias": (n,) for here in layers for p, n in widths.items()}
    yield Adapted(
        "bitfit", {}, biases, lambda t: {}, peft=False, settings=biased, comment="every bias that the model has"
    )
    norms = [f"{here}.{n}" for here in layers for n in ("input_layernorm", "post_attention_layernorm")] + ["model.norm"]
    yield Adapted(
        "ln_tuning", {}, {f"{n}.weight": (8,) for n in norms}, lambda t: {}, comment="every norm, the last one too"
    )
    yield from _shared("model.embed_tokens", [f"{here}.self_attn" for here in layers], layers, kv=(1, 4))


def on_gpt2() -> Iterator[Adapted]:
    layers = [f"transformer.h.{i}" for i in range(2)]
    yield full("gpt2", SMALL_GPT2)
    yield from _lora([(f"{here}.attn.c_attn", 24) for here in layers])
    gains = {f"{here}.attn.c_attn.gain": (24,) for here in layers} | {
        f"{here}.mlp.c_proj.gain": (12,) for here in layers
    }
    yield _ia3(gains, "mlp.c_proj")
    norms = [f"{here}.{n}" for here in layers for n in ("ln_1", "ln_2")] + ["transformer.ln_f"]
    biases = {f"{n}.bias": (8,) for n in norms}
    widths = {"attn.c_attn": 24, "attn.c_proj": 8, "mlp.c_fc": 12, "mlp.c_proj": 8}
    biases |= {f"{here}.{name}.bias": (n,) for here in layers for name, n in widths.items()}
    yield Adapted(
        "bitfit", {}, biases, lambda t: {}, peft=False, comment="every bias that the model has, those of norms too"
    )
    yield Adapted("ln_tuning", {}, {f"{n}.{w}": (8,) for n in norms for w in ("weight", "bias")}, lambda t: {})
    yield from _shared("transformer.wte", [f"{here}.attn" for here in layers], layers, kv=(2, 4))


def _lora(sites: list[tuple[str, int]]) -> Iterator[Adapted]:
    config = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}
    shapes = {f"{name}.{letter}": shape for name, out in sites for letter, shape in (("A", (2, 8)), ("B", (out, 2)))}

    def advice(t: Tensors) -> reference.Advice:
        return {n: lambda f, x, n=n: lora(f, x, t[f"{n}.A"], t[f"{n}.B"], lora_scale(config)) for n, _ in sites}

    yield Adapted("lora", config | {"targets": [n for n, _ in sites]}, shapes, advice, flags="Scaling TransposedFactor")


def _ia3(gains: dict[str, tuple[int, ...]], feedforward: str) -> Adapted:
    sites = [name.removesuffix(".gain") for name in gains]
    inside = [name for name in sites if name.endswith(feedforward)]

    def advice(t: Tensors) -> reference.Advice:
        return {n: lambda f, x, n=n: ia3(f, x, t[f"{n}.gain"], n in inside) for n in sites}

    return Adapted("ia3", {"targets": sites, "feedforward": inside}, gains, advice, flags="Ia3InputSide")


def _shared(embed: str, attentions: list[str], layers: list[str], kv: tuple[int, int]) -> Iterator[Adapted]:
    blocks = [f"{here}.{out}" for here in layers for out in ("attn_out", "mlp_out")]
    letters = {"down": (3, 8), "down_bias": (3,), "up": (8, 3), "up_bias": (8,)}

    options = {"size": 3, "activation": "gelu_tanh", "norms": False}

    def bottlenecks(t: Tensors) -> reference.Advice:
        def advise(b: str) -> Callable:
            return lambda f, x: houlsby(f, x, *(t[f"{b}.{letter}"] for letter in letters), options["activation"])

        return {b: advise(b) for b in blocks}

    yield Adapted(
        "houlsby",
        options,
        {f"{b}.{letter}": s for b in blocks for letter, s in letters.items()},
        bottlenecks,
        flags="BottleneckSkip",
        peft=False,
        comment="after attention and after the feed-forward layer, before each residual",
    )
    yield Adapted(
        "prompt_tuning",
        {"tokens": 3},
        {f"{embed}.prompt": (3, 8)},
        lambda t: {embed: lambda f, ids: prompt(f, ids, t[f"{embed}.prompt"])},
        flags="PromptFirst PromptMaskedLoss",
        comment="the first real token has position 3; logits and loss are of the real tokens alone",
    )
    shapes = {f"{a}.attend.{letter}": (kv[0], 3, kv[1]) for a in attentions for letter in ("keys", "values")}

    def prefixes(t: Tensors) -> reference.Advice:
        def advise(a: str) -> Callable:
            return lambda f, q, k, v: prefix(f, q, k, v, t[f"{a}.attend.keys"], t[f"{a}.attend.values"])

        return {f"{a}.attend": advise(a) for a in attentions}

    yield Adapted(
        "prefix_tuning",
        {"tokens": 3},
        shapes,
        prefixes,
        first_position=3,
        flags="PrefixPositions PrefixVisible",
        comment="the first real token has position 3, as in PEFT; the prefix's keys are not rotated",
    )


TRAIN = {"steps": 3, "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-3, "weight_decay": 0.1}
"""eps is large: the bias of a key has only rounding noise for a gradient, which a small eps would blow up to whole steps."""


def adapted_loss(case_config: dict, adapted: Adapted, tensors: Tensors, trained: Tensors):
    weights = {n: t for n, t in tensors.items() if n not in ("ids", "targets")} | trained
    run = reference.model(case_config["model"], weights, adapted.advice(trained))
    logits = run(tensors["ids"], first_position=adapted.first_position)
    return logits, reference.mean_loss(logits, tensors["targets"])


def model_cases(family: str, settings: dict, methods: Iterator[Adapted]) -> Iterator[Case]:
    for adapted in methods:
        settings_here = settings | adapted.settings
        config = adapted.options | {"model": config_of(family, settings_here)}
        shared = {"kind": "method", "name": adapted.method, "spec": PAPERS[adapted.method]}
        for at in ("model", "train"):
            case_id = f"{adapted.method}-{family}-{at}"
            draw = Draw(case_id)
            inputs = tokens(draw, settings_here["vocab_size"], time=6)
            base = draw_weights(draw, weight_shapes(family, settings_here))
            extra = {n: shape for n, shape in adapted.trained.items() if n not in base}
            inputs |= base | {n: draw.normal(*s, scale=0.4) + np.float32(n.endswith("gain")) for n, s in extra.items()}

            def gradients(t: Tensors, config=config, adapted=adapted) -> Tensors:
                trained = {n: t[n].clone().requires_grad_() for n in adapted.trained}
                logits, loss = adapted_loss(config, adapted, t, trained)
                loss.backward()
                return {"logits": logits, "loss": loss, **{f"grad.{n}": p.grad for n, p in trained.items()}}

            def steps(t: Tensors, config=config, adapted=adapted) -> Tensors:
                trained = {n: t[n].clone().requires_grad_() for n in adapted.trained}
                options = {"lr": TRAIN["lr"], "betas": TRAIN["betas"], "eps": TRAIN["eps"]}
                optimizer = torch.optim.AdamW(
                    trained.values(), weight_decay=TRAIN["weight_decay"], foreach=False, **options
                )
                losses = []
                for _ in range(TRAIN["steps"]):
                    optimizer.zero_grad()
                    _, loss = adapted_loss(config, adapted, t, trained)
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
                return {"losses": torch.stack(losses), **{f"after.{n}": p for n, p in trained.items()}}

            witnesses = {}
            if at == "model" and adapted.peft:
                witnesses[peft_witness.VERSION] = peft_witness.model(
                    family, settings_here, adapted.method, adapted.options
                )
            yield Case(
                id=case_id,
                at=at,
                inputs=inputs,
                flags=tuple(adapted.flags.split()),
                witnesses=witnesses,
                comment=adapted.comment if at == "model" else f"three steps of AdamW. {adapted.comment}".strip(),
                config=config if at == "model" else config | {"optimizer": TRAIN},
                compute=gradients if at == "model" else steps,
                **shared,
            )


def cases() -> Iterator[Case]:
    yield from lora_sites()
    yield from ia3_sites()
    yield from other_sites()
    yield from model_cases("llama", SMALL_LLAMA, on_llama())
    yield from model_cases("gpt2", SMALL_GPT2, on_gpt2())
