"""Whole tiny models with the head of a task: what it says, the loss, and the gradient for every weight.

The oracle is transformers' own classes, in float64 throughout as in models.py; the witness is the head's formula, above
what encoder_reference.py and reference.py compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import encoder_reference
import numpy as np
import reference
import torch
import transformers
from common import Case, Compute, Draw, Tensors
from encoders import BERT, DEBERTA, DISTILBERT, NO_GRADIENT, NOT_WEIGHTS
from models import LLAMA, ORACLE, PADDED, draw_weights, precision, real_only
from torch.nn import functional
from transformers import AutoConfig

ROBERTA = BERT | {"pad_token_id": 1, "type_vocab_size": 1}
SEQUENCE, TOKENS, MASKED = "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "deberta-v2": "DebertaV2",
    "llama": "Llama",
}


def transformers_model(model_type: str, head: str, settings: dict):
    """The class that transformers has for it, in the default dtype, without dropout."""
    config = AutoConfig.for_model(model_type, **settings)
    kind = getattr(transformers, CLASSES[model_type] + head)
    model = kind._from_config(config, attn_implementation="eager").to(torch.get_default_dtype()).eval()
    model.config.architectures = [kind.__name__]
    return model


def answer(logits: torch.Tensor, tensors: Tensors, weights: Tensors) -> Tensors:
    targets = tensors["targets"]
    if targets.is_floating_point():
        loss = functional.mse_loss(logits[:, 0], targets)
    else:
        loss = functional.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), ignore_index=-100)
    loss.backward()
    said = real_only(logits, tensors["segments"]) if logits.ndim == 3 else logits
    grads = {f"grad.{name}": weight.grad for name, weight in weights.items() if not name.endswith(NO_GRADIENT)}
    return {"logits": said, "loss": loss} | grads


def by_transformers(model_type: str, head: str, settings: dict) -> Compute:
    def compute(tensors: Tensors) -> Tensors:
        with precision():
            model = transformers_model(model_type, head, settings)
            weights = dict(model.named_parameters())
            given = {name: t for name, t in tensors.items() if name not in NOT_WEIGHTS}
            if given.keys() != weights.keys():
                raise SystemExit(f"{model_type}: other weights than expected: {given.keys() ^ weights.keys()}")
            model.load_state_dict(given, strict=False)
            options = {"token_type_ids": tensors["types"].long()} if "types" in tensors else {}
            mask = (tensors["segments"] >= 0).long()
            return answer(model(tensors["ids"].long(), attention_mask=mask, **options).logits, tensors, weights)

    return compute


def by_formula(head: str, config: dict, tensors: Tensors) -> Tensors:
    weights = {n: t.clone().requires_grad_() for n, t in tensors.items() if n not in NOT_WEIGHTS}
    return answer(logits_of(head, config, weights, tensors), tensors, weights)


def logits_of(head: str, config: dict, weights: Tensors, tensors: Tensors) -> torch.Tensor:
    family, segments = config["model_type"], tensors["segments"]
    if family == "llama":  # its head for labels in the place of the one for tokens
        body = {("lm_head.weight" if name == "score.weight" else name): w for name, w in weights.items()}
        said = reference.model(config | {"tie_word_embeddings": False}, body)(tensors["ids"], None, segments)
        return said[torch.arange(len(said)), (segments >= 0).sum(1) - 1]
    prefix = {"deberta-v2": "deberta", "distilbert": "distilbert"}.get(family, family) + "."
    body = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    hidden = encoder_reference.model(config, body)(tensors["ids"], tensors.get("types"), segments)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    if head == TOKENS:
        return linear("classifier", hidden)
    if head == MASKED:
        norm = "cls.predictions.transform.LayerNorm"
        x = functional.gelu(linear("cls.predictions.transform.dense", hidden))
        x = functional.layer_norm(x, x.shape[-1:], weights[f"{norm}.weight"], weights[f"{norm}.bias"], 1e-12)
        return x @ body["embeddings.word_embeddings.weight"].T + weights["cls.predictions.bias"]
    first = hidden[:, 0]
    if family == "bert":
        return linear("classifier", torch.tanh(linear("bert.pooler.dense", first)))
    if family == "roberta":
        return linear("classifier.out_proj", torch.tanh(linear("classifier.dense", first)))
    if family == "distilbert":
        return linear("classifier", torch.relu(linear("pre_classifier", first)))
    return linear("classifier", functional.gelu(linear("pooler.dense", first)))


def inputs_of(draw: Draw, head: str, config: dict, labels: int, types: bool) -> dict[str, np.ndarray]:
    """ids, of padding where segments say so, types, targets and segments."""
    segments = np.int32(PADDED)
    real = segments >= 0
    ids = draw.integers(2, config["vocab_size"], *segments.shape)
    found = {"ids": np.where(real, ids, config["pad_token_id"]).astype(np.int32)}
    if types:
        found["types"] = (np.where(np.arange(segments.shape[1]) < 3, 0, 1) * real).astype(np.int32)
    if head == SEQUENCE:
        found["targets"] = draw.normal(2) if labels == 1 else draw.integers(0, labels, 2)
    else:
        asked = real & (np.arange(segments.shape[1]) % 2 == 1)
        values = draw.integers(0, labels or config["vocab_size"], *segments.shape)
        found["targets"] = np.where(asked, values, -100).astype(np.int32)
    return found | {"segments": segments}


def cases() -> Iterator[Case]:
    rows: list[tuple] = [  # id, model type, settings, head, labels, types, flags, comment
        ("bert-classifies", "bert", BERT, SEQUENCE, 3, True, "Pooler TextTypes", "a pair of texts; tanh in the pooler"),
        ("roberta-classifies", "roberta", ROBERTA, SEQUENCE, 3, False, "Pooler", "two layers in the classifier"),
        ("distilbert-regression", "distilbert", DISTILBERT, SEQUENCE, 1, False, "Pooler", "ReLU; the loss is squared"),
        ("deberta-classifies", "deberta-v2", DEBERTA, SEQUENCE, 2, False, "Pooler", "the exact GELU in the pooler"),
        ("bert-tags", "bert", BERT, TOKENS, 4, False, "Padding", "no pooler"),
        ("bert-masked", "bert", BERT, MASKED, 0, False, "TiedEmbedding", "the table is the last layer, with a bias"),
        ("llama-classifies", "llama", LLAMA | {"pad_token_id": 0}, SEQUENCE, 3, False, "LastToken", "score, no bias"),
    ]
    for case_id, model_type, settings, head, labels, types, flags, comment in rows:
        draw, settings = Draw(case_id), settings | ({"num_labels": labels} if labels else {})
        model = transformers_model(model_type, head, settings)
        config = json.loads(model.config.to_json_string())
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        yield Case(
            id=case_id,
            kind="model",
            name=model_type.removesuffix("-v2"),
            comment=comment,
            flags=tuple(flags.split()),
            config=config,
            inputs=inputs_of(draw, head, config, labels, types) | draw_weights(draw, shapes),
            oracle=ORACLE,
            compute=by_transformers(model_type, head, settings),
            witnesses={"golden/make/heads.py, encoder_reference.py": partial(by_formula, head, config)},
            spec="golden/README.md, Models",
        )
