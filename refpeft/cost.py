"""What a training step keeps and computes, by that of a few tokens on a model whose weights are not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refpeft import fused, learning
from refpeft.absent import counted, owner, zeros
from refpeft.backend import bfloat16
from refpeft.batches import IGNORE, Batch
from refpeft.errors import RefpeftError
from refpeft.models.base import Model
from refpeft.models.config import ModelConfig
from refpeft.tape import Node
from refpeft.tensor import WORTH_MAKING_AGAIN, Tensor, no_grad

_PROBED = (2, 3, 4)  # tokens of the rows that are measured: what a row takes is a polynomial of degree 2 of its tokens
_BACKWARD = 2.5
"""Of attention, as a multiple of its forward pass: four products, and the scores again, which are not kept."""

MADE_AGAIN = (fused.rms_norm, fused.layer_norm, fused.silu_mul)
"""Whose outputs a GPU makes again for who reads them (refpeft.cuda); it keeps no masks of dropout, either."""

MARGIN = 64
"""Numbers behind each row of these outputs, and of attention's, on a GPU in bfloat16: see refpeft.cuda.margins."""

DEVICES = {
    "v100": 125.0,
    "t4": 65.0,
    "a100": 312.0,
    "a6000": 154.8,
    "l4": 121.0,
    "h100": 989.0,
    "h200": 989.0,
    "rtx3090": 71.0,
    "rtx4090": 165.2,
}
"""TFLOP/s of dense products of matrices in 16 bits, added up in float32: peaks by NVIDIA's data sheets (SXM models)."""

UTILISATION = 0.4
"""Of a device's peak, what training is taken to reach where nothing else is said: large models reach 0.3 to 0.5."""


@dataclass(frozen=True)
class Step:
    """A forward and a backward pass.

    kept      bytes that the forward pass keeps for the backward pass, if computed in float32; see `step` for others
    inputs    those where layers are computed again, without the layer that is; None where they cannot be
    forward   floating-point operations in products of matrices
    backward  those of the backward pass; where layers are computed again, `forward` comes on top
    """

    kept: float
    inputs: float | None
    forward: float
    backward: float

    def flops(self, recompute: bool) -> float:
        """All operations."""
        return self.forward * (1 + recompute) + self.backward


@dataclass(frozen=True)
class Speed:
    """How fast a device is taken to be: a share, `utilisation`, of its peak."""

    tflops: float
    utilisation: float = UTILISATION
    device: str | None = None

    def seconds(self, flops: float) -> float:
        return flops / (self.tflops * 1e12 * self.utilisation)

    def text(self) -> str:
        whose = f" ({self.device}'s peak in 16 bits, by its data sheet)" if self.device else ""
        return f"if it reaches {self.utilisation:.0%} of {self.tflops:g} TFLOP/s{whose}"


def step(model: Model, rows: int, tokens: int, narrow: bool = False) -> Step:
    """A step over full rows, all tokens learned, of a model of refpeft.memory.skeleton.

    What a few tokens keep is measured, and their products are counted; attention is by a formula: 4 operations for a
    number of each head, and for each pair of a query and a key that it sees. With `narrow` bytes are those of a GPU in
    bfloat16: two for a number of a token, and none for outputs that are made again.
    """
    model.mode.training = _drops_numbers(model)
    all_tokens = rows * tokens if narrow else 0
    kept, forward, backward = _scaled(model, rows, tokens, partial(_passes, narrow=all_tokens), narrow)
    try:
        learning.refuse_recomputation(model)
        model.checkpointing = True
        inputs = _scaled(model, rows, tokens, partial(_inputs, narrow=all_tokens), narrow)[0]
    except RefpeftError:
        inputs = None
    finally:
        model.checkpointing = model.mode.training = False
    attention = 4 * rows * _pairs(model.config, tokens)
    return Step(kept, inputs, forward + attention, backward + _BACKWARD * attention)


def _drops_numbers(model: Model) -> bool:
    """Whether a method has dropout: then what that gives, and its masks, are kept in training."""
    return any(getattr(part.cfg, "dropout", 0) for adapter in model.adapters for part in adapter.parts)


def _scaled(
    model: Model, rows: int, tokens: int, measure: Callable[[Model, int, int], np.ndarray], narrow: bool
) -> np.ndarray:
    """What `measure` would find for so many rows of so many tokens: something once, and the same for each row.

    The first of what it finds is bytes, which a row has half of where its numbers are `narrow`.
    """
    with np.errstate(all="ignore"):
        one, two = [measure(model, 1, few) for few in _PROBED], measure(model, 2, _PROBED[0])
    once = 2 * one[0] - two
    row = _longer(one, tokens) - once
    if narrow:
        row[0] /= 2
    return once + rows * row


def _longer(found: list[np.ndarray], tokens: int) -> np.ndarray:
    """What a row of `tokens` takes, by those of _PROBED (Lagrange's polynomial)."""
    total = 0
    for i, t in enumerate(_PROBED):
        others = [other for other in _PROBED if other != t]
        total = total + found[i] * math.prod((tokens - other) / (t - other) for other in others)
    return total


def _pairs(config: Any, tokens: int) -> int:
    """Numbers of heads that meet in all layers' attentions over a row: half of all pairs where only one way is seen."""
    width, square = config.heads * config.head_dim, tokens * tokens
    half = tokens * (tokens + 1) // 2
    if hasattr(config, "decoder_layers"):
        return width * (config.layers * square + config.decoder_layers * (half + square))
    return width * config.layers * (half if isinstance(config, ModelConfig) else square)


def _inputs(model: Model, rows: int, tokens: int, narrow: int) -> np.ndarray:
    """(bytes kept,) of so many tokens."""
    return np.array([_tape_bytes(model, _result(model, rows, tokens), narrow / (rows * tokens))], float)


def _passes(model: Model, rows: int, tokens: int, narrow: int) -> np.ndarray:
    """(bytes kept, operations forward, operations backward) of so many tokens.

    `narrow` is how many tokens the step has that this is for, on a GPU in bfloat16; 0: it is not.
    """
    trained = [tensor for _, tensor in model.trained()]
    with counted() as forward, no_grad():
        _result(model, rows, tokens)
    for tensor in trained:
        tensor.node.grad = zeros(tensor.shape)
    with counted() as both:
        result = _result(model, rows, tokens)
        kept = _tape_bytes(model, result, narrow / (rows * tokens))
        result.backward()
    for tensor in trained:
        tensor.node.grad = None
    return np.array([kept, forward.flops, both.flops - forward.flops], float)


def _result(model: Model, rows: int, tokens: int) -> Tensor:
    """The loss of a batch of the model's task, or its hidden states where it has none."""
    ids = np.zeros((rows, tokens), np.int32)
    if model.task in (None, "embed"):
        return model(ids)
    targets = np.where((model.read == "all") | (np.arange(tokens) == 0), ids, IGNORE)
    if model.task == "regress":
        targets = np.where(targets == IGNORE, np.nan, targets).astype(np.float32)
    batch = Batch(ids, targets, said=ids if model.task == "seq2seq" else None)
    return learning.objective(model, batch, batch.denominator)


def tape_bytes(model: Model, batch: Batch) -> int:
    """Bytes of all arrays that a forward pass keeps for the backward pass, without the trained and the frozen ones."""
    return _tape_bytes(model, model.loss(batch))


def _tape_bytes(model: Model, result: Tensor, narrow: float = 0.0) -> int:
    """Bytes that are kept; `narrow` is how many times as many tokens a step on a GPU in bfloat16 has (0: elsewhere)."""
    held = [tensor.data for _, tensor in model.trained()]
    held += [weight.array for weight in model.frozen.values() if not weight.quantized]
    there = {owner(array)[0] for array in held}
    owners: dict[int, int] = {}
    margins = 0
    nodes, seen = [result.node], {result.node}
    while nodes:
        node = nodes.pop()
        made_again = _made_again(node, narrow) if narrow else ()
        for array in _arrays(node.saved or ()):
            key, nbytes = owner(array)
            if key not in there and not (narrow and array.dtype == bool) and array.shape not in made_again:
                owners[key] = max(nbytes, owners.get(key, 0))
        if narrow:
            margins += _rows_with_margin(node, narrow) * MARGIN * np.dtype("f4").itemsize
        fresh = [parent for parent in node.parents if isinstance(parent, Node) and parent not in seen]
        seen.update(fresh)
        nodes += fresh
    return sum(owners.values()) + margins


def _made_again(node: Node, times: float) -> set[tuple[int, ...]]:
    """The shapes of the inputs that `node` need not keep on a GPU: outputs that are made again in the backward pass.

    They are those that are large enough for that (see _is_large). Their ops save an array of the same shape first.
    """
    if node.op is fused.linear_cross_entropy:
        return set()  # which keeps not its input, but that one's gradient
    makers = [parent for parent in node.parents if isinstance(parent, Node) and parent.op in MADE_AGAIN]
    made = [parent.saved[0] for parent in makers if parent.saved[0] is not None]
    return {array.shape for array in made if _is_large(array, times)}


def _is_large(array: np.ndarray, times: float) -> bool:
    """Whether an output like this one is made again where there are so many times as many tokens, in bfloat16."""
    return array.size * bfloat16.itemsize * times >= WORTH_MAKING_AGAIN


def _rows_with_margin(node: Node, times: float) -> int:
    """How many rows a GPU keeps of what `node` gave that have a margin."""
    if node.op is not None and node.op.name == fused.attention.name:  # or a faster pair, which keeps the same first
        batch, _, queries, _ = node.saved[1].shape
        return batch * queries
    like = node.saved[0] if node.op in MADE_AGAIN else None
    return 0 if like is None or _is_large(like, times) else math.prod(like.shape[:-1])


def _arrays(saved: Any) -> Iterator[np.ndarray]:
    """The arrays in what an op saved."""
    if isinstance(saved, np.ndarray):
        yield saved
    elif isinstance(saved, (tuple, list)):
        for part in saved:
            yield from _arrays(part)
