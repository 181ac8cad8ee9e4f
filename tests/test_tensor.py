"""The tape: how gradients add up, what is an error, and that it goes away."""

import gc
import threading
import weakref

import numpy as np
import pytest

from refpeft import ops, tensor
from refpeft.errors import RefpeftError
from refpeft.tape import ADDED, before_leaves
from refpeft.tensor import Op, Tensor, no_grad, op, parameter


def leaf(*values: float) -> Tensor:
    return parameter(np.array(values, "f8"))


# ---- gradients add up ------------------------------------------------------------------------------------------------


def test_backward_starts_from_ones_or_from_what_is_given():
    x = leaf(1, 2, 3)
    (x * 2).backward()
    assert np.array_equal(x.grad, [2, 2, 2])
    x = leaf(1, 2, 3)
    (x * 2).backward(np.array([1.0, 0, -1]))
    assert np.array_equal(x.grad, [2, 0, -2])


def test_a_tensor_used_twice_gets_the_sum():
    x = leaf(1, 2)
    y = x * x
    (y + y + x).backward()
    assert np.array_equal(x.grad, 4 * x.data + 1)


def test_the_same_tensor_on_both_sides_of_a_sum_gets_twice_the_gradient():
    x = leaf(1, 2)
    (x + x).backward()
    assert np.array_equal(x.grad, [2, 2])


def test_two_leaves_of_one_sum_do_not_share_their_gradient():
    a, b = leaf(1, 2), leaf(3, 4)
    g = np.ones(2)
    (a + b).backward(g)
    a.node.grad += 10
    assert np.array_equal(b.grad, [1, 1]) and np.array_equal(g, [1, 1])


def test_views_of_the_incoming_gradient_are_not_written_into():
    x, g = leaf(1, 2, 3, 4), np.ones((2, 2))
    y = x.reshape(2, 2)
    (y + y.T + y).backward(g)
    assert np.array_equal(x.grad, [3, 3, 3, 3]) and np.array_equal(g, np.ones((2, 2)))


def test_gradients_of_several_passes_add_up_in_a_leaf():
    x = leaf(1, 2)
    for _ in range(3):
        (x * x).backward()
    assert np.array_equal(x.grad, 6 * x.data)


def test_a_preset_gradient_buffer_is_added_to_in_place():
    flat = np.array([5.0, 5, 7])
    x, y = leaf(1, 2), parameter(np.array(3.0))
    x.node.grad, y.node.grad = flat[:2], flat[2:].reshape(())
    (x * y).backward()
    assert np.array_equal(flat, [8, 8, 10])
    assert np.shares_memory(x.grad, flat) and np.shares_memory(y.grad, flat)


def test_a_leaf_is_its_own_derivative():
    x = leaf(1, 2)
    x.backward()
    x.backward()
    assert np.array_equal(x.grad, [2, 2])


def test_a_constant_beside_a_leaf_gets_no_gradient():
    x, c = leaf(1, 2), Tensor(np.array([3.0, 4.0]))
    y = x * c
    y.backward()
    assert c.grad is None and y.node.parents == ()
    assert np.array_equal(x.grad, c.data)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_backward_twice_is_an_error_that_names_the_op():
    x = leaf(1, 2)
    y = ops.exp(x) + 1
    y.backward()
    with pytest.raises(RefpeftError, match=r"^backward\(\) twice through the same add: the first call freed the tape"):
        y.backward()


def test_backward_through_a_part_that_is_freed_is_an_error_that_names_the_op():
    shared = ops.exp(leaf(1, 2))
    first, second = shared * 2, shared * 3
    first.backward()
    with pytest.raises(RefpeftError, match=r"^backward\(\) twice through the same exp"):
        second.backward()


def test_backward_of_a_constant_is_an_error():
    with pytest.raises(
        RefpeftError, match=r"^backward\(\) of a constant: nothing that it was computed from is trained"
    ):
        (Tensor(np.ones(2)) * 2).backward()


def test_a_gradient_of_another_shape_is_an_error():
    with pytest.raises(RefpeftError, match=r"^backward\(\): grad has shape \[3\]: expected \[2\]"):
        (leaf(1, 2) * 2).backward(np.ones(3))


def test_an_op_without_a_backward_says_so():
    @op
    def half(needs, x):
        return x / 2, ()

    with pytest.raises(NotImplementedError, match="this op has no backward"):
        half(leaf(1)).backward()


def test_a_tensor_says_what_it_is():
    x = leaf(1, 2)
    assert repr(x) == "Tensor(leaf, (2,), float64)"
    assert repr(x * 2) == "Tensor(mul, (2,), float64)"
    assert repr(ops.detach(x)) == "Tensor(constant, (2,), float64)"
    assert repr(ops.mul) == "<op mul>"
    assert ops.mul.__doc__ == "a * b"


# ---- the tape --------------------------------------------------------------------------------------------------------


def test_twenty_thousand_ops_need_no_recursion():
    x = leaf(0.5)
    y = x
    for _ in range(20_000):
        y = y + x
    y.backward()
    assert x.grad[0] == 20_001
    y = x
    for _ in range(20_000):
        y = y * 1.0
    del y  # dropped without a backward pass


def test_backward_frees_what_was_saved_though_the_result_is_still_held():
    x = leaf(1, 2)
    hidden = ops.exp(Tensor(x.data.copy(), x.node))
    saved = weakref.ref(hidden.data)
    loss = (hidden * 2).sum()
    del hidden
    assert saved() is not None  # exp reads its result in backward
    loss.backward()
    assert saved() is None
    assert loss.node.saved is None and loss.node.parents == ()


def test_a_tape_that_is_dropped_is_freed_without_the_garbage_collector():
    x = leaf(1, 2)
    gc.disable()
    try:
        loss = ops.exp(Tensor(x.data.copy(), x.node)).sum()
        saved = weakref.ref(loss.node.parents[0].saved[0])
        assert saved() is not None
        del loss
        assert saved() is None
    finally:
        gc.enable()


def test_nothing_is_recorded_within_no_grad():
    x = leaf(1, 2)
    with no_grad():
        assert (x * 2).node is None
        with no_grad():
            pass
        assert (x * 2).node is None
    assert (x * 2).node is not None


def test_recording_is_back_after_an_error():
    x = leaf(1, 2)
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert (x * 2).node is not None


def test_each_thread_records_for_itself():
    x, seen, inside, done = leaf(1, 2), {}, threading.Event(), threading.Event()

    def quiet():
        with no_grad():
            inside.set()
            done.wait(10)
            seen["quiet"] = (x * 2).node

    thread = threading.Thread(target=quiet)
    thread.start()
    inside.wait(10)
    seen["main"] = (x * 2).node
    done.set()
    thread.join()
    assert seen["quiet"] is None and seen["main"] is not None


# ---- what is made again ----------------------------------------------------------------------------------------------


def cube_that_is_made_again(made: list[str], beside_gradients: bool) -> Op:
    """x^3, of which `made` is told where it is made again, alone or beside its gradients, if these may bring it."""

    @op
    def cube(needs, x):
        return x**3, (x,)

    @cube.override(np.ndarray, "f8")
    def fast(needs, x):
        return x**3, (x,)

    @fast.recomputed
    def _(x):
        made.append("again")
        return x**3

    @fast.backward(again=beside_gradients)
    def _(g, x, again=False):
        if not again:
            return (g * 3 * x**2,)
        made.append("on the way back")
        return g * 3 * x**2, x**3

    return cube


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_output_that_can_be_made_again_is_not_kept_by_who_reads_it(length: int, monkeypatch):
    """One that is made of another such output keeps that."""
    monkeypatch.setattr(tensor, "WORTH_MAKING_AGAIN", 0)
    made = []
    cube = cube_that_is_made_again(made, beside_gradients=False)

    @op
    def square(needs, x):
        return x**2, (x,)

    @square.override(np.ndarray, "f8")
    def fast_square(needs, x):
        return x**2, (x,)

    @fast_square.backward
    def _(g, x):
        return (g * 2 * x,)

    x = leaf(2, -1)
    y = x
    for _ in range(length):
        y = cube(y)
    (square(y) + square(y)).backward()
    power = 2 * 3**length
    assert np.array_equal(x.grad, 2 * power * x.data ** (power - 1))
    assert len(made) == 1


@pytest.mark.parametrize("at_once", [0, 1, 2])
@pytest.mark.parametrize("later", [1, 2])
def test_who_can_wait_gets_an_output_from_the_way_back_through_what_gave_it(later: int, at_once: int, monkeypatch):
    """Others beside it have it made again."""
    monkeypatch.setattr(tensor, "WORTH_MAKING_AGAIN", 0)
    made = []
    cube = cube_that_is_made_again(made, beside_gradients=True)

    def pair(waits: bool) -> Op:
        found = Op(None, "product")
        found.stands_in = True

        @found.backward(into=True, waits=waits)
        def _(g, x, w, into):
            if not waits:
                return g * w, g * x
            x.later(lambda x: np.add(into[1], g * x, out=into[1]))
            return g * w, ADDED

        return found

    x, w = leaf(2, -1), leaf(3, 5)
    w.node.grad = np.zeros(2)
    y = cube(x)
    total = None
    for waits in [True] * later + [False] * at_once:
        each = pair(waits).made(y.data * w.data, (True, True), (y, w), (y.data, w.data))
        total = each if total is None else total + each
    total.backward()
    count = later + at_once
    assert np.array_equal(w.grad, count * x.data**3)
    assert np.array_equal(x.grad, count * w.data * 3 * x.data**2)
    assert sorted(made) == ["again"] * (at_once > 0) + ["on the way back"]


@pytest.mark.parametrize("beside", [False, True])
def test_before_the_gradient_of_a_leaf_is_added_to_it_is_named_unless_the_pair_sees_to_that(beside: bool):
    x, w = leaf(2, -1), leaf(3, 5)
    w.node.grad = np.zeros(2)
    by = Op(None, "product")

    @by.backward(into=True, beside=beside)
    def _(g, x, w, into):
        into[1][...] += g * x
        return g * w, ADDED

    named = []
    with before_leaves(named.append):
        by.made(x.data * w.data, (True, True), (x, w), (x.data, w.data)).backward()
        assert [each is w.grad for each in named] == [True] * (not beside)
        named.clear()
        (x * w).backward()
    assert any(each is w.grad for each in named) and any(each is x.grad for each in named)
