"""How an answer grows, token by token: the most probable token, one that is drawn, or the best of several beams.

A walk has `said`, the continuations of one prompt that are still open (none once it is over), `step`, which is told the
log-probabilities of what comes next after each of them, and `answer`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from .rng import Stream


@dataclass(frozen=True)
class Answer:
    """What follows a prompt."""

    tokens: list[int]
    """Without the stop token."""
    logprob: float
    """log p(tokens | prompt) of the model itself, whatever was drawn from; the stop token counts, if it came."""
    stopped: bool
    """Whether the stop token came."""

    def score(self, length_penalty: float = 1.0) -> float:
        """logprob / length ** length_penalty, what beam search goes by. The length counts the stop token."""
        return self.logprob / max(1, len(self.tokens) + self.stopped) ** length_penalty


class Single:
    """One continuation: at each step the most probable token, or with a temperature one that is drawn."""

    def __init__(
        self,
        most: int,
        stop: Collection[int],
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stream: Stream | None = None,
    ):
        self.most, self.stop = most, stop
        self.temperature, self.top_k, self.top_p, self.stream = temperature, top_k, top_p, stream
        self.said: list[list[int]] = [[]]
        self.answer = Answer([], 0.0, False)

    def step(self, logp: np.ndarray) -> list[int]:
        """Goes on by logp (1, vocab), the log-probabilities of the next token; says from which rows."""
        token = self._pick(logp[0])
        tokens, logprob = self.answer.tokens, self.answer.logprob
        if token is None:
            self.said = []
        elif token in self.stop:
            self.answer, self.said = Answer(tokens, logprob + float(logp[0, token]), True), []
        else:
            self.answer = Answer([*tokens, token], logprob + float(logp[0, token]), False)
            self.said = [self.answer.tokens] if len(tokens) + 1 < self.most else []
        return [0] * len(self.said)

    def _pick(self, logp: np.ndarray) -> int | None:
        """A token, or None where none is allowed."""
        best = int(logp.argmax())
        if logp[best] == -np.inf:
            return None
        return draw(logp, self.temperature, self.top_k, self.top_p, self.stream) if self.temperature else best


def draw(logp: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, stream: Stream) -> int:
    """A token by logp (vocab,) / temperature, of the `top_k` most probable whose probabilities sum to `top_p`."""
    z = logp / temperature
    order = np.argsort(-z, kind="stable")[:top_k]
    p = np.exp(z[order] - z[order[0]])
    p /= p.sum()
    if top_p is not None:  # the smallest set whose probability reaches top_p, at least one token
        keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:keep], p[:keep] / p[:keep].sum()
    return int(order[min(int(np.searchsorted(np.cumsum(p), stream.uniform(), side="right")), len(order) - 1)])


class Beams:
    """Beam search as transformers 5 defines it (`_beam_search` with early_stopping=False).

    The `beams` most probable open continuations are kept, by the sum of their log-probabilities. One that ends among
    the `beams` best candidates of a step, by a stop token or at `most` tokens, is finished; the best finished ones are
    kept, by Answer.score. So many being finished, the search ends when the best open one, scored at its present length,
    is no better than the worst of them: a longer one might still have been, with a length penalty above 0.
    """

    def __init__(self, most: int, stop: Collection[int], beams: int, length_penalty: float):
        self.beams, self.length_penalty, self.most, self.stop = beams, length_penalty, most, frozenset(stop)
        self.said: list[list[int]] = [[]]  # most probable first
        self._logprobs = np.zeros(1)  # of these
        self._finished: list[Answer] = []  # best first

    @property
    def answer(self) -> Answer:
        return self._finished[0]

    def step(self, logp: np.ndarray) -> list[int]:
        """Goes on by logp (open ones, vocab), the log-probabilities of the next token; says from which rows."""
        said, length = self.said, len(self.said[0]) + 1
        rows, tokens, logprobs, ended = [], [], [], []
        for rank, (logprob, row, token) in enumerate(self._candidates(logp)):
            stops = token in self.stop
            if stops or length == self.most:
                if rank < self.beams:
                    ended.append(Answer(said[row] if stops else [*said[row], token], logprob, stops))
            elif len(rows) < self.beams:
                rows.append(row)
                tokens.append(token)
                logprobs.append(logprob)
        if not (rows or ended or self._finished):  # no token is allowed any more
            ended.append(Answer(said[0], float(self._logprobs[0]), False))
        self._finished = sorted([*self._finished, *ended], key=self._score, reverse=True)[: self.beams]
        if rows and len(self._finished) == self.beams:
            best = Answer([*said[rows[0]], tokens[0]], logprobs[0], False)
            if self._score(best) <= self._score(self._finished[-1]):
                rows, tokens, logprobs = [], [], []
        self.said = [[*said[row], token] for row, token in zip(rows, tokens, strict=True)]
        self._logprobs = np.array(logprobs)
        return rows

    def _score(self, answer: Answer) -> float:
        return answer.score(self.length_penalty)

    def _candidates(self, logp: np.ndarray) -> list[tuple[float, int, int]]:
        """(log-probability, row, token), the best first: enough of them for `beams` that do not stop."""
        wanted = self.beams * (1 + len(self.stop))
        each = min(wanted, logp.shape[1])
        tokens = np.argpartition(logp, -each, axis=1)[:, -each:]
        sums = self._logprobs[:, None] + np.take_along_axis(logp, tokens, axis=1)
        rows = np.broadcast_to(np.arange(len(logp))[:, None], tokens.shape)
        order = np.lexsort((tokens.ravel(), rows.ravel(), -sums.ravel()))[:wanted]
        return [(float(sums.flat[i]), int(rows.flat[i]), int(tokens.flat[i])) for i in order if sums.flat[i] > -np.inf]


def repeating(tokens: Sequence[int], n: int) -> np.ndarray:
    """The tokens that would end `n` tokens in a row which are in `tokens` already."""
    if len(tokens) < n:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int64), n)
    last = np.asarray(tokens[len(tokens) + 1 - n :], np.int64)
    return windows[(windows[:, :-1] == last).all(axis=1), -1]
