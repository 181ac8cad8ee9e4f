"""Reverse-mode differentiation over NumPy or CuPy arrays.

A Tensor is an array and, where a gradient is wanted, a Node. An op is a pair of functions on plain arrays; the tape is
the nodes alone, each with the saved values that its op's backward reads, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np

from .backend import Array, bfloat16, cast, rounded_factors, xp_of
from .errors import RefpeftError
from .tape import Again, Node, Slice, propagate, recording, state


class Tensor:
    """An array that ops can differentiate through."""

    __slots__ = ("data", "node")
    __array_ufunc__ = None  # ndarray + Tensor is then Tensor.__radd__, not an array of objects

    def __init__(self, data: Array, node: Node | None = None):
        self.data, self.node = data, node

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def grad(self) -> Array | None:
        """What backward() added up here, for a leaf; None before."""
        return None if self.node is None else self.node.grad

    def __repr__(self) -> str:
        kind = "constant" if self.node is None else "leaf" if self.node.op is None else self.node.op.name
        return f"Tensor({kind}, {self.shape}, {self.dtype})"

    def backward(self, grad: Array | None = None) -> None:
        """Adds d(self)/d(leaf) to the `.grad` of every leaf, and frees the tape on the way.

        `grad` is the gradient of self, ones where it is not given.
        """
        if self.node is None:
            raise RefpeftError("backward() of a constant: nothing that it was computed from is trained")
        if grad is None:
            grad = xp_of(self.data).ones_like(self.data)
        elif grad.shape != self.shape:
            raise RefpeftError(
                f"backward(): grad has shape {list(grad.shape)}: expected {list(self.shape)}, as the tensor"
            )
        propagate(self.node, grad)


class Pending(Tensor):
    """What `op` gives that may do its work together with the one that comes next: computed when it is first asked for.

    `what` is for that one, which may say what this `becomes`: see Op.shares_work.
    """

    __slots__ = ("_compute", "_dtype", "_recording", "_result", "_shape", "op", "what")

    def __init__(self, op: Op, compute: Callable[[], Tensor], shape: tuple[int, ...], dtype: np.dtype, what: tuple):
        self.op, self._compute, self._shape, self._dtype, self.what = op, compute, shape, dtype, what
        self._recording = state.recording
        self._result: Tensor | None = None

    @property
    def there(self) -> bool:
        """Whether it has been computed."""
        return self._result is not None

    def becomes(self, result: Tensor) -> None:
        """Says what has been computed elsewhere."""
        self._result, self.what, self._compute = result, (), None  # lest it keep what it was computed of

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def data(self) -> Array:
        return self._made().data

    @property
    def node(self) -> Node | None:
        return self._made().node

    def _made(self) -> Tensor:
        if self._result is None:
            with recording(self._recording):
                self.becomes(self._compute())
        return self._result


def needs_of(inputs: Sequence[Any]) -> tuple[bool, ...]:
    """Which inputs of an op want a gradient; none of them where nothing is recorded."""
    needs = tuple([isinstance(x, Tensor) and x.node is not None for x in inputs])
    if True in needs:
        state.touched = True
        if not state.recording:
            return (False,) * len(inputs)
    return needs


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Within it, ops record nothing."""
    return recording(False)


_plain = ContextVar("plain", default=False)  # whether overrides are left aside; shards take it over


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, ops run as they are defined: without the overrides that are faster."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def parameter(data: Array) -> Tensor:
    """A leaf: a Tensor whose `.grad` backward() fills."""
    return Tensor(data, Node())


class Op:
    """A differentiable operation: a pair of functions on plain arrays.

    `forward(needs, *arrays, **options) -> (array, saved)`, where `needs[i]` says whether input i wants a gradient, so
    that `saved` holds no more than backward will read; `backward(g, *saved)` returns one gradient, or None, for each
    input, and never writes into `g`. An input may be None; numbers and plain arrays are constants of the same dtype.
    A gradient that is zero but for a part may be a Slice.

    Tensors of bfloat16 may meet float32 ones, which values are: the result is bfloat16, and gradients have the dtype of
    their inputs. The pair never sees bfloat16: it computes in float32, and its results are rounded. An op that only
    `moves` numbers gets bfloat16 arrays; one that gives `float32` (a loss) is not rounded.

    The pair is the op's definition. Beside it there may be a faster one for one kind of array: see `override`.
    """

    stands_in = False  # whether this is a faster pair of another one
    into = False  # whether backward adds to gradients in place
    beside = False  # whether it sees to it itself that nothing else adds to a leaf's meanwhile
    onto = False  # whether it adds what it finds, in arrays of its own, to gradients that may not be written
    waits = False  # whether it takes a tape.Again in the place of an input that will be there later
    gives_again = False  # whether it gives the output, too, where it is asked for that
    again: Callable[..., Array] | None = None  # (*saved) -> the output
    takes_over = False  # whether the output may have the memory of the first input
    together: Callable[[tuple, dict[str, Any]], Tensor | None] | None = None  # see the method `shares_work`

    def __init__(
        self,
        forward: Callable[..., tuple[Array, tuple]],
        name: str | None = None,
        moves: bool = False,
        float32: bool = False,
    ):
        self.forward, self.name, self.__doc__ = forward, name or forward.__name__, forward.__doc__
        self.moves, self.float32 = moves, float32
        self.vjp: Callable[..., tuple] = _no_backward
        self.overrides: dict[tuple[type, np.dtype], Op] = {}

    def override(self, kind: type, *dtypes: str, takes_over: bool = False) -> Callable[[Callable[..., Any]], Op]:
        """Decorator: makes a pair of its forward half that stands in for this one where the first Tensor is of `kind`.

        It takes what the plain pair takes, means the same to rounding, and keeps no more bytes on the tape. It may
        return NotImplemented from forward, and the plain pair is asked: of inputs that it was not written for, wrong
        ones above all. Its backward may write into what its own forward saved and made, never into `g` or an input.

        One for bfloat16 is given arrays as they are, some of them float32, and constants in float32. With `takes_over`
        its forward is told by the keyword `spare` whether nobody else can see the first input, so that its memory may
        become the result's.
        """

        def register(forward: Callable[..., Any]) -> Op:
            found = Op(forward, self.name, float32=self.float32)
            found.stands_in, found.takes_over = True, takes_over
            for dtype in dtypes:
                self.overrides[kind, np.dtype(dtype)] = found
            return found

        return register

    def overridden(self, kind: type, dtype: np.dtype) -> bool:
        """Whether a faster pair is asked first, here and now, for such arrays."""
        return not _plain.get() and (kind, dtype) in self.overrides

    def backward(
        self,
        vjp: Callable[..., tuple] | None = None,
        *,
        into: bool = False,
        beside: bool = False,
        onto: bool = False,
        waits: bool = False,
        again: bool = False,
    ) -> Callable[..., Any]:
        """Decorator that gives the op its other half.

        With `into` it is called with a keyword of that name, which has for each input the array that its gradient may
        be added to in place, or None; for one that it added it returns tape.ADDED. Gradients of leaves may be added to
        on a stream beside: the tape waits for that, unless the pair is `beside`, and does so itself. With `onto` there
        is another such keyword, of arrays that must not be written: where there is one, it may return the sum, as a
        tape.Total. With `again`, which goes with `recomputed`, there is a keyword of that name: where it is true, the
        output comes back behind the gradients, as `recomputed` gives it. With `waits` a tape.Again may be in the place
        of what such a pair gave: it is asked for its `output` now, or `later`.
        """
        if vjp is None:
            return partial(self.backward, into=into, beside=beside, onto=onto, waits=waits, again=again)
        self.vjp, self.into, self.beside, self.onto = vjp, into, beside, onto
        self.waits, self.gives_again = waits, again
        return vjp

    def recomputed(self, again: Callable[..., Array]) -> Callable[..., Array]:
        """Decorator of (*saved) -> the output: other ops keep nothing of it then, and it is made again for them."""
        self.again = again
        return again

    def shares_work(self, together: Callable[[tuple, dict[str, Any]], Tensor | None]) -> Callable[..., Tensor | None]:
        """Decorator of (inputs, options) -> a Tensor in the place of this op's, or None: then it does its work alone.

        It may put its work off, by a Pending, or do what is pending of its inputs with its own.
        """
        self.together = together
        return together

    def __call__(self, *inputs: Tensor | Array | float | None, **options: Any) -> Tensor:
        if self.together is not None and not _plain.get():
            shared = self.together(inputs, options)
            if shared is not None:
                return shared
        return self.alone(*inputs, **options)

    def alone(self, *inputs: Tensor | Array | float | None, **options: Any) -> Tensor:
        """The op, not together with others. One that takes over memory is only called by __call__: see _spare."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not tensors:
            raise RefpeftError(f"{self.name}: expected at least one Tensor among {_describe(inputs)}")
        like = tensors[0].data
        dtype = like.dtype
        for x in tensors:
            if x.data.dtype != dtype:
                if {x.data.dtype, dtype} != _MIXED:
                    raise RefpeftError(f"{self.name}: the tensors differ in dtype: {_describe(inputs)}")
                dtype = bfloat16
        needs = needs_of(inputs)
        pair = self
        if self.overrides and not _plain.get():
            pair = self.overrides.get((type(like), dtype), self)
        low = dtype == bfloat16
        try:
            arrays = [x.data if isinstance(x, Tensor) else _constant(x, dtype, like) for x in inputs]
            if pair.takes_over:
                del tensors, x  # references that are counted
                made = pair.forward(needs, *arrays, **options, spare=bool(options) and _spare(inputs))
            else:
                made = NotImplemented if low and pair is self else pair.forward(needs, *arrays, **options)
            if made is NotImplemented:
                pair = _of_bfloat16(self) if low else self
                made = pair.forward(needs, *arrays, **options)
            out, saved = made
        except (ValueError, TypeError, IndexError, AttributeError, np.linalg.LinAlgError) as error:
            raise RefpeftError(f"{self.name}({_describe(inputs)}{_say(options)}): {error}") from error
        expected = _float32 if low and self.float32 else dtype
        if out.dtype != expected:
            raise RefpeftError(f"{self.name}({_describe(inputs)}{_say(options)}) gave {out.dtype}: expected {expected}")
        if True not in needs:
            return Tensor(out)
        return pair.made(out, needs, inputs, saved)

    def made(self, out: Array, needs: Sequence[bool], inputs: Sequence[Any], saved: tuple) -> Tensor:
        """`out` as what this op made of `inputs`, on the tape."""
        nodes = tuple([x.node if n else None for x, n in zip(inputs, needs, strict=True)])
        if self.stands_in and self.again is None:  # one that can be made again keeps what that takes
            saved = _without_what_can_be_made(saved, inputs)
        return Tensor(out, Node(self, nodes, saved))

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def op(forward: Callable[..., tuple[Array, tuple]] | None = None, *, moves: bool = False, float32: bool = False) -> Any:
    """Decorator: makes an Op of its forward half."""
    if forward is None:
        return partial(op, moves=moves, float32=float32)
    return Op(forward, moves=moves, float32=float32)


def _no_backward(*_: Any) -> tuple:
    raise NotImplementedError("this op has no backward")


_float32 = np.dtype("f4")
_MIXED = {_float32, bfloat16}


@functools.cache
def _of_bfloat16(plain: Op) -> Op:
    """The pair of `plain` for arrays of which some are bfloat16: it computes in float32, unless it only moves.

    Its products may round their factors (backend.rounded_factors), but not those of a loss, which stays float32.
    """
    inside = bfloat16 if plain.moves else _float32
    exactly = plain.moves or plain.float32

    def context() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if exactly or _plain.get() else rounded_factors()

    def forward(needs: tuple[bool, ...], *arrays: Any, **options: Any) -> tuple[Array, tuple]:
        dtypes = tuple([getattr(array, "dtype", None) for array in arrays])
        with context():
            out, saved = plain.forward(needs, *[_cast(array, inside) for array in arrays], **options)
        return _cast(out, _float32 if plain.float32 else bfloat16), (dtypes, *saved)

    def backward(g: Array, dtypes: tuple, *saved: Any) -> tuple:
        with context():
            grads = plain.vjp(_cast(g, inside), *saved)
        return tuple([_cast(each, dtype) for each, dtype in zip(grads, dtypes, strict=True)])

    pair = Op(forward, plain.name, float32=plain.float32)
    pair.vjp = backward
    return pair


def _cast(x: Any, dtype: np.dtype) -> Any:
    """An array or a Slice in another floating dtype; anything else as it is."""
    if isinstance(x, Slice):
        return Slice(x.shape, x.key, _cast(x.g, dtype))
    return cast(x, dtype) if getattr(x, "dtype", None) in _MIXED else x


WORTH_MAKING_AGAIN = 2**24
"""Bytes from which on an output is not kept if it can be made again: smaller ones cost less than the time."""


def is_made_again(x: Any) -> bool:
    """Whether the tape keeps nothing of an input of an op: what gave it can make it again."""
    if not isinstance(x, Tensor) or x.node is None or x.node.op is None or x.node.op.again is None:
        return False
    return x.data.nbytes >= WORTH_MAKING_AGAIN


def _without_what_can_be_made(saved: tuple, inputs: Sequence[Any]) -> tuple:
    """`saved`, with an Again in the place of inputs whose nodes can make them again."""
    makers = {id(x.data): x.node for x in inputs if is_made_again(x)}
    return tuple([Again.of(makers[id(part)]) if id(part) in makers else part for part in saved]) if makers else saved


_fewest: list[tuple[int, int]] = []  # references to a Tensor that only a call knows, and to its array, seen from _spare


def _spare(inputs: tuple) -> bool:
    """Whether nobody but this call knows its first input and that one's array: the caller made it on the spot.

    Of a call op(x, ..., name=value): Python holds one reference less where there are no options.
    """
    x = inputs[0]
    if not isinstance(x, Tensor) or x.data.base is not None:
        return False
    if type(x) is Pending and sys.getrefcount(x._result) > _held_once():  # it is the result of others, too
        return False
    counts = sys.getrefcount(x), sys.getrefcount(x.data)
    if not _fewest:
        _fewest.append(counts)  # the call below
    return counts[0] <= _fewest[0][0] and counts[1] <= _fewest[0][1]


@functools.cache
def _held_once() -> int:
    """References to what one attribute holds, seen from a call."""
    holder = Tensor(np.empty(1))
    return sys.getrefcount(holder.data)


def _count_references() -> None:
    """Calls an op in the way that _spare is to recognize."""
    probe = Op(lambda needs, x, option: (x, ()), "probe")
    probe.override(np.ndarray, "f4", takes_over=True)(lambda needs, x, option, spare: (x, ()))
    probe(Tensor(np.empty(1, "f4")), option=None)


_count_references()


def _constant(x: Any, dtype: np.dtype, like: Array) -> Any:
    if x is None:
        return None
    if dtype == bfloat16:
        if getattr(x, "dtype", None) == bfloat16:
            return x
        dtype = _float32
    if isinstance(x, (bool, int, float, np.generic)):
        return dtype.type(x)  # stays on the host: a device copy could not be captured in a graph
    return xp_of(like).asarray(x, dtype)


def _describe(inputs: tuple) -> str:
    def one(x: Any) -> str:
        if x is None or isinstance(x, (bool, int, float)):
            return repr(x)
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__

    return ", ".join(map(one, inputs))


def _say(options: dict[str, Any]) -> str:
    plain = (bool, int, float, str, tuple)
    return "".join(f", {k}={v!r}" for k, v in options.items() if isinstance(v, plain))


def astype(x: Tensor, dtype: np.dtype) -> Tensor:
    """`x` in another floating dtype, itself where it has that; its gradient comes back in its own."""
    if x.dtype == dtype:
        return x
    if x.node is None or not state.recording:
        state.touched |= x.node is not None
        return Tensor(cast(x.data, dtype))
    state.touched = True
    return Tensor(cast(x.data, dtype), Node(_astype, (x.node,), (x.dtype,)))


@op
def _astype(needs, x):
    raise NotImplementedError  # astype() makes the node itself


@_astype.backward
def _(g, dtype):
    return (_cast(g, dtype),)


def checkpoint(
    fn: Callable[..., Tensor], *inputs: Tensor, put_away: Callable[[Array], Callable[[], Array]] | None = None
) -> Tensor:
    """`fn(*inputs)`, keeping only the inputs: fn runs again in the backward pass (Chen et al., 2016, arXiv:1604.06174).

    What `fn` reads beside its inputs must be constants and parameters, and it must compute the same again. `put_away`
    is given the first input's array when fn is done, and gives what is called for it in the backward pass.
    """
    if not state.recording:  # also within another checkpoint, whose `touched` then goes on
        return fn(*inputs)
    state.touched = False
    with no_grad():
        out = fn(*inputs)
    if not state.touched:
        return out
    nodes = tuple(x.node for x in inputs)
    arrays = [x.data for x in inputs]
    if put_away is not None:
        arrays[0] = put_away(arrays[0])
    return Tensor(out.data, Node(_recompute, nodes, (fn, tuple(arrays), tuple(map(bool, nodes)))))


@op
def _recompute(needs, *arrays):
    raise NotImplementedError  # checkpoint() makes the node itself


@_recompute.backward
def _(g, fn, arrays, needs):
    arrays = [x() if callable(x) else x for x in arrays]
    inputs = [Tensor(x, Node() if need else None) for x, need in zip(arrays, needs, strict=True)]
    with recording(True):
        out = fn(*inputs)
    if out.node is not None:
        out.backward(g)
    return tuple(x.grad for x in inputs)
