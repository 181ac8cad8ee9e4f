"""Writing text with a model, a decoder or an encoder-decoder: greedily, by drawing, or by beam search."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from .backend import SMALL_MODEL, blas_threads, threads, to_host
from .cpu import products
from .errors import RefpeftError
from .models.base import Model
from .models.cache import Cache
from .models.t5 import T5
from .rng import Stream
from .search import Answer, Beams, Single, repeating
from .tensor import Tensor, no_grad

Prompts = Sequence[Sequence[int]]


def generate(model: Model, prompts: Prompts, max_tokens: int = 128, **options: Any) -> list[list[int]]:
    """The tokens of each of `answers`, which says what the options are."""
    return [answer.tokens for answer in answers(model, prompts, max_tokens, **options)]


def answers(
    model: Model,
    prompts: Prompts,
    max_tokens: int = 128,
    *,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> list[Answer]:
    """What follows each prompt: at most `max_tokens` tokens, up to and without the first of `stop`.

    A decoder goes on with the prompt. An encoder-decoder reads the prompt, and says the answer after
    `decoder_start_token_id`. Prompts may differ in length: shorter ones are padded, which changes no answer.

    temperature      0 takes the most probable token; otherwise one is drawn from the `top_k` most probable whose
                     probabilities sum to `top_p`. The same `seed` draws the same tokens for a prompt, whatever prompts
                     are beside it
    beams            with 2 and more: beam search, as refpeft.search.Beams defines it
    length_penalty   of beam search: above 0 favours long answers, below 0 short ones
    no_repeat_ngram  so many tokens in a row never come again, also of a decoder's prompt; 0: they may. Where that
                     leaves no token, the answer ends

    A model whose positions are learned (GPT-2) says no more than it has positions for. Raises RefpeftError for wrong
    options and for a model that writes no text.
    """
    if model.task not in ("causal-lm", "seq2seq"):
        what = f" for the task {model.task!r}" if model.task else ""
        raise RefpeftError(f"a {model.config.family} model{what} writes no text: expected a decoder, or T5")
    _check(max_tokens, temperature, top_k, top_p, beams, length_penalty, no_repeat_ngram)
    if not prompts or not all(len(p) for p in prompts):
        raise RefpeftError("a prompt is empty: expected at least one token (give the model's BOS token for no prompt)")
    longest, room = max(map(len, prompts)), model.room
    if longest > room:
        raise RefpeftError(f"a prompt has {longest:,} tokens, but the model has room for {room:,}")
    walks: list[Single | Beams] = []
    for prompt in prompts:
        most = int(min(max_tokens, room - len(prompt) + 1))  # the last token is not read again
        if beams > 1:
            walks.append(Beams(most, stop, beams, length_penalty))
        else:
            walks.append(Single(most, stop, temperature, top_k, top_p, Stream(seed, "sample", *map(int, prompt))))
    together = len(prompts) if longest + max_tokens - 1 <= room else 1  # padding takes positions, too
    with no_grad(), _all_cores(model):
        for start in range(0, len(prompts), together):
            some = slice(start, start + together)
            _finish(walks[some], model, prompts[some], no_repeat_ngram)
    return [walk.answer for walk in walks]


def _check(
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    beams: int,
    length_penalty: float,
    no_repeat_ngram: int,
) -> None:
    """Raises RefpeftError for values that are none, and for options that do not go together."""
    counts = (("max_tokens", max_tokens, 1), ("beams", beams, 1), ("no_repeat_ngram", no_repeat_ngram, 0))
    for name, value, least in (*counts, ("top_k", 1 if top_k is None else top_k, 1)):
        if value < least:
            raise RefpeftError(f"{name} is {value}: expected {least} or more")
    if not 0 <= temperature < math.inf:
        raise RefpeftError(f"temperature is {temperature}: expected 0 (greedy) or a number above it")
    if top_p is not None and not 0 < top_p <= 1:
        raise RefpeftError(f"top_p is {top_p}: expected a probability above 0")
    if not -10 <= length_penalty <= 10:
        raise RefpeftError(f"length_penalty is {length_penalty}: expected a number from -10 to 10")
    if temperature and beams > 1:
        raise RefpeftError("a temperature draws tokens, and beam search draws none: choose one of them")
    if not temperature and (top_k or top_p):
        raise RefpeftError("top_k and top_p say among which tokens to draw: set a temperature, too")
    if length_penalty != 1 and beams == 1:
        raise RefpeftError("length_penalty chooses among beams: set 2 beams or more, too")


@contextlib.contextmanager
def _all_cores(model: Model) -> Iterator[None]:
    """Within it, a model's larger products take all threads: as refpeft.cpu shares them out, where it computes.

    BLAS shares out the product of a single row only, and its threads spin while they wait for each other.
    """
    ours = model.xp is np and model.dtype == np.float32
    number = threads() if ours and model.parameters() >= SMALL_MODEL else 1
    with blas_threads(model.parameters(), 1 if ours else None), products.threads(number):
        yield


def _finish(walks: Sequence[Single | Beams], model: Model, prompts: Prompts, no_repeat_ngram: int) -> None:
    """Takes walks, one for each prompt, to their ends, side by side."""
    text = Source(model, prompts) if isinstance(model, T5) else Beginning(model, prompts)
    logits = text.read(text.first)
    while walks:
        logp = _log_softmax(to_host(logits.data)[:, -1])
        if no_repeat_ngram:
            for row, said in enumerate(said for walk in walks for said in walk.said):
                before = text.before[text.prompt[row]]
                logp[row, repeating([*before, *said], no_repeat_ngram)] = -np.inf
        rows, start = [], 0
        for walk in walks:
            here = logp[start : start + len(walk.said)]
            rows += [start + row for row in walk.step(here)]
            start += len(here)
        walks = [walk for walk in walks if walk.said]
        if walks:
            logits = text.go_on(np.array(rows), [said[-1] for walk in walks for said in walk.said])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (rows, vocab) in float64."""
    logp = logits.astype(np.float64)
    top = logp.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        raise RefpeftError("the logits are nan: weights of the model, or of an adapter, are not finite numbers")
    logp -= top
    logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
    return logp


# ---- what is read ----


class Reading:
    """Rows of text that a model reads token by token; rows of the same prompt are neighbours.

    `first` (prompts, time) is what is read first, `before` the tokens of each prompt that belong to its answer's text.
    """

    first: np.ndarray
    before: Prompts

    def __init__(self, model: Model, prompts: Prompts):
        self.model, self.cache = model, Cache()
        self.prompt = np.arange(len(prompts))  # of each row

    def read(self, ids: np.ndarray) -> Tensor:
        """The logits (rows, 1, vocab) of what comes after `ids` (rows, time)."""
        raise NotImplementedError

    def take(self, rows: np.ndarray) -> None:
        """Goes on with these rows, which may be of other prompts than before."""
        self.prompt = self.prompt[rows]
        self.cache.take(self.model.xp.asarray(rows))

    def go_on(self, rows: np.ndarray, tokens: Sequence[int]) -> Tensor:
        """The logits (rows, 1, vocab) after `tokens`, each of which follows what was in one of `rows` until now."""
        if not np.array_equal(self.prompt[rows], self.prompt):
            self.take(rows)
        else:
            moved = np.flatnonzero(rows != np.arange(len(rows)))
            if moved.size:
                self.cache.reorder(*map(self.model.xp.asarray, (rows[moved], moved)))
        return self.read(np.array(tokens, np.int32)[:, None])


class Beginning(Reading):
    """Prompts that a decoder goes on with; padding is on the left."""

    def __init__(self, model: Model, prompts: Prompts):
        super().__init__(model, prompts)
        self.before = prompts
        self.first, real = _padded(prompts, right=False)
        self.padding = (~real).sum(axis=1, keepdims=True)  # of each row
        self.segments = np.where(real, 0, -1).astype(np.int32)

    def take(self, rows: np.ndarray) -> None:
        super().take(rows)
        self.padding, self.segments = self.padding[rows], self.segments[rows]

    def read(self, ids: np.ndarray) -> Tensor:
        if not self.padding.any():
            return self.model(ids, cache=self.cache, last=True)
        more = self.cache.tokens + ids.shape[1] - self.segments.shape[1]
        self.segments = np.pad(self.segments, ((0, 0), (0, more)))
        now = np.arange(self.cache.tokens, self.segments.shape[1])
        return self.model(ids, np.maximum(now - self.padding, 0), self.segments, self.cache, last=True)


class Source(Reading):
    """Prompts that an encoder reads, once; then the decoder speaks of them."""

    model: T5

    def __init__(self, model: T5, prompts: Prompts):
        super().__init__(model, prompts)
        start = model.config.start_id
        self.before = [[start]] * len(prompts)
        self.first = np.full((len(prompts), 1), start, np.int32)
        ids, real = _padded(prompts, right=True)
        self.segments = None if real.all() else np.where(real, 0, -1).astype(np.int32)
        self.states = model.encode(ids, self.segments)

    def take(self, rows: np.ndarray) -> None:
        super().take(rows)  # of the states, too: the cache has their keys and values
        self.segments = None if self.segments is None else self.segments[rows]

    def read(self, ids: np.ndarray) -> Tensor:
        hidden = self.model.decode(ids, self.states, self.segments, self.cache)
        return self.model.head(self.model.finish(hidden[:, -1:]))


def _padded(prompts: Prompts, right: bool) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as integers (prompts, time), with zeros on one side of shorter ones, and which are no padding."""
    longest = max(map(len, prompts))
    ids, real = np.zeros((len(prompts), longest), np.int32), np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        here = slice(len(prompt)) if right else slice(longest - len(prompt), None)
        ids[row, here] = prompt
        real[row, here] = True
    return ids, real
