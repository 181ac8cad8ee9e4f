"""Reverse-mode differentiation over NumPy or CuPy arrays.

A Tensor is an array and, where a gradient is wanted, a Node. An op is a pair of functions on plain arrays; the tape is
the nodes alone, each with the saved values that its op's backward reads, and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .backend import Array, xp_of
from .errors import RefpeftError


class Node:
    """One step of the tape: the op, where its inputs came from, and what its backward needs. A leaf has no op."""

    __slots__ = ("grad", "op", "parents", "saved")

    def __init__(self, op: Op | None = None, parents: tuple[Node | None, ...] = (), saved: tuple | None = ()):
        self.op, self.parents, self.saved = op, parents, saved
        self.grad: Array | None = None


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
        order = _topological(self.node)
        _accumulate(self.node, grad)
        while order:
            node = order.pop()
            if node.op is None:
                continue
            if node.saved is None:
                raise RefpeftError(f"backward() twice through the same {node.op.name}: the first call freed the tape")
            if node.grad is not None:  # None where checkpoint() found an input unused
                grads = node.op.vjp(node.grad, *node.saved)
                for parent, g in zip(node.parents, grads, strict=True):
                    if parent is not None and g is not None:
                        _accumulate(parent, g)
            node.parents, node.saved, node.grad = (), None, None


def _topological(root: Node) -> list[Node]:
    """The nodes below `root`, each after all that it was made from. Iterative: deep models pass Python's limit."""
    order, seen, stack = [], {root}, [(root, iter(root.parents))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(parent.parents)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def _accumulate(node: Node, g: Array) -> None:
    if node.op is not None:
        node.grad = g if node.grad is None else node.grad + g
    elif node.grad is None:
        node.grad = g.copy()  # g may be a view, or be the gradient of another parent too
    else:
        node.grad += g  # into the flat gradient buffer, where there is one


class _State(threading.local):
    recording = True
    touched = False  # whether an op met an input that wants a gradient, recorded or not, since checkpoint() cleared it


_state = _State()


@contextlib.contextmanager
def _recording(on: bool) -> Iterator[None]:
    before, _state.recording = _state.recording, on
    try:
        yield
    finally:
        _state.recording = before


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Within it, ops record nothing."""
    return _recording(False)


def parameter(data: Array) -> Tensor:
    """A leaf: a Tensor whose `.grad` backward() fills."""
    return Tensor(data, Node())


class Op:
    """A differentiable operation: a pair of functions on plain arrays.

    `forward(needs, *arrays, **options) -> (array, saved)`, where `needs[i]` says whether input i wants a gradient, so
    that `saved` holds no more than backward will read; `backward(g, *saved)` returns one gradient, or None, for each
    input, and never writes into `g`. An input may be None; numbers and plain arrays are constants of the same dtype.
    """

    def __init__(self, forward: Callable[..., tuple[Array, tuple]]):
        self.forward, self.name, self.__doc__ = forward, forward.__name__, forward.__doc__
        self.vjp: Callable[..., tuple] = _no_backward

    def backward(self, vjp: Callable[..., tuple]) -> Callable[..., tuple]:
        """Decorator that gives the op its other half."""
        self.vjp = vjp
        return vjp

    def __call__(self, *inputs: Tensor | Array | float | None, **options: Any) -> Tensor:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not tensors:
            raise RefpeftError(f"{self.name}: expected at least one Tensor among {_describe(inputs)}")
        dtype = tensors[0].data.dtype
        if any(x.data.dtype != dtype for x in tensors):
            raise RefpeftError(f"{self.name}: the tensors differ in dtype: {_describe(inputs)}")
        needs = tuple(isinstance(x, Tensor) and x.node is not None for x in inputs)
        _state.touched |= any(needs)
        if not _state.recording:
            needs = (False,) * len(inputs)
        try:
            arrays = [x.data if isinstance(x, Tensor) else _constant(x, dtype, tensors[0].data) for x in inputs]
            out, saved = self.forward(needs, *arrays, **options)
        except (ValueError, TypeError, IndexError, AttributeError, np.linalg.LinAlgError) as error:
            raise RefpeftError(f"{self.name}({_describe(inputs)}{_say(options)}): {error}") from error
        if out.dtype != dtype:
            raise RefpeftError(f"{self.name}({_describe(inputs)}{_say(options)}) gave {out.dtype}: expected {dtype}")
        if not any(needs):
            return Tensor(out)
        return Tensor(out, Node(self, tuple(x.node if n else None for x, n in zip(inputs, needs, strict=True)), saved))

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def op(forward: Callable[..., tuple[Array, tuple]]) -> Op:
    """Decorator: makes an Op of its forward half."""
    return Op(forward)


def _no_backward(*_: Any) -> tuple:
    raise NotImplementedError("this op has no backward")


def _constant(x: Any, dtype: np.dtype, like: Array) -> Any:
    if x is None:
        return None
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


def checkpoint(fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`fn(*inputs)`, keeping only the inputs: fn runs again in the backward pass (Chen et al., 2016, arXiv:1604.06174).

    What `fn` reads beside its inputs must be constants and parameters, and it must compute the same again.
    """
    if not _state.recording:  # also within another checkpoint, whose `touched` then goes on
        return fn(*inputs)
    _state.touched = False
    with no_grad():
        out = fn(*inputs)
    if not _state.touched:
        return out
    nodes = tuple(x.node for x in inputs)
    return Tensor(out.data, Node(_recompute, nodes, (fn, tuple(x.data for x in inputs), tuple(map(bool, nodes)))))


@op
def _recompute(needs, *arrays):
    raise NotImplementedError  # checkpoint() makes the node itself


@_recompute.backward
def _(g, fn, arrays, needs):
    inputs = [Tensor(x, Node() if need else None) for x, need in zip(arrays, needs, strict=True)]
    with _recording(True):
        out = fn(*inputs)
    if out.node is not None:
        out.backward(g)
    return tuple(x.grad for x in inputs)
