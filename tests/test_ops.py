"""Every small op: NumPy's values, right gradients, one dtype throughout, and errors that name the op and the shapes."""

import importlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from cases import FUSED, HOST, OPS, Case, Place
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refpeft import fourier, fused, gates, lowrank, ops
from refpeft.conformance.gradcheck import gradcheck
from refpeft.errors import RefpeftError
from refpeft.tensor import Op, Tensor, parameter, plain

EPS = float(np.finfo("f8").eps)
ALL = OPS + FUSED
shapes = hnp.array_shapes(max_dims=4, max_side=4)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(got, expected, limit=64):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max(initial=0) <= limit * EPS * max(np.abs(expected).max(initial=0), 1e-30)


# ---- all ops alike ---------------------------------------------------------------------------------------------------


def test_no_op_is_missing_from_the_table():
    modules = [path.stem for path in Path(ops.__file__).parent.glob("*.py") if "\n@op" in path.read_text()]
    assert {"ops", "fused", "fourier", "gates", "tensor"} <= set(modules)
    defined = {
        value.name
        for name in modules
        for value in vars(importlib.import_module(f"refpeft.{name}")).values()
        if isinstance(value, Op)
    }
    assert defined - {"_astype", "_recompute"} == {case.op.name for case in ALL}


@pytest.mark.parametrize("case", ALL, ids=str)
def test_values_are_the_formulas(case: Case):
    arrays = case.arrays()
    close(np.asarray(case(*map(Tensor, arrays)).data), case.expected(*arrays))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradients_are_the_finite_differences(case: Case):
    assert gradcheck(case, *case.arrays()) < 1e-7


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_dtype_stays_forward_and_backward(case: Case, dtype: str):
    place = Place(dtype)
    leaves = [parameter(array) for array in case.arrays(place)]
    out = case(*leaves, place=place)
    assert out.dtype == dtype
    out.backward(np.ones(out.shape, dtype))
    assert [leaf.grad.dtype for leaf in leaves] == [dtype] * len(leaves)
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_single_precision_is_right_to_its_last_places(case: Case):
    results = []
    for place in (HOST, Place("f4")):
        leaves = [parameter(array) for array in case.arrays(place)]
        with plain() if "padded" in case.note else nullcontext():  # at padding the faster pair of attention has zeros
            out = case(*leaves, place=place)
        out.backward(place(normal(out.shape)))
        results.append([out.data, *(leaf.grad for leaf in leaves)])
    for double, single in zip(*results, strict=True):
        assert np.abs(single - double).max() <= 64 * np.finfo("f4").eps * np.abs(double).max()


@pytest.mark.parametrize("case", [case for case in ALL if len(case.arrays()) > 1], ids=str)
def test_a_gradient_is_the_same_where_the_other_inputs_are_constants(case: Case):
    arrays = case.arrays()
    together = [parameter(array) for array in arrays]
    out = case(*together)
    g = normal(out.shape)
    out.backward(g)
    for i, array in enumerate(arrays):
        alone = parameter(array)
        case(*(alone if j == i else Tensor(other) for j, other in enumerate(arrays))).backward(g)
        assert np.array_equal(alone.grad, together[i].grad)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_constants_record_nothing(case: Case):
    assert case(*map(Tensor, case.arrays())).node is None


@pytest.mark.parametrize("case", [case for case in ALL if len(case.arrays()) > 1], ids=str)
def test_mixed_dtypes_are_an_error_that_names_the_op(case: Case):
    first, *others = map(Tensor, case.arrays())
    with pytest.raises(RefpeftError, match=rf"^{case.op.name}: the tensors differ in dtype: .*float32.*float64"):
        case(Tensor(first.data.astype("f4")), *others)


def x(*shape):
    return Tensor(np.zeros(shape))


WRONG = {
    "add": lambda: x(2, 3) + x(4),
    "sub": lambda: x(2, 3) - x(4),
    "mul": lambda: x(2, 3) * x(4),
    "div": lambda: x(2, 3) / x(4),
    "maximum": lambda: ops.maximum(x(2, 3), x(4)),
    "where": lambda: ops.where(x(2, 3), x(4), condition=np.ones(3, bool)),
    "softmax": lambda: ops.softmax(x(2, 3), axis=2),
    "log_softmax": lambda: ops.log_softmax(x(2, 3), axis=2),
    "sum": lambda: x(2, 3).sum(axis=2),
    "max": lambda: ops.max(x(2, 3), axis=2),
    "reshape": lambda: x(2, 3).reshape(4),
    "transpose": lambda: x(2, 3).transpose(0, 0),
    "broadcast_to": lambda: ops.broadcast_to(x(2, 3), shape=(2, 4)),
    "concat": lambda: ops.concat(x(2, 3), x(3, 2), axis=0),
    "stack": lambda: ops.stack(x(2, 3), x(3, 2)),
    "getitem": lambda: x(2, 3)[2],
    "take": lambda: ops.take(x(2, 3), indices=np.array([2])),
    "matmul": lambda: x(2, 3) @ x(2, 3),
    "matmul of a vector": lambda: x(2, 3) @ x(3),
    "solve": lambda: ops.solve(x(2, 3), x(2, 1)),
    "solve for a vector": lambda: ops.solve(x(2, 2), x(2)),
    "pick": lambda: fused.pick(x(2, 3, 4), rows=(np.array([0]), np.array([3]))),
    "linear": lambda: ops.linear(x(2, 3), x(4, 2)),
    "linear with a short bias": lambda: ops.linear(x(2, 3), x(4, 3), x(1)),
    "frozen_linear": lambda: fused.frozen_linear(x(2, 3), weight=lambda: np.zeros((4, 2))),
    "frozen_linear with a short bias": lambda: fused.frozen_linear(x(2, 3), x(1), weight=lambda: np.zeros((4, 3))),
    "addmm": lambda: fused.addmm(x(2, 3), x(2, 2), x(3, 4), alpha=1),
    "addmm of one row too many": lambda: fused.addmm(x(2, 3), x(1, 4), x(3, 4), alpha=1),
    "sparse_linear": lambda: fused.sparse_linear(x(2, 3), x(1), rows=np.array([0, 1]), columns=np.array([0, 1]), out=4),
    "add_columns": lambda: fused.add_columns(x(2, 3), x(2, 1), columns=np.array([0, 1])),
    "row_gains": lambda: lowrank.row_gains(x(2, 1), x(2, 3), x(3, 5), weight=lambda: np.ones((2, 5)), alpha=1.0),
    "hadamard_linear": lambda: fused.hadamard_linear(x(2, 3), x(4, 2), x(2, 5), weight=lambda: np.zeros((4, 3))),
    "circulant_linear": lambda: fourier.circulant_linear(x(2, 3), x(1, 2, 2)),
    "spectral_linear": lambda: fourier.spectral_linear(x(2, 3), x(1), places=np.array([0]), shape=(4, 5)),
    "hard_concrete": lambda: gates.hard_concrete(x(2, 3), u=np.ones((3, 2))),
    "gated_linear": lambda: gates.gated_linear(x(2, 3), x(4, 3), x(3, 4), u=gates.MIDDLE),
    "fastfood": lambda: fourier.fastfood(x(2, 3), signs=np.ones(4), order=np.arange(4), gauss=np.ones(4), size=4),
    "embedding": lambda: fused.embedding(x(2, 3), ids=np.array([2])),
    "rms_norm": lambda: fused.rms_norm(x(2, 3), x(1), eps=1e-5),
    "layer_norm": lambda: fused.layer_norm(x(2, 3), x(3), x(2, 3), eps=1e-5),
    "silu_mul": lambda: fused.silu_mul(x(2, 3), x(1, 3)),
    "dropout": lambda: fused.dropout(x(2, 3), rate=1, stream=None),
    "rope": lambda: fused.rope(x(2, 1, 4, 6), cos=np.ones((1, 1, 1, 3)), sin=np.ones((1, 1, 1, 3))),
    "attention with heads that do not divide": lambda: fused.attention(
        x(2, 3, 4, 2), x(2, 2, 4, 2), x(2, 2, 4, 2), mask=fused.Mask(4)
    ),
    "attention with too few keys": lambda: fused.attention(
        x(2, 3, 4, 2), x(2, 3, 3, 2), x(2, 3, 3, 2), mask=fused.Mask(3)
    ),
    "attention with values of other rows": lambda: fused.attention(
        x(2, 3, 4, 2), x(2, 3, 4, 2), x(1, 3, 4, 2), mask=fused.Mask(4)
    ),
    "attention with a bias of other heads": lambda: fused.attention(
        x(2, 3, 4, 2), x(2, 3, 4, 2), x(2, 3, 4, 2), x(1, 2, 4, 4), mask=fused.Mask(4)
    ),
    "cross_entropy": lambda: fused.cross_entropy(x(2, 3), targets=np.zeros(1, int), denominator=1),
    "linear_cross_entropy": lambda: fused.linear_cross_entropy(
        x(2, 3), weight=lambda: np.zeros((4, 3)), targets=np.zeros(3, int), denominator=1
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_shapes_are_an_error_that_names_the_op_and_the_shapes(call, request):
    with pytest.raises(RefpeftError) as caught:
        call()
    name = request.node.callspec.id.split()[0]
    assert str(caught.value).startswith(f"{name}(float64[2, ")


def test_every_op_that_can_be_given_wrong_shapes_was():
    of_any_shape = {
        "neg",
        "power",
        "exp",
        "log",
        "sqrt",
        "abs",
        "relu",
        "tanh",
        "sigmoid",
        "silu",
        "gelu",
        "sin",
        "cos",
    }
    assert {case.op.name for case in ALL} == of_any_shape | {name.split()[0] for name in WRONG}


def test_an_op_needs_a_tensor():
    with pytest.raises(RefpeftError, match=r"^add: expected at least one Tensor among float64\[2\], 1"):
        ops.add(np.zeros(2), 1)


def test_what_is_no_number_is_an_error_that_names_the_op():
    with pytest.raises(RefpeftError, match=r"^add\(float64\[2\], str\)"):
        x(2) + "one"


def test_a_result_of_another_dtype_is_an_error_that_names_the_op():
    narrow = Tensor(np.zeros((2, 3), "f4"))
    with pytest.raises(RefpeftError, match=r"^frozen_linear\(float32\[2, 3\]\) gave float64: expected float32"):
        fused.frozen_linear(narrow, weight=lambda: np.zeros((4, 3)))


# ---- constants -------------------------------------------------------------------------------------------------------

CONSTANTS = [2, 2.5, True, np.float64(2.5), np.int64(2), np.array(2.5), np.full((3, 4), 2.5), [1.0, 2.0, 3.0, 4.0]]
BINARY = [ops.add, ops.sub, ops.mul, ops.div, ops.maximum]


@pytest.mark.parametrize("constant", CONSTANTS, ids=repr)
@pytest.mark.parametrize("op", BINARY, ids=lambda op: op.name)
def test_numbers_and_plain_arrays_take_the_dtype_of_the_tensor(op: Op, constant):
    leaf = parameter(np.ones((3, 4), "f4"))
    for out in (op(leaf, constant), op(constant, leaf)):
        out.backward()
        assert out.dtype == leaf.grad.dtype == np.float32


def test_operators_are_the_ops_on_either_side():
    a, b = normal((3, 3)), normal((3, 3), 1)
    for left, right in ((Tensor(a), Tensor(b)), (Tensor(a), b), (a, Tensor(b))):
        assert np.array_equal((left + right).data, a + b)
        assert np.array_equal((left - right).data, a - b)
        assert np.array_equal((left * right).data, a * b)
        assert np.array_equal((left / right).data, a / b)
        assert np.array_equal((left @ right).data, a @ b)
    x = Tensor(a)
    assert np.array_equal((-x).data, -a)
    assert np.array_equal((x**2).data, a**2)
    assert np.array_equal((1 - x).data, 1 - a)
    assert np.array_equal(x.T.data, a.T)
    assert np.array_equal(x.reshape(9).data, a.reshape(9))
    assert np.array_equal(x.transpose(1, 0).data, a.T)
    assert np.array_equal(x[1:, 0].data, a[1:, 0])
    assert np.array_equal(x.sum(axis=0).data, a.sum(axis=0))
    close(x.mean(axis=1, keepdims=True).data, a.mean(axis=1, keepdims=True))


def test_a_tensor_unpacks_along_its_first_axis():
    leaf = parameter(normal((3, 2)))
    first, _, last = leaf
    (first * 2 + last).sum().backward()
    assert np.array_equal(leaf.grad, [[2, 2], [0, 0], [1, 1]])


# ---- broadcasting ----------------------------------------------------------------------------------------------------


@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=3), st.sampled_from(BINARY))
def test_gradients_of_broadcast_inputs_have_their_shapes(pair, op):
    a, b = normal(pair.input_shapes[0]), 3 + abs(normal(pair.input_shapes[1], 1))
    assert op(Tensor(a), Tensor(b)).shape == pair.result_shape
    assert gradcheck(op, a, b) < 1e-7


@given(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3))
def test_where_broadcasts_all_three(found):
    condition = normal(found.input_shapes[0]) > 0
    a, b = normal(found.input_shapes[1], 1), normal(found.input_shapes[2], 2)
    # NumPy's where broadcasts the condition too; a gradient never flows to it
    assert np.array_equal(ops.where(Tensor(a), Tensor(b), condition=condition).data, np.where(condition, a, b))
    assert gradcheck(lambda a, b: ops.where(a, b, condition=condition), a, b) < 1e-7


@given(hnp.mutually_broadcastable_shapes(signature="(m,n),(n,p)->(m,p)", max_dims=2, max_side=3))
def test_matmul_broadcasts_stacks(pair):
    a, b = (normal(shape, i) for i, shape in enumerate(pair.input_shapes))
    assert ops.matmul(Tensor(a), Tensor(b)).shape == pair.result_shape
    assert gradcheck(ops.matmul, a, b) < 1e-7


@given(hnp.mutually_broadcastable_shapes(signature="(m,m),(m,p)->(m,p)", max_dims=2, max_side=3))
def test_solve_broadcasts_stacks(pair):
    a, b = (normal(shape, i) for i, shape in enumerate(pair.input_shapes))
    a = a + 5 * np.eye(a.shape[-1])
    assert ops.solve(Tensor(a), Tensor(b)).shape == pair.result_shape
    assert gradcheck(ops.solve, a, b) < 1e-7


def test_where_refuses_a_condition_that_is_not_boolean():
    for condition in (np.ones(3), x(3)):
        with pytest.raises(
            RefpeftError, match=r"^where\(float64\[3\], 1\.0\): condition is float64: expected booleans"
        ):
            ops.where(x(3), 1.0, condition=condition)


# ---- reductions ------------------------------------------------------------------------------------------------------


@given(st.data(), st.booleans())
def test_reductions_over_any_axes(data, keepdims):
    shape = data.draw(shapes)
    axis = data.draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1), hnp.valid_tuple_axes(len(shape))))
    if axis == ():
        axis = None
    a = normal(shape)
    options = {"axis": axis, "keepdims": keepdims}
    for op, numpys in ((ops.sum, np.sum), (ops.mean, np.mean), (ops.max, np.max)):
        close(np.asarray(op(Tensor(a), **options).data), np.asarray(numpys(a, **options)))
        assert gradcheck(lambda x, op=op: op(x, **options), a) < 1e-7


def test_equal_maxima_share_the_gradient():
    leaf = parameter(np.array([1.0, 3.0, 3.0]))
    ops.max(leaf).backward()
    assert np.array_equal(leaf.grad, [0, 0.5, 0.5])
    a, b = parameter(np.array([1.0, 2.0])), parameter(np.array([1.0, 0.0]))
    ops.maximum(a, b).backward()
    assert np.array_equal(a.grad, [0.5, 1]) and np.array_equal(b.grad, [0.5, 0])
    c = parameter(np.array([1.0, 2.0]))
    ops.minimum(c, 1.0).backward()
    assert np.array_equal(c.grad, [0.5, 0])


def test_softmax_neither_overflows_nor_loses_small_logarithms():
    big = Tensor(np.array([1000.0, 0.0, -1000.0]))
    assert np.array_equal(ops.softmax(big).data, [1, 0, 0])
    assert np.array_equal(ops.log_softmax(big).data, [0, -1000, -2000])
    assert np.array_equal(ops.sigmoid(big).data, [1, 0.5, 0])


# ---- shapes and picking ----------------------------------------------------------------------------------------------


@given(st.data())
def test_getitem_by_any_basic_key(data):
    shape = data.draw(shapes)
    key = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    a = normal(shape)
    leaf = parameter(a)
    out = leaf[key]
    assert np.array_equal(out.data, a[key])
    g = normal(out.shape, 1)
    out.backward(g)
    expected = np.zeros(shape)
    expected[key] = g
    assert np.array_equal(leaf.grad, expected)


@pytest.mark.parametrize("key", [[0, 1], np.array([0, 1]), np.array([True, False]), True, (0, [1]), "a", 1.0], ids=repr)
def test_other_keys_are_refused(key):
    with pytest.raises(RefpeftError, match=r"^getitem\(float64\[2, 3\].*ops.take picks by an array"):
        x(2, 3)[key]


@given(hnp.arrays(np.int64, hnp.array_shapes(max_dims=3, max_side=4), elements=st.integers(-4, 3)))
def test_take_adds_up_the_gradients_of_rows_taken_twice(indices):
    leaf = parameter(normal((4, 2)))
    out = ops.take(leaf, indices=indices)
    assert np.array_equal(out.data, leaf.data[indices])
    out.backward()
    counts = np.bincount(indices.reshape(-1) % 4, minlength=4)
    assert np.array_equal(leaf.grad, np.stack([counts, counts], axis=1))


def test_take_refuses_a_mask():
    with pytest.raises(RefpeftError, match=r"^take\(float64\[2, 3\]\): indices are bool: expected integers"):
        ops.take(x(2, 3), indices=np.array([True, False]))


@given(st.data(), st.integers(1, 4))
def test_concat_and_stack_give_each_its_part_of_the_gradient(data, count):
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    parts = [normal(tuple(n if i == axis % len(shape) else m for i, m in enumerate(shape)), n) for n in sizes]
    assert np.array_equal(ops.concat(*map(Tensor, parts), axis=axis).data, np.concatenate(parts, axis))
    assert gradcheck(lambda *xs: ops.concat(*xs, axis=axis), *parts) < 1e-7
    same = [normal(shape, j) for j in range(count)]
    assert np.array_equal(ops.stack(*map(Tensor, same), axis=axis).data, np.stack(same, axis))
    assert gradcheck(lambda *xs: ops.stack(*xs, axis=axis), *same) < 1e-7


@given(st.data())
def test_transpose_by_any_permutation(data):
    shape = data.draw(shapes)
    axes = data.draw(st.permutations(range(len(shape))))
    a = normal(shape)
    assert np.array_equal(Tensor(a).transpose(*axes).data, a.transpose(axes))
    assert gradcheck(lambda x: x.transpose(*axes), a) < 1e-7


def test_detach_stops_the_gradient():
    leaf = parameter(normal(3))
    (leaf * ops.detach(leaf)).backward()
    assert np.array_equal(leaf.grad, leaf.data)


# ---- nothing is kept for inputs that need no gradient ----------------------------------------------------------------


def kept(tensor: Tensor) -> list:
    return [a for a in tensor.node.saved if isinstance(a, np.ndarray)]


def keeps(tensor: Tensor, *arrays) -> bool:
    """Whether the node holds exactly these arrays."""
    return {id(a) for a in kept(tensor)} == {id(a) for a in arrays}


@pytest.mark.parametrize("case", [case for case in ALL if len(case.arrays()) > 1], ids=str)
def test_one_trained_input_keeps_no_more_than_all(case: Case):
    arrays = case.arrays()
    everything = sum(a.nbytes for a in kept(case(*map(parameter, arrays))))
    for i, array in enumerate(arrays):
        alone = case(*(parameter(array) if j == i else Tensor(other) for j, other in enumerate(arrays)))
        assert sum(a.nbytes for a in kept(alone)) <= everything


def test_products_keep_only_the_other_factor():
    a, b = normal((3, 3)), normal((3, 3), 1)
    for op in (ops.mul, ops.matmul):
        assert keeps(op(parameter(a), Tensor(b)), b)
        assert keeps(op(Tensor(a), parameter(b)), a)
        assert keeps(op(parameter(a), parameter(b)), a, b)
    assert keeps(ops.div(parameter(a), Tensor(b)), b)


def test_linear_keeps_no_input_of_a_constant_weight():
    a, w, b = normal((3, 4)), normal((5, 4), 1), normal(5, 2)
    assert keeps(ops.linear(parameter(a), Tensor(w), Tensor(b)), w)
    assert keeps(ops.linear(Tensor(a), parameter(w), Tensor(b)), a)
    assert keeps(ops.linear(Tensor(a), Tensor(w), parameter(b)))


def test_sums_and_shapes_keep_nothing():
    leaf = parameter(normal((3, 4)))
    for out in (leaf + 1, leaf - leaf, -leaf, leaf.sum(), leaf.T, leaf.reshape(12), leaf[1:], ops.concat(leaf, leaf)):
        assert keeps(out)
