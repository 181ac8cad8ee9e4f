"""Faster pairs beside an op's own: when they are taken; and gradients that are there in part only."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refpeft import ops, tensor
from refpeft.absent import absent
from refpeft.conformance import device
from refpeft.errors import RefpeftError
from refpeft.tape import ADDED, Slice, Total
from refpeft.tensor import Tensor, no_grad, op, parameter


@pytest.fixture
def scale():
    """An op that doubles, whose faster pair triples but refuses vectors."""

    @op
    def scale(needs, x, b=None, *, fail=False):
        if fail:
            raise ValueError("as asked")
        return x * 2, ()

    @scale.backward
    def _(g):
        return (g * 2, None)

    @scale.override(np.ndarray, "f4")
    def faster(needs, x, b=None, *, fail=False):
        return NotImplemented if x.ndim == 1 or fail == "refuse" else (x * 3, (needs,))

    @faster.backward
    def _(g, needs):
        return (g * 3, None)

    return scale


def matrix(dtype="f4"):
    return np.ones((2, 2), dtype)


def factor(scale, x, **options):
    """What the op multiplies by, the same forward and backward."""
    leaf = parameter(x)
    y = scale(leaf, None, **options)
    y.backward()
    assert np.array_equal(leaf.grad, y.data)
    return float(y.data.ravel()[0])


@pytest.fixture
def doubled():
    """An op that doubles, in the memory of its input where that is spare."""

    @op
    def doubled(needs, x, *, by):
        return x * by, ()

    @doubled.override(np.ndarray, "f4", takes_over=True)
    def in_place(needs, x, *, by, spare):
        return np.multiply(x, by, out=x if spare else None), ()

    return doubled


def test_a_pair_takes_over_an_array_that_nobody_else_has(doubled):
    addresses = []

    def made() -> Tensor:
        array = matrix()
        addresses.append(array.ctypes.data)
        return Tensor(array)

    y = doubled(made(), by=2)
    assert y.data.ctypes.data == addresses[0]
    array = matrix()
    held = Tensor(array[:1].copy())
    for x in (held, Tensor(array), Tensor(array[:1]), Tensor(array[:1].T)):
        doubled(x, by=2)
        assert (x.data == 1).all()
    doubled(Tensor(array), by=2)
    assert (array == 1).all()


# ---- when it is taken ------------------------------------------------------------------------------------------------


def test_a_faster_pair_is_taken_forward_and_backward_for_its_kind_of_array(scale):
    assert factor(scale, matrix()) == 3
    assert factor(scale, matrix("f8")) == 2


def test_it_is_asked_first_and_the_plain_pair_of_what_it_refuses(scale):
    x = parameter(np.ones(2, "f4"))
    y = scale(x, None)
    assert y.node.op is scale and np.array_equal(y.data, [2, 2])
    with pytest.raises(RefpeftError, match=r"^scale\(float32\[2, 2\], None, fail='refuse'\): as asked$"):
        scale(parameter(matrix()), None, fail="refuse")


def test_the_kind_is_that_of_the_first_tensor(scale):
    assert scale(matrix(), Tensor(matrix())).data[0, 0] == 3
    assert scale(parameter(absent((2, 2))), Tensor(matrix())).node.op is scale


def test_subclasses_and_arrays_of_a_device_get_the_plain_pair(scale, monkeypatch):
    class Own(np.ndarray):
        pass

    assert factor(scale, matrix().view(Own)) == 2
    assert scale(parameter(absent((2, 2)))).node.op is scale
    xp = device.install(monkeypatch)
    assert scale(parameter(xp.asarray(matrix()))).node.op is scale


def test_within_plain_it_is_left_aside_and_back_after_it(scale):
    with tensor.plain():
        assert factor(scale, matrix()) == 2
        with pytest.raises(ZeroDivisionError), tensor.plain():
            raise ZeroDivisionError
        assert factor(scale, matrix()) == 2
    assert factor(scale, matrix()) == 3


def test_what_was_recorded_goes_back_as_it_came(scale):
    x = parameter(matrix())
    y = scale(x, None)
    with tensor.plain():
        y.backward()
    assert np.array_equal(x.grad, 3 * matrix())


def test_plain_is_of_one_thread(scale):
    seen = []
    with tensor.plain():
        thread = threading.Thread(target=lambda: seen.append(factor(scale, matrix())))
        thread.start()
        thread.join()
    assert seen == [3]


def test_it_is_told_what_is_needed(scale):
    assert scale(parameter(matrix()), Tensor(matrix())).node.saved == ((True, False),)
    with no_grad():
        assert scale(parameter(matrix()), None).node is None


def test_its_node_has_the_name_of_the_op(scale):
    y = scale(parameter(matrix()), None)
    assert repr(y) == "Tensor(scale, (2, 2), float32)"
    y.backward()
    with pytest.raises(RefpeftError, match=r"^backward\(\) twice through the same scale"):
        y.backward()


def test_its_errors_and_a_wrong_dtype_are_told_as_those_of_the_plain_pair():
    @op
    def half(needs, x):
        return x / 2, ()

    @half.override(np.ndarray, "f4")
    def _(needs, x):
        return (x.no_such_thing if x.ndim == 1 else x.astype("f8")), ()

    with pytest.raises(RefpeftError, match=r"^half\(float32\[2\]\): .*no_such_thing"):
        half(parameter(np.ones(2, "f4")))
    with pytest.raises(RefpeftError, match=r"^half\(float32\[2, 2\]\) gave float64: expected float32$"):
        half(parameter(matrix()))


# ---- gradients that are there already --------------------------------------------------------------------------------


def test_one_may_add_to_a_gradient_in_place_or_give_the_sum_where_others_have_it_too():
    @op
    def double(needs, x):
        return 2 * x, ()

    @double.override(np.ndarray, "f4")
    def doubled(needs, x):
        return 2 * x, ()

    found = []

    @doubled.backward(into=True, onto=True)
    def _(g, into, onto):
        found.append((into[0] is not None, onto[0] is not None))
        if into[0] is not None:
            into[0][...] += 2 * g
            return (ADDED,)
        return (2 * g if onto[0] is None else Total(onto[0] + 2 * g),)

    x, g = parameter(matrix()), matrix() + 1
    before = g.copy()
    y = x * 1.0
    z = y + double(y)
    (z + double(z)).backward(g)
    assert found == [(False, True)] * 2
    assert np.array_equal(x.grad, 9 * before) and np.array_equal(g, before)
    found.clear()
    double(x).backward()
    double(x * 1.0).backward()
    assert found == [(True, False), (False, False)]


# ---- gradients that are there in part --------------------------------------------------------------------------------

PARTS = st.sampled_from(
    [
        np.s_[:],
        np.s_[0],
        np.s_[1:3],
        np.s_[..., :2],
        np.s_[:, -1],
        np.s_[2:2],
        np.s_[::2, 1:],
        np.s_[None, 1],
        np.s_[3, 4],
    ]
)


@given(st.lists(PARTS, min_size=1, max_size=6), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 99))
def test_parts_of_a_tensor_add_up_to_its_gradient(parts, leaf, preset, wholes, seed):
    rng = np.random.default_rng(seed)
    x, expected = parameter(rng.standard_normal((4, 5))), np.zeros((4, 5))
    if preset:
        x.node.grad = expected = rng.standard_normal((4, 5))
        buffer, expected = x.grad, expected.copy()
    inner = x if leaf else x + 0.0
    terms = []
    for part in parts:
        weights = rng.standard_normal(x.data[part].shape)
        terms.append((inner[part] * weights).sum())
        expected[part] += weights
    for _ in range(wholes):
        weights = rng.standard_normal(x.shape)
        terms.append((inner * weights).sum())
        expected += weights
    rng.shuffle(terms)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    total.backward()
    assert np.allclose(x.grad, expected, rtol=0, atol=1e-12)
    assert not preset or x.grad is buffer


def test_a_gradient_that_two_have_is_not_written_into():
    a, b, g = parameter(np.zeros((3, 2))), parameter(np.zeros((3, 2))), np.ones((3, 2))
    left, right = a + 0.0, b + 0.0
    both = left + right  # hands the same array to both
    total = ops.sum(left[1:]) + ops.sum(left * 2.0) + ops.sum(both * g)
    total.backward()
    assert np.array_equal(b.grad, g)
    assert np.array_equal(a.grad, [[3, 3], [4, 4], [4, 4]])


def test_a_slice_is_an_array_of_the_whole():
    found = Slice((3, 4), np.s_[1:, 0], np.ones(2, "f4")).whole()
    assert found.dtype == np.float32 and np.array_equal(found, [[0] * 4, [1, 0, 0, 0], [1, 0, 0, 0]])
