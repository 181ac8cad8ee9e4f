"""The tape: nodes with what they keep, and how gradients run back and add up. refpeft.tensor puts ops on it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arena
from .backend import Array
from .errors import RefpeftError

if TYPE_CHECKING:
    from .tensor import Op


class Node:
    """One step of the tape: the op, where its inputs came from, and what its backward needs. A leaf has no op."""

    __slots__ = ("again", "grad", "op", "own", "parents", "saved")

    def __init__(self, op: Op | None = None, parents: tuple[Node | None, ...] = (), saved: tuple | None = ()):
        self.op, self.parents, self.saved = op, parents, saved
        self.grad: Array | None = None
        self.own = False  # whether nothing else has the array `grad`, so that more may be added to it in place
        self.again: Again | None = None  # what later ops keep in the place of this one's output


class Again:
    """Stands on the tape for the output of a node that is made again when it is asked for, as often as it was kept."""

    __slots__ = ("array", "askers", "node", "uses")

    def __init__(self, node: Node):
        self.node, self.askers = node, 0
        self.array: Array | None = None
        self.uses: list[Callable[[Array], None]] = []

    @classmethod
    def of(cls, node: Node) -> Again:
        """The one of `node`, for one asker more."""
        node.again = node.again or cls(node)
        node.again.askers += 1
        return node.again

    def output(self) -> Array:
        """What the node gave. It is held until the last asker has it."""
        self.askers -= 1
        found = self.node.op.again(*self.node.saved) if self.array is None else self.array
        self.array = found if self.askers else None
        return found

    def later(self, use: Callable[[Array], None]) -> None:
        """Calls `use` with what the node gave on the way back through it, which makes that beside the gradients."""
        self.askers -= 1
        self.array = self.array if self.askers else None
        self.uses.append(use)


class Slice:
    """The gradient of an array of which an op read a part: `g` at `key`, zeros elsewhere, which are not there."""

    __slots__ = ("g", "key", "shape")

    def __init__(self, shape: tuple[int, ...], key: Any, g: Array):
        self.shape, self.key, self.g = shape, key, g

    def whole(self) -> Array:
        """An array of `shape`, of nobody else."""
        found = arena.zeros(self.g, self.shape)
        arena.put(found, self.key, self.g, add=False)
        return found


class Total:
    """What a backward returns in the place of a gradient: an array of nobody else, with what was there of it before."""

    __slots__ = ("array",)

    def __init__(self, array: Array):
        self.array = array


ADDED = object()
"""What a backward returns in the place of a gradient that it has added already: see Op.backward."""


class _State(threading.local):
    recording = True
    before_leaf = staticmethod(lambda gradient: None)  # what is done before the gradient of a leaf is added to
    touched = False  # whether an op met an input that wants a gradient, recorded or not, since checkpoint() cleared it


state = _State()


@contextlib.contextmanager
def recording(on: bool) -> Iterator[None]:
    """Within it, ops record what they do, or do not."""
    before, state.recording = state.recording, on
    try:
        yield
    finally:
        state.recording = before


@contextlib.contextmanager
def before_leaves(call: Callable[[Array], None]) -> Iterator[None]:
    """Within it, `call` is made of the gradient of a leaf before it is added to, but not where a pair sees to that."""
    before, state.before_leaf = state.before_leaf, call
    try:
        yield
    finally:
        state.before_leaf = before


# ---- the way back ----------------------------------------------------------------------------------------------------


def propagate(root: Node, grad: Array) -> None:
    """Adds d(root)/d(leaf) to the gradient of every leaf below, that of `root` being `grad`, and frees the tape."""
    order = _topological(root)
    _accumulate(root, grad)
    while order:
        node = order.pop()
        if node.op is None:
            continue
        if node.saved is None:
            raise RefpeftError(f"backward() twice through the same {node.op.name}: the first call freed the tape")
        if node.grad is not None:  # None where checkpoint() found an input unused
            _pass_on(node)
        node.parents, node.saved, node.grad, node.again = (), None, None, None


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


def _pass_on(node: Node) -> None:
    """Adds the gradients of what `node` was made from to theirs."""
    op, saved = node.op, node.saved
    if op.stands_in:
        saved = tuple([part.output() if type(part) is Again and not _can_wait(op, part) else part for part in saved])
    uses = node.again.uses if node.again else ()
    how = {"again": True} if uses else {}
    if op.into:
        how["into"] = tuple([_open(parent, op.beside) for parent in node.parents])
    if op.onto:
        how["onto"] = tuple([_closed(parent) for parent in node.parents])
    gradients = op.vjp(node.grad, *saved, **how)
    if uses:
        *gradients, output = gradients
        for use in uses:
            use(output)
        del output
    for parent, g in zip(node.parents, gradients, strict=True):
        if type(g) is Total:
            parent.grad, parent.own = g.array, True
        elif parent is not None and g is not None and g is not ADDED:
            _accumulate(parent, g)


def _can_wait(op: Op, again: Again) -> bool:
    """Whether `op` takes an output that is not there yet, and gets it on the way back through what gave it."""
    return op.waits and again.node.op.gives_again


def _references(node: Node) -> tuple[int, int]:
    """How many there are to its gradient, and to what that is a view of."""
    base = node.grad.base
    return sys.getrefcount(node.grad), 0 if base is None else sys.getrefcount(base)


def _fewest_references() -> tuple[int, int]:
    """Those to a gradient that nothing else has, which is a view of what nothing else has."""
    node = Node()
    node.grad = np.empty(1)[:]
    return _references(node)


_ALONE = _fewest_references()


def _open(node: Node | None, beside: bool = True) -> Array | None:
    """The gradient that is there of `node`, if more may be added to it in place. See Op.backward for `beside`."""
    if node is None or node.grad is None:
        return None
    if node.op is None and not beside:
        state.before_leaf(node.grad)
    if node.op is None or node.own:
        return node.grad
    references = _references(node)
    if references[0] > _ALONE[0] or references[1] > _ALONE[1]:
        return None
    node.own = True  # what gave it has forgotten it
    return node.grad


def _closed(node: Node | None) -> Array | None:
    """The gradient that is there of `node`, if nothing may be added to it in place; not that of a leaf."""
    return None if node is None or node.op is None or node.own else node.grad


def _accumulate(node: Node, g: Array | Slice) -> None:
    if isinstance(g, Slice):
        _add_slice(node, g)
        return
    if node.op is not None:
        if node.grad is None:
            node.grad, node.own = g, False  # g may be a view, or be the gradient of another parent too
        elif node.own:
            arena.add_to(node.grad, g)
        else:
            node.grad, node.own = arena.add(node.grad, g), True
        return
    if node.grad is None:
        node.grad = g.copy()  # g may be a view, or be the gradient of another parent too
        return
    state.before_leaf(node.grad)
    node.grad += g  # into the flat gradient buffer, where there is one


def _add_slice(node: Node, g: Slice) -> None:
    if node.grad is None:
        node.grad, node.own = g.whole(), True
        return
    if node.op is None:
        state.before_leaf(node.grad)
    elif _open(node) is None:
        node.grad, node.own = node.grad.copy(), True
    arena.put(node.grad, g.key, g.g, add=True)
