"""Frozen layers with low-rank methods on them, y = x W^T + alpha (x A^T) B^T: as one op, and all that read x as one.

A method says base(x) and then addmm(base(x), linear(x, A), B), and some say gain * addmm(...). All of it waits until
its result is asked for, and is computed together with what else waits for the same x, such as k and v beside q. Where
the weights have room for the factors (refpeft.cuda.rooms), it takes two products forward, and four going back.

Elsewhere each part is a product that adds to what another one left. A wide product reads what it adds to while it
computes, which costs little; a narrow one, such as u B^T, takes as long as its memory does. So narrow products come
first and write, wide ones add: nothing of the layer's size is read and written for the sake of a sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cupy

from refpeft import fused, ops
from refpeft.backend import Array, bfloat16
from refpeft.cuda import aside, blas, gains, margins, narrow, rooms
from refpeft.cuda.blas import low, product
from refpeft.cuda.linear import linear_at, low_weight, rows_of, weight_gradient, write_bias
from refpeft.cuda.maps import float32, mapped
from refpeft.cuda.rooms import Factors, Part, Room
from refpeft.tape import ADDED, Again, Node, state
from refpeft.tensor import Op, Pending, Tensor, is_made_again, needs_of

# ---- what waits ------------------------------------------------------------------------------------------------------


class _Layer:
    """A frozen layer that waits, with the low-rank factors that it has been given, as tensors, or none."""

    def __init__(self, part: Part):
        self.part = part
        self.values: tuple[Tensor, ...] = ()  # A, or u where this comes from elsewhere, and B
        self.gain: Tensor | None = None  # (out,), by which the result is multiplied
        self.result: Pending | None = None
        self.before_gain: Pending | None = None


class _Readers:
    """Layers that read the same x, and wait until one of them is asked for."""

    def __init__(self, x: Tensor):
        self.x, self.recording = x, state.recording
        self.waiting: list[_Layer] = []
        self._frozen: dict[tuple[int, int], Tensor] = {}  # by weight and bias, what is there without factors

    def add(self, part: Part) -> Pending:
        """The result of one layer more."""
        layer = _Layer(part)
        self.waiting.append(layer)
        layer.result = self._pending(fused.frozen_linear, layer, partial(self._computed, layer, True))
        return layer.result

    def add_factors(self, layer: _Layer, u: Tensor, B: Tensor, alpha: float) -> Pending:
        """The result of a layer that waits, with alpha u B^T; without that it still can be asked for."""
        if type(u) is Pending and u.op is ops.linear and not u.there and u.what[0] is self.x:
            A = u.what[1]
            layer.part.factors, layer.values = Factors(A.data, B.data, alpha), (A, B)
        else:
            layer.part.factors, layer.values = Factors(None, B.data, alpha), (u, B)
        layer.result = self._pending(fused.addmm, layer, partial(self._computed, layer, False))
        return layer.result

    def add_gain(self, layer: _Layer, gain: Tensor) -> Pending:
        """The result of a layer that waits, times gain (out,); without that it still can be asked for."""
        layer.gain, layer.before_gain = gain, layer.result
        layer.result = self._pending(ops.mul, layer, partial(self._multiplied, layer, gain, layer.result))
        return layer.result

    def _pending(self, op: Op, layer: _Layer, compute: Any) -> Pending:
        shape = (*self.x.shape[:-1], layer.part.weight.shape[0])
        return Pending(op, compute, shape, bfloat16, (self, layer))

    def _computed(self, layer: _Layer, bare: bool) -> Tensor:
        """What a layer gives, `bare` of its factors or with them.

        Others that wait are computed with it, where they can be one product. Where it is wanted bare of factors, too,
        that is one product, and they are added to it.
        """
        if bare and layer.values:
            return self._frozen_of(layer.part)
        if layer.gain is not None:  # its multiplication will be another one
            layer.gain, layer.result = None, layer.before_gain
        return self._waited_for(layer)

    def _multiplied(self, layer: _Layer, gain: Tensor, y: Pending) -> Tensor:
        """gain * y, of a layer's result y: with what else waits, unless y was asked for itself."""
        return ops.mul.alone(gain, y) if layer.gain is None else self._waited_for(layer)

    def _waited_for(self, layer: _Layer) -> Tensor:
        """All of what a layer gives."""
        once = self._is_wanted_once(layer)
        if layer in self.waiting and once:
            others = filter(self._is_wanted_once, self.waiting)
            for chosen in ([each for each in others if (each.gain is None) == (layer.gain is None)], [layer]):
                made = _together(self.x, chosen)
                if made is not None:
                    result = made[chosen.index(layer)]
                    for each, its_result in zip(chosen, made, strict=True):
                        each.result.becomes(its_result)
                        self.leave(each)
                    return result
        if layer in self.waiting:
            self.leave(layer)
        y = self._alone(layer, once)
        return y if layer.gain is None else ops.mul.alone(layer.gain, y)

    def _alone(self, layer: _Layer, once: bool) -> Tensor:
        """What a layer gives, without its gain, by itself."""
        if not layer.values:
            return self._frozen_of(layer.part)
        (u, B), factors = layer.values, layer.part.factors
        u, alpha = u if factors.A is None else ops.linear.alone(self.x, u), factors.alpha
        if once:
            return _single(self.x, layer.part, u, B, alpha)
        return fused.addmm(self._frozen_of(layer.part), u, B, alpha=alpha)

    def _frozen_of(self, part: Part) -> Tensor:
        """x weight^T + bias, computed when it is first asked for."""
        key = id(part.weight), id(part.bias)
        if key not in self._frozen:
            inputs = (self.x,) if part.bias is None else (self.x, part.bias)
            self._frozen[key] = fused.frozen_linear.alone(*inputs, weight=part.weight)
        return self._frozen[key]

    def _is_wanted_once(self, layer: _Layer) -> bool:
        """Whether no other layer has its weight and bias, and it has not been asked for without factors."""
        there = (id(layer.part.weight), id(layer.part.bias)) in self._frozen
        return not there and not any(each is not layer and _same(layer, each) for each in self.waiting)

    def leave(self, layer: _Layer) -> None:
        """Says that a layer waits no longer."""
        self.waiting.remove(layer)
        layer.before_gain = None  # lest it keep what keeps this
        if not self.waiting and self in _latest:
            _latest.clear()  # which keeps x


def _same(layer: _Layer, other: _Layer) -> bool:
    return layer.part.weight is other.part.weight and layer.part.bias is other.part.bias


_latest: list[_Readers] = []  # the readers that the last layer was added to


@fused.frozen_linear.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    x, bias = (*inputs, None)[:2]
    if not _are_rows_in_training(x) or isinstance(bias, Tensor):
        return None
    if not _latest or _latest[0].x is not x or _latest[0].recording is not state.recording:
        _latest[:] = [_Readers(x)]
    return _latest[0].add(Part(options["weight"], bias))


@ops.linear.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    x, A, bias = (*inputs, None)[:3]
    if bias is not None or type(A) is not Tensor or not _are_rows_in_training(x) or not rooms.is_trained(A.data):
        return None
    return Pending(ops.linear, partial(ops.linear.alone, x, A), (*x.shape[:-1], len(A.data)), bfloat16, (x, A))


@fused.addmm.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    y, u, B = inputs
    if type(y) is not Pending or y.op is not fused.frozen_linear or y.there or not _fit(y, u, B):
        return None
    readers, layer = y.what
    if layer not in readers.waiting or layer.values:
        return None
    return readers.add_factors(layer, u, B, float(options["alpha"]))


@ops.mul.shares_work
def _(inputs: tuple, options: dict[str, Any]) -> Tensor | None:
    for gain, y in (inputs, inputs[::-1]):
        if type(y) is Pending and y.op is fused.addmm and not y.there and type(gain) is Tensor:
            readers, layer = y.what
            fits = gain.shape == y.shape[-1:] and gain.dtype == float32
            if fits and layer in readers.waiting and layer.result is y:
                return readers.add_gain(layer, gain)
    return None


def _are_rows_in_training(x: Any) -> bool:
    return blas.is_training() and type(x) is Tensor and type(x.data) is cupy.ndarray and x.dtype == bfloat16


def _fit(y: Pending, u: Any, B: Any) -> bool:
    """Whether addmm of these is what it is for: rows of bfloat16 and float32 factors of their widths."""
    if not (isinstance(u, Tensor) and isinstance(B, Tensor)) or (u.dtype, B.ndim) != (bfloat16, 2):
        return False
    return u.shape == (*y.shape[:-1], B.shape[1]) and y.shape[-1] == B.shape[0]


# ---- layers in one room ----------------------------------------------------------------------------------------------


def _together(x: Tensor, waiting: list[_Layer]) -> list[Tensor] | None:
    """What layers that read x give, computed as one; None where they have no room for that, or nothing is gained."""
    parts = [layer.part for layer in waiting]
    rank = sum(part.rank for part in parts)
    offset = margins.taken(x.data, rank) if rank else 0
    if offset is None or (not rank and len(parts) == 1):
        return None
    if len({part.factors.A is None for part in parts if part.factors is not None}) > 1:
        return None
    room = rooms.room(parts, offset)
    if room is None:
        return None
    u = margins.behind(x.data, rank) if rank else None
    if room.is_given_u:
        if rank > sum(part.factors.rank for part in parts if part.factors is not None):
            u[...] = cupy.zeros((), bfloat16)  # also between the factors' places
        given = [layer.values[0] for layer in waiting if layer.values]
        for each, place in zip(given, room.parts_of(u), strict=True):
            _put(each, place)
    elif rank:
        product(rows_of(x.data), room.down.T, out=rows_of(u))
    y = _forward(x.data, u, room)
    parents = (x, *(value for layer in waiting for value in layer.values))
    needs = needs_of(parents)
    if True in needs:
        kept_x = x.data if rank and not room.is_given_u else None
        if rank and (room.is_given_u or is_made_again(x)):
            u = u.copy()  # lest it keep x, behind whose rows it is
        whole = layers.made(y, needs, parents, (kept_x, u, room, needs[0]))
    else:
        whole = Tensor(y)
    if waiting[0].gain is not None:
        whole = _times(whole, [layer.gain for layer in waiting])
    return [whole] if len(parts) == 1 else _columns(whole, room.widths)


def _put(u: Tensor, place: Array) -> None:
    """Writes u to its place, where it is computed if it waits."""
    if type(u) is Pending and u.op is ops.linear and not u.there:
        u.becomes(linear_at(place, *u.what))
    else:
        place[...] = u.data


def _forward(x: Array, u: Array | None, room: Room) -> Array:
    y = cupy.empty((*x.shape[:-1], len(room.forward)), bfloat16)
    if room.bias is not None:
        write_bias(y, room.bias)
    if u is not None:
        x = margins.together(x, u)
    product(rows_of(x), room.forward.T, out=rows_of(y), add=room.bias is not None)
    return y


layers = Op(_forward, "frozen layers with low-rank factors")
layers.stands_in = True


@layers.backward(into=True, beside=True, waits=True)
def _(g, x, u, room, x_needed, into):
    g, du, values = g.whole() if isinstance(g, _Gathered) else low(g), None, []
    if room.is_given_u:
        its_own = cupy.empty(u.shape, bfloat16)
        dBs = _narrow_products(g, its_own, None, u, room, into[2::2])
        values = [each for pair in zip(room.parts_of(its_own), dBs, strict=True) for each in pair]
    elif u is not None:
        du = margins.scratch(g, u.shape[-1])
        du = cupy.empty(u.shape, bfloat16) if du is None else du
        values = _narrow_products(g, du, x, u, room, into[1:])
    if not x_needed:
        return None, *values
    adds = into[0] is not None and margins.step(into[0]) is not None
    dx = into[0] if adds else cupy.empty((*g.shape[:-1], room.backward.shape[1]), bfloat16)
    if du is None or margins.lies_behind(du, g):
        g = g if du is None else margins.together(g, du)
        product(rows_of(g), room.backward, out=rows_of(dx), add=adds)
    else:
        product(rows_of(du), room.down, out=rows_of(dx), add=adds)
        product(rows_of(g), room.backward[: g.shape[-1]], out=rows_of(dx), add=True)
    return ADDED if adds else dx, *values


def _narrow_products(
    g: Array, du: Array, x: Array | Again | None, u: Array, room: Room, into: tuple
) -> list[Array | object]:
    """Fills du; the gradients of what is trained of each layer in turn, of A and B, or of B alone where x is None.

    That of A waits for an x that is yet to be there.
    """
    g, du, u = map(rows_of, (g, du, u))
    direct = room.alpha is not None and all(array is not None and array.flags.c_contiguous for array in into)
    adds = direct or room.adds_gradients(into)
    if type(x) is Again and not adds:
        x = x.output()
    waits, alpha = type(x) is Again, room.alpha if direct else 1.0
    if direct:
        aside.join_all_that_adds_to(into[-1])
        (dA, dB), between = (into if x is not None else (None, *into)), []
    else:
        whole, dA, dB = room.blank_gradients()
        between = [whole]
    twin = cupy.empty(du.shape, bfloat16) if waits else None  # what lies behind g is somebody else's when x is there
    one_pass = narrow.both_ways(g, u, room.up, du, dB, room.widths, room.ranks, alpha, direct, twin)
    if not one_pass:
        product(g, room.up, out=du)
        if waits:
            twin[...] = du

    def of_B() -> None:
        if not one_pass:
            product(g.T, u, out=dB, alpha=alpha, add=direct)

    def of_A(du: Array, x: Array | None) -> None:
        if x is not None:
            product(du.T, rows_of(x), out=dA, add=direct)
        if adds and not direct:
            room.add_gradients(whole, into)

    def both() -> None:
        of_B()
        of_A(du, x)

    if waits:
        of_B()
        x.later(lambda x: aside.run(lambda: of_A(twin, x), into, [twin, x, *between]))
    elif not adds:
        both()
        return room.gradients(dA, dB)
    elif x is not None or not (direct and one_pass):  # else that was all
        aside.run(both, into, [*([] if x is None else [du, x]), *([] if one_pass else [g, u]), *between])
    return [ADDED] * len(into)


# ---- gains of outputs ------------------------------------------------------------------------------------------------


def _times(y: Tensor, by: list[Tensor]) -> Tensor:
    """y (..., out) times gains of float32, which are as long as `out` together."""
    gain = by[0].data if len(by) == 1 else cupy.concatenate([each.data for each in by])
    needs = needs_of((y, *by))
    scaled = mapped("mul", y.data, gain)
    if True not in needs:
        return Tensor(scaled)
    kept_y = y.data if True in needs[1:] else None
    return gained.made(scaled, needs, (y, *by), (kept_y, gain, [len(each.data) for each in by], needs))


gained = Op(_times, "gains of layers")
gained.stands_in = True


@gained.backward
def _(g, y, gain, lengths, needs):
    g = g.whole() if isinstance(g, _Gathered) else low(g)
    dy = margins.rows(g.shape)
    if y is None:
        return mapped("mul", g, gain, out=dy), *[None] * len(lengths)
    parts = margins.columns(gains.backward(g, y, gain, dy), lengths)
    return dy, *(part if need else None for part, need in zip(parts, needs[1:], strict=True))


# ---- the columns of one result ---------------------------------------------------------------------------------------


class _Gathered:
    """The gradients of columns, in the place of that of the array that they are columns of."""

    def __init__(self, shape: tuple[int, ...], widths: list[int]):
        self.shape, self.widths = shape, widths
        self.parts: list[Array | None] = [None] * len(widths)

    def whole(self) -> Array:
        """One array, which is there already where the parts lie side by side."""
        if all(part is not None for part in self.parts):
            parts = list(map(low, self.parts))
            found = margins.beside(parts)
            if found is not None:
                return found
        found = margins.rows(self.shape)
        for place, part in zip(margins.columns(found, self.widths), self.parts, strict=True):
            place[...] = cupy.zeros(place.shape, bfloat16) if part is None else low(part)
        return found


def _columns(whole: Tensor, widths: list[int]) -> list[Tensor]:
    """Views of whole (..., sum of widths), on whose way back the gradients are gathered."""
    views = margins.columns(whole.data, widths)
    if whole.node is None:
        return list(map(Tensor, views))
    gathered = _Gathered(whole.shape, widths)
    return [Tensor(view, Node(_column, (whole.node,), (gathered, at))) for at, view in enumerate(views)]


_column = Op(lambda needs, whole: (whole, ()), "column")


@_column.backward
def _(g, gathered, at):
    first = all(part is None for part in gathered.parts)
    gathered.parts[at] = g
    return (gathered if first else ADDED,)


# ---- one layer without a room ----------------------------------------------------------------------------------------

_linear = ops.linear.overrides[cupy.ndarray, bfloat16]


def _single(x: Tensor, part: Part, u: Tensor, B: Tensor, alpha: float) -> Tensor:
    """x W^T + alpha u B^T; where u is x A^T, and of nothing else, its way back is a part of this one's."""
    A = _down_projection(u, x)
    out = _added(x.data, u.data, part.weight, part.bias, B.data, alpha)
    parents = (x, u if A is None else A, B)
    needs = needs_of(parents)
    if True not in needs:
        return Tensor(out)
    kept_x = x.data if A is not None and needs[1] else None
    kept_u = u.data if needs[2] else None
    values = None if A is None else A.data, B.data, alpha
    return single.made(out, needs, parents, (kept_x, kept_u, part.weight, *values, needs))


def _down_projection(u: Tensor, x: Tensor) -> Tensor | None:
    """The A of u = x A^T, where u was made of this very x, and of nothing else; None otherwise."""
    if u.node is None or u.node.op is not _linear or u.node.parents[0] is not x.node or len(u.node.parents) > 2:
        return None
    A, kept_x, *_ = u.node.saved
    return None if x.node is None and kept_x is not x.data else Tensor(A, u.node.parents[1])


def _added(x: Array, u: Array, weight: Any, bias: Array | None, B: Array, alpha: float) -> Array:
    y = cupy.empty((*x.shape[:-1], len(B)), bfloat16)
    if bias is not None:
        write_bias(y, bias)
    product(rows_of(u), low(B).T, out=rows_of(y), alpha=alpha, add=bias is not None)
    product(rows_of(x), low_weight(weight).T, out=rows_of(y), add=True)
    return y


single = Op(_added, "frozen_linear and addmm")
single.stands_in = True


@single.backward(into=True, beside=True, waits=True)
def _(g, x, u, weight, A, B, alpha, needs, into):
    g = low(g)
    du = dA = dB = dx = None
    if needs[1] or (A is not None and needs[0]):
        du = cupy.empty((*g.shape[:-1], B.shape[1]), bfloat16)
        product(rows_of(g), low(B), out=rows_of(du), alpha=alpha)
    if needs[2]:
        dB = weight_gradient(g, u, into[2], B.dtype, alpha)
    if A is None:
        dA = du if needs[1] else None  # the gradient of u, which has its own way
    elif type(x) is Again and into[1] is not None and into[1].flags.c_contiguous:
        x.later(lambda x: weight_gradient(du, x, into[1], A.dtype))
        dA = ADDED
    elif needs[1]:
        dA = weight_gradient(du, x.output() if type(x) is Again else x, into[1], A.dtype)
    if needs[0]:
        adds = into[0] is not None and margins.step(into[0]) is not None
        dx = into[0] if adds else cupy.empty((*g.shape[:-1], weight.shape[1]), bfloat16)
        if A is not None:
            product(rows_of(du), low(A), out=rows_of(dx), add=adds)
        product(rows_of(g), low_weight(weight), out=rows_of(dx), add=adds or A is not None)
        dx = ADDED if adds else dx
    return dx, dA, dB
