"""Writing text with a model: greedy or sampled, with a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from .backend import blas_threads, to_host
from .errors import RefpeftError
from .models.base import Cache, Model
from .models.config import check_speaks
from .rng import Stream
from .tensor import no_grad


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """The tokens that follow each prompt, at most `max_tokens` each, up to and without the first of `stop`.

    Prompts may differ in length: shorter ones are padded on the left, which changes no result. `temperature` 0 takes
    the most probable token; otherwise one is drawn from the `top_k` most probable whose probabilities sum to `top_p`.
    The same seed draws the same tokens for a row, whatever rows are beside it in the batch. A model whose positions are
    learned (GPT-2) says no more than it has positions for.
    """
    check_speaks(model.config)
    if not prompts or not all(len(p) for p in prompts):
        raise RefpeftError("a prompt is empty: expected at least one token (give the model's BOS token for no prompt)")
    if not 0 <= temperature < math.inf:
        raise RefpeftError(f"temperature is {temperature}: expected 0 (greedy) or a number above it")
    if top_p is not None and not 0 < top_p <= 1:
        raise RefpeftError(f"top_p is {top_p}: expected a probability above 0")
    longest = max(map(len, prompts))
    if longest > model.room:
        raise RefpeftError(f"a prompt has {longest:,} tokens, but the model has room for {model.room:,}")
    steps = int(min(max_tokens, model.room - longest + 1))  # the last token is not read again
    ids = np.zeros((len(prompts), longest), np.int32)
    segments = np.full(ids.shape, -1, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        segments[row, longest - len(prompt) :] = 0
    padded = bool((segments < 0).any())
    before = np.asarray([longest - len(p) for p in prompts])[:, None]  # padding of each row
    streams = [Stream(seed, "sample", *map(int, prompt)) for prompt in prompts]
    cache, out = Cache(), [[] for _ in prompts]
    live, now = np.ones(len(prompts), bool), ids
    with no_grad(), blas_threads(model.parameters()):
        for _ in range(steps):
            positions = np.maximum(np.arange(cache.tokens, cache.tokens + now.shape[1])[None] - before, 0)
            logits = model(now, positions if padded else None, segments if padded else None, cache, last=True)
            last = to_host(logits.data)[:, -1]
            if np.isnan(last.max()):
                raise RefpeftError("the logits are nan: weights of the model, or of an adapter, are not finite numbers")
            picked = _pick(last, temperature, top_k, top_p, streams)
            for row in np.flatnonzero(live):
                if int(picked[row]) in stop:
                    live[row] = False
                else:
                    out[row].append(int(picked[row]))
            if not live.any():
                break
            now = picked[:, None].astype(np.int32)
            segments = np.concatenate((segments, np.zeros_like(now)), axis=1)
    return out


def _pick(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, streams: Sequence[Stream]
) -> np.ndarray:
    """One token for each row of logits (batch, vocab)."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    picked = np.empty(len(logits), np.int64)
    for row, stream in enumerate(streams):
        z = logits[row].astype(np.float64) / temperature
        order = np.argsort(-z, kind="stable")[:top_k]
        p = np.exp(z[order] - z[order[0]])
        p /= p.sum()
        if top_p is not None:  # the smallest set whose probability reaches top_p, at least one token
            keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
            order, p = order[:keep], p[:keep] / p[:keep].sum()
        picked[row] = order[min(int(np.searchsorted(np.cumsum(p), stream.uniform(), side="right")), len(order) - 1)]
    return picked
