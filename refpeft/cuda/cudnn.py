"""Attention by cuDNN, through nvidia-cudnn-frontend, which needs no PyTorch: the extras flash12 and flash13.

A plan is made for every shape and way to mask, in about half a second, and kept. The environment variable
REFPEFT_CUDNN=0 says that cuDNN is not to be used.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from types import ModuleType
from typing import Any

import cupy
import numpy as np

from refpeft import fused
from refpeft.backend import Array, bfloat16
from refpeft.cuda import margins
from refpeft.cuda.kernels import Source, are_started, contiguous
from refpeft.fused import Mask

OLDEST = (1, 27)
"""Of nvidia-cudnn-frontend: those before import PyTorch where it is installed."""

MOST_MEMORY = fused.ATTENTION_ON_GPU
"""Bytes that a plan may work in. A deterministic backward pass wants a gradient of all queries for every 128 or 256
keys; where that is more, it is done in parts, of some rows or heads."""

_source = Source("attention.cu")
_NAMES = ("q", "k", "v", "y", "lse", "g", "dq", "dk", "dv", "asked", "seen")
_UID = {name: uid for uid, name in enumerate(_NAMES, 1)}


# ---- the library -----------------------------------------------------------------------------------------------------


def version() -> str | None:
    """cuDNN's version, such as "9.28.1", or None where it cannot be used here."""
    library, _ = _load()
    return library and library.backend_version_string()


def missing() -> str | None:
    """Why cuDNN is not used, and what to install; None where it is."""
    return "REFPEFT_CUDNN is 0: unset it" if is_turned_off() else _load()[1]


def is_turned_off() -> bool:
    """Whether somebody does not want it."""
    return os.environ.get("REFPEFT_CUDNN") == "0"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(the frontend, None), or (None, why there is none)."""
    extra = f"refpeft[flash{cupy.cuda.runtime.runtimeGetVersion() // 1000}]"
    install = f"pip install '{extra}'"
    try:
        found = metadata.version("nvidia-cudnn-frontend")
    except metadata.PackageNotFoundError:
        return None, f"nvidia-cudnn-frontend is not installed: {install}"
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        return None, f"nvidia-cudnn-frontend {found} is older than {'.'.join(map(str, OLDEST))}: {install}"
    try:
        _load_runtime()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cudnn
        cudnn.backend_version()
    except Exception as error:  # ImportError, OSError, RuntimeError: as many as there are things to be missing
        return None, f"cuDNN cannot be loaded ({str(error).splitlines()[0]}): {install}"
    return cudnn, None


def _load_runtime() -> None:
    """Loads libcudart from NVIDIA's wheels, if it is there: the frontend itself looks in the system's folders only."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    with contextlib.suppress(Exception):
        load_nvidia_dynamic_lib("cudart")


# ---- attention -------------------------------------------------------------------------------------------------------


def supports(q: Array, k: Array, v: Array, mask: Mask, bias: Array | None, scale: float, trained: bool) -> str | None:
    """Why this attention is not for `forward` and, if it is trained, `backward`; None: it is, and their plans are made.

    Whether cuDNN is there at all is said by `missing`.
    """
    if bias is not None:
        return "a bias is added to the scores"
    if any(array.dtype != bfloat16 for array in (q, k, v)):
        return "not all arrays are bfloat16"
    if k.shape != v.shape or q.shape[1] % k.shape[1] or not (q.size and k.size):
        return f"queries {q.shape}, keys {k.shape} and values {v.shape} are of different sizes, or there are none"
    task = task_of(q, k, v, mask, scale)
    if isinstance(task, str):
        return task
    device = cupy.cuda.Device().id
    for each in (task, replace(task, backward=True))[: 1 + trained]:
        planned = _planned(each, device)
        if isinstance(planned, str):
            return planned
    return None


def forward(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> tuple[Array, Array]:
    """softmax(scale q k^T + mask) v, and the log of each row's sum of exponentials: what fused.attention computes.

    q (batch, heads, queries, dim), k and v (batch, kv_heads, keys, dim) of bfloat16 that `supports` accepts. Comes
    back: y as q, a view of (batch, queries, heads, dim), and (batch, heads, queries) of float32.
    """
    y, lse = margins.heads(q.shape), cupy.empty((*q.shape[:3], 1), np.float32)
    _run(task_of(q, k, v, mask, scale), mask, {"q": q, "k": k, "v": v, "y": y, "lse": lse})
    return y, lse[..., 0]


def backward(
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    lse: Array,
    mask: Mask,
    scale: float,
    made: Sequence[Array | None],
) -> None:
    """The gradients of q, k and v, into the arrays of `made`; None where one is not wanted. The same bits in every run.

    g is the gradient of y. The arrays are what margins.heads_like(q, k, v) gives.
    """
    task = task_of(q, k, v, mask, scale, True, y)
    of = list(made)
    if any(array is None for array in of):
        blank = margins.heads_like((q, k, v))
        of = [blank[at] if array is None else array for at, array in enumerate(of)]
    if task.padded:  # cuDNN may leave out keys that nobody sees
        for array in of:
            array[...] = cupy.zeros((1, 1, 1, 1), bfloat16)
    gradients = dict(zip(("dq", "dk", "dv"), of, strict=True))
    _run(task, mask, {"q": q, "k": k, "v": v, "y": y, "lse": lse[..., None], "g": _by_tokens(g)} | gradients)


def _by_tokens(g: Array) -> Array:
    """`g` (batch, heads, time, dim), or a copy, that is a view of (batch, time, heads, dim)."""
    by_tokens = g.transpose(0, 2, 1, 3)
    if by_tokens.flags.c_contiguous and g.data.ptr % 16 == 0:
        return g
    return by_tokens.copy(order="C").transpose(0, 2, 1, 3)


# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What there is a plan for.

    causal     keys after a query's own are hidden; the last query is aligned with the last key
    window     how many keys back a query sees, itself included
    padded     how many keys each row has is in an array, "seen"; "asked" is all queries
    in_memory  heads and kv_heads that lie in a row of the arrays, where the task is a part of another one
    strides    of q, k and v, of batch, heads and time, in numbers. All other arrays have memory of their own
    margins    numbers behind all heads of a token: of y, of the gradient of q, and of those of k and v
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    scale: float
    causal: bool
    window: int | None
    padded: bool
    in_memory: tuple[int, int]
    strides: tuple[tuple[int, ...], ...]
    margins: tuple[int, int, int]
    backward: bool = False


def task_of(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, backward: bool = False, y: Array | None = None
) -> Task | str:
    """The task that arrays and a mask are, or why they are none; y is None where it is yet to be made."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    if dim % 8 or dim > 256:
        return f"heads have {dim} dimensions, which is not a multiple of 8 up to 256"
    if queries == keys == 1:
        return "there is one token"
    if not all(map(_readable, (q, k, v))):
        return "rows of the arrays are not at multiples of 16 bytes"
    seen = _seen(mask, queries, keys)
    if seen is None:
        return "it has no such mask"
    strides = tuple(map(_strides, (q, k, v)))
    behind = margins.now() if y is None else y.strides[2] // y.itemsize - heads * dim if queries > 1 else 0
    lie = (heads, kv_heads), strides, (behind, *_behind_gradients(q, k, v))
    return Task(batch, heads, kv_heads, queries, keys, dim, scale, *seen, *lie, backward)


def _behind_gradients(q: Array, k: Array, v: Array) -> tuple[int, int]:
    """How many numbers lie behind all heads of a token, of the gradients of q and of k: see margins.heads_like."""
    widths = [array.shape[1] * array.shape[3] for array in (q, k, v)]
    side_by_side = margins.heads_beside((q, k, v)) is not None
    return tuple([(sum(widths) if side_by_side else width) - width + margins.now() for width in widths[:2]])


def _readable(array: Array) -> bool:
    """Whether heads (batch, heads, time, dim) can be read where they are, 16 bytes at a time."""
    apart = all(stride > 0 and stride % 8 == 0 for stride in _strides(array))
    return apart and array.strides[3] == array.itemsize and array.data.ptr % 16 == 0


def _strides(array: Array) -> tuple[int, ...]:
    """Of batch, heads and time, in numbers; where there is only one, that says nothing, and is always the same."""
    each = zip(array.strides[:3], array.shape, strict=False)
    return tuple([stride // array.itemsize if count > 1 else array.size for stride, count in each])


def _seen(mask: Mask, queries: int, keys: int) -> tuple[bool, int | None, bool] | None:
    """(causal, window, padded) of a task that hides what `mask` does from all but padding; None: there is none."""
    extra = keys - mask.keys
    causal = mask.causal and queries > 1  # a single query is the last
    window = mask.window if mask.window is not None and mask.window < mask.keys else None
    if extra < 0 or (mask.causal and queries > keys) or (window and (extra or not causal)):
        return None
    if mask.segments is None or (mask.padded and mask.causal):  # padding on the right comes after all that is real
        return causal, window, False
    return (causal, window, True) if mask.padded else None


# ---- plans -----------------------------------------------------------------------------------------------------------


def described(task: Task, **device: Any) -> Any:
    """cuDNN's graph of a task. Raises cudnn.cudnnGraphNotSupportedError where it has no kernel for it.

    `device` are options of cudnn.pygraph: a handle, or the properties of a device that is not here.
    """
    cudnn, _ = _load()
    low, single, integer = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT, cudnn.data_type.INT32
    graph = cudnn.pygraph(io_data_type=low, intermediate_data_type=single, compute_data_type=single, **device)

    def given(name: str, shape: list[int], strides: list[int], dtype: Any = low) -> Any:
        return graph.tensor(name=name, dim=shape, stride=strides, data_type=dtype, uid=_UID[name])

    def made(name: str, tensor: Any, shape: list[int], strides: list[int], dtype: Any = low) -> None:
        tensor.set_output(True).set_dim(shape).set_stride(strides).set_data_type(dtype).set_uid(_UID[name])

    def own(time: int, heads: int, margin: int = 0) -> list[int]:
        token = heads * task.dim + margin
        return [time * token, task.dim, token, 1]

    of_queries = [task.batch, task.heads, task.queries, task.dim]
    of_keys = [task.batch, task.kv_heads, task.keys, task.dim]
    y_lies = own(task.queries, task.in_memory[0], task.margins[0])
    lse_shape, lse_lies = [*of_queries[:3], 1], [task.heads * task.queries, task.queries, 1, 1]

    shapes = {"q": of_queries, "k": of_keys, "v": of_keys}
    inputs = {name: given(name, shapes[name], [*lies, 1]) for name, lies in zip("qkv", task.strides, strict=True)}
    options = {"attn_scale": task.scale}
    if task.causal:
        aligned = cudnn.diagonal_alignment
        options["diagonal_alignment"] = aligned.TOP_LEFT if task.queries == task.keys else aligned.BOTTOM_RIGHT
        options["diagonal_band_right_bound"] = 0
    if task.window:
        options["diagonal_band_left_bound"] = task.window
    if task.padded:
        lengths = [given(name, [task.batch, 1, 1, 1], [1, 1, 1, 1], integer) for name in ("asked", "seen")]
        options |= {"use_padding_mask": True, "seq_len_q": lengths[0], "seq_len_kv": lengths[1]}
    if not task.backward:
        y, lse = graph.sdpa(name="attention", generate_stats=True, **inputs, **options)
        made("y", y, of_queries, y_lies)
        made("lse", lse, lse_shape, lse_lies, single)
    else:
        g, y = given("g", of_queries, own(task.queries, task.in_memory[0])), given("y", of_queries, y_lies)
        lse = given("lse", lse_shape, lse_lies, single)
        gradients = graph.sdpa_backward(
            name="gradients", o=y, dO=g, stats=lse, use_deterministic_algorithm=True, **inputs, **options
        )
        q_lies, k_lies = (
            own(time, heads, margin)
            for time, heads, margin in zip((task.queries, task.keys), task.in_memory, task.margins[1:], strict=True)
        )
        shapes = {"dq": (of_queries, q_lies), "dk": (of_keys, k_lies), "dv": (of_keys, k_lies)}
        for tensor, (name, (shape, lies)) in zip(gradients, shapes.items(), strict=True):
            made(name, tensor, shape, lies)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    return graph


@dataclass(frozen=True)
class Plan:
    """What executes a task, and the bytes that it works in."""

    graph: Any
    memory: int


@functools.cache
def _plan(task: Task, device: int) -> Plan | str:
    """The plan of a task as a whole, or why there is none."""
    cudnn, _ = _load()
    try:
        graph = described(task, handle=_handle(device))
        graph.build_plans()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        return f"cuDNN says: {str(error).strip().splitlines()[0]}"
    return Plan(graph, graph.get_workspace_size())


@functools.cache
def _planned(task: Task, device: int) -> tuple[Task, Plan] | str:
    """(the task, or what is to be done for each part of it; its plan), or why there is none.

    Heads are parted where one row is too much for memory. So the `lse` of a part is one piece of the whole task's, as
    cuDNN before 9.26 asks for.
    """
    part = task
    while True:
        plan = _plan(part, device)
        if isinstance(plan, str) or plan.memory <= MOST_MEMORY:
            return plan if isinstance(plan, str) else (part, plan)
        if part.batch * part.kv_heads == 1:
            return f"it would work in {plan.memory:,} bytes"
        times = plan.memory / MOST_MEMORY
        batch = _divisor(part.batch, part.batch / times)
        times *= batch / part.batch
        kv_heads = _divisor(part.kv_heads, part.kv_heads / times)
        part = replace(part, batch=batch, kv_heads=kv_heads, heads=part.heads // part.kv_heads * kv_heads)


def _divisor(n: int, most: float) -> int:
    """The largest divisor of n that is at most `most`, or else 1."""
    return next((d for d in range(n, 1, -1) if n % d == 0 and d <= most), 1)


def _run(task: Task, mask: Mask, arrays: dict[str, Array]) -> None:
    """Does a task, part by part. `arrays` begin with the batch and with heads."""
    device = cupy.cuda.Device().id
    part, plan = _planned(task, device)
    if task.padded:
        arrays = arrays | _lengths(mask, task)
    if not are_started():
        return  # lengths of rows are not there
    memory = cupy.empty(max(plan.memory, 1), np.uint8)
    for row in range(0, task.batch, part.batch):
        for head in range(0, task.kv_heads, part.kv_heads):
            pointers = {_UID[name]: _address(array, row, head, task) for name, array in arrays.items()}
            plan.graph.execute(pointers, memory.data.ptr, handle=_handle(device))


def _address(array: Array, row: int, kv_head: int, task: Task) -> int:
    """Where in an array the part begins that has this row and head of keys first; queries have more heads."""
    head = kv_head * array.shape[1] // task.kv_heads
    return array.data.ptr + row * array.strides[0] + head * array.strides[1]


def _lengths(mask: Mask, task: Task) -> dict[str, Array]:
    """How many queries and keys each row has: int32 (batch, 1)."""
    asked, seen = (cupy.empty((task.batch, 1), np.int32) for _ in range(2))
    segments = contiguous(mask.segments.astype(np.int32, copy=False))
    tokens = segments.shape[1]
    _source("lengths")(task.batch, 32, segments, asked, seen, task.queries, tokens, task.keys - tokens)
    return {"asked": asked, "seen": seen}


# ---- of each device --------------------------------------------------------------------------------------------------

_handles: dict[int, tuple[Any, int]] = {}


def _handle(device: int) -> Any:
    """cuDNN's handle, which works on the current stream."""
    cudnn, _ = _load()
    stream = cupy.cuda.get_current_stream().ptr
    handle, its_stream = _handles.get(device, (None, None))
    if its_stream != stream:
        handle = cudnn.create_handle() if handle is None else handle
        cudnn.set_stream(handle=handle, stream=stream)
        _handles[device] = handle, stream
    return handle
