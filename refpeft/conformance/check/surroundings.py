"""A method beside others: around and inside of LoRA, on quantized weights, in float32, on a device, in files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np

from refpeft import adapters, backend, learning, manager, sites, survey
from refpeft.backend import to_host
from refpeft.batches import Batches
from refpeft.config import Train
from refpeft.conformance import device
from refpeft.conformance.check import subjects
from refpeft.conformance.check.computing import EPS, ROUNDING, check_causality, check_gradients, nothing_detached
from refpeft.conformance.check.findings import Failed, NotApplicable, place
from refpeft.conformance.check.subjects import Method
from refpeft.errors import RefpeftError
from refpeft.examples import Example
from refpeft.files import read_safetensors
from refpeft.models.base import Model
from refpeft.optim import AdamW, Flat
from refpeft.peft_formats import FORMATS
from refpeft.quant import Dense, make_quantizer
from refpeft.sites import Adapter
from refpeft.tensor import plain

EPS_OF_FLOAT32 = float(np.finfo("f4").eps)
FLOAT32 = 2**12
"""eps(float32), of the largest expected number, that outputs and gradients in float32 may differ by from float64's."""

_LORA = {"r": 3, "targets": "all-linear"}


# ---- other methods ---------------------------------------------------------------------------------------------------


def inside_of_lora(method: Method) -> str:
    return _with_lora(method, ("method", "lora"))


def around_lora(method: Method) -> str:
    return _with_lora(method, ("lora", "method"))


def _with_lora(method: Method, order: tuple[str, str]) -> str:
    """Both act, the gradients of both are right, and a decoder stays causal."""
    family = method.first
    built, attached = method.bare(family), {}
    for one in order:
        try:
            which = (method.plugin, method.cfg) if one == "method" else ("lora", _LORA)
            attached[one] = sites.attach(built, *which)
            subjects.outputs(built)
        except RefpeftError as error:
            raise NotApplicable(f"refused: {error}") from None
        subjects.move(attached[one])
    with nothing_detached(method):
        found = subjects.gradients(built)
    shared = {layer.site.name for layer in attached["method"].layers}
    for name in _names(attached["lora"], built):
        if not found[name].any() and name.rpartition(":")[2].rpartition(".")[0] in shared:
            raise Failed(f"{name} gets no gradient: the hook must call base(x), which is all that is attached below")
    check_gradients(built, method)
    if family != "bert":
        check_causality(built, family)
    return f"gradients of both are right{', and nothing sees later tokens' if family != 'bert' else ''} ({family})"


def _names(adapter: Adapter, built: Model) -> list[str]:
    ours = {id(tensor) for tensor in adapter.params.values()}
    return [name for name, tensor in built.trained() if id(tensor) in ours]


# ---- quantized weights -----------------------------------------------------------------------------------------------


def dense_base(method: Method) -> str:
    if method.quantizer is not None and method.families:
        raise NotApplicable(f"it is for quantized weights: on nf4 it is attached to {', '.join(method.families)}")
    return f"tried on {method.first} and all that follows"


def quantized_base(method: Method) -> str:
    """On nf4 it computes what it does on the numbers that nf4 stands for."""
    family = method.first
    if method.quantizer is not None:
        return f"nf4, which it needs ({family})"
    try:
        packed, adapter = method.attached(family, quantizer=make_quantizer("nf4"))
    except RefpeftError as error:
        raise NotApplicable(f"refused on nf4: {error}") from None
    dense, other = method.attached(family)
    for name, site in dense.sites.items():
        if isinstance(site.weight, Dense) and site.kind == "linear":
            site.weight.array = packed.sites[name].weight()
    subjects.copy(adapter, other)  # some are made of the weights
    pairs = [(subjects.outputs(packed), subjects.outputs(dense))]
    ours, theirs = subjects.gradients(packed), subjects.gradients(dense)
    pairs += [(ours[name], theirs[name]) for name in theirs]
    worst = subjects.largest(subjects.share(got, expected) for got, expected in pairs)
    if not worst <= ROUNDING * EPS:
        raise Failed(
            f"on nf4 it differs by {worst:.1g} from what it is on the same numbers, dense: ask base.weight, "
            "base.frozen(x) or site.weight() for the frozen weight at every call, and keep no copy of it"
        )
    return f"on nf4 what it is on the same numbers, dense ({family})"


# ---- dtypes and devices ----------------------------------------------------------------------------------------------


def float32_and_float64(method: Method) -> str:
    shares = []
    for family in method.families or [method.first]:
        single, adapter = method.attached(family, "float32")
        double, other = method.attached(family)
        subjects.copy(adapter, other)
        shares.append(_apart(single, double))
    eps = subjects.largest(shares) / EPS_OF_FLOAT32
    if not eps <= FLOAT32:
        raise Failed(
            f"float32 differs from float64 by {eps:,.0f} eps of the largest number, more than {FLOAT32:,}: look for "
            "differences of numbers that are nearly equal, or numbers that are cast"
        )
    return f"agree to {eps:,.0f} eps of float32, of {FLOAT32:,} allowed"


def _apart(built: Model, expected: Model) -> float:
    """By how much two models' outputs and gradients differ, as a share of the largest output and gradient."""
    got, want = subjects.gradients(built), subjects.gradients(expected)
    most = subjects.largest(abs(gradient).max(initial=0) for gradient in want.values())
    of_gradients = [float(abs(got[name] - want[name]).max(initial=0)) / most for name in want]
    return subjects.largest([subjects.share(subjects.outputs(built), subjects.outputs(expected)), *of_gradients])


def no_host_read(method: Method) -> str:
    """A training step on a stand-in for CuPy, whose arrays the host cannot read, with NumPy's gradients."""
    for family in method.decoders or [method.first]:
        with device.installed() as stand_in:
            there = _step(method, family, stand_in)
        with plain():  # as a device computes
            here = _step(method, family, np)
        largest = max(float(abs(array).max(initial=0)) for array in here.values())
        for name, array in here.items():
            if not abs(there[name] - array).max(initial=0) <= 64 * EPS_OF_FLOAT32 * largest:
                raise Failed(f"{name} is another on a device: take array functions of backend.xp_of(array)")
    return f"a training step reads nothing on the host ({', '.join(method.decoders or method.families)})"


def _step(method: Method, family: str, xp: ModuleType) -> dict[str, np.ndarray]:
    """The loss and the gradients of a step of training in float32."""
    built, _ = method.attached(family, "float32", xp=xp)
    if method.has("peft_survey"):
        given = subjects.batch()
        examples = [Example(ids, np.arange(len(ids)) > 2, line=n) for n, ids in enumerate(given.ids, 1)]
        survey.settle(built, Batches(examples, 2, 16), Train(batch=2), 0)
    built.mode.training = True
    flat = Flat(built.trained(), learning.rates(built))
    learning.states(built)
    optimizer = AdamW(flat, weight_decay=0.1)
    try:
        with device.capture():
            loss = subjects.value(built)
            loss.backward()
            found = {"loss": loss.data} | {name: tensor.grad.copy() for name, tensor in built.trained()}
            flat.clip(0.1)
            learning.step(built, lambda: optimizer.step(1e-2), 0, 1)
    except device.HostRead as error:
        what = f"{error}{place(error, method.path)}"
        raise Failed(f"{what}: keep it an array, also where it is one number") from error
    return {name: to_host(array) for name, array in found.items()}


def gpu(method: Method) -> str:
    try:
        xp = backend.module("cuda")
    except RefpeftError as error:
        raise NotApplicable(f"no device here ({error})") from None
    shares = []
    for family in method.families or [method.first]:
        here, adapter = method.attached(family, "float32")
        there, other = method.attached(family, "float32", xp=xp)
        subjects.copy(adapter, other)
        shares.append(_apart(there, here))
    eps = subjects.largest(shares) / EPS_OF_FLOAT32
    if not eps <= FLOAT32:
        raise Failed(f"CuPy differs from NumPy by {eps:,.0f} eps of the largest number, more than {FLOAT32:,}")
    return f"CuPy agrees with NumPy to {eps:,.0f} eps of float32, of {FLOAT32:,} allowed"


# ---- files -----------------------------------------------------------------------------------------------------------


def saving_and_loading(method: Method) -> str:
    """An adapter that was made with one seed computes the same after loading, where first values are another seed's."""
    for family in method.families or [method.first]:
        built, adapter = method.attached(family, "float32", seed=7)
        before = subjects.outputs(built)
        with tempfile.TemporaryDirectory() as folder:
            adapters.save(folder, built, adapter)
            again = method.bare(family, "float32")
            adapters.load(again, folder)
        eps = subjects.share(subjects.outputs(again), before) / EPS_OF_FLOAT32
        if not eps <= 64:
            raise Failed(
                f"{family}: loaded, it computes something else ({eps:,.0f} eps): what is drawn or made of weights and "
                "not trained must be in the file, so give it in peft_params or peft_shared as a Tensor"
            )
    return f"loaded under another seed it is the same ({', '.join(method.families)})"


def peft_file(method: Method) -> str:
    form = FORMATS.get(method.name)
    if form is None or not Path(method.path).is_relative_to(manager.shipped()):
        raise NotApplicable("PEFT has no form for it: its files are refpeft's own")
    built, adapter = method.attached(method.first, "float32")
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(folder, built, adapter)
        config = json.loads((Path(folder) / adapters.CONFIG).read_text("utf-8"))
        tensors = read_safetensors(Path(folder) / adapters.TENSORS)
    if config["peft_type"] == adapters.OWN:
        raise NotApplicable("these options have no form in PEFT: the file is refpeft's own")
    return f"{config['peft_type']}, {len(tensors)} tensors such as {min(tensors)}"


PROPERTIES = (
    inside_of_lora,
    around_lora,
    dense_base,
    quantized_base,
    float32_and_float64,
    no_host_read,
    gpu,
    saving_and_loading,
    peft_file,
)
