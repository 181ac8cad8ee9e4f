"""Whole tiny models of every family: logits, loss, and the gradient of the loss for every weight.

The oracle is transformers' own classes (eager attention), in float64 throughout (common.Float64Throughout undoes its
roundings to float32); the witness is reference.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import reference
import torch
import transformers
from common import Case, Compute, Draw, Float64Throughout, Tensors, default_dtype
from fused import visible
from transformers import AutoConfig, AutoModelForCausalLM

ORACLE = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]} float64"
NOT_WEIGHTS = ("ids", "targets", "positions", "segments")

LLAMA = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
WIDE = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # four frequencies in a head
GPT2 = {
    "vocab_size": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 20,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def transformers_model(model_type: str, settings: dict):
    """The class that transformers has for it, in the default dtype; float32 is float64 if that is the default."""
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.get_default_dtype()).eval()


def config_of(model_type: str, settings: dict) -> dict:
    """config.json, as transformers writes it beside a checkpoint."""
    model = transformers_model(model_type, settings)
    model.config.architectures = [type(model).__name__]
    return json.loads(model.config.to_json_string())


def draw_weights(draw: Draw, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights of such sizes that every part of the model matters, biases and norms too."""
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = draw.normal(*shape, scale=0.3) + np.float32(
                "norm" in name.lower() or ".ln_" in name
            ) * name.endswith("weight")
        else:
            embedding = "embed" in name or "wte" in name or "wpe" in name
            weights[name] = draw.normal(*shape, scale=0.8 if embedding else 1.2 * shape[-1] ** -0.5)
    return {name: np.asarray(array, np.float32) for name, array in weights.items()}


def weight_shapes(model_type: str, settings: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in transformers_model(model_type, settings).named_parameters()}


def additive_mask(segments: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """(batch, 1, time, time): 0 where a token sees another, the lowest number where not."""
    time = segments.shape[1]
    seen = torch.from_numpy(np.stack([visible(time, time, time, window, row) for row in segments.tolist()]))[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.get_default_dtype()).min)


def precision():
    """Within it transformers does not round to float32, if float64 is wanted."""
    return Float64Throughout() if torch.get_default_dtype() == torch.float64 else default_dtype(torch.float32)


def by_transformers(model_type: str, settings: dict) -> Compute:
    def compute(tensors: Tensors) -> Tensors:
        with precision():
            model = transformers_model(model_type, settings)
            weights = {name: t for name, t in tensors.items() if name not in NOT_WEIGHTS}
            model.load_state_dict(weights, strict=False)
            ids, segments = tensors["ids"].long(), tensors.get("segments")
            options = {}
            if "positions" in tensors:  # packed: the mask is ours
                options = {"position_ids": tensors["positions"].long(), "attention_mask": additive_mask(segments)}
            elif segments is not None:  # padded on the right: transformers makes the mask
                options = {"attention_mask": (segments >= 0).long()}
            logits = model(ids, **options).logits
            loss = reference.mean_loss(logits, tensors["targets"])
            loss.backward()
            grads = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
        if grads.keys() != {f"grad.{name}" for name in weights}:
            raise SystemExit(f"{model_type}: other weights than expected: {grads.keys() ^ weights.keys()}")
        return {"logits": real_only(logits, segments), "loss": loss, **grads}

    return compute


def by_reference(config: dict) -> Compute:
    def compute(tensors: Tensors) -> Tensors:
        weights = {n: t.clone().requires_grad_() for n, t in tensors.items() if n not in NOT_WEIGHTS}
        segments = tensors.get("segments")
        logits = reference.model(config, weights)(tensors["ids"], tensors.get("positions"), segments)
        loss = reference.mean_loss(logits, tensors["targets"])
        loss.backward()
        return {
            "logits": real_only(logits, segments),
            "loss": loss,
            **{f"grad.{n}": w.grad for n, w in weights.items()},
        }

    return compute


def one_document_at_a_time(forward: Callable, vocab: int, trained: list[str] | None = None) -> Compute:
    """Packed rows again, each document alone: the loss of the pack is the sum of theirs over all its targets.

    forward(weights, ids) gives logits; `trained` are the weights to differentiate by (default: all).
    """

    def compute(tensors: Tensors) -> Tensors:
        weights = {n: t for n, t in tensors.items() if n not in NOT_WEIGHTS}
        leaves = {n: weights[n].clone().requires_grad_() for n in trained or weights}
        ids, targets, segments = tensors["ids"], tensors["targets"], tensors["segments"]
        logits, loss = torch.zeros(*ids.shape, vocab), torch.zeros(())
        supervised = (targets >= 0).sum()
        for row in range(len(ids)):
            for document in segments[row].unique().tolist():
                if document < 0:
                    continue
                here = segments[row] == document
                part = forward(weights | leaves, ids[row, here][None])[0]
                logits[row, here] = part.detach()
                count = (targets[row, here] >= 0).sum()
                if count:
                    loss = loss + reference.mean_loss(part, targets[row, here]) * count / supervised
        loss.backward()
        return {"logits": logits, "loss": loss, **{f"grad.{n}": w.grad for n, w in leaves.items()}}

    return compute


def real_only(logits: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Logits of padding are not compared: 0."""
    return logits if segments is None else logits * (segments >= 0)[..., None]


def tokens(draw: Draw, vocab: int, batch: int = 2, time: int = 7) -> dict[str, np.ndarray]:
    """ids, and targets of which some are not supervised; the last position of a row has none."""
    ids = draw.integers(0, vocab, batch, time)
    targets = np.concatenate([ids[:, 1:], np.full((batch, 1), -100)], axis=1).astype(np.int32)
    targets[0, :2] = -100
    return {"ids": ids, "targets": targets}


PADDED = [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, -1, -1, -1]]
PACKED = [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, -1, -1]]


def with_segments(inputs: dict[str, np.ndarray], segments: list[list[int]], packed: bool) -> dict[str, np.ndarray]:
    """Padding or several documents a row: no target beyond the end of a document; packed documents start at 0 again."""
    rows = np.int32(segments)
    last = np.concatenate([rows[:, 1:] != rows[:, :-1], np.ones((len(rows), 1), bool)], axis=1)
    targets = np.where(last | (rows < 0), -100, inputs["targets"]).astype(np.int32)
    out = inputs | {"targets": targets}
    if packed:
        starts = np.array([[row.index(s) for s in row] for row in segments])
        out["positions"] = (np.arange(rows.shape[1])[None] - starts).astype(np.int32)
    return out | {"segments": rows}


def cases() -> Iterator[Case]:
    rope = {"rope_theta": 10000.0}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    yarn = {"rope_type": "yarn", **rope, "factor": 4.0, "original_max_position_embeddings": 64}
    between = yarn | {"original_max_position_embeddings": 4096, "mscale": 0.8, "mscale_all_dim": 0.5}
    tied = {"tie_word_embeddings": True}
    rows: list[tuple] = [  # id, model type, settings, time, segments, flags, comment
        ("llama-plain", "llama", LLAMA, 7, None, "GroupedQuery RopePairs GateAndUp", "grouped queries, untied head"),
        (
            "llama-tied",
            "llama",
            LLAMA | tied,
            7,
            None,
            "TiedEmbedding",
            "one matrix is embedding and head: its gradient is the sum of both uses",
        ),
        ("llama-biases", "llama", LLAMA | {"attention_bias": True, "mlp_bias": True}, 7, None, "LinearBias", ""),
        (
            "llama-head-dim",
            "llama",
            LLAMA | {"head_dim": 6, "num_key_value_heads": 4},
            7,
            None,
            "HeadDim",
            "head_dim is not hidden_size / heads; as many key heads as heads",
        ),
        (
            "llama-rope-linear",
            "llama",
            WIDE | {"rope_parameters": {"rope_type": "linear", **rope, "factor": 4.0}},
            7,
            None,
            "RopeScaling",
            "",
        ),
        (
            "llama-rope-llama3",
            "llama",
            WIDE | {"rope_parameters": llama3, "max_position_embeddings": 256},
            7,
            None,
            "RopeScaling",
            "the four frequencies of a head fall into all three bands",
        ),
        (
            "llama-rope-dynamic-short",
            "llama",
            WIDE | {"rope_parameters": {"rope_type": "dynamic", **rope, "factor": 2.0}},
            7,
            None,
            "RopeScaling",
            "shorter than max_position_embeddings: nothing changes",
        ),
        (
            "llama-rope-dynamic-long",
            "llama",
            WIDE | {"rope_parameters": {"rope_type": "dynamic", **rope, "factor": 2.0}, "max_position_embeddings": 4},
            9,
            None,
            "RopeScaling",
            "longer than max_position_embeddings: the base grows with the length",
        ),
        (
            "llama-rope-yarn",
            "llama",
            WIDE | {"rope_parameters": yarn, "max_position_embeddings": 256},
            7,
            None,
            "RopeScaling YarnAmplitude",
            "cos and sin are multiplied by 0.1 ln(factor) + 1",
        ),
        (
            "llama-rope-yarn-amplitude",
            "llama",
            WIDE
            | {
                "rope_parameters": yarn | {"attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0},
                "max_position_embeddings": 256,
            },
            7,
            None,
            "RopeScaling YarnAmplitude",
            "the amplitude and the betas are given",
        ),
        (
            "llama-rope-yarn-between",
            "llama",
            WIDE | {"head_dim": 16, "rope_parameters": between, "max_position_embeddings": 16384},
            7,
            None,
            "RopeScaling YarnRamp YarnAmplitude",
            "waves 0 to 2 are kept, 6 and 7 slowed down, those between in part; the amplitude is of two mscales",
        ),
        (
            "llama-rope-yarn-exact",
            "llama",
            WIDE | {"head_dim": 16, "rope_parameters": between | {"truncate": False}, "max_position_embeddings": 16384},
            7,
            None,
            "RopeScaling YarnRamp",
            "the ends of the ramp are not rounded to whole waves, as in gpt-oss",
        ),
        ("llama-padded", "llama", LLAMA, 7, PADDED, "Padding", "padding on the right; its logits are not compared"),
        (
            "llama-packed",
            "llama",
            LLAMA,
            7,
            PACKED,
            "PackedDocuments",
            "documents of a row neither see nor place one another",
        ),
        (
            "mistral-window",
            "mistral",
            LLAMA | {"sliding_window": 3},
            9,
            None,
            "SlidingWindow",
            "a window shorter than the rows",
        ),
        ("mistral-no-window", "mistral", LLAMA | {"sliding_window": None}, 7, None, "", ""),
        ("qwen2-plain", "qwen2", LLAMA | tied, 7, None, "LinearBias", "q, k and v have biases, o has none"),
        ("qwen2-packed", "qwen2", LLAMA, 7, PACKED, "PackedDocuments", ""),
        (
            "qwen3-plain",
            "qwen3",
            LLAMA | {"head_dim": 8},
            7,
            None,
            "QueryKeyNorm",
            "a norm over each head of q and k, before rope",
        ),
        ("qwen3-tied", "qwen3", LLAMA | tied, 7, None, "QueryKeyNorm TiedEmbedding", ""),
        (
            "smollm3-nope",
            "smollm3",
            LLAMA | tied | {"no_rope_layers": [1, 0]},
            7,
            None,
            "NoRopeLayers",
            "the second layer has no rope",
        ),
        (
            "gpt2-plain",
            "gpt2",
            GPT2,
            7,
            None,
            "TransposedWeight TiedEmbedding GeluVariant FusedQueryKeyValue PositionOffset",
            "Conv1D weights are (in, out)",
        ),
        ("gpt2-untied", "gpt2", GPT2 | {"tie_word_embeddings": False}, 7, None, "TransposedWeight", ""),
        ("gpt2-padded", "gpt2", GPT2, 7, PADDED, "Padding", ""),
        ("gpt2-packed", "gpt2", GPT2, 7, PACKED, "PackedDocuments", "learned positions start at 0 in every document"),
    ]
    for case_id, model_type, settings, time, segments, flags, comment in rows:
        draw = Draw(case_id)
        config = config_of(model_type, settings)
        inputs = tokens(draw, settings["vocab_size"], time=time)
        packed = "packed" in case_id
        if segments:
            inputs = with_segments(inputs, segments, packed)
        witnesses = {"golden/make/reference.py": by_reference(config)}
        if packed:
            witnesses["each document alone"] = one_document_at_a_time(
                lambda weights, ids, config=config: reference.model(config, weights)(ids), settings["vocab_size"]
            )
        yield Case(
            id=case_id,
            kind="model",
            name=model_type,
            comment=comment,
            flags=tuple(flags.split()),
            config=config,
            inputs=inputs | draw_weights(draw, weight_shapes(model_type, settings)),
            oracle=ORACLE,
            compute=by_transformers(model_type, settings),
            witnesses=witnesses,
            spec="golden/README.md, Models",
        )
