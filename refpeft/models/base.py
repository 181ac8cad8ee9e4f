"""What every model is: frozen weights, the sites where adapters act, and a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

import refpeft.cpu  # noqa: F401  its pairs register themselves
from refpeft import fused, ops
from refpeft.backend import Array, xp_of
from refpeft.errors import RefpeftError
from refpeft.layers import Mode
from refpeft.models.block import Places
from refpeft.models.cache import Cache
from refpeft.models.config import ModelConfig
from refpeft.models.objectives import cross_entropy
from refpeft.quant import Dense, Frozen, Quantized
from refpeft.rng import Stream
from refpeft.sites import Adapter, Site
from refpeft.tensor import Tensor, astype, checkpoint, no_grad

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classify": "SEQ_CLS",
    "regress": "SEQ_CLS",
    "tag": "TOKEN_CLS",
    "embed": "FEATURE_EXTRACTION",
    "mlm": None,
    None: "FEATURE_EXTRACTION",
}
"""PEFT's word for each task; it has none for masked language models."""


class Model:
    """A language model: `model(ids)` gives logits, `model.sites` are the places where adapters act.

    `weights(name, linear, transposed)` gives the frozen weight of a checkpoint name as a callable (quant.Dense or
    quant.Quantized): `linear` says that it may be quantized, `transposed` that the file has it as (in, out).
    Subclasses build their sites in `__init__` and define `trunk` and `finish`.
    """

    head: Site
    embed: Site
    name: str | None = None  # this and the following are set by refpeft.load: what it was called there (a hub id, ...),
    checkpoint: Any = None  # its files,
    tokenizer: Any = None  # and its tokenizer
    weightless = False  # of a plan's model, whose weights are not there
    stream = Stream  # what first values are drawn from
    task: str | None = "causal-lm"  # what it is for: see refpeft.models.heads, which sets this and the following
    labels: tuple[str, ...] = ()  # the names of a classification's labels, in the order of their numbers
    read = "all"  # which positions the head reads: all, first, last, or the mean of real tokens
    trained_head: tuple[str, ...] = ()  # sites that are trained beside any method
    head_tensors: Mapping[str, str] = MappingProxyType(
        {}
    )  # names in `frozen` of all that is the head's: those in files
    new_head: tuple[str, ...] = ()  # names of those that the checkpoint lacks: they have first values of a seed

    def __init__(self, config: ModelConfig, weights: Callable[..., Frozen], dtype: np.dtype, xp: ModuleType = np):
        self.config, self.dtype, self.xp = config, np.dtype(dtype), xp
        self.activations = self.dtype
        """What hidden states are kept in. Where it is bfloat16, `dtype` is float32: of values, statistics, logits."""
        self.tf32 = False
        """Whether a training on a GPU multiplies matrices of float32 in TF32."""
        self.sites: dict[str, Site] = {}
        self.frozen: dict[str, Frozen] = {}
        """Checkpoint name -> frozen weight, each stored once."""
        self.quantizable: set[str] = set()
        """The names of those that a quantizer takes: all linear layers but the head."""
        self.adapters: list[Adapter] = []
        self.mode = Mode()
        self.objective: Callable[[Any, float], Tensor] = partial(cross_entropy, self)
        """What is minimised, of a Batch and a denominator."""
        self.checkpointing = False
        """Whether a layer's activations are computed again in the backward pass."""
        self.put_away: Callable[[Array], Callable[[], Array]] | None = None
        """What puts a layer's input elsewhere until then: see tensor.checkpoint."""
        self._weights = weights

    # ---- building ----

    def place(self, array: Array, dtype: np.dtype | None = None) -> Array:
        """A copy of an array in the compute dtype, or another one, where this model computes."""
        return self.xp.array(array, dtype=dtype or self.dtype)

    def weight(self, name: str, linear: bool = False, transposed: bool = False) -> Frozen:
        """The frozen weight of this checkpoint name, made once."""
        if name not in self.frozen:
            self.frozen[name] = self._weights(name, linear, transposed)
            if linear:
                self.quantizable.add(name)
        return self.frozen[name]

    def _site(self, *args: Any, **keywords: Any) -> Site:
        site = Site(*args, **keywords)
        self.sites[site.name] = site
        return site

    def linear(
        self, name: str, *roles: str, bias: bool = False, transposed: bool = False, tied: str | None = None
    ) -> Site:
        """A linear site; `transposed` where the checkpoint has it as (in, out); `tied` shares another site's weight."""
        weight = self.weight(f"{tied or name}.weight", linear="head" not in roles, transposed=transposed)

        def base(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            bias = site.bias if bias is None else bias
            if weight is not None:
                return ops.linear(x, weight, bias)
            return fused.frozen_linear(x, bias, weight=site.weight)

        frozen_bias = self.weight(f"{name}.bias")() if bias else None
        site = self._site(name, "linear", weight.shape, roles, base, weight, frozen_bias, tied, transposed)
        if "head" in roles:
            site.result = self.dtype
        return site

    def embedding(self, name: str, *roles: str) -> Site:
        def base(ids: Array, weight: Tensor | None = None) -> Tensor:
            if weight is None:
                return Tensor(site.weight.rows(ids, self.activations))
            return astype(fused.embedding(weight, ids=ids), self.activations)

        weight = self.weight(f"{name}.weight")
        site = self._site(name, "embedding", weight.shape, roles, base, weight)
        return site

    def norm(self, name: str, eps: float, *roles: str, bias: bool = False) -> Site:
        """A LayerNorm where it has a bias, an RMSNorm otherwise."""

        def base(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            gain = site.weight() if weight is None else weight
            shift = site.bias if bias is None else bias
            if shift is None:
                return fused.rms_norm(x, gain, eps=eps)
            return fused.layer_norm(x, gain, shift, eps=eps)

        weight = self.weight(f"{name}.weight")
        frozen_bias = self.weight(f"{name}.bias")() if bias else None
        site = self._site(name, "norm", weight.shape, roles, base, weight, frozen_bias)
        return site

    def place_of(self, name: str, kind: str, shape: tuple[int, ...], role: str, base: Callable[..., Tensor]) -> Site:
        """A site that is a place in the computation and has no weight of its own."""
        return self._site(name, kind, shape, (role,), base)

    def original(self, site: Site) -> Array:
        """The site's weight before it was quantized, read again: dense and (out, in), in the compute dtype.

        Where the model keeps dense weights in bfloat16, it is rounded to that. Raises RefpeftError where the files have
        it quantized already.
        """
        if isinstance(site.weight, Dense):
            return site.weight()
        read = self._weights(f"{site.name}.weight", False, site.transposed)
        if isinstance(read, Quantized):
            raise RefpeftError(
                f"{site.name} is quantized in the model's files, and its weight from before is needed: take the "
                "original model, and quantize it with --quantizer"
            )
        return read()

    # ---- computing ----

    def trunk(
        self,
        ids: Array,
        positions: Array | None,
        segments: Array | None,
        cache: Cache | None,
        rows: Array | None = None,
    ) -> Tensor:
        """The hidden state of each real token before the last norm: (batch, time, dim).

        With `rows`, positions of the flattened tokens, of these alone: (rows, dim).
        """
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """The last norm."""
        raise NotImplementedError

    def __call__(
        self,
        ids: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits (batch, time, vocab) for integer ids (batch, time); of the last position alone if `last`.

        positions (batch, time) default to 0, 1, ...; segments (batch, cached + time) number the documents of a packed
        row, -1 for padding: a token sees earlier tokens of its own document only. With a head that classifies rows:
        (batch, labels).
        """
        if not last:
            return self.outputs(self._hidden(ids, positions, segments, cache), segments)
        batch, time = ids.shape
        ends = self.xp.arange(1, batch + 1) * time - 1
        return self.outputs(self._hidden(ids, positions, segments, cache, rows=ends).reshape(batch, 1, -1), segments)

    def loss(self, batch: Any, denominator: float | None = None) -> Tensor:
        """What is minimised over a Batch: the sum of the targets' losses over `denominator` (None: the batch's own)."""
        return self.objective(batch, (batch.denominator or 1) if denominator is None else denominator)

    def states(self, batch: Any, rows: np.ndarray) -> Tensor:
        """What the head reads at `rows`, positions of the flattened targets of a Batch: (len(rows), dim)."""
        everywhere = len(rows) == batch.targets.size and (batch.share is None or batch.share.asks_all(batch))
        hidden = self.hidden_of(batch, None if everywhere else rows)
        return self.finish(hidden.reshape(-1, hidden.shape[-1]))

    def hidden_of(self, batch: Any, rows: np.ndarray | None = None) -> Tensor:
        """The hidden state at each target of a Batch, before what `finish` does: as `trunk` gives it."""
        return self._hidden(batch.ids, batch.positions, batch.segments, rows=rows)

    def outputs(self, hidden: Tensor, segments: Array | None) -> Tensor:
        """What the head says to hidden states (batch, time, dim), of the positions that it reads.

        (batch, time, vocab or labels) where it reads all, else (batch, labels); (batch, dim) of norm 1 where it is the
        mean over real tokens.
        """
        if self.read == "all":
            return self.head(self.finish(hidden))
        batch, time, dim = hidden.shape
        if self.read == "mean":
            real = self.xp.ones((batch, time)) if segments is None else self.xp.asarray(segments) >= 0
            share = (real / real.sum(axis=1, keepdims=True)).astype(self.dtype)
            mean = ops.sum(astype(hidden, self.dtype) * Tensor(share[..., None]), axis=1)
            return mean / ops.sqrt(ops.sum(mean * mean, axis=-1, keepdims=True))
        if self.read == "first":
            return self.head(self.finish(hidden[:, 0]))
        last = self.xp.full(batch, time - 1) if segments is None else (self.xp.asarray(segments) >= 0).sum(axis=1) - 1
        rows = self.xp.arange(batch) * time + last
        return self.head(self.finish(ops.take(hidden.reshape(-1, dim), indices=rows)))

    def _hidden(
        self,
        ids: Array,
        positions: Array | None,
        segments: Array | None,
        cache: Cache | None = None,
        **more: Array | None,
    ) -> Tensor:
        """trunk() of host or device arrays."""
        self.check_ids(ids)
        arrays = [a if a is None else self.xp.asarray(a) for a in (ids, positions, segments, *more.values())]
        try:
            return self.trunk(*arrays[:3], cache, **dict(zip(more, arrays[3:], strict=True)))
        finally:
            self.forget()

    def check_ids(self, ids: Array) -> None:
        """Raises RefpeftError for ids that are none of this model's; those on a device are not looked at."""
        if xp_of(ids) is np:
            ids = np.asarray(ids)
            if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
                raise RefpeftError(f"ids are {ids.dtype}{list(ids.shape)}: expected integers (batch, time)")
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab:
                raise RefpeftError(
                    f"token {low if low < 0 else high} is not among the model's {self.config.vocab:,}: the "
                    "tokenizer is another model's, or got tokens that this model has no embedding for"
                )

    def forget(self) -> None:
        """Drops what hooks handed on to others (`memo`) in a forward pass: it holds the tape of that pass."""
        for part in (part for adapter in self.adapters for part in adapter.parts):
            part.memo.__dict__.clear()

    @property
    def task_type(self) -> str | None:
        """PEFT's word for what the model is for."""
        return TASK_TYPES[self.task]

    @property
    def room(self) -> float:
        """The most tokens that a row may have beside those that adapters add; infinite with rotary positions."""
        if isinstance(self.config, ModelConfig) and self.config.rope is not None:
            return math.inf
        with no_grad():
            virtual = self.embed(self.xp.zeros((1, 1), np.int32)).shape[1] - 1
        return self.config.context - self.first_position(virtual, None)

    def joins(self, longest: int) -> bool:
        """Whether it is the same to the model if texts of at most so many tokens are documents of one row."""
        return True

    # ---- what subclasses share ----

    def places(self, rows: Array | None, ids: Array, virtual: int) -> Places | None:
        """Where the tokens that `rows` says are in the hidden states, of which `virtual` come before those of `ids`."""
        if rows is None:
            return None
        time = ids.shape[1]
        return rows // time, rows % time + virtual

    def positioned(self, hidden: Tensor, ids: Array, positions: Array | None, cache: Cache | None) -> tuple[Array, int]:
        """(positions of all rows of `hidden` (batch or 1, rows), number of virtual tokens among them).

        Virtual tokens, which an adapter put before the real ones, are at 0, 1, ... and the real ones after them;
        methods that add keys instead (prefix tuning) say with `peft_positions` where the real ones start.
        """
        virtual = hidden.shape[1] - ids.shape[1]
        past = cache.tokens if cache else 0
        if positions is None:
            positions = self.xp.arange(past, past + ids.shape[1])[None]
        first = self.first_position(virtual, cache)
        positions = positions + first
        if virtual:
            before = self.xp.broadcast_to(self.xp.arange(first - virtual, first)[None], (positions.shape[0], virtual))
            positions = self.xp.concatenate((before, positions), axis=1)
        return positions, virtual

    def check_positions(self, ids: Array, positions: Array | None, virtual: int, cache: Cache | None) -> None:
        """Raises RefpeftError where tokens are farther behind the first than the model has learned positions for.

        Of `positions` on a device the longest possible are assumed.
        """
        if positions is None or self.xp is not np:
            last = ids.shape[1] + (cache.tokens if cache else 0)
        else:
            last = 1 + int(positions.max())
        last += self.first_position(virtual, cache)
        if last > self.config.context:
            raise RefpeftError(
                f"{last} positions were asked for: this model has {self.config.context}; shorten the rows"
            )

    def first_position(self, virtual: int, cache: Cache | None) -> int:
        """The position of the first real token; `virtual` tokens come before it now, or did when the cache began."""
        if cache and cache.tokens:
            virtual = cache.layers[0][0].time - cache.tokens
        return virtual + sum(adapter.positions for adapter in self.adapters)

    def embedded(self, ids: Array, cache: Cache | None) -> Tensor:
        """The token embeddings, with virtual tokens before them at the start of a sequence only."""
        hidden = self.embed(ids)
        return hidden[:, -ids.shape[1] :] if cache and cache.tokens else hidden

    def run(self, layer: Callable[..., Tensor], x: Tensor, **around: Any) -> Tensor:
        """layer(x, **around), by recomputation where that is asked for; x may be elsewhere until then.

        Tensors in `around` may be of what is trained, as x is.
        """
        if not self.checkpointing:
            return layer(x, **around)
        tensors = {name: value for name, value in around.items() if isinstance(value, Tensor)}

        def again(x: Tensor, *given: Tensor) -> Tensor:
            return layer(x, **around | dict(zip(tensors, given, strict=True)))

        return checkpoint(again, x, *tensors.values(), put_away=self.put_away)

    # ---- counting ----

    def parameters(self) -> int:
        """How many numbers the frozen model has; tied weights count once."""
        return sum(int(np.prod(w.shape)) for w in self.frozen.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the frozen weights as they are kept."""
        return sum(w.nbytes for w in self.frozen.values())

    @property
    def bits(self) -> float | None:
        """Bits that a number of the quantized weights takes, constants included; None where none is quantized."""
        quantized = [weight for weight in self.frozen.values() if isinstance(weight, Quantized)]
        numbers = sum(math.prod(weight.shape) for weight in quantized)
        return 8 * sum(weight.nbytes for weight in quantized) / numbers if numbers else None

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """(name, Tensor) of everything that the attached adapters train."""
        for adapter in self.adapters:
            for name, tensor in adapter.params.items():
                yield (name if len(self.adapters) == 1 else f"{adapter.name}:{name}"), tensor
