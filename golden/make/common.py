"""What all make scripts share: a case, how its limits are measured, how it is written and checked.

Expected values are torch's in float64. Limits come from computing the same thing again, in float32 and in float64, with
every sum and matrix product in another order: what another correct implementation may differ by. Those in bfloat16 come
from rounding in other directions: bfloat16.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import bfloat16
import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
torch.set_num_threads(1)

GOLDEN = Path(__file__).resolve().parents[1]
Tensors = dict[str, torch.Tensor]
Compute = Callable[[Tensors], Tensors]

LEAST_LIMIT = 8  # one operation is off by at most an eps on any device worth its name; times 8
MOST_LIMIT = 2**13  # above it a case says nothing: change its inputs
WITNESS_LIMIT = 1e-10  # of max|expected|, in float64
FLOAT32_AND_WIDER = ("optimizer", "schedule", "quantizer", "random")  # kinds that nobody computes in bfloat16


@dataclass
class Case:
    id: str
    kind: str
    name: str
    comment: str
    inputs: dict[str, np.ndarray]  # float32, or integers; in the order that the README's table gives
    compute: Compute  # from `inputs` (floats in the dtype that is asked for) to outputs
    flags: tuple[str, ...] = ()
    at: str | None = None
    level: str = "must"
    spec: str = ""
    config: dict = field(default_factory=dict)
    witnesses: dict[str, Compute] = field(default_factory=dict)  # name and version -> the same by somebody else
    oracle: str = f"torch {torch.__version__.split('+')[0]} float64"
    limits: dict[str, str] | None = None  # where they are not measured
    exact: tuple[str, ...] = ()  # outputs that must be equal, although they are no integers
    script: str = ""

    @property
    def path(self) -> Path:
        """Where the case lies, without its suffix."""
        folder = self.name if self.kind in ("method", "quantizer") else self.kind
        return GOLDEN / "v1" / folder / self.id


class Draw:
    """Random inputs that depend on the case's id alone."""

    def __init__(self, case_id: str):
        self.generator = np.random.default_rng(zlib.crc32(case_id.encode()))

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(scale * self.generator.standard_normal(shape), np.float32)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return self.generator.uniform(low, high, shape).astype(np.float32)

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Integers of low .. high - 1."""
        return self.generator.integers(low, high, shape).astype(np.int32)


# ---- computing -------------------------------------------------------------------------------------------------


def with_gradients(forward: Callable[..., torch.Tensor], wrt: tuple[str, ...]) -> Compute:
    """Outputs y = forward(**inputs without g) and grad.<name> = d sum(y * g) / d name for every name in `wrt`."""

    def compute(tensors: Tensors) -> Tensors:
        leaves = {name: tensors[name].clone().requires_grad_() for name in wrt}
        y = forward(**{name: t for name, t in (tensors | leaves).items() if name != "g"})
        y.backward(tensors["g"])
        return {"y": y, **{f"grad.{name}": leaf.grad for name, leaf in leaves.items()}}

    return compute


class Float64Throughout(TorchFunctionMode):
    """Inside, whoever asks for float32 gets float64.

    transformers rounds to float32 inside its models (norms, rotary angles, softmax, cross-entropy), also when
    the weights are float64. Those roundings are an implementation's choice, not part of the model.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class SummationOrder(TorchDispatchMode):
    """Inside, every sum, mean and matrix product adds its terms in another order, also those of the backward pass."""

    ORDERS = ("halves", "one by one", *(f"shuffled {i}" for i in range(5)))

    def __init__(self, order: str):
        super().__init__()
        self.order = order
        self.generator = torch.Generator().manual_seed(zlib.crc32(order.encode()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func in (aten.mm.default, aten.bmm.default):
            return self.product(*args)
        if func is aten.addmm.default and not kwargs:
            return args[0] + self.product(*args[1:])
        if func in (aten.sum.dim_IntList, aten.mean.dim) and args[0].is_floating_point():
            return self.sum(*args, mean=func is aten.mean.dim)
        return func(*args, **kwargs)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.order == "one by one":
            return self.total((a.mT.unsqueeze(-1) * b.unsqueeze(-2)), a.dim() - 2)
        if self.order == "halves":
            half = a.shape[-1] // 2
            return a[..., :half] @ b[..., :half, :] + a[..., half:] @ b[..., half:, :]
        order = torch.randperm(a.shape[-1], generator=self.generator)
        return a[..., order] @ b[..., order, :]

    def sum(self, x: torch.Tensor, axes=None, keepdim=False, mean=False) -> torch.Tensor:
        axes = range(x.dim()) if not axes else sorted(a % x.dim() for a in axes)
        count = math.prod(x.shape[a] for a in axes)
        for axis in axes:
            x = self.total(x, axis).unsqueeze(axis)
        if not keepdim:
            x = x.reshape([n for a, n in enumerate(x.shape) if a not in axes])
        return x / count if mean else x

    def total(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        n = x.shape[axis]
        if n == 0 or self.order == "halves":
            first, rest = x.split([n // 2, n - n // 2], axis)
            return first.sum(axis) + rest.sum(axis)
        if self.order != "one by one":
            x = x.index_select(axis, torch.randperm(n, generator=self.generator))
        return x.cumsum(axis).select(axis, n - 1)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(compute: Compute, inputs: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, np.ndarray]:
    """Outputs of `compute` on the stored inputs, floats in `dtype`."""
    with default_dtype(dtype):
        tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        return {name: t.detach().contiguous().numpy() for name, t in compute(tensors).items()}


def in_eps(got: np.ndarray, expected: np.ndarray, eps: float) -> float:
    """max|got - expected| in units of eps * max|expected|; infinite where an answer is not finite."""
    if not np.isfinite(got).all():
        return math.inf
    scale = np.abs(expected).max(initial=0.0)
    error = np.abs(got.astype(np.float64) - expected).max(initial=0.0)
    return error / (eps * scale) if scale else math.inf if error else 0.0


def measure(case: Case, expected: dict[str, np.ndarray]) -> dict[str, dict[str, int] | str]:
    """The checks of a case: eight times the worst error over orders of summation, rounded up to a power of two.

    Errors in eps are about the same in float32 and float64, so both get the worse one: the float64 result is its own
    yardstick.
    """
    worst = dict.fromkeys(expected, 0.0)
    for dtype in (torch.float32, torch.float64):
        for order in (None, *SummationOrder.ORDERS):
            with SummationOrder(order) if order else nullcontext():
                got = run(case.compute, case.inputs, dtype)
            for name, want in expected.items():
                worst[name] = max(worst[name], in_eps(got[name], want, torch.finfo(dtype).eps))
    exact = {name for name, want in expected.items() if is_exact(want) or name in case.exact}
    return {name: "exact" if name in exact else _limits(case, name, worst[name]) for name in expected}


def is_exact(expected: np.ndarray) -> bool:
    return expected.dtype.kind in "iub"


def _limits(case: Case, output: str, worst: float) -> dict[str, int]:
    limit = max(LEAST_LIMIT, 2 ** math.ceil(math.log2(8 * worst)) if worst else 0)
    if limit > MOST_LIMIT:
        raise SystemExit(
            f"{case.id} {output}: errors of {worst:.3g} eps are too large to say anything: change its inputs"
        )
    return {"float32": limit, "float64": limit}


def with_bfloat16(case: Case, checks: dict[str, dict | str], expected: dict[str, np.ndarray]) -> dict[str, dict | str]:
    """The checks with limits in bfloat16 measured again; without, where the case says nothing in bfloat16."""
    wider = {n: {dtype: c[dtype] for dtype in c if dtype != "bfloat16"} for n, c in checks.items() if c != "exact"}
    if case.kind in FLOAT32_AND_WIDER or case.at in ("train", "steps") or "quantizer" in case.config or not wider:
        return checks | wider
    inputs = {n: bfloat16.nearest(a) if a.dtype.kind == "f" else a for n, a in case.inputs.items()}
    worst = dict.fromkeys(wider, 0.0)
    for sample in range(bfloat16.SAMPLES):
        with bfloat16.Rounded(sample):
            got = run(case.compute, inputs, torch.float32)
        for name in wider:
            worst[name] = max(worst[name], in_eps(got[name], expected[name], bfloat16.EPS))
    limits = {name: bfloat16.limit_of(error) for name, error in worst.items()}
    if None in limits.values():
        return checks | wider
    return checks | {name: check | {"bfloat16": limits[name]} for name, check in wider.items()}


# ---- writing and checking --------------------------------------------------------------------------------------


def build(case: Case) -> tuple[dict, dict[str, np.ndarray]]:
    """The JSON document and the tensors of a case; its witnesses are asked."""
    expected = run(case.compute, case.inputs)
    for name, array in expected.items():
        if not np.isfinite(array).all():
            raise SystemExit(f"{case.id} {name}: an expected value is not finite")
    for witness, compute in case.witnesses.items():
        answer = run(compute, case.inputs)
        for name, want in expected.items():
            if name not in answer:
                raise SystemExit(f"{case.id} {name}: {witness} does not say")
            error = in_eps(answer[name], want, 1.0)
            if error > (0 if is_exact(want) else WITNESS_LIMIT):
                raise SystemExit(f"{case.id} {name}: {witness} differs by {error:.2e} of max|expected|")
    checks = case.limits or measure(case, expected)
    document = {
        "id": case.id,
        "kind": case.kind,
        "name": case.name,
        **({"at": case.at} if case.at else {}),
        "level": case.level,
        "comment": case.comment,
        "flags": list(case.flags),
        "spec": case.spec,
        "config": case.config,
        "inputs": list(case.inputs),
        "checks": with_bfloat16(case, checks, expected),
        "tensors": f"{case.id}.safetensors",
        "source": {"oracle": case.oracle, "agrees_with": list(case.witnesses), "script": f"golden/make/{case.script}"},
    }
    tensors = {f"in.{name}": array for name, array in case.inputs.items()}
    tensors |= {f"out.{name}": array for name, array in expected.items()}
    return document, tensors


def write(case: Case) -> None:
    document, tensors = build(case)
    case.path.parent.mkdir(parents=True, exist_ok=True)
    case.path.with_suffix(".json").write_text(as_text(document))
    case.path.with_suffix(".safetensors").write_bytes(save({n: np.array(a, order="C") for n, a in tensors.items()}))


def write_limits(case: Case) -> None:
    """Measures a stored case's limits in bfloat16 again, and changes nothing else."""
    path = case.path.with_suffix(".json")
    document = json.loads(path.read_text())
    stored = load_file(path.with_suffix(".safetensors"))
    expected = {name: stored[f"out.{name}"] for name in document["checks"]}
    document["checks"] = with_bfloat16(case, document["checks"], expected)
    path.write_text(as_text(document))


def as_text(document: dict) -> str:
    """JSON with one line for each member, and for each member of its objects."""

    def line(value) -> str:
        return json.dumps(value, ensure_ascii=False)

    def member(key: str, value) -> str:
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"    {line(k)}: {line(v)}" for k, v in value.items())
            return f"  {line(key)}: {{\n{inner}\n  }}"
        return f"  {line(key)}: {line(value)}"

    return "{\n" + ",\n".join(member(key, value) for key, value in document.items()) + "\n}\n"


def check(case: Case) -> list[str]:
    """What differs between a stored case and the same made again: inputs to the bit, outputs within their limits.

    No limit that is measured here is more than four times the stored one.
    """
    if not case.path.with_suffix(".json").exists():
        return [f"{case.id}: not stored"]
    document, tensors = build(case)
    stored = json.loads(case.path.with_suffix(".json").read_text())
    stored_tensors = load_file(case.path.with_suffix(".safetensors"))
    problems = [
        f"{case.id}: {key} differs from what is stored"
        for key in sorted(document.keys() | stored.keys())
        if key not in ("checks", "source") and document.get(key) != stored.get(key)
    ]
    if tensors.keys() != stored_tensors.keys():
        return [*problems, f"{case.id}: other tensors are stored: {sorted(tensors.keys() ^ stored_tensors.keys())}"]
    for name, measured in document["checks"].items():
        limits = stored["checks"].get(name)
        for dtype in measured if "exact" not in (measured, limits) else ():
            if limits and limits.get(dtype, math.inf) < measured[dtype] / 4:
                problems.append(f"{case.id}: {name}: {limits[dtype]} in {dtype} is stored, {measured[dtype]} measured")
    for name, array in tensors.items():
        limit = stored["checks"][name.removeprefix("out.")] if name.startswith("out.") else "exact"
        allowed = 0 if limit == "exact" else max(limit.values()) * np.finfo(np.float64).eps
        same = stored_tensors[name].shape == array.shape and stored_tensors[name].dtype == array.dtype
        if not same or in_eps(array, stored_tensors[name], 1.0) > allowed:
            problems.append(f"{case.id}: {name} differs from what is stored")
    return problems


def write_manifest() -> None:
    """MANIFEST.json: the sha256 of every file under v1/."""
    files = sorted(p for p in (GOLDEN / "v1").rglob("*") if p.is_file())
    hashes = {p.relative_to(GOLDEN).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    text = json.dumps({"suite": "2026.11", "format": 1, "files": hashes}, indent=1)
    (GOLDEN / "MANIFEST.json").write_text(text + "\n")
