"""A frozen layer and its low-rank method as one op: what the two ops alone give, to rounding."""

import contextlib

import cupy
import numpy as np
import pytest
import tiny
from test_linear_on_the_gpu import EPS, close, drawn

from refpeft import fused, ops, sites, tensor
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import aside, lowrank, margins
from refpeft.optim import Flat
from refpeft.quant import Dense, make_quantizer
from refpeft.tensor import Pending, Tensor, no_grad, parameter


class Problem:
    """A layer (32, width) with factors of rank r, whose values lie in one flat buffer; all on the GPU."""

    def __init__(self, rows=(2, 5), width=24, out=32, r=8, bias=False, trained_x=True):
        self.exact = {
            "x": drawn(*rows, width), "A": drawn(r, width, seed=1), "B": drawn(out, r, seed=2),
        }  # fmt: skip
        self.w, self.b, self.g = (
            drawn(out, width, seed=3),
            drawn(out, seed=4) if bias else None,
            drawn(*rows, out, seed=5),
        )
        self.weight = Dense(cupy.asarray(self.w).astype(bfloat16), np.dtype("f4"))
        self.bias = None if self.b is None else cupy.asarray(self.b).astype("f4")
        x = cupy.asarray(self.exact["x"]).astype(bfloat16)
        self.x = parameter(x) if trained_x else Tensor(x)
        self.A, self.B = (parameter(cupy.asarray(self.exact[name]).astype("f4")) for name in "AB")
        self.flat = Flat({"A": self.A, "B": self.B}.items())

    def layer(self, x: Tensor) -> Tensor:
        return fused.addmm(
            fused.frozen_linear(x, self.bias, weight=self.weight), ops.linear(x, self.A), self.B, alpha=1.5
        )

    def expected(self) -> dict[str, np.ndarray]:
        x, A, B = (parameter(self.exact[name]) for name in "xAB")
        u = ops.linear(x, A)
        y = fused.addmm(fused.frozen_linear(x, self.b, weight=lambda: self.w), u, B, alpha=1.5)
        y.backward(self.g)
        return {"y": y.data, "x": x.grad, "A": A.grad, "B": B.grad}


def behind(array):
    """The same numbers in rows with room behind them."""
    found = margins.rows(array.shape)
    found[...] = array
    return found


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"rows": (64,), "width": 64, "r": 16}, {"trained_x": False}])
def test_it_is_one_op_with_the_values_and_gradients_of_two(options: dict, margin: bool, passes: int):
    """With room behind the rows of x and g, or without; also where the weight has room from an earlier pass."""
    problem = Problem(**options)
    before = problem.weight.array
    for _ in range(passes):
        problem.flat.grads.fill(0)
        problem.flat.values *= -1
        with margins.lowered(problem.flat.values):
            if margin:
                problem.x.data, g = behind(problem.x.data), behind(cupy.asarray(problem.g).astype(bfloat16))
            else:
                g = cupy.asarray(problem.g).astype(bfloat16)
            if problem.x.node:
                problem.x.node.grad = None
            y = problem.layer(problem.x)
            assert y.node.op is lowrank.layer
            y.backward(g)
    assert (problem.weight.array is not before) == margin
    if passes % 2:
        problem.flat.values *= -1
        problem.flat.grads *= -1
    found = {"y": y.data, "A": problem.A.grad, "B": problem.B.grad}
    found |= {"x": problem.x.grad} if problem.x.node else {}
    expected = problem.expected()
    for name, array in found.items():
        assert array.dtype == (np.float32 if name in "AB" else bfloat16)
        close(array, expected[name], EPS["bfloat16"], 2)  # u is rounded before it is multiplied


def test_outside_of_training_the_ops_do_their_work_alone():
    problem = Problem()
    assert type(fused.frozen_linear(problem.x, weight=problem.weight)) is Tensor
    close(problem.layer(problem.x).data, problem.expected()["y"], EPS["bfloat16"], 2)


def test_what_waits_is_computed_where_something_else_asks_for_it():
    problem = Problem()
    with margins.lowered(problem.flat.values):
        waiting = fused.frozen_linear(problem.x, weight=problem.weight)
        assert type(waiting) is Pending and waiting.shape == (2, 5, 32) and not waiting.there
        doubled = waiting * 2.0
        assert waiting.there
        close(doubled.data, 2 * problem.exact["x"] @ problem.w.T, EPS["bfloat16"], 1.1)
        y = fused.addmm(waiting, ops.linear(problem.x, problem.A), problem.B, alpha=1.5)
        assert y.node.op is not lowrank.layer
        (y + doubled).backward()
    assert problem.x.grad.shape == problem.x.shape


def test_another_input_of_the_factors_has_its_own_gradient():
    """As with dropout before A."""
    problem = Problem()
    with margins.lowered(problem.flat.values):
        y = fused.addmm(
            fused.frozen_linear(problem.x, weight=problem.weight),
            ops.linear(problem.x * 0.5, problem.A), problem.B, alpha=3.0,
        )  # fmt: skip
        assert y.node.op is lowrank.layer
        y.backward(cupy.asarray(problem.g).astype(bfloat16))
    expected = problem.expected()
    for name, leaf in {"x": problem.x, "A": problem.A, "B": problem.B}.items():
        close(leaf.grad, expected[name], EPS["bfloat16"], 2)


def test_a_bias_of_the_factors_has_its_own_gradient():
    problem = Problem()
    bias = parameter(cupy.ones(8, "f4"))
    with margins.lowered(problem.flat.values):
        u = ops.linear(problem.x, problem.A, bias)
        y = fused.addmm(fused.frozen_linear(problem.x, weight=problem.weight), u, problem.B, alpha=1.5)
        y.backward(cupy.asarray(problem.g).astype(bfloat16))
    expected = problem.expected()
    for name, leaf in {"x": problem.x, "A": problem.A}.items():
        close(leaf.grad, expected[name], EPS["bfloat16"], 2)
    close(bias.grad, 1.5 * problem.g.reshape(-1, 32).sum(axis=0) @ problem.exact["B"], EPS["bfloat16"], 2)


def test_nothing_is_recorded_without_gradients():
    problem = Problem()
    with margins.lowered(problem.flat.values), no_grad():
        y = problem.layer(problem.x)
    assert y.node is None
    close(y.data, problem.expected()["y"], EPS["bfloat16"], 2)


@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same_with_it(name: str, quantizer: str | None, checkpointing: bool):
    results = []
    for together in (True, False):
        model = tiny.low(name, make_quantizer(quantizer), xp=cupy)
        sites.attach(model, "lora", {"r": 8, "targets": "all-linear"})
        tiny.scramble(model.adapters[-1])
        flat = Flat(model.trained())
        model.mode.training, model.checkpointing = True, checkpointing
        with margins.lowered(flat.values) if together else contextlib.nullcontext():
            loss = model.loss(tiny.batch())
            loss.backward()
        results.append((float(loss.data), to_host(flat.grads).astype("f8")))
    (loss, here), (other, there) = results
    assert abs(loss - other) < 0.01 * loss
    assert np.linalg.norm(here - there) < 0.03 * np.linalg.norm(there)


def test_plain_pairs_know_nothing_of_it():
    problem = Problem()
    with margins.lowered(problem.flat.values), tensor.plain():
        assert type(fused.frozen_linear(problem.x, weight=problem.weight)) is Tensor


def test_gradients_aside_are_those_of_one_stream():
    """Also where layers in turn use the room behind the same rows, as readers of a residual stream do."""
    results = []
    for together in (True, False, True):
        problems = [Problem(rows=(64,), width=512, out=512, r=16) for _ in range(8)]
        flat = Flat((f"{i}.{name}", getattr(each, name)) for i, each in enumerate(problems) for name in "AB")
        g = cupy.asarray(problems[0].g).astype(bfloat16)
        with margins.lowered(flat.values), aside.gradients_aside(flat.grads) if together else contextlib.nullcontext():
            x = problems[0].x.data
            for each in problems:
                each.x.data = behind(x)
            total = None
            for each in problems:
                y = each.layer(each.x)
                total = y if total is None else total + y
            total.backward(behind(g))
        results.append(to_host(flat.grads))
    assert all(np.array_equal(results[0], other) for other in results[1:])
