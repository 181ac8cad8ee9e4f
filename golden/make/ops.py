"""Small operations with the gradient of every input: values are torch's own functions, gradients torch's autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import Case, Draw, with_gradients

OPS: dict[str, Callable[..., torch.Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda x: -x,
    "power": lambda x, exponent: x**exponent,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda condition, a, b: torch.where(condition, a, b),
    "sum": lambda x, axis=None, keepdims=False: x.sum(dim=_axes(x, axis), keepdim=keepdims),
    "mean": lambda x, axis=None, keepdims=False: x.mean(dim=_axes(x, axis), keepdim=keepdims),
    "max": lambda x, axis=None, keepdims=False: x.amax(dim=_axes(x, axis), keepdim=keepdims),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, axes=None: x.permute(axes or list(range(x.dim()))[::-1]),
    "broadcast_to": lambda x, shape: x.broadcast_to(shape),
    "concat": lambda *xs, axis: torch.cat(xs, dim=axis),
    "stack": lambda *xs, axis: torch.stack(xs, dim=axis),
    "getitem": lambda x, key: x[tuple(slice(*k) if isinstance(k, list) else k for k in key)],
    "take": lambda x, indices: x[indices.long()],
    "matmul": lambda a, b: a @ b,
    "linear": lambda x, w, b=None: torch.nn.functional.linear(x, w, b),
    "softmax": lambda x, axis: torch.softmax(x, dim=axis),
    "log_softmax": lambda x, axis: torch.log_softmax(x, dim=axis),
    "solve": torch.linalg.solve,
    "sin": torch.sin,
    "cos": torch.cos,
    "circulant_linear": lambda x, w: x @ _circulant(w).mT,
    "fastfood": lambda x, signs, order, gauss, size: fastfood(x, signs, order.long(), gauss, size),
    "hard_concrete": lambda log_alpha, u: hard_concrete(log_alpha, u),
    "gated_linear": lambda x, w, log_alpha, u: x @ (hard_concrete(log_alpha, u) * w).mT,
    "spectral_linear": lambda x, c, places, shape: x @ _spectral(c, places.long(), shape).mT,
}


def hard_concrete(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gates stretched to [-1.5, 1.5] and clipped; u is kept 1e-4 away from 0 and 1, as in diff pruning's code."""
    u = u.clamp(1e-4, 1 - 1e-4)
    return (torch.sigmoid(u.log() - (1 - u).log() + log_alpha) * 3 - 1.5).clamp(0, 1)


def _axes(x: torch.Tensor, axis: int | list[int] | None) -> list[int]:
    return list(range(x.dim())) if axis is None else [axis] if isinstance(axis, int) else axis


def _circulant(w: torch.Tensor) -> torch.Tensor:
    outs, ins, size = w.shape
    j, k = torch.arange(size)[:, None], torch.arange(size)
    return w[:, :, (k - j) % size].permute(0, 2, 1, 3).reshape(outs * size, ins * size)


def _spectral(c: torch.Tensor, places: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """A sum of cosines: the real part of the inverse Fourier transform, by its definition."""
    down, across = torch.arange(shape[0])[:, None, None], torch.arange(shape[1])[:, None]
    turns = (places // shape[1]) * down / shape[0] + (places % shape[1]) * across / shape[1]
    return (c * torch.cos(2 * math.pi * turns)).sum(-1) / (shape[0] * shape[1])


def fastfood(x: torch.Tensor, signs: torch.Tensor, order: torch.Tensor, gauss: torch.Tensor, size: int):
    """The first `size` of H G P H B x, divided by sqrt(size) and the length of G, from the matrix H itself."""
    H = torch.ones(1, 1, dtype=x.dtype)
    while len(H) < len(gauss):
        H = torch.kron(H, torch.tensor([[1, 1], [1, -1]], dtype=x.dtype))
    padded = torch.cat((x, x.new_zeros(len(gauss) - len(x))))
    return (H @ (gauss * (H @ (signs * padded))[order]))[:size] / (size**0.5 * torch.linalg.norm(gauss))


def _case(
    variant: str, inputs: dict[str, np.ndarray], *, name: str, comment: str = "", flags=(), level="must", **config
):
    case_id = f"{name}-{variant}"

    def forward(**tensors: torch.Tensor) -> torch.Tensor:
        return OPS[name](*tensors.values(), **config)

    wrt = tuple(n for n, a in inputs.items() if a.dtype == np.float32 and n not in ("gauss", "u"))
    y = forward(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    inputs = inputs | {"g": Draw(f"{case_id} g").normal(*y.shape)}
    return Case(
        id=case_id,
        kind="op",
        name=name,
        comment=comment,
        flags=flags,
        level=level,
        config=config,
        inputs=inputs,
        compute=with_gradients(forward, wrt),
        spec="golden/README.md, Operations",
    )


def cases() -> Iterator[Case]:
    yield from _binary()
    yield from _unary()
    yield from _reductions()
    yield from _shapes()
    yield from _algebra()


def _binary() -> Iterator[Case]:
    shapes = {
        "same": ((3, 4), (3, 4)),
        "broadcast-both": ((2, 1, 4), (3, 1)),
        "broadcast-row": ((2, 3, 4), (4,)),
        "broadcast-scalar": ((), (2, 3)),
    }
    comments = {"broadcast-both": "both sides are stretched, so both gradients are sums", "broadcast-scalar": "no axes"}
    for name in ("add", "sub", "mul", "div", "maximum", "minimum"):
        for variant, (a, b) in shapes.items():
            draw = Draw(f"{name}-{variant}")
            inputs = {"a": draw.normal(*a), "b": draw.normal(*b)}
            if name == "div":
                inputs["b"] = np.sign(inputs["b"]) * (np.abs(inputs["b"]) + np.float32(0.5))
            flags = ("BroadcastGradient",) if variant != "same" else ()
            yield _case(variant, inputs, name=name, flags=flags, comment=comments.get(variant, ""))
    for name in ("maximum", "minimum"):
        a, b = np.float32([[1, 2, 3], [0, -1, 0]]), np.float32([[1, 5, 3], [0, -1, 2]])
        comment = "where both are equal each side gets half the gradient, as in torch"
        yield _case("ties", {"a": a, "b": b}, name=name, comment=comment, flags=("TiedMaximum",), level="may")
    for variant, (a, b) in {"same": ((3, 4), (3, 4)), "broadcast": ((3, 1), (2, 1, 4))}.items():
        draw = Draw(f"where-{variant}")
        shape = np.broadcast_shapes(a, b)
        inputs = {"condition": draw.integers(0, 2, *shape).astype(bool), "a": draw.normal(*a), "b": draw.normal(*b)}
        yield _case(variant, inputs, name="where", flags=("BroadcastGradient",) if variant == "broadcast" else ())


def _unary() -> Iterator[Case]:
    for name in ("neg", "exp", "abs", "tanh", "sigmoid", "relu", "silu", "sin", "cos"):
        yield _case("basic", {"x": Draw(f"{name}-basic").normal(3, 5)}, name=name)
    for name in ("log", "sqrt"):
        yield _case("basic", {"x": Draw(f"{name}-basic").uniform(3, 5, low=0.1, high=4.0)}, name=name)
    far = np.float32([-120.0, -30.0, -4.0, 0.0, 4.0, 30.0, 120.0])
    for name in ("tanh", "sigmoid", "silu"):
        comment = "arguments far out: neither overflow nor NaN"
        yield _case("far", {"x": far}, name=name, comment=comment, flags=("Overflow",))
    zero = np.float32([-1.0, 0.0, 2.0])
    for name in ("relu", "abs"):
        yield _case("zero", {"x": zero}, name=name, comment="the gradient at 0 is 0", level="may")
    for exponent in (2, 3, -1, 0.5, -0.5, 1.7):
        variant = f"{exponent:g}".replace("-", "minus-").replace(".", "p")
        x = Draw(f"power-{variant}").uniform(3, 5, low=0.3, high=2.0)
        yield _case(variant, {"x": x}, name="power", exponent=exponent)
    negative = Draw("power-negative-base").normal(3, 5)
    yield _case("negative-base", {"x": negative}, name="power", exponent=3, comment="a negative base, a whole exponent")


def _reductions() -> Iterator[Case]:
    axes = {
        "all": {},
        "last": {"axis": -1},
        "first-kept": {"axis": 0, "keepdims": True},
        "two": {"axis": [0, 2]},
        "two-kept": {"axis": [1, 2], "keepdims": True},
    }
    for name in ("sum", "mean", "max"):
        for variant, config in axes.items():
            yield _case(variant, {"x": Draw(f"{name}-{variant}").normal(2, 3, 4)}, name=name, **config)
    ties = np.float32([[1, 3, 3], [2, 2, 2]])
    comment = "equal maxima share the gradient, as in torch.amax"
    yield _case("ties", {"x": ties}, name="max", axis=1, comment=comment, flags=("TiedMaximum",), level="may")
    for name in ("softmax", "log_softmax"):
        for variant, axis in {"last": -1, "first": 0, "middle": 1}.items():
            yield _case(variant, {"x": Draw(f"{name}-{variant}").normal(3, 4, 5)}, name=name, axis=axis)
        large = Draw(f"{name}-large").normal(3, 4, scale=4.0) + np.float32(1000.0)
        comment = "large logits: the maximum is subtracted first"
        yield _case("large", {"x": large}, name=name, axis=-1, comment=comment, flags=("Overflow",))


def _shapes() -> Iterator[Case]:
    def normal(case_id: str, *shape: int) -> np.ndarray:
        return Draw(case_id).normal(*shape)

    yield _case("flatten", {"x": normal("reshape-flatten", 2, 3, 4)}, name="reshape", shape=[24])
    yield _case("split-axis", {"x": normal("reshape-split-axis", 2, 12)}, name="reshape", shape=[2, 3, -1])
    yield _case("reversed", {"x": normal("transpose-reversed", 2, 3, 4)}, name="transpose")
    yield _case(
        "cycle",
        {"x": normal("transpose-cycle", 2, 3, 4)},
        name="transpose",
        axes=[1, 2, 0],
        comment="a cycle of three axes: the gradient takes the inverse order, not the same",
        flags=("InverseTranspose",),
    )
    yield _case("heads", {"x": normal("transpose-heads", 2, 3, 2, 4)}, name="transpose", axes=[0, 2, 1, 3])
    yield _case(
        "new-axis",
        {"x": normal("broadcast_to-new-axis", 3)},
        name="broadcast_to",
        shape=[2, 3],
        flags=("BroadcastGradient",),
    )
    yield _case(
        "stretch",
        {"x": normal("broadcast_to-stretch", 2, 1, 3)},
        name="broadcast_to",
        shape=[4, 2, 5, 3],
        flags=("BroadcastGradient",),
    )
    for name, sizes, axis in (
        ("concat", (2, 3, 1), 1),
        ("concat", (2, 1), -1),
        ("stack", (2, 2, 2), 1),
        ("stack", (2, 2), -1),
    ):
        variant = f"{len(sizes)}-axis-{'last' if axis < 0 else axis}"
        draw = Draw(f"{name}-{variant}")
        shapes = [(2, n, 3) if axis == 1 else (3, n) for n in sizes]
        yield _case(variant, {f"x{i}": draw.normal(*s) for i, s in enumerate(shapes)}, name=name, axis=axis)
    keys = {
        "integer": [1],
        "slices": [[0, 3, 2], [1, None, None]],
        "mixed": [[None, None, None], -1, [None, 2, None]],
    }
    for variant, key in keys.items():
        comment = "a list in the key is a slice [start, stop, step], a number an index"
        yield _case(variant, {"x": normal(f"getitem-{variant}", 4, 3, 5)}, name="getitem", key=key, comment=comment)
    for variant, rows in {"vector": [3, 0, 3, 1, 3], "matrix": [[0, 4], [4, 2]], "none-repeat": [2, 0, 4]}.items():
        inputs = {"x": normal(f"take-{variant}", 5, 3), "indices": np.int32(rows)}
        flags = () if variant == "none-repeat" else ("RepeatedRows",)
        comment = "" if variant == "none-repeat" else "rows that repeat add their gradients"
        yield _case(variant, inputs, name="take", flags=flags, comment=comment)


def _algebra() -> Iterator[Case]:
    shapes = {
        "plain": ((3, 4), (4, 2)),
        "stacks": ((2, 3, 4), (2, 4, 5)),
        "one-matrix": ((2, 3, 4), (4, 5)),
        "broadcast-stacks": ((2, 1, 3, 4), (3, 4, 2)),
        "row-and-column": ((1, 6), (6, 1)),
        "long": ((5, 96), (96, 7)),
    }
    for variant, (a, b) in shapes.items():
        draw = Draw(f"matmul-{variant}")
        yield _case(variant, {"a": draw.normal(*a), "b": draw.normal(*b)}, name="matmul")
    for variant, x, bias in (
        ("plain", (3, 4), False),
        ("bias", (3, 4), True),
        ("3d-bias", (2, 3, 4), True),
        ("vector", (4,), True),
        ("square", (3, 6), True),
    ):
        draw = Draw(f"linear-{variant}")
        inputs = {"x": draw.normal(*x), "w": draw.normal(6, x[-1])} | ({"b": draw.normal(6)} if bias else {})
        yield _case(variant, inputs, name="linear", flags=("TransposedWeight",), comment="w is (out, in)")
    for variant, a, b in (("plain", (4, 4), (4, 3)), ("stack", (2, 3, 3), (2, 3, 2)), ("broadcast", (3, 3), (2, 3, 2))):
        draw = Draw(f"solve-{variant}")
        matrix = draw.normal(*a, scale=1 / math.sqrt(a[-1])) + 2 * np.eye(a[-1], dtype=np.float32)
        yield _case(variant, {"a": matrix, "b": draw.normal(*b)}, name="solve", comment="the x with a @ x = b")
    for variant, (x, w) in {
        "plain": ((2, 3, 8), (3, 2, 4)),
        "odd": ((2, 9), (1, 3, 3)),
        "one": ((2, 5), (1, 1, 5)),
    }.items():
        draw = Draw(f"circulant_linear-{variant}")
        inputs = {"x": draw.normal(*x), "w": draw.normal(*w)}
        yield _case(variant, inputs, name="circulant_linear", flags=("CirculantDirection",))
    for variant, shape, rows in (("plain", [6, 4], (2, 3)), ("square", [5, 5], (4,))):
        draw = Draw(f"spectral_linear-{variant}")
        places = draw.generator.permutation(shape[0] * shape[1])[:7].astype(np.int32)
        inputs = {"x": draw.normal(*rows, shape[1]), "c": draw.normal(7), "places": places}
        yield _case(variant, inputs, name="spectral_linear", flags=("FourierScale",), shape=shape)
    for variant, rows in (("plain", (4,)), ("3d", (2, 3))):
        draw = Draw(f"hard_concrete-{variant}")
        u = draw.uniform(5, 4)
        u[0, :2] = 0, 1
        inputs = {"log_alpha": draw.normal(5, 4, scale=2), "u": u}
        if variant == "plain":
            comment = "among u are 0 and 1"
            yield _case(variant, inputs, name="hard_concrete", flags=("HardConcrete",), comment=comment)
        inputs = {"x": draw.normal(*rows, 4), "w": draw.normal(5, 4), **inputs}
        yield _case(variant, inputs, name="gated_linear", flags=("HardConcrete",))
    for variant, count, n, size in (("plain", 5, 16, 12), ("short", 8, 8, 3), ("one", 1, 1, 1), ("long", 20, 256, 200)):
        draw = Draw(f"fastfood-{variant}")
        random = {"signs": 2 * draw.integers(0, 2, n) - 1, "order": draw.generator.permutation(n).astype(np.int32)}
        inputs = {"x": draw.normal(count), **random, "gauss": draw.normal(n)}
        yield _case(variant, inputs, name="fastfood", flags=("FastfoodOrder", "FastfoodLength"), size=size)
