"""The trained values as one flat buffer, and the optimizers that work on it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from . import backend, blockwise, paging
from .backend import Array, cast, xp_of
from .errors import RefpeftError
from .feed import feed
from .tensor import Tensor

PAGES = {"cpu": 2**16, "cuda": 2**22}
"""How many values are updated at a time: on the host so many that they stay in its caches, on the GPU so many that
launches do not count. A multiple of the 8-bit blocks."""

KERNELS: dict[tuple[type, type], Callable[..., Any]] = {}
"""What does in one launch or two what array code does here, by (Flat or an optimizer, the kind of its arrays).

It takes the arguments of Flat.clip or Optimizer.change, and means the same; after NotImplemented array code does it.
"""


class Flat:
    """All trained values in one buffer and all their gradients in another; the tensors become views of them.

    Optimizing, clipping, saving and comparing are then one operation each. The order is that of the names given.
    `rates` are the parameters' learning rates as multiples of the optimizer's, 1 where a name is not among them.
    """

    def __init__(self, params: Iterable[tuple[str, Tensor]], rates: Mapping[str, float] | None = None):
        self.params = dict(params)
        self.rates = [(rates or {}).get(name, 1.0) for name in self.params]
        if not self.params:
            raise RefpeftError("nothing is trained: attach a method to the model first")
        tensors = list(self.params.values())
        xp = xp_of(tensors[0].data)
        self.values = xp.concatenate([t.data.reshape(-1) for t in tensors])
        self.grads = self.gradients_of(self.params)
        self.norm: Array | None = None  # what `clip` found, until the optimizer's next step is done
        at = 0
        for tensor in tensors:
            part = slice(at, at + tensor.data.size)
            tensor.data = self.values[part].reshape(tensor.data.shape)
            at = part.stop

    def gradients_of(self, params: Mapping[str, Tensor]) -> Array:
        """A new flat buffer of zeros: the gradients of `params`, these tensors or their twins, are now views of it."""
        grads, at = xp_of(self.values).zeros_like(self.values), 0
        for name in self.params:
            tensor = params[name]
            part = slice(at, at + tensor.data.size)
            tensor.node.grad = grads[part].reshape(tensor.data.shape)
            at = part.stop
        return grads

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter, by name, in order."""
        return {name: list(tensor.shape) for name, tensor in self.params.items()}

    def clip(self, limit: float) -> Array:
        """Scales the gradients so that their norm is at most `limit` (0: leaves them); returns the norm before.

        As torch.nn.utils.clip_grad_norm_: the factor is limit / (norm + 1e-6), and at most 1.
        """
        kernel = KERNELS.get((Flat, type(self.grads)))
        self.norm = kernel(self, limit) if kernel else NotImplemented
        if self.norm is NotImplemented:
            self.norm = self._clip(limit)
        return self.norm

    def _clip(self, limit: float) -> Array:
        xp, page = xp_of(self.grads), PAGES[_device(self.grads)]
        parts = (self.grads[at : at + page] for at in range(0, self.grads.size, page))  # whose squares take no room
        norm = xp.sqrt(backend.stack([(part * part).sum() for part in parts]).sum())
        if limit:
            self.grads *= xp.minimum(self.grads.dtype.type(limit) / (norm + self.grads.dtype.type(1e-6)), 1)
        return norm


def _device(array: Array) -> str:
    return "cpu" if xp_of(array) is np else "cuda"


# ---- what optimizers have in common ----------------------------------------------------------------------------------

Shape = Sequence[int]


@dataclass(frozen=True)
class Part:
    """What is updated at a time: a stretch of the flat buffer, its shape, and the stretches of state beside it."""

    span: slice
    shape: Shape
    state: dict[str, slice]
    rate: float  # of learning, as a multiple of the optimizer's


@dataclass(frozen=True)
class Layout:
    """An optimizer's parts, and (elements, dtype) of its state arrays by name."""

    parts: list[Part]
    arrays: dict[str, tuple[int, np.dtype]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state."""
        return sum(size * dtype.itemsize for size, dtype in self.arrays.values())

    @property
    def nbytes_near(self) -> int:
        """The most bytes of paged state that are near at a time: of a part, the one before it and the one after it."""

        def nbytes(part: Part) -> int:
            return sum((s.stop - s.start) * self.arrays[name][1].itemsize for name, s in part.state.items())

        return min(self.nbytes, 3 * max(map(nbytes, self.parts)))


class Optimizer:
    """Updates the values of a Flat from its gradients.

    A subclass says what state it needs (`moments`, or `needs`) and how one part is updated (`update`); which part is
    updated when, where its state is kept and what a checkpoint holds is the same for all. The state begins as zeros.
    What changes from step to step lies in arrays (`numbers`), so that one captured step can be run again and again.
    With `paged` it lies outside of the memory that is computed in, where that is possible (refpeft.paging), and the
    values become the same, bit for bit.
    """

    moments: tuple[str, ...] = ()  # state arrays with an element for every value

    def __init__(self, flat: Flat, weight_decay: float = 0.0, paged: bool = False):
        xp = xp_of(flat.values)
        self.flat, self.weight_decay, self.step_count = flat, weight_decay, 0
        layout = self.layout(list(flat.shapes.values()), flat.values.dtype, _device(flat.values), flat.rates)
        self._kernel = KERNELS.get((type(self), type(flat.values)))
        self._parts = _joined(layout.parts) if self._kernel and not paged else layout.parts
        self._now: _Numbers | None = None
        self._state = {name: paging.zeros(xp, size, dtype, paged) for name, (size, dtype) in layout.arrays.items()}

    @classmethod
    def layout(
        cls, shapes: Sequence[Shape], dtype: np.dtype, device: str, rates: Sequence[float] | None = None
    ) -> Layout:
        """Parts and state for parameters of these shapes, this dtype and these rates (None: all 1)."""
        parts: list[Part] = []
        arrays: dict[str, tuple[int, np.dtype]] = {}
        at = 0
        of_a_rate = itertools.groupby(zip(rates or [1.0] * len(shapes), shapes, strict=True), lambda pair: pair[0])
        for rate, pairs in of_a_rate:
            for shape in cls.pieces([shape for _, shape in pairs], PAGES[device]):
                state = {}
                for name, (count, kept) in cls.needs(shape, dtype).items():
                    start, _ = arrays.get(name, (0, kept))
                    state[name] = slice(start, start + count)
                    arrays[name] = start + count, kept
                parts.append(Part(slice(at, at + math.prod(shape)), shape, state, rate))
                at += math.prod(shape)
        return Layout(parts, arrays)

    @classmethod
    def pieces(cls, shapes: Sequence[Shape], page: int) -> list[Shape]:
        """The shapes of the parts: here stretches of the flat buffer, across parameters."""
        size = sum(map(math.prod, shapes))
        return [(min(page, size - at),) for at in range(0, size, page)]

    @classmethod
    def needs(cls, shape: Shape, dtype: np.dtype) -> dict[str, tuple[int, np.dtype]]:
        """(elements, dtype) of the state arrays of a part, by name."""
        return {name: (math.prod(shape), dtype) for name in cls.moments}

    @property
    def state(self) -> dict[str, Array]:
        """The state arrays, by name, each flat: what a checkpoint holds beside the values."""
        return {name: kept.array for name, kept in self._state.items()}

    def step(self, lr: float) -> None:
        """One update from the gradients, which are zeroed."""
        self.prepare(lr)
        self.apply()

    def prepare(self, lr: float) -> None:
        """Says that a step of this learning rate comes: what `apply`, captured or not, will do next."""
        self.step_count += 1
        if self._now is None:
            rates = list(dict.fromkeys(part.rate for part in self._parts))
            self._now = _Numbers(self.flat.values, rates, list(self.numbers(lr)))
        self._now.fill([self.numbers(lr * rate) for rate in self._now.of])

    def apply(self) -> None:
        """The update that was prepared, from the gradients, which are zeroed: array code without a read of the host.

        Where Flat.clip found that the gradients' norm is not finite, values and state stay what they are.
        """
        values, grads = self.flat.values, self.flat.grads
        pages = paging.in_turn(self._state, [part.state for part in self._parts])
        for state, part in zip(pages, self._parts, strict=True):  # pages first: the last one has to go back, too
            p, g = (array[part.span].reshape(part.shape) for array in (values, grads))
            now = self._now.of[part.rate]
            if not self._kernel or self._kernel(self, p, g, now, **state) is NotImplemented:
                self.change(p, g, now, **state)
        grads.fill(0)
        self.flat.norm = None

    def change(self, p: Array, g: Array, now: SimpleNamespace, **state: Array) -> None:
        """`update` of a part, unless the norm is known and not finite.

        The host looks, and does not begin. On the device a part's values and state are copied before, and come back
        from there where they have to: that is five more passes over each, and room for these copies.
        """
        norm = self.flat.norm
        if norm is None:
            self.update(p, g, now, **state)
        elif (xp := xp_of(p)) is np:
            if np.isfinite(norm):
                self.update(p, g, now, **state)
        else:
            before = [(array, array.copy()) for array in (p, *state.values())]
            self.update(p, g, now, **state)
            for array, old in before:
                xp.copyto(array, old, where=~xp.isfinite(norm))

    def numbers(self, lr: float) -> dict[str, float]:
        """What `update` computes with in step `step_count`, beside constants, for values that learn at `lr`."""
        return {"lr": lr, "decay": 1 - lr * self.weight_decay}

    def update(self, p: Array, g: Array, now: SimpleNamespace, **state: Array) -> None:
        """Updates the values `p` of a part, and its state, in place. `g` are its gradients.

        `now` has the step's `numbers` by name, as arrays without axes.
        """
        raise NotImplementedError

    def decay(self, p: Array, now: SimpleNamespace) -> None:
        """Decoupled weight decay (arXiv:1711.05101): the values shrink by lr * weight_decay, before the update."""
        if self.weight_decay:
            p *= now.decay


class _Numbers:
    """The numbers of a step by rate and name, `of[rate].name`: always the same arrays, in which `fill` puts others."""

    def __init__(self, values: Array, rates: Sequence[float], names: Sequence[str]):
        self._feed = feed(xp_of(values), (len(rates), len(names)), values.dtype)
        rows = (self._feed.array[i] for i in range(len(rates)))
        self.of = {
            rate: SimpleNamespace(**{name: row[i, ...] for i, name in enumerate(names)})
            for rate, row in zip(rates, rows, strict=True)
        }

    def fill(self, numbers: Sequence[dict[str, float]]) -> None:
        """Takes those of each rate."""
        self._feed.fill(np.array([list(of_a_rate.values()) for of_a_rate in numbers]))


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Stretches that follow one another at the same rate as one, for kernels, which need no pages."""
    found = []
    for rate, same in itertools.groupby(parts, key=lambda part: part.rate):
        run = list(same)
        first, last = run[0], run[-1]
        span = slice(first.span.start, last.span.stop)
        state = {name: slice(kept.start, last.state[name].stop) for name, kept in first.state.items()}
        found.append(Part(span, (span.stop - span.start,), state, rate))
    return found


# ---- the optimizers --------------------------------------------------------------------------------------------------


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101), as torch.optim.AdamW computes it.

    p = (1 - lr wd) p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;
    p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps).
    """

    moments = ("m", "v")

    def __init__(
        self,
        flat: Flat,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        paged: bool = False,
    ):
        super().__init__(flat, weight_decay, paged)
        self.betas, self.eps = betas, eps

    def numbers(self, lr: float) -> dict[str, float]:
        (b1, b2), t = self.betas, self.step_count
        return super().numbers(lr) | {"rate": lr / (1 - b1**t), "unbias": 1 / math.sqrt(1 - b2**t)}

    def update(self, p: Array, g: Array, now: SimpleNamespace, m: Array, v: Array) -> None:
        real, (b1, b2) = p.dtype.type, self.betas
        self.decay(p, now)
        m *= real(b1)
        m += real(1 - b1) * g
        v *= real(b2)
        v += real(1 - b2) * (g * g)
        root = xp_of(v).sqrt(v)
        root *= now.unbias
        root += real(self.eps)
        p -= now.rate * (m / root)


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits (Dettmers et al., 2021, arXiv:2110.02861): 2 bytes and 1/32 for each value.

    A step decodes them, computes as AdamW does, updates the values from the new moments before these are rounded, and
    encodes them: in blocks of 256 of a parameter, m with the signed dynamic map and v with the unsigned one, to the
    nearest level. Zero is a level of both, so a value without gradients never moves (bitsandbytes 0.50 on the CPU
    looks codes up in a table of 65,536 bins that has no zero, and moves it). The other side of that zero: where all
    gradients of a value are below 1/2,500 of the largest in its block, its v is kept as 0 but its m is not, and its
    steps become far too long; so it is in the paper and in bitsandbytes' CUDA kernels, too.
    """

    BLOCK = 256

    @classmethod
    def pieces(cls, shapes: Sequence[Shape], page: int) -> list[Shape]:
        """Stretches that end where a parameter ends within a block."""
        stretches = [0]
        for size in map(math.prod, shapes):
            stretches[-1] += size
            if stretches[-1] % cls.BLOCK:
                stretches.append(0)
        return [piece for size in stretches for piece in Optimizer.pieces([(size,)], page)]

    @classmethod
    def needs(cls, shape: Shape, dtype: np.dtype) -> dict[str, tuple[int, np.dtype]]:
        count = math.prod(shape)
        codes, absmax = (count, np.dtype("u1")), (-(-count // cls.BLOCK), np.dtype("f4"))
        return {key: size for name in cls.moments for key, size in ((name, codes), (f"{name}.absmax", absmax))}

    def update(self, p: Array, g: Array, now: SimpleNamespace, **state: Array) -> None:
        books = _dynamic_books(xp_of(p))
        moments = {
            name: blockwise.decode(self._blocks(state, name, book), p.shape, p.dtype) for name, book in books.items()
        }
        super().update(p, g, now, **moments)
        for name, moment in moments.items():
            codes, absmax = blockwise.encode(cast(moment, np.dtype("f4")), self.BLOCK, books[name])
            state[name][...], state[f"{name}.absmax"][...] = codes, absmax

    def _blocks(self, state: dict[str, Array], name: str, book: blockwise.Book) -> blockwise.Blocks:
        return blockwise.Blocks(state[name], state[f"{name}.absmax"], self.BLOCK, book.levels)


@functools.cache
def _dynamic_books(xp: ModuleType) -> dict[str, blockwise.Book]:
    maps = {"m": blockwise.dynamic_map(), "v": blockwise.dynamic_map(signed=False)}
    return {name: blockwise.nearest(levels, xp) for name, levels in maps.items()}


class SGD(Optimizer):
    """Gradient descent with momentum, as torch.optim.SGD computes it; its weight decay is part of the gradient.

    g = g + wd p;  m = momentum m + g;  p = p - lr m.
    """

    moments = ("m",)

    def __init__(self, flat: Flat, momentum: float = 0.9, weight_decay: float = 0.0, paged: bool = False):
        super().__init__(flat, weight_decay, paged)
        self.momentum = momentum

    def update(self, p: Array, g: Array, now: SimpleNamespace, m: Array) -> None:
        real = p.dtype.type
        m *= real(self.momentum)
        m += g + real(self.weight_decay) * p if self.weight_decay else g
        p -= now.lr * m


class Lion(Optimizer):
    """Lion (Chen et al., 2023, arXiv:2302.06675), algorithm 2, its decay before the update as the authors' code has it.

    p = (1 - lr wd) p;  p = p - lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g.
    """

    moments = ("m",)

    def __init__(
        self, flat: Flat, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, paged: bool = False
    ):
        super().__init__(flat, weight_decay, paged)
        self.betas = betas

    def update(self, p: Array, g: Array, now: SimpleNamespace, m: Array) -> None:
        real, (b1, b2) = p.dtype.type, self.betas
        self.decay(p, now)
        p -= now.lr * xp_of(m).sign(real(b1) * m + real(1 - b1) * g)
        m *= real(b2)
        m += real(1 - b2) * g


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern, 2018, arXiv:1804.04235), algorithms 4 and 5: of a matrix's squared gradients it keeps
    the means of rows and of columns only (of more than two axes the last two are the matrix's), of a vector's all.

    b = 1 - t^-0.8;  s = g² + 1e-30;  r = b r + (1 - b) mean of rows of s;  c = b c + (1 - b) mean of columns of s;
    u = g / sqrt(r c / mean(r));  p = (1 - lr wd) p;  p = p - a u / max(1, RMS(u)).

    The step size a is lr, or with `relative_step` max(1e-3, RMS(p)) min(lr, 1 / sqrt(t)), p before its decay, as the
    paper and torch.optim.Adafactor have it: too little for LoRA, half of whose matrices begin as zeros. torch differs
    where gradients are tiny: it bounds r c / mean(r) and mean(r) from below by the dtype's eps, instead of the 1e-30.
    """

    def __init__(self, flat: Flat, relative_step: bool = False, weight_decay: float = 0.0, paged: bool = False):
        super().__init__(flat, weight_decay, paged)
        self.relative_step = relative_step

    @classmethod
    def pieces(cls, shapes: Sequence[Shape], page: int) -> list[Shape]:
        return list(shapes)

    @classmethod
    def needs(cls, shape: Shape, dtype: np.dtype) -> dict[str, tuple[int, np.dtype]]:
        """Of a matrix first the means of rows, then those of columns."""
        if len(shape) < 2:
            return {"v": (math.prod(shape), dtype)}
        return {"v": (math.prod(shape[:-1]) + math.prod([*shape[:-2], shape[-1]]), dtype)}

    def numbers(self, lr: float) -> dict[str, float]:
        t = self.step_count
        fresh = t**-0.8
        rate = min(lr, t**-0.5) if self.relative_step else lr
        return super().numbers(lr) | {"rate": rate, "fresh": fresh, "kept": 1 - fresh}

    def update(self, p: Array, g: Array, now: SimpleNamespace, v: Array) -> None:
        xp, real, rate = xp_of(p), p.dtype.type, now.rate
        if self.relative_step:
            rate = xp.maximum(_rms(p), real(1e-3)) * rate
        self.decay(p, now)
        squares = g * g
        squares += real(1e-30)
        v *= now.kept
        if g.ndim < 2:
            estimate = v.reshape(g.shape)
            estimate += now.fresh * squares
        else:
            count = math.prod(g.shape[:-1])
            rows, columns = v[:count].reshape(g.shape[:-1]), v[count:].reshape(*g.shape[:-2], g.shape[-1])
            rows += now.fresh * squares.mean(axis=-1)
            columns += now.fresh * squares.mean(axis=-2)
            estimate = (rows / rows.mean(axis=-1, keepdims=True))[..., None] * columns[..., None, :]
        update = g / xp.sqrt(estimate)
        p -= rate / xp.maximum(_rms(update), real(1)) * update


def _rms(array: Array) -> Array:
    return xp_of(array).sqrt((array * array).mean())


OPTIONS = ("betas", "eps", "momentum", "relative_step")
"""What only some optimizers take, as their constructors say; in config.Train None is the optimizer's own default."""

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "sgd": SGD,
    "lion": Lion,
    "adafactor": Adafactor,
}
