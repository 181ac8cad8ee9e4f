"""Whole tiny encoders and encoder-decoders: hidden states, or logits and loss, and the gradient for every weight.

The oracle is transformers' own classes, in float64 throughout as in models.py; the witness is encoder_reference.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import encoder_reference
import numpy as np
import reference
import torch
from common import Case, Compute, Draw, Tensors
from models import ORACLE, PADDED, draw_weights, precision, real_only
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

NOT_WEIGHTS = ("ids", "types", "said", "targets", "segments", "g")
NO_GRADIENT = (
    ".key.bias",
    ".k_lin.bias",
    ".pos_key_proj.bias",
)  # but rounding errors: they shift all of a query's scores

BERT = {
    "vocab_size": 14,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "pad_token_id": 0,
}
DISTILBERT = {
    "vocab_size": 14,
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
    "max_position_embeddings": 10,
    "pad_token_id": 0,
}
ALBERT = BERT | {"embedding_size": 6, "num_hidden_layers": 3}
DEBERTA = BERT | {
    "type_vocab_size": 0,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 6,
    "max_relative_positions": 12,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}
DEBERTA_V2 = DEBERTA | {
    "position_buckets": -1,
    "max_relative_positions": 4,
    "norm_rel_ebd": "none",
    "share_att_key": False,
    "position_biased_input": True,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "embedding_size": 6,
}
T5 = {
    "vocab_size": 14,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 12,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
FLAN = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def transformers_model(model_type: str, settings: dict):
    """The class that transformers has for it, in the default dtype, without dropout."""
    kind = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModel
    model = kind.from_config(AutoConfig.for_model(model_type, **settings)).to(torch.get_default_dtype()).eval()
    if not settings.get("tie_word_embeddings", True):  # transformers 5 ties T5's all the same
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.shared.weight))
        model.config.tie_word_embeddings = False
    return model


def parameters(model) -> dict[str, torch.nn.Parameter]:
    """Those that have a part in the outputs: a pooler has none."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("pooler.")}


def answer(forward, tensors: Tensors, weights: Tensors) -> Tensors:
    """The outputs of a case, from a forward function of ids (and types, or said) and segments."""
    segments = tensors.get("segments")
    found = forward(**{name: tensors[name] for name in ("ids", "types", "said", "segments") if name in tensors})
    if "g" in tensors:
        (found * tensors["g"]).sum().backward()
        outputs = {"hidden": real_only(found, segments)}
    else:
        loss = reference.mean_loss(found, tensors["targets"])
        loss.backward()
        outputs = {"logits": found, "loss": loss}
    grads = {f"grad.{name}": weight.grad for name, weight in weights.items() if not name.endswith(NO_GRADIENT)}
    return outputs | grads


def by_transformers(model_type: str, settings: dict) -> Compute:
    def compute(tensors: Tensors) -> Tensors:
        with precision():
            model = transformers_model(model_type, settings)
            given = {name: t for name, t in tensors.items() if name not in NOT_WEIGHTS}
            if given.keys() != parameters(model).keys():
                raise SystemExit(
                    f"{model_type}: other weights than expected: {given.keys() ^ parameters(model).keys()}"
                )
            model.load_state_dict(given, strict=False)

            def forward(ids, types=None, said=None, segments=None):
                options = {} if segments is None else {"attention_mask": (segments >= 0).long()}
                options |= {} if types is None else {"token_type_ids": types.long()}
                if said is not None:
                    return model(ids.long(), decoder_input_ids=said.long(), **options).logits
                return model(ids.long(), **options).last_hidden_state

            return answer(forward, tensors, parameters(model))

    return compute


def by_reference(config: dict, tensors: Tensors) -> Tensors:
    weights = {n: t.clone().requires_grad_() for n, t in tensors.items() if n not in NOT_WEIGHTS}
    return answer(encoder_reference.model(config, weights), tensors, weights)


def inputs_of(draw: Draw, config: dict, segments: list[list[int]] | None, types: bool) -> dict[str, np.ndarray]:
    """ids, of padding where segments say so, and what else the model reads; g, or what the decoder said and is to say.

    No real token is the padding token, whose row transformers' embeddings give no gradient.
    """
    pad, time = config["pad_token_id"], 7
    ids = draw.integers(2, config["vocab_size"], 2, time)
    real = np.ones((2, time), bool) if segments is None else np.int32(segments) >= 0
    found = {"ids": np.where(real, ids, pad).astype(np.int32)}
    if types:
        found["types"] = np.where(np.arange(time) < 3, 0, [[1], [0]]).astype(np.int32)
    if config["model_type"] == "t5":
        targets = draw.integers(2, config["vocab_size"], 2, 6)
        found["said"] = np.concatenate([np.zeros((2, 1), np.int32), targets[:, :-1]], axis=1)
        targets[1, 4:] = -100
        found["targets"] = targets
    else:
        found["g"] = draw.normal(2, time, config.get("hidden_size") or config["dim"]) * real[..., None]
    return found | ({} if segments is None else {"segments": np.int32(segments)})


def cases() -> Iterator[Case]:
    rows: list[tuple] = [  # id, model type, settings, segments, types, flags, comment
        ("bert-plain", "bert", BERT, None, True, "TextTypes NormPlace", "a pair of texts in the first row"),
        ("bert-padded", "bert", BERT | {"hidden_act": "gelu_new"}, PADDED, True, "Padding GeluVariant NormPlace", ""),
        (
            "roberta-padded",
            "roberta",
            BERT | {"pad_token_id": 1, "type_vocab_size": 1},
            PADDED,
            False,
            "Padding PositionOffset",
            "the first token is at the position after the padding token's number",
        ),
        (
            "distilbert-padded",
            "distilbert",
            DISTILBERT | {"activation": "relu"},
            PADDED,
            False,
            "Padding",
            "no types; other names",
        ),
        ("albert-shared", "albert", ALBERT, PADDED, True, "Padding SharedLayers", "three runs of one layer"),
        (
            "albert-groups",
            "albert",
            ALBERT | {"num_hidden_groups": 2, "hidden_act": "gelu"},
            None,
            False,
            "SharedLayers",
            "the first of two layers runs twice",
        ),
        (
            "deberta-v3-padded",
            "deberta-v2",
            DEBERTA,
            PADDED,
            False,
            "Padding RelativeBuckets DisentangledScale",
            "positions through the layers' own q and k, in buckets",
        ),
        (
            "deberta-v2-convolution",
            "deberta-v2",
            DEBERTA_V2,
            PADDED,
            False,
            "Padding RelativeBuckets DisentangledScale",
            "positions with projections of their own, beyond 4 the same; a convolution beside the first layer",
        ),
        (
            "t5-padded",
            "t5",
            T5,
            PADDED,
            False,
            "Padding TiedEmbedding RelativeBuckets UnscaledScores",
            "one matrix is embedding and head, and the head reads states divided by sqrt(d_model)",
        ),
        (
            "t5-gated",
            "t5",
            FLAN,
            None,
            False,
            "GeluVariant RelativeBuckets UnscaledScores",
            "as T5 1.1 and Flan-T5: a gate with the tanh form, a head of its own",
        ),
        (
            "t5-far",
            "t5",
            T5 | {"relative_attention_max_distance": 5},
            None,
            False,
            "RelativeBuckets",
            "the farthest tokens share a bucket",
        ),
        (
            "deberta-v2-whole",
            "deberta-v2",
            DEBERTA_V2,
            None,
            False,
            "RelativeBuckets DisentangledScale",
            "no padding; a convolution beside the first layer",
        ),
    ]
    for case_id, model_type, settings, segments, types, flags, comment in rows:
        draw = Draw(case_id)
        model = transformers_model(model_type, settings)
        model.config.architectures = [type(model).__name__]
        config = json.loads(model.config.to_json_string())
        shapes = {name: tuple(p.shape) for name, p in parameters(model).items()}
        yield Case(
            id=case_id,
            kind="model",
            name=model_type.removesuffix("-v2"),
            comment=comment,
            flags=tuple(flags.split()),
            config=config,
            inputs=inputs_of(draw, config, segments, types) | draw_weights(draw, shapes),
            oracle=ORACLE,
            compute=by_transformers(model_type, settings),
            witnesses={"golden/make/encoder_reference.py": partial(by_reference, config)},
            spec="golden/README.md, Models",
        )
