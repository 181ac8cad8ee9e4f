"""A frozen layer and its low-rank method as one op: what the two ops alone give, to rounding."""

import contextlib
import gc
import weakref

import cupy
import numpy as np
import pytest
import tiny
from test_linear_on_the_gpu import EPS, close, drawn

from refpeft import fused, ops, sites, tensor
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import aside, lowrank, margins, rooms
from refpeft.optim import Flat
from refpeft.quant import Dense, make_quantizer
from refpeft.tape import Node
from refpeft.tensor import Op, Pending, Tensor, no_grad, parameter


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
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"rows": (64,), "width": 64, "r": 16}, {"trained_x": False}, {"r": 1}, {"r": 11}]
)
def test_it_is_one_op_with_the_values_and_gradients_of_two(options: dict, margin: bool, passes: int):
    """With room behind the rows of x and g, or without; also where the weight has room from an earlier pass."""
    problem = Problem(**options)
    before = problem.weight.array
    for _ in range(passes):
        problem.flat.grads.fill(0)
        problem.flat.values *= -1
        with rooms.lowered(problem.flat.values):
            if margin:
                problem.x.data, g = behind(problem.x.data), behind(cupy.asarray(problem.g).astype(bfloat16))
            else:
                g = cupy.asarray(problem.g).astype(bfloat16)
            if problem.x.node:
                problem.x.node.grad = None
            y = problem.layer(problem.x)
            assert y.node.op is (lowrank.layers if margin else lowrank.single)
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


class Siblings:
    """Layers of different widths that read the same x; of those with `ranks` 0 nothing is trained."""

    def __init__(self, ranks=(8, 0, 16), widths=(32, 16, 16), bias=False):
        self.ranks, self.width, self.rows = ranks, 24, (2, 5)
        self.x = drawn(*self.rows, self.width)
        self.w = [drawn(out, self.width, seed=10 + i) for i, out in enumerate(widths)]
        self.b = [drawn(out, seed=20 + i) if bias and i != 1 else None for i, out in enumerate(widths)]
        self.g = [drawn(*self.rows, out, seed=30 + i) for i, out in enumerate(widths)]
        self.values = {
            f"{i}.{name}": drawn(*shape, seed=40 + 2 * i + len(shape))
            for i, (out, r) in enumerate(zip(widths, ranks, strict=True)) if r
            for name, shape in (("A", (r, self.width)), ("B", (out, r)))
        }  # fmt: skip
        self.weights = [Dense(cupy.asarray(w).astype(bfloat16), np.dtype("f4")) for w in self.w]
        self.biases = [None if b is None else cupy.asarray(b).astype("f4") for b in self.b]
        self.trained = {name: parameter(cupy.asarray(v).astype("f4")) for name, v in self.values.items()}
        self.flat = Flat(self.trained.items()) if self.trained else None

    def outputs(self, x, values, weights, biases) -> list[Tensor]:
        found = []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y = fused.frozen_linear(x, bias, weight=weight)
            if self.ranks[i]:
                y = fused.addmm(y, ops.linear(x, values[f"{i}.A"]), values[f"{i}.B"], alpha=1.0 + i)
            found.append(y)
        return found

    def expected(self) -> tuple[list[np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        x, values = parameter(self.x), {name: parameter(v) for name, v in self.values.items()}
        ys = self.outputs(x, values, [lambda w=w: w for w in self.w], self.b)
        for y, g in zip(ys, self.g, strict=True):
            y.backward(g)
        return [y.data for y in ys], x.grad, {name: v.grad for name, v in values.items()}


def backward(outputs: list[Tensor], gradients: list) -> None:
    """The way back from several results at once."""
    root = Op(None, "all of these")
    root.backward(lambda g: tuple(gradients))
    Tensor(gradients[0], Node(root, tuple(y.node for y in outputs))).backward(gradients[0])


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"ranks": (8, 8, 8)}, {"ranks": (0, 8), "widths": (16, 16)}, {"ranks": (3, 12, 1)}],
)
def test_layers_that_read_the_same_rows_are_one_product(options: dict, side_by_side: bool):
    """Their gradients come as columns of one array, or not; in the second pass values come by the launch for all."""
    problem = Siblings(**options)
    for sign in (-1, -1):
        problem.flat.values *= sign
        problem.flat.grads.fill(0)
        with rooms.lowered(problem.flat.values):
            x = parameter(behind(cupy.asarray(problem.x).astype(bfloat16)))
            ys = problem.outputs(x, problem.trained, problem.weights, problem.biases)
            assert all(type(y) is Pending and not y.there for y in ys)
            first = ys[0].node
            assert all(y.there for y in ys)
            assert all(y.node.parents == first.parents for y in ys) and first.parents[0].op is lowrank.layers
            gradients = [cupy.asarray(g).astype(bfloat16) for g in problem.g]
            if side_by_side:
                whole = margins.rows((*problem.rows, sum(g.shape[-1] for g in gradients)))
                places = margins.columns(whole, [g.shape[-1] for g in gradients])
                for place, g in zip(places, gradients, strict=True):
                    place[...] = g
                gradients = places
            assert (margins.beside(gradients) is not None) == side_by_side
            backward(ys, gradients)
    outputs, dx, values = problem.expected()
    for y, expected in zip(ys, outputs, strict=True):
        close(y.data, expected, EPS["bfloat16"], 2)
    close(x.grad, dx, EPS["bfloat16"], 2)
    for name, expected in values.items():
        close(problem.trained[name].grad, expected, EPS["bfloat16"], 2)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"ranks": (8, 8, 8)}, {"ranks": (3, 12, 1)}, {"ranks": (16,), "widths": (32,)}],
)
def test_layers_whose_factors_read_something_else_are_one_product(options: dict, waits: bool):
    """As with dropout. What A gives may be there already; in the second pass values come by the launch for all."""
    problem = Siblings(**options)
    others = [drawn(*problem.rows, problem.width, seed=60 + i) for i in range(len(problem.ranks))]

    def outputs(x, reads, trained, weights, biases) -> list:
        found = []
        for i, r in enumerate(problem.ranks):
            y = fused.frozen_linear(x, biases[i], weight=weights[i])
            if r:
                u = ops.linear(reads[i], trained[f"{i}.A"])
                y = fused.addmm(y, u if waits else u * 1.0, trained[f"{i}.B"], alpha=0.5 + i)
            found.append(y)
        return found

    for sign in (-1, -1):
        problem.flat.values *= sign
        problem.flat.grads.fill(0)
        with rooms.lowered(problem.flat.values), aside.gradients_aside(problem.flat.grads):
            x = parameter(behind(cupy.asarray(problem.x).astype(bfloat16)))
            reads = [parameter(cupy.asarray(other).astype(bfloat16)) for other in others]
            ys = outputs(x, reads, problem.trained, problem.weights, problem.biases)
            made = {y.node.op if len(ys) == 1 else y.node.parents[0].op for y in ys}
            assert made == {lowrank.layers}
            backward(ys, [cupy.asarray(g).astype(bfloat16) for g in problem.g])
    exact_x, exact = parameter(problem.x), {name: parameter(v) for name, v in problem.values.items()}
    exact_reads = list(map(parameter, others))
    expected = outputs(exact_x, exact_reads, exact, [lambda w=w: w for w in problem.w], problem.b)
    for y, g in zip(expected, problem.g, strict=True):
        y.backward(g)
    for y, other in zip(ys, expected, strict=True):
        close(y.data, other.data, EPS["bfloat16"], 2)
    close(x.grad, exact_x.grad, EPS["bfloat16"], 2)
    for r, one, other in zip(problem.ranks, reads, exact_reads, strict=True):
        if r:
            close(one.grad, other.grad, EPS["bfloat16"], 2)
    for name, value in exact.items():
        close(problem.trained[name].grad, value.grad, EPS["bfloat16"], 2)


def gained(problem: Siblings, gains: dict, x: Tensor, values: dict, weights: list, biases: list) -> tuple[list, list]:
    """What layers give, and the same times gains, as DoRA has it."""
    ys = problem.outputs(x, values, weights, biases)
    return ys, [gain * y for gain, y in zip(gains.values(), ys, strict=True)]


@pytest.mark.parametrize("asked", [None, 0, 1])
@pytest.mark.parametrize(
    "options", [{"ranks": (8, 8, 8)}, {"ranks": (3, 12, 1), "bias": True}, {"ranks": (16,), "widths": (32,)}], ids=str
)
def test_gains_of_layers_that_read_the_same_rows_are_one_multiplication(options: dict, asked: int | None):
    """Also where one of them is asked for without its gain, before the others."""
    problem = Siblings(**options)
    asked = None if asked is None else min(asked, len(problem.ranks) - 1)
    gains = {f"{i}.gain": drawn(len(w), seed=70 + i) for i, w in enumerate(problem.w)}
    trained = problem.trained | {name: parameter(cupy.asarray(v).astype("f4")) for name, v in gains.items()}
    flat = Flat(trained.items())
    for _ in range(2):
        flat.grads.fill(0)
        with rooms.lowered(flat.values), aside.gradients_aside(flat.grads):
            x = parameter(behind(cupy.asarray(problem.x).astype(bfloat16)))
            its_gains = {name: trained[name] for name in gains}
            ys, scaled = gained(problem, its_gains, x, trained, problem.weights, problem.biases)
            more = [] if asked is None else [ys[asked]]
            assert all(type(y) is Pending and not y.there for y in scaled)
            assert all(y.data.dtype == bfloat16 for y in more)
            together = [y for i, y in enumerate(scaled) if i != asked]
            made = {y.node.op if len(ys) == 1 else y.node.parents[0].op for y in together}
            assert made == ({lowrank.gained} if together else set())
            gradients = [cupy.asarray(g).astype(bfloat16) for g in problem.g]
            backward([*scaled, *more], gradients + [gradients[asked] for _ in more])
    exact_x = parameter(problem.x)
    exact = {name: parameter(v) for name, v in (problem.values | gains).items()}
    ys, expected = gained(
        problem, {name: exact[name] for name in gains}, exact_x, exact, [lambda w=w: w for w in problem.w], problem.b
    )
    backward(expected + ([] if asked is None else [ys[asked]]), problem.g + problem.g[asked:][: len(more)])
    for y, other in zip(scaled, expected, strict=True):
        close(y.data, other.data, EPS["bfloat16"], 2)
    close(x.grad, exact_x.grad, EPS["bfloat16"], 3)
    for name, value in exact.items():
        close(trained[name].grad, value.grad, EPS["bfloat16"], 3)


def test_a_capture_finds_the_rooms_that_took_the_place_of_others():
    """Those of layers without factors, say, of a method before, whose values lay at the same address."""
    problem, stream = Siblings(ranks=(8, 8, 8)), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for how in ("without factors", "with factors", "captured"):
            if how == "captured":
                stream.begin_capture()
            with rooms.lowered(problem.flat.values):
                x = parameter(behind(cupy.empty(problem.x.shape, bfloat16)))
                if how == "without factors":
                    ys = [fused.frozen_linear(x, weight=weight) for weight in problem.weights]
                else:
                    ys = problem.outputs(x, problem.trained, problem.weights, problem.biases)
                assert all(y.node.parents[0].op is lowrank.layers for y in ys)
            if how == "captured":
                stream.end_capture()


def test_outside_of_training_the_ops_do_their_work_alone():
    problem = Problem()
    assert type(fused.frozen_linear(problem.x, weight=problem.weight)) is Tensor
    close(problem.layer(problem.x).data, problem.expected()["y"], EPS["bfloat16"], 2)


@pytest.mark.parametrize("margin", [True, False])
@pytest.mark.parametrize("gain", [None, Tensor(cupy.ones(32, "f4"))], ids=["", "gain"])
def test_nothing_keeps_what_a_layer_reads_where_its_factors_read_something_else(gain: Tensor | None, margin: bool):
    """As with dropout. Python frees it at once, without looking for circles."""
    problem = Problem()
    gc.disable()
    try:
        with rooms.lowered(problem.flat.values):
            if margin:
                problem.x.data = behind(problem.x.data)
            x, array = problem.x, weakref.ref(problem.x.data)
            u = ops.linear(x * 2.0, problem.A)
            y = fused.addmm(fused.frozen_linear(x, weight=problem.weight), u, problem.B, alpha=1.5)
            y = y if gain is None else gain * y
            assert y.node is not None and array() is not None
            del x, problem.x
            assert array() is None
    finally:
        gc.enable()


def test_what_others_wait_for_is_not_written_to():
    """Of those that read the same through the same weight one is added to, which has its memory if it is alone."""
    problem, addresses = Problem(), []
    exact, weight = problem.exact["x"] @ problem.w.T, problem.weight
    z, columns = Tensor(cupy.ones((2, 5, 32), bfloat16)), cupy.arange(32, dtype=np.int32)

    def frozen() -> Tensor:
        y = fused.frozen_linear(problem.x, weight=weight)
        addresses.append(y.data.data.ptr)
        return y

    with rooms.lowered(problem.flat.values):
        waiting = fused.frozen_linear(problem.x, weight=weight)
        factors = (Tensor(cupy.ones(shape, "f4")) for shape in ((2, 5, 1), (32, 1)))
        one = fused.addmm(frozen(), *factors, alpha=1.0)
        two = fused.add_columns(frozen(), z, columns=columns)
        close(waiting.data, exact, EPS["bfloat16"], 1.1)
        del waiting
        three = fused.add_columns(frozen(), z, columns=columns)
    assert all(y.data.data.ptr != addresses[0] for y in (one, two)) and three.data.data.ptr == addresses[2]
    for y in (one, two, three):
        close(y.data, exact + 1, EPS["bfloat16"], 1.1)


def test_what_waits_is_computed_where_something_else_asks_for_it():
    problem = Problem()
    with rooms.lowered(problem.flat.values):
        waiting = fused.frozen_linear(problem.x, weight=problem.weight)
        assert type(waiting) is Pending and waiting.shape == (2, 5, 32) and not waiting.there
        doubled = waiting * 2.0
        assert waiting.there
        close(doubled.data, 2 * problem.exact["x"] @ problem.w.T, EPS["bfloat16"], 1.1)
        y = fused.addmm(waiting, ops.linear(problem.x, problem.A), problem.B, alpha=1.5)
        assert y.node.op is not lowrank.single
        (y + doubled).backward()
    assert problem.x.grad.shape == problem.x.shape


@pytest.mark.parametrize("first", ["with", "without"])
def test_a_layer_that_is_wanted_with_factors_and_without_is_one_product(monkeypatch, first: str):
    """As in DoRA, which takes the frozen layer's result apart."""
    problem, made = Problem(), []
    alone = fused.frozen_linear.alone
    monkeypatch.setattr(fused.frozen_linear, "alone", lambda *a, **k: made.append(alone(*a, **k)) or made[-1])
    expected = problem.expected()
    made.clear()
    before = problem.weight.array
    with rooms.lowered(problem.flat.values):
        problem.x.data = behind(problem.x.data)
        frozen = fused.frozen_linear(problem.x, weight=problem.weight)
        both = fused.addmm(frozen, ops.linear(problem.x, problem.A), problem.B, alpha=1.5)
        again = fused.frozen_linear(problem.x, weight=problem.weight)
        y = both * 2.0 - frozen - again if first == "with" else (again + frozen) * -1.0 + both * 2.0
        y.backward(cupy.asarray(problem.g).astype(bfloat16))
    assert len(made) == 1 and problem.weight.array is before
    plain = problem.exact["x"] @ problem.w.T
    close(y.data, 2 * (expected["y"] - plain), EPS["bfloat16"], 8)  # of larger numbers' difference
    for name, leaf in {"A": problem.A, "B": problem.B}.items():
        close(leaf.grad, 2 * expected[name], EPS["bfloat16"], 3)


def test_another_input_of_the_factors_has_its_own_gradient():
    """As with dropout before A."""
    problem = Problem()
    with rooms.lowered(problem.flat.values):
        y = fused.addmm(
            fused.frozen_linear(problem.x, weight=problem.weight),
            ops.linear(problem.x * 0.5, problem.A), problem.B, alpha=3.0,
        )  # fmt: skip
        assert y.node.op is lowrank.single
        y.backward(cupy.asarray(problem.g).astype(bfloat16))
    expected = problem.expected()
    for name, leaf in {"x": problem.x, "A": problem.A, "B": problem.B}.items():
        close(leaf.grad, expected[name], EPS["bfloat16"], 2)


def test_a_bias_of_the_factors_has_its_own_gradient():
    problem = Problem()
    bias = parameter(cupy.ones(8, "f4"))
    with rooms.lowered(problem.flat.values):
        u = ops.linear(problem.x, problem.A, bias)
        y = fused.addmm(fused.frozen_linear(problem.x, weight=problem.weight), u, problem.B, alpha=1.5)
        y.backward(cupy.asarray(problem.g).astype(bfloat16))
    expected = problem.expected()
    for name, leaf in {"x": problem.x, "A": problem.A}.items():
        close(leaf.grad, expected[name], EPS["bfloat16"], 2)
    close(bias.grad, 1.5 * problem.g.reshape(-1, 32).sum(axis=0) @ problem.exact["B"], EPS["bfloat16"], 2)


def test_nothing_is_recorded_without_gradients():
    problem = Problem()
    with rooms.lowered(problem.flat.values), no_grad():
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
        with rooms.lowered(flat.values) if together else contextlib.nullcontext():
            loss = model.loss(tiny.batch())
            loss.backward()
        results.append((float(loss.data), to_host(flat.grads).astype("f8")))
    (loss, here), (other, there) = results
    assert abs(loss - other) < 0.01 * loss
    assert np.linalg.norm(here - there) < 0.03 * np.linalg.norm(there)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantizer", [None, "nf4"])
@pytest.mark.parametrize("rank", [8, 12])
def test_what_norms_and_units_give_comes_back_with_their_gradients(
    rank: int, quantizer: str | None, checkpointing: bool, monkeypatch
):
    """Their low-rank readers wait for it: nothing is made again for them alone, and the gradients are the same."""
    results, made = [], []
    for op in (fused.rms_norm, fused.silu_mul):
        pair = op.overrides[cupy.ndarray, np.dtype(bfloat16)]
        monkeypatch.setattr(pair, "again", lambda *saved, again=pair.again: made.append(again) or again(*saved))
    for worth in (0, 2**40):
        monkeypatch.setattr(tensor, "WORTH_MAKING_AGAIN", worth)
        model = tiny.low("llama", make_quantizer(quantizer), xp=cupy)
        sites.attach(model, "lora", {"r": rank, "targets": "all-linear"})
        tiny.scramble(model.adapters[-1])
        flat = Flat(model.trained())
        model.mode.training, model.checkpointing = True, checkpointing
        for _ in range(2):
            flat.grads.fill(0)
            with rooms.lowered(flat.values), aside.gradients_aside(flat.grads):
                model.loss(tiny.batch()).backward()
        results.append(to_host(flat.grads).astype("f8"))
    assert not made
    assert np.linalg.norm(results[0] - results[1]) < 1e-5 * np.linalg.norm(results[1])


def test_what_is_added_to_aside_is_waited_for_before_more_is_added(monkeypatch):
    problem = Problem(rows=(64,), width=512, out=512, r=16)
    g, waited = cupy.asarray(problem.g).astype(bfloat16), []
    with rooms.lowered(problem.flat.values), aside.gradients_aside(problem.flat.grads):
        problem.layer(problem.x).backward(g)
    alone = to_host(problem.A.grad)
    problem.flat.grads.fill(0)
    with rooms.lowered(problem.flat.values), aside.gradients_aside(problem.flat.grads):
        problem.layer(problem.x).backward(g)
        aside.join_all_that_adds_to(cupy.empty(4, "f4"))
        monkeypatch.setattr(aside._Aside, "_let_go", lambda self, go=aside._Aside._let_go: waited.append(1) or go(self))
        (problem.A * 2.0).backward()
        assert waited
    assert np.array_equal(to_host(problem.A.grad), alone + np.float32(2))


def test_plain_pairs_know_nothing_of_it():
    problem = Problem()
    with rooms.lowered(problem.flat.values), tensor.plain():
        assert type(fused.frozen_linear(problem.x, weight=problem.weight)) is Tensor


def test_gradients_aside_are_those_of_one_stream():
    """Also where layers in turn use the room behind the same rows, as readers of a residual stream do."""
    results = []
    for together in (True, False, True):
        problems = [Problem(rows=(64,), width=512, out=512, r=16) for _ in range(8)]
        flat = Flat((f"{i}.{name}", getattr(each, name)) for i, each in enumerate(problems) for name in "AB")
        g = cupy.asarray(problems[0].g).astype(bfloat16)
        with rooms.lowered(flat.values), aside.gradients_aside(flat.grads) if together else contextlib.nullcontext():
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
