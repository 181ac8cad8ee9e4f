"""What plugins are tried on: tiny random models of three shapes, a batch with padding, a method attached to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from refpeft import learning, manager, ops, sites
from refpeft.api import class_of
from refpeft.backend import to_host, xp_of
from refpeft.batches import IGNORE, Batch
from refpeft.config import plugin_options
from refpeft.conformance.check.findings import NotApplicable, said
from refpeft.errors import RefpeftError
from refpeft.layers import INPUTS, Layer
from refpeft.manager import Listing
from refpeft.models.base import Frozen, Model
from refpeft.models.checkpoint import expected_tensors
from refpeft.models.config import from_hf
from refpeft.quant import Dense, Quantizer, make_quantizer
from refpeft.rng import Stream
from refpeft.sites import Adapter
from refpeft.tensor import Tensor

_SIZES = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
CONFIGS = {
    "llama": _SIZES
    | {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 48,
        "n_positions": 256,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "layer_norm_epsilon": 1e-5,
    },
    "bert": _SIZES | {"model_type": "bert", "num_attention_heads": 4, "max_position_embeddings": 256},
}
"""Grouped-query attention without biases; Conv1D, biases and a tied head; an encoder without a head."""

LENGTHS = (10, 7, 10)  # of the rows of `batch`
MOVE = 0.1  # deviation of what is added to first values


def model(family: str, dtype: str = "float64", quantizer: Quantizer | None = None, xp: ModuleType = np) -> Model:
    """The tiny model of CONFIGS with this name; `quantizer` is for its linear weights. Always the same numbers."""
    config, compute = from_hf(CONFIGS[family]), np.dtype(dtype)
    shapes = expected_tensors(config)

    def weights(name: str, linear: bool, transposed: bool) -> Frozen:
        drawn = Stream(0, "check", family, name).standard_normal(shapes[name])
        if len(shapes[name]) == 1:
            array = 0.2 * drawn + (not name.endswith("bias"))
        else:
            array = drawn * shapes[name][0 if transposed else -1] ** -0.5
        array = array.astype("f4")  # so that models of all dtypes have the same
        array = xp.asarray(np.ascontiguousarray(array.T) if transposed else array)
        return quantizer(array, compute, name) if linear and quantizer else Dense(array.astype(compute), compute)

    return class_of(config)(config, weights, compute, xp)


def batch() -> Batch:
    """Three rows, one of them padded, with the next token as the target."""
    count, time = len(LENGTHS), max(LENGTHS)
    tokens = Stream(0, "check", "tokens").uniform(0, 48, (count, time + 1)).astype("i4")
    segments = np.where(np.arange(time) < np.array(LENGTHS)[:, None], 0, -1).astype("i4")
    return Batch(tokens[:, :-1], np.where(segments < 0, IGNORE, tokens[:, 1:]), segments=segments)


def move(adapter: Adapter) -> None:
    """Moves every trained value away from its start, as training would."""
    for name, tensor in adapter.params.items():
        drawn = MOVE * Stream(1, "check", name).standard_normal(tensor.shape)
        tensor.data += xp_of(tensor.data).asarray(drawn.astype(tensor.dtype))


def copy(adapter: Adapter, other: Adapter) -> None:
    """Gives `other`, of any dtype and on any device, the values of `adapter`, which is on the host."""
    ours = adapter.params | adapter.constants
    for name, tensor in (other.params | other.constants).items():
        tensor.data[...] = xp_of(tensor.data).asarray(ours[name].data)


def outputs(built: Model, rows: slice = slice(None), time: int = max(LENGTHS)) -> np.ndarray:
    """Logits, or an encoder's hidden states, of rows of the batch; 0 at padding."""
    given = batch()
    ids, segments = given.ids[rows, :time], given.segments[rows, :time]
    y = to_host(built(ids, segments=segments).data)
    return np.where(segments[..., None] < 0, 0, y)


def share(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest expected number; NaN where there is one."""
    most, off = float(abs(expected).max(initial=0)), float(abs(got - expected).max(initial=0))
    return off / most if most else off


def largest(numbers: Iterable[float]) -> float:
    """NaN where one of them is, which Python's max may lose."""
    return float(np.max(list(numbers)))


def value(built: Model) -> Tensor:
    """What training minimises for the batch, penalties included; of an encoder without a head a mean over states."""
    given = batch()
    if built.task == "causal-lm":
        total = learning.objective(built, given, given.denominator)
    else:
        y = built(given.ids, segments=given.segments)
        g = Stream(2, "check", "g").standard_normal(y.shape) * (given.segments >= 0)[..., None]
        total = ops.sum(y * Tensor(built.place(g))) * (1 / given.tokens)
    for penalty in learning.penalties(built):
        total = total + penalty
    return total


def gradients(built: Model) -> dict[str, np.ndarray]:
    """The gradient of `value` by everything that is trained, by name; zeros where a step leaves a value out."""
    tensors = dict(built.trained())
    for tensor in tensors.values():
        tensor.node.grad = None
    value(built).backward()
    return {name: to_host(t.data * 0 if t.grad is None else t.grad) for name, t in tensors.items()}


@dataclass
class Method:
    """A method with its options, and the models that it can be attached to.

    families   those of CONFIGS that take it; `refused` has what the others say
    broken     what it raises on one of them that is no refusal
    quantizer  nf4 where it takes only quantized weights
    """

    plugin: ModuleType
    listing: Listing
    options: dict[str, Any]
    families: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    broken: str = ""
    quantizer: Quantizer | None = None

    @cached_property
    def cfg(self) -> Any:
        return plugin_options(self.plugin, self.options)

    @property
    def name(self) -> str:
        return self.listing.name

    @property
    def path(self) -> str:
        return self.listing.path

    @property
    def decoders(self) -> tuple[str, ...]:
        return tuple(family for family in self.families if family != "bert")

    @property
    def first(self) -> str:
        """The model that properties are asked of where one will do. Raises NotApplicable where there is none."""
        if not self.families:
            raise NotApplicable("it could be attached to no model: see `attaches`")
        return self.families[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of site that it has a forward hook for."""
        return tuple(kind for kind in INPUTS if manager.hook(self.plugin, f"peft_{kind}"))

    def has(self, hook: str) -> bool:
        return manager.hook(self.plugin, hook) is not None

    def bare(self, family: str, dtype: str = "float64", **more: Any) -> Model:
        """A model as it is before the method is attached."""
        return model(family, dtype, **({"quantizer": self.quantizer} | more))

    def attached(
        self, family: str, dtype: str = "float64", moved: bool = True, seed: int = 0, targets: Any = None, **more: Any
    ) -> tuple[Model, Adapter]:
        """A model with the method on it, and the adapter, its values moved away from their start."""
        built = self.bare(family, dtype, **more)
        cfg = self.cfg if targets is None else dataclasses.replace(self.cfg, targets=targets)
        adapter = sites.attach(built, self.plugin, cfg, seed=seed)
        if moved:
            move(adapter)
        return built, adapter

    def fit(self) -> None:
        """Finds `families`: on dense weights, or where no model takes it so, on quantized ones."""
        for quantizer in (None, make_quantizer("nf4")):
            self.quantizer, self.refused, fitting = quantizer, {}, []
            for family in CONFIGS:
                try:
                    outputs(self.attached(family)[0])
                    fitting.append(family)
                except RefpeftError as error:
                    self.refused[family] = " ".join(str(error).split())
                except (Exception, SystemExit) as error:  # whatever a plugin does
                    self.broken = f"{family}: {said(error, self.path)}"
            self.families = tuple(fitting)
            if fitting:
                return
        self.quantizer = None


def own(adapter: Adapter) -> Iterator[Layer]:
    """The layers of the method itself, without those of the methods that it brings along."""
    return (layer for layer in adapter.layers if layer.part is adapter.parts[0])
