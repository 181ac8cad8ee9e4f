"""What a method computes: first values, gradients, what tokens and rows see, merging, and how it uses the base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from refpeft import ops, sites
from refpeft.conformance.check import subjects
from refpeft.conformance.check.findings import Failed, NotApplicable
from refpeft.conformance.check.subjects import Method, own
from refpeft.errors import RefpeftError, few
from refpeft.layers import INPUTS, Layer
from refpeft.models.base import Model
from refpeft.rng import Stream
from refpeft.tensor import Tensor

CLAIM = re.compile(r"leaves? the (\w+ )?model as it is|model is unchanged")
"""The words in a docstring that claim that first values change nothing."""

EPS = float(np.finfo("f8").eps)
STEPS = (1e-5, 1e-7)  # of central differences; the second where relu's kink is within the first
ROUNDING = 2**20  # eps(float64) that results may differ by where they are added up in another order: 2e-10


def attaches(method: Method) -> str:
    if method.broken:
        raise Failed(method.broken)
    if not method.families:
        family, reason = next(iter(method.refused.items()))
        raise Failed(f"no model takes it; {family}: {reason} (options that fit are given by --set KEY=VALUE)")
    said = []
    for family in method.families:
        _, adapter = method.attached(family, moved=False)
        kinds = [layer.site.kind for layer in adapter.layers]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in INPUTS if kind in kinds)
        said.append(f"{family} ({counts}; {adapter.size:,} numbers)")
    refused = [f"not on {family}: {reason}" for family, reason in method.refused.items()]
    return "; ".join(said + refused)


def first_values(method: Method) -> str:
    """The seed decides them: equal in two runs of one seed."""
    one, two = (method.attached(method.first, moved=False, seed=3)[1] for _ in range(2))
    for name, tensor in one.params.items():
        if not np.isfinite(tensor.data).all():
            raise Failed(f"{name} is not finite: mend peft_params")
        if not np.array_equal(tensor.data, two.params[name].data):
            raise Failed(f"{name} is another with the same seed: draw from the argument `rng` of peft_params alone")
    other = method.attached(method.first, moved=False, seed=4)[1]
    drawn = any(not np.array_equal(tensor.data, other.params[name].data) for name, tensor in one.params.items())
    return "the seed decides them" if drawn else "the same for every seed"


def identity_at_start(method: Method) -> str:
    changes = []
    for family in method.families or [method.first]:
        before = subjects.outputs(method.bare(family))
        changes.append(subjects.share(subjects.outputs(method.attached(family, moved=False)[0]), before))
    worst = subjects.largest(changes)
    if not CLAIM.search(" ".join((method.plugin.__doc__ or "").split())):
        raise NotApplicable(
            f"first values change outputs by {worst:.1g} of the largest, and the docstring does not say that they "
            "leave the model as it is"
        )
    if not worst <= ROUNDING * EPS:
        raise Failed(
            f"first values change outputs by {worst:.1g} of the largest, but the docstring says that they leave the "
            "model as it is: mend peft_params, or the docstring"
        )
    return "to the bit" if not worst else f"up to rounding, {worst:.1g} of the largest output"


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(method: Method) -> str:
    """Against finite differences, for every trained value, at every kind of site that the plugin has a hook for."""
    worst: dict[str, float] = {}
    for family in method.families or [method.first]:
        worst = _larger(worst, check_gradients(method.attached(family)[0], method))
    left_out = [kind for kind in method.kinds if kind not in worst]
    for kind in list(left_out):
        for family in method.families:
            names = [site.name for site in method.bare(family).sites.values() if site.kind == kind]
            try:
                built, _ = method.attached(family, targets=tuple(names))
            except RefpeftError:  # not what it is made for there
                continue
            worst = _larger(worst, check_gradients(built, method))
            if kind in worst:
                left_out.remove(kind)
                break
    text = ", ".join(f"{kind} {error:.0e}" for kind, error in worst.items())
    return f"worst error {text}" + (f"; not tried, nothing to train there: {', '.join(left_out)}" if left_out else "")


def _larger(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Of each member the larger number."""
    return one | {name: max(number, one.get(name, 0.0)) for name, number in other.items()}


def check_gradients(built: Model, method: Method) -> dict[str, float]:
    """The worst error by kind of site, "shared" for what is no site's own.

    Values that a method detaches are none here: the tape and the differences are of the same function then. Raises
    Failed where the gradient of a trained value is not what finite differences say.
    """
    worst: dict[str, float] = {}
    with nothing_detached(method):
        found = subjects.gradients(built)
        largest = max(float(np.sqrt((g * g).sum())) for g in found.values())
        for (kind, key), tensors in _alike(built).items():
            directions = {name: Stream(5, "check", name).standard_normal(t.shape) for name, t in tensors.items()}
            length = sum(float((d * d).sum()) for d in directions.values()) ** 0.5
            directions = {name: direction / length for name, direction in directions.items()}
            slope = sum(float((found[name] * direction).sum()) for name, direction in directions.items())
            for step in STEPS:
                difference = _difference(built, tensors, directions, step)
                off = abs(slope - difference)
                right = off <= 1e-5 * abs(slope) + 1e-7 * largest + 1e-14 / step
                if right:
                    break
            if not right:
                where = f"{key} at {kind} sites" if kind else key
                raise Failed(
                    f"the gradient of {where} ({next(iter(tensors))}) is {slope:.6g} along a random direction, where "
                    f"finite differences say {difference:.6g}: compute with refpeft.ops and refpeft.fused on Tensors "
                    "(see `operations`); what is meant as a constant goes through ops.detach"
                )
            error = off / max(abs(slope), abs(difference), 0.01 * largest, 1e-12)
            worst[kind or "shared"] = max(worst.get(kind or "shared", 0.0), error)
    return worst


def _alike(built: Model) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What is trained, by kind of site and by name there; what is no site's own has the kind ""."""
    kinds = {layer.site.name: layer.site.kind for one in built.adapters for layer in one.layers}
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in built.trained():
        site, _, key = name.rpartition(".")
        found.setdefault((kinds.get(site.rpartition(":")[2], ""), key), {})[name] = tensor
    return found


def _difference(built: Model, tensors: dict[str, Tensor], directions: dict[str, np.ndarray], step: float) -> float:
    here, values = {name: tensor.data for name, tensor in tensors.items()}, []
    for sign in (1, -1):
        for name, tensor in tensors.items():
            tensor.data = here[name] + sign * step * directions[name]
        values.append(float(subjects.value(built).data))
    for name, tensor in tensors.items():
        tensor.data = here[name]
    return (values[0] - values[1]) / (2 * step)


@contextmanager
def nothing_detached(method: Method) -> Iterator[None]:
    """Within it ops.detach gives what it is given."""
    with mock.patch.object(ops, "detach", lambda x: x), mock.patch.dict(vars(method.plugin)):
        if "detach" in vars(method.plugin):
            method.plugin.detach = ops.detach
        yield


# ---- tokens and rows -------------------------------------------------------------------------------------------------


def causality(method: Method) -> str:
    if not method.decoders:
        raise NotApplicable("no decoder takes it")
    for family in method.decoders:
        built, _ = method.attached(family)
        check_causality(built, family)
    return f"a token changes no logits before it ({', '.join(method.decoders)})"


def check_causality(built: Model, family: str) -> None:
    """Raises Failed where a token of row 0 changes what is said before it."""
    given = subjects.batch()
    before, at = subjects.outputs(built), 5
    ids = given.ids.copy()
    ids[0, at] = (ids[0, at] + 1) % 48
    after = built(ids, segments=given.segments).data
    early = abs(after[0, :at] - before[0, :at]).max(axis=-1)
    if not early.max() <= ROUNDING * EPS * abs(before).max():
        raise Failed(
            f"{family}: logits at token {int(early.argmax())} change with token {at}, by {early.max():.1g}: what a "
            "hook gives at a token must come of that one and earlier ones (sums over time see them all)"
        )


def independence_of_rows(method: Method) -> str:
    for family in method.families or [method.first]:
        built, _ = method.attached(family)
        whole, scale = subjects.outputs(built), ROUNDING * EPS
        for row, length in enumerate(subjects.LENGTHS):
            alone = subjects.outputs(built, slice(row, row + 1), length)[0]
            off = abs(alone - whole[row, :length]).max()
            if not off <= scale * abs(whole).max():
                padded = " with its padding" if length < max(subjects.LENGTHS) else ""
                raise Failed(
                    f"{family}: a row that is computed alone differs by {off:.1g} from what it is in a batch{padded}: "
                    "no hook may add up over rows, or over padding (its axis 0 is the batch, axis 1 time)"
                )
        if family in method.decoders:
            _check_joined(built, family, whole)
    return "a row is the same alone, in a batch with padding and without, and beside others in one row"


def _check_joined(built: Model, family: str, whole: np.ndarray) -> None:
    """Raises Failed where texts that share a row differ from `whole`, those in rows of their own."""
    given = subjects.batch()
    one = given.unpadded()
    joined = built(one.ids, one.positions, one.segments).data[0]
    off = abs(joined - whole[given.segments >= 0]).max()
    if not off <= ROUNDING * EPS * abs(whole).max():
        raise Failed(
            f"{family}: texts that share a row differ by {off:.1g} from what they are in rows of their own, and padded "
            "rows are computed so: of other tokens a hook may know only what attention has of the same text"
        )


# ---- the base --------------------------------------------------------------------------------------------------------


class _Counted:
    """A hook's `base` that counts its calls, and says that something is below."""

    is_frozen = False

    def __init__(self, base: Any):
        self._base, self.calls = base, 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.calls += 1
        return self._base(*args, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def base_called_once(method: Method) -> str:
    calls: list[tuple[Layer, int]] = []
    for family in method.families or [method.first]:
        built, adapter = method.attached(family)
        for layer in own(adapter):
            _count(layer, calls)
        subjects.outputs(built)
    if not calls:
        raise NotApplicable("it has no forward hook: the methods that it brings along call the base")
    for layer, count in calls:
        if not count:
            raise Failed(
                f"the hook at {layer.site.name} never calls base: call base(x) once, so that what is attached below "
                "acts (base.weight and base.frozen are the frozen part alone)"
            )
        if count > 1 and layer.site.kind != "norm":
            raise Failed(
                f"the hook at {layer.site.name} calls base {count} times: call it once and keep what it gives, since "
                "methods below draw, count and compute at every call"
            )
    return f"in {len(calls)} calls of hooks"


def _count(layer: Layer, calls: list[tuple[Layer, int]]) -> None:
    """Lets a layer add to `calls` how often its hook called base, at every call of the hook."""
    function, names = layer._function, layer._names

    def counting(*args: Any) -> Any:
        have = dict(zip(names, args, strict=True))
        base = have["base"] = _Counted(have.get("base"))
        y = function(*(have[name] for name in names))
        calls.append((layer, base.calls))
        return y

    layer._function = counting


# ---- merging and detaching -------------------------------------------------------------------------------------------


def merging(method: Method) -> str:
    """Merged is unmerged, and unmerging restores every bit."""
    shares, merged = [], []
    for family in method.families or [method.first]:
        built, _ = method.attached(family)
        before, frozen = subjects.outputs(built), _bits(built)
        try:
            undone = sites.merge(built)
        except RefpeftError as error:
            if "cannot be merged" in str(error):
                raise NotApplicable(str(error)) from None
            raise
        shares.append(subjects.share(subjects.outputs(built), before))
        if not shares[-1] <= ROUNDING * EPS:
            raise Failed(
                f"{family}: merged outputs differ from the adapter's by {shares[-1]:.1g} of the largest: peft_merge "
                "must give the weight (and bias) with which the layer alone computes what the hook does, (out, in)"
            )
        undone.undo()
        changed = [name for name, array in _bits(built).items() if not np.array_equal(array, frozen[name])]
        if changed or not np.array_equal(subjects.outputs(built), before):
            raise Failed(f"{family}: after undo() {few(changed, 3) or 'outputs'} differ: peft_merge must not write")
        merged.append(family)
    worst = f"{subjects.largest(shares):.0e} of the largest output"
    return f"merged is unmerged to {worst}, undo() restores every bit ({', '.join(merged)})"


def detaching(method: Method) -> str:
    """A forward and a backward pass leave frozen weights alone, and without the adapter the base computes as before."""
    for family in method.families or [method.first]:
        plain = subjects.outputs(method.bare(family))
        built, adapter = method.attached(family)
        frozen = _bits(built)
        if np.array_equal(subjects.outputs(built), plain):
            raise Failed(f"{family}: values away from their start change no output: is what they give lost?")
        subjects.gradients(built)
        changed = [name for name, array in _bits(built).items() if not np.array_equal(array, frozen[name])]
        if changed:
            raise Failed(f"{family}: a step wrote into {few(changed, 3)}: never change arrays in place in a hook")
        sites.detach(built, adapter)
        if not np.array_equal(subjects.outputs(built), plain):
            raise Failed(f"{family}: the base computes something else afterwards: never change arrays in place")
    return "the base is itself again, bit for bit"


def _bits(built: Model) -> dict[str, np.ndarray]:
    """A copy of every frozen weight, as its numbers."""
    return {name: np.array(frozen()) for name, frozen in built.frozen.items()}


PROPERTIES = (
    attaches,
    first_values,
    identity_at_start,
    gradients,
    causality,
    independence_of_rows,
    base_called_once,
    merging,
    detaching,
)
