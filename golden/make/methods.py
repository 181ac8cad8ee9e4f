"""Methods on a whole tiny Llama and GPT-2: logits, loss, gradients, and three steps of AdamW. The witness is PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import peft_witness
import reference
import torch
from common import Case, Compute, Draw, Tensors
from equations import PAPERS, houlsby, ia3, lora, lora_scale, prefix, prompt
from models import (
    GPT2,
    LLAMA,
    PACKED,
    PADDED,
    config_of,
    draw_weights,
    one_document_at_a_time,
    real_only,
    tokens,
    weight_shapes,
    with_segments,
)

SMALL = {"vocab_size": 16}
SMALL_LLAMA = (
    LLAMA | SMALL | {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
)
SMALL_GPT2 = GPT2 | SMALL | {"n_embd": 8, "n_head": 2, "n_inner": 12}


def cases() -> Iterator[Case]:
    yield from model_cases("llama", SMALL_LLAMA, on_llama())
    yield from model_cases("gpt2", SMALL_GPT2, on_gpt2())


@dataclass
class Adapted:
    """A method on a model: what it trains, and where it stands."""

    method: str
    options: dict
    trained: dict[str, tuple[int, ...]]  # names and shapes, <site>.<letter>
    advice: Callable[[Tensors], reference.Advice]  # from the trained tensors
    constants: dict[str, tuple[int, ...] | np.ndarray] = field(default_factory=dict)  # given, not trained; or shapes
    first_position: int = 0
    flags: str = ""
    comment: str = ""
    peft: bool = True
    settings: dict = field(default_factory=dict)  # changes of the model's config
    label: str = ""  # in the names of its cases
    virtual: bool = False  # whether it adds virtual tokens, so that rows with padding and packed ones are cases, too
    witness: Compute | None = None  # PEFT's answer, where that takes more than the options
    rates: dict[str, float] = field(default_factory=dict)  # learning rates of letters, as multiples of the others'


def full(family: str, settings: dict, **changes) -> Adapted:
    shapes = weight_shapes(family, settings | changes)
    return Adapted("full", {}, shapes, lambda t: {}, peft=False, settings=changes, comment="everything is trained")


def on_llama() -> Iterator[Adapted]:
    layers = [f"model.layers.{i}" for i in range(2)]
    yield full("llama", SMALL_LLAMA, tie_word_embeddings=True)
    yield from _lora([(f"{here}.self_attn.{p}_proj", out) for here in layers for p, out in (("q", 8), ("v", 4))])
    yield _lora_at_both_ends()
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

    config_here = config | {"targets": [n for n, _ in sites]}
    yield Adapted("lora", config_here, shapes, advice, flags="Scaling TransposedFactor")
    yield Adapted(
        "lora",
        config_here | {"lr_ratio": 4.0},
        shapes,
        advice,
        label="plus-",
        rates={"B": 4.0},
        flags="LoraPlusRates",
        comment="B has 4 times the learning rate of A, also for its weight decay",
    )
    yield Adapted(
        "lora",
        config_here | {"freeze_A": True},
        {name: shape for name, shape in shapes.items() if name.endswith(".B")},
        advice,
        constants={name: shape for name, shape in shapes.items() if name.endswith(".A")},
        label="fa-",
        flags="FrozenFactor",
        peft=False,
        comment="A is given, and not trained",
    )


def _lora_at_both_ends() -> Adapted:
    """At an embedding and at the head that shares its table: each has factors of its own, of what is frozen once."""
    config = {"r": 2, "alpha": 6.0, "rslora": False, "dropout": 0.0}
    embed, head, vocab = "model.embed_tokens", "lm_head", SMALL["vocab_size"]
    shapes = {f"{embed}.A": (2, vocab), f"{embed}.B": (8, 2), f"{head}.A": (2, 8), f"{head}.B": (vocab, 2)}

    def advice(t: Tensors) -> reference.Advice:
        change = lora_scale(config) * (t[f"{embed}.B"] @ t[f"{embed}.A"]).mT
        return {
            embed: lambda f, ids: f(ids) + change[ids],
            head: lambda f, x: lora(f, x, t[f"{head}.A"], t[f"{head}.B"], lora_scale(config)),
        }

    return Adapted(
        "lora",
        config | {"targets": [embed, head]},
        shapes,
        advice,
        flags="Scaling TiedEmbedding",
        peft=False,
        settings={"tie_word_embeddings": True},
        label="tied-",
        comment="the head is tied to the embedding; each of the two has its own factors, which the other does not read",
    )


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
        virtual=True,
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
        virtual=True,
        comment="the first real token has position 3, as in PEFT; the prefix's keys are not rotated",
    )


TRAIN = {"steps": 3, "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-3, "weight_decay": 0.1}
"""eps is large: the gradient of a key's bias is rounding noise, which a small eps would blow up to whole steps."""


def forward(config: dict, adapted: Adapted) -> Callable:
    """logits(weights with the trained tensors among them, ids, positions, segments)"""

    def logits(weights: Tensors, ids, positions=None, segments=None) -> torch.Tensor:
        run = reference.model(config["model"], weights, adapted.advice(weights))
        return run(ids, positions, segments, first_position=adapted.first_position)

    return logits


def loss_of(config: dict, adapted: Adapted, t: Tensors, trained: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    segments = t.get("segments")
    logits = forward(config, adapted)(t | trained, t["ids"], t.get("positions"), segments)
    return real_only(logits, segments), reference.mean_loss(logits, t["targets"])


def gradients(config: dict, adapted: Adapted) -> Compute:
    def compute(t: Tensors) -> Tensors:
        trained = {n: t[n].clone().requires_grad_() for n in adapted.trained}
        logits, loss = loss_of(config, adapted, t, trained)
        loss.backward()
        return {"logits": logits, "loss": loss, **{f"grad.{n}": p.grad for n, p in trained.items()}}

    return compute


def three_steps(config: dict, adapted: Adapted) -> Compute:
    def compute(t: Tensors) -> Tensors:
        trained = {n: t[n].clone().requires_grad_() for n in adapted.trained}
        options = {name: TRAIN[name] for name in ("lr", "betas", "eps", "weight_decay")}
        groups = [
            {"params": [p], "lr": TRAIN["lr"] * adapted.rates.get(name.rpartition(".")[2], 1)}
            for name, p in trained.items()
        ]
        optimizer = torch.optim.AdamW(groups, foreach=False, **options)
        losses = []
        for _ in range(TRAIN["steps"]):
            optimizer.zero_grad()
            _, loss = loss_of(config, adapted, t, trained)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), **{f"after.{n}": p for n, p in trained.items()}}

    return compute


def model_cases(family: str, settings: dict, methods: Iterator[Adapted]) -> Iterator[Case]:
    for adapted in methods:
        settings_here = settings | adapted.settings
        config = adapted.options | {"model": config_of(family, settings_here)}
        peft = adapted.witness or peft_witness.model(family, settings_here, adapted.method, adapted.options)
        alone = one_document_at_a_time(forward(config, adapted), settings_here["vocab_size"], list(adapted.trained))
        witnesses = {
            "model": {peft_witness.VERSION: peft} if adapted.peft else {},
            "padded": {peft_witness.VERSION: peft} if adapted.peft else {},
            "packed": {"each document alone": alone},
            "train": {},
        }
        comments = {
            "padded": "padding on the right. ",
            "packed": "every document of a row sees the virtual tokens, none another. ",
            "train": "three steps of AdamW. ",
        }
        variants = ("model", "train", "padded", "packed") if adapted.virtual else ("model", "train")
        for variant in ("train",) if adapted.rates else variants:
            case_id = f"{adapted.method}-{family}-{adapted.label}{variant}"
            draw = Draw(case_id)
            inputs = tokens(draw, settings_here["vocab_size"])
            if variant in ("padded", "packed"):
                inputs = with_segments(inputs, PADDED if variant == "padded" else PACKED, variant == "packed")
            base = draw_weights(draw, weight_shapes(family, settings_here))
            extra = {n: shape for n, shape in adapted.trained.items() if n not in base}
            inputs |= base | {n: draw.normal(*s, scale=0.4) + np.float32(n.endswith("gain")) for n, s in extra.items()}
            inputs |= {
                n: given if isinstance(given, np.ndarray) else draw.normal(*given, scale=0.4)
                for n, given in adapted.constants.items()
            }
            flags = {"padded": " Padding", "packed": " PackedDocuments"}.get(variant, "")
            train = variant == "train"
            yield Case(
                id=case_id,
                kind="method",
                name=adapted.method,
                at="train" if train else "model",
                comment=(comments.get(variant, "") + adapted.comment).strip(),
                flags=tuple((adapted.flags + flags).split()),
                spec=PAPERS[adapted.method],
                config=config | ({"optimizer": TRAIN} if train else {}),
                inputs=inputs,
                compute=three_steps(config, adapted) if train else gradients(config, adapted),
                witnesses=witnesses[variant],
            )
