"""Layers: one method at one site with its values, and what its hooks are given there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from . import capturing, fused, manager
from .backend import Array, xp_of
from .errors import RefpeftError
from .rng import Order, Step, Stream
from .tensor import Tensor

if TYPE_CHECKING:
    from .batches import Share
    from .placing import Placed
    from .sites import Site

INPUTS = {
    "linear": ("x",),
    "embedding": ("ids",),
    "norm": ("x",),
    "attention": ("q", "k", "v"),
    "block": ("x",),
}
"""The kinds of site, and what a hook of each kind is given first."""


class Base:
    """What a hook gets as `base`: the layer below, callable, and its frozen parts."""

    __slots__ = ("_call", "_key", "_keywords", "_site")

    def __init__(self, site: Site, call: Callable[..., Tensor], keywords: dict[str, Any], key: tuple[str, ...]):
        self._site, self._call, self._keywords, self._key = site, call, keywords, key

    def __call__(self, *args: Any, **stand_ins: Any) -> Tensor:
        twice = stand_ins.keys() & self._keywords.keys() & {"weight", "bias"}
        if twice:
            raise RefpeftError(f"two methods replace the {twice.pop()} of {self._site.name}: attach only one of them")
        return self._call(*args, **(self._keywords | stand_ins))

    @property
    def is_frozen(self) -> bool:
        """Whether it is the site's own layer, with no method below, and none above that replaces a part of it."""
        return self._call is self._site.base and not self._keywords

    def frozen(self, x: Tensor) -> Tensor:
        """x (..., in) times a linear layer's frozen weight, without its bias and the methods below: (..., out)."""
        return fused.frozen_linear(x, weight=self._site.weight)

    def scale(self, q: Tensor) -> float:
        """What an attention multiplies the scores of q (..., width) with: 1 / sqrt(width), in some models another."""
        return self._keywords.get("scale", q.shape[-1] ** -0.5)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (batch, heads, time, width) such as this layer's own: positions, window, documents, earlier tokens.

        For sub-networks of a block's hook. Keys have as many heads as queries, or fewer. Rotary positions take every
        n-th of the model's frequencies where `width` is an n-th of its head_dim, and so span the same range; T5's bias
        of positions is the model's.
        """
        around = self._keywords
        if around.get("cos") is not None:
            every, odd = divmod(2 * around["cos"].shape[-1], q.shape[-1])
            if odd:
                raise RefpeftError(f"{self._site.name}: heads of {q.shape[-1]} numbers do not divide the model's")
            cos, sin = (around[name][..., ::every] for name in ("cos", "sin"))
            q, k = fused.rope(q, cos=cos, sin=sin), fused.rope(k, cos=cos, sin=sin)
        if around["cache"]:
            k, v = around["cache"].extend(self._key, k, v)
        return fused.attention(q, k, v, around.get("bias"), mask=around["mask"])

    def cross_attention(self, q: Tensor, source: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """Attention to what `source` gives, keys and values of the encoder's tokens; in generation it is asked once."""
        cache, key = self._keywords["cache"], (*self._key, "cross")
        known = cache and cache.layers.get(key)
        k, v = (Tensor(one.array) for one in known) if known else source()
        if cache and not known:
            cache.extend(key, k, v)
        return fused.attention(q, k, v, mask=self._keywords["read"])

    @property
    def weight(self) -> Tensor:
        """The frozen dense weight as a constant; within a product with x it stays on the tape: see `frozen`."""
        return Tensor(self._site.weight())

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias as a constant, or None."""
        return None if self._site.bias is None else Tensor(self._site.bias)


class Near:
    """The linear layers in the same layer of the model as a site: near("k", x) is what its `k` makes of x (..., in)."""

    def __init__(self, beside: Sequence[Site]):
        self._by_role = {role: s for s in beside if s.kind in ("linear", "attention") for role in s.roles}
        self._key_norm = next((site for site in beside if site.name.endswith(".k_norm")), None)

    def has(self, role: str) -> bool:
        """Whether the layer has a site of this role."""
        return role in self._by_role

    def site(self, role: str) -> Site:
        """The site of a role. Raises RefpeftError where the layer has none."""
        if not self.has(role):
            raise RefpeftError(f"this model's layers have no '{role}', but {', '.join(self._by_role)}")
        return self._by_role[role]

    def __call__(self, role: str, x: Tensor) -> Tensor:
        site = self.site(role)
        y, share = site(x), site.shape[0] // len(site.roles)  # one layer for q, k and v has them side by side
        at = site.roles.index(role) * share
        return y if len(site.roles) == 1 else y[..., at : at + share]

    def keys_and_values(self, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Of rows x (rows, in), as the layer makes them for its attention `site`: (kv_heads, rows, head_dim) each.

        Keys are normalized where the layer's own are, and have no rotary positions.
        """
        before = "cross_" if "cross_attend" in site.roles else ""
        k, v = (self(before + role, x[None]).reshape(-1, *site.shape) for role in "kv")
        k = self._key_norm(k) if self._key_norm else k
        return k.transpose(1, 0, 2), v.transpose(1, 0, 2)


@dataclass
class Mode:
    """What all sites of a model know of the moment: whether it trains, with which seed, which forward pass this is."""

    training: bool = False
    seed: int = 0
    step: int = 0  # of the optimizer, from 0
    part: int = 0  # of the step's batch, where its gradients are accumulated
    again: int = 0  # how often the same rows were computed before, for methods that compare passes
    chunk: int = 0  # where the rows begin that the head is given, of those with a target
    share: Share | None = None  # of what the batch is one, where several are computed at the same time
    placed: Placed | None = None  # the batch, where it lies otherwise than on the host
    run: int = 0  # of a layer that a model runs several times (ALBERT)
    task: Any = None  # which data set of several rows are of: one number, or one for each row


class Train:
    """What a hook knows of training: the optimizer's step, and random numbers, the same in every run of a seed.

    They are also the same for every row, whatever share of a micro-batch it is in, and on every device. An array has
    rows if it begins with the axes `like`: those of the batch (with `said`, of what its decoder reads), or if `picked`
    of the rows that have a target.
    """

    def __init__(
        self,
        mode: Mode,
        purpose: tuple[str, ...],
        like: tuple[int, ...] | None = None,
        picked: bool = False,
        said: bool = False,
    ):
        again = ("again", mode.again) if mode.again else ()
        again += ("run", mode.run) if mode.run else ()
        self._key = (mode.seed, "dropout", *purpose, Step(mode.step), mode.part, *again)
        self._of_the_pass = (mode.seed, "draw", *purpose, mode.step, mode.part, *again)
        self._of_the_step = (mode.seed, "draw", *purpose[:-1], mode.step)
        self._mode, self._like, self._picked, self._said = mode, like, picked, said
        self._method = purpose[1] if purpose else "a method"
        self._calls = 0
        self._draws: Stream | None = None

    @property
    def step(self) -> int:
        """The number of the optimizer's step, from 0."""
        capturing.refuse(f"{self._method} goes by the number of the step")
        return self._mode.step

    def draw(self, n: int, apart: bool = False) -> int:
        """A number of 0 ... n - 1, drawn by the host: the same at every site of the method during a step.

        With `apart` each site draws its own, anew in every forward pass and at every call.
        """
        capturing.refuse(f"{self._method} draws a number on the host, by which it decides what to compute")
        if not apart:
            return int(Stream(*self._of_the_step).uniform(0, n))
        self._draws = self._draws or Stream(*self._of_the_pass)
        return int(self._draws.uniform(0, n))

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers between 0 and 1 in the shape of `like`, constants, drawn where it is; call it in a fixed order."""
        return Tensor(self._stream(like, 2).uniform(0, 1, like.shape).astype(like.dtype))

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        """`x` with elements zeroed at `rate` and the rest scaled by 1 / (1 - rate)."""
        if not rate:
            return x
        return fused.dropout(x, rate=rate, stream=self._stream(x, 1))

    def _stream(self, x: Tensor, words: int) -> Stream:
        """What the numbers of `x` are drawn from, so many words each: a stream for each call, of the whole batch."""
        self._calls += 1
        stream = Stream(*self._key, self._calls, xp=xp_of(x.data))
        order = self._order(x.shape)
        return stream.skip(words * self._before(x.shape)) if order is None else stream.of(order)

    def _before(self, shape: tuple[int, ...]) -> int:
        """How many numbers of the whole batch come before those of an array of this shape."""
        like, share = self._like, self._mode.share
        if like is None or shape[: len(like)] != like:
            return 0
        if self._picked:
            return (self._mode.chunk + (share.asked.start if share else 0)) * math.prod(shape[1:])
        return share.here.start * math.prod(shape[share.axis + 1 :]) if share else 0

    def _order(self, shape: tuple[int, ...]) -> Order | None:
        """Which of the host's numbers an array of this shape has, where its rows lie otherwise here; else None."""
        like, placed = self._like, self._mode.placed
        if placed is None or like is None or shape[: len(like)] != like or not math.prod(shape):
            return None
        if self._picked:
            begins = placed.places_of_rows(self._mode.chunk, shape[0])
        elif len(like) == 1:
            begins = placed.lines
        else:
            begins = placed.places_of_tokens(like[1], self._said)
        if begins is None or len(begins) != shape[0]:
            return None
        tokens = 1 if len(like) == 1 else like[1]
        row = math.prod(shape[1:])
        return Order(begins, row, row // tokens)


@dataclass
class Part:
    """One plugin's share of an adapter: the method itself, or a companion that it brings."""

    plugin: ModuleType
    cfg: Any
    shared: SimpleNamespace = field(default_factory=SimpleNamespace)
    sites: list[Site] = field(default_factory=list)
    memo: SimpleNamespace = field(default_factory=SimpleNamespace)
    behind: int = 0  # rows that the embedding gave below this part's hook, in the last forward pass

    @property
    def name(self) -> str:
        return self.plugin.__name__.rpartition(".")[2]

    @property
    def is_recipe(self) -> bool:
        """Whether it has no forward hook, and only brings other methods along."""
        return not any(manager.hook(self.plugin, f"peft_{kind}") for kind in INPUTS)

    def call(self, hook: str, **have: Any) -> Any:
        """What the plugin's `hook` returns, or None where it has none; values of `have` may be thunks."""
        found = manager.hook(self.plugin, hook)
        if found is None:
            return None
        function, names = found
        have = {"cfg": self.cfg, "shared": self.shared, "sites": self.sites} | have
        return function(*(have[name]() if isinstance(have[name], Lazy) else have[name] for name in names))


class Lazy:
    """A value that is computed only if a hook names it."""

    def __init__(self, make: Callable[[], Any]):
        self.make = make

    def __call__(self) -> Any:
        return self.make()


class Layer:
    """One part at one site, with its values.

    `frozen` is the frozen weight that the site has in place of its own while this is on it, and the site's own one
    then; None of methods that leave it alone. `state` holds what the method keeps in training (peft_state).
    """

    def __init__(self, part: Part, site: Site, values: dict[str, Tensor], mode: Mode, adapter: str, near: Near):
        self.part, self.site, self.values, self.mode, self.near = part, site, values, mode, near
        self.frozen: Any = None
        self.state = SimpleNamespace()
        self.p = SimpleNamespace(**values)
        self._purpose = (adapter, part.name, site.name)
        self.name = ".".join(self._purpose)
        self._function, self._names = manager.hook(part.plugin, f"peft_{site.kind}")
        missing = [name for name in INPUTS[site.kind] if name not in self._names]
        if missing:
            raise RefpeftError(f"plugin '{part.name}': peft_{site.kind} does not take {', '.join(missing)}")

    def around(self, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function like `inner` that runs the plugin's hook around it. Keywords travel inward to the frozen layer."""
        inputs = INPUTS[self.site.kind]
        part = self.part
        fixed = {"p": self.p, "cfg": part.cfg, "site": self.site, "sites": part.sites, "shared": part.shared}
        fixed |= {"near": self.near, "memo": part.memo}
        below = self._counting(inner) if "embed" in self.site.roles else inner

        def call(*args: Any, **keywords: Any) -> Tensor:
            train = self.train(args[0].shape) if "train" in self._names else None
            base = Base(self.site, below, keywords, self._purpose)
            have = fixed | {"base": base, "train": train, "behind": part.behind, "task": self.mode.task}
            have |= zip(inputs, args, strict=True)
            return self._function(*(have[name] for name in self._names))

        return call

    def _counting(self, embed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`embed`, and its number of rows is what the method's other hooks get as `behind`."""

        def count(*args: Any, **keywords: Any) -> Tensor:
            h = embed(*args, **keywords)
            self.part.behind = h.shape[1]
            return h

        return count

    def train(self, reads: tuple[int, ...] | None = None) -> Train | None:
        """What its hooks are given of training, those of the forward pass by the shape of what they read.

        None outside of it.
        """
        if not self.mode.training:
            return None
        if reads is None:
            return Train(self.mode, self._purpose)
        axes = {"embedding": 2, "attention": 1}.get(self.site.kind, len(reads) - 1)
        of_source = {"cross_k", "cross_v"} & set(self.site.roles)
        said = self.site.name.startswith("decoder.") and not of_source
        return Train(self.mode, self._purpose, reads[:axes], len(reads) == 2 and axes == 1, said)

    @property
    def row_by_row(self) -> bool:
        """Whether it surely does the same to every row of its input, whatever others are there.

        What can be merged into a weight does, if it is not told of which data set each row is.
        """
        merges = self.site.weight is not None and manager.hook(self.part.plugin, "peft_merge") is not None
        return merges and not {"task", "memo"} & set(self._names)

    @property
    def text_by_text(self) -> bool:
        """Whether texts in rows of their own may be one after the other in a row, as packed ones are.

        Not where it may put something before each row, or is told something of rows.
        """
        beside = self.site.kind in ("linear", "norm", "block") and not {"task", "behind"} & {*self._names}
        return self.row_by_row or beside

    @property
    def remembers(self) -> bool:
        """Whether its hook hands something on to those of other sites, in `memo`."""
        return "memo" in self._names

    def put_on(self, model: Any) -> None:
        """Puts it on its site, outermost."""
        self.site.layers.append(self)
        self._exchange(model)

    def take_off(self, model: Any) -> None:
        """Takes it off its site, which has its own frozen weight again."""
        self.site.layers.remove(self)
        self._exchange(model)

    def _exchange(self, model: Any) -> None:
        if self.frozen is not None:
            self.site.weight, self.frozen = self.frozen, self.site.weight
            model.frozen[f"{self.site.name}.weight"] = self.site.weight
        self.site.compose()

    @property
    def arrays(self) -> SimpleNamespace:
        """Its values by name, as arrays."""
        return SimpleNamespace(**{name: value.data for name, value in self.values.items()})

    @property
    def grads(self) -> SimpleNamespace:
        """The gradients of its trained values by name, as arrays; None where there is none yet."""
        return SimpleNamespace(**{name: v.grad for name, v in self.values.items() if v.node is not None})

    @property
    def stands_in(self) -> bool:
        """Whether its merged form takes the place of frozen parts, whatever they are, as base(x, weight=...) does."""
        merge = manager.hook(self.part.plugin, "peft_merge")
        return merge is not None and not {"weight", "bias"} & set(merge[1])

    def merged(self, weight: Array, bias: Array | None) -> dict[str, Array]:
        """{"weight": ..., "bias": ...} with this layer folded in. Raises RefpeftError where the method cannot."""
        if manager.hook(self.part.plugin, "peft_merge") is None or weight is None:
            where = f"(at {self.site.name}): keep it as an adapter"
            raise RefpeftError(f"method '{self.part.name}' cannot be merged into weights {where}")
        have = {"weight": weight, "bias": bias, "frozen": Lazy(self.site.weight)}
        shared = SimpleNamespace(**{name: value.data for name, value in vars(self.part.shared).items()})
        out = self.part.call("peft_merge", **have, p=self.arrays, site=self.site, shared=shared)
        return {"weight": weight, "bias": bias} | (out if isinstance(out, dict) else {"weight": out})
