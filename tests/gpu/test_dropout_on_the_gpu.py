"""Dropout on the GPU has the masks of the host, bit for bit, in eager and in captured steps."""

import cupy
import numpy as np
import pytest

from refpeft import fused
from refpeft.backend import bfloat16, to_host
from refpeft.rng import Order, Slots, Step, Stream
from refpeft.tape import ADDED
from refpeft.tensor import parameter, plain

every_dtype = pytest.mark.parametrize("dtype", [bfloat16, np.dtype("f4")], ids=lambda dtype: dtype.name)


def drawn(*shape: int, dtype: np.dtype) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def dropped(x: np.ndarray, rate: float, stream: Stream) -> np.ndarray:
    """As fused.dropout defines it: in float32, and rounded once."""
    keep = stream.keeps(x.size, rate).reshape(x.shape)
    return (x.astype("f4") * keep * np.float32(1 / (1 - rate))).astype(x.dtype)


@every_dtype
@pytest.mark.parametrize("skipped", [0, 8, 3, 2**34 - 4])
@pytest.mark.parametrize("shape", [(64,), (7, 5), (3, 1000), (1,)])
def test_it_is_the_hosts_bit_for_bit(dtype: np.dtype, shape: tuple[int, ...], skipped: int):
    x, rate, seed = drawn(*shape, dtype=dtype), 0.3, 2**33 + 5
    leaf, stream = parameter(cupy.asarray(x)), Stream(seed, "mask", xp=cupy).skip(skipped)
    out = fused.dropout(leaf, rate=rate, stream=stream)
    assert out.node.op.stands_in and out.dtype == dtype
    assert sum(part.nbytes for part in out.node.saved if isinstance(part, cupy.ndarray)) == 0
    assert np.array_equal(to_host(out.data), dropped(x, rate, Stream(seed, "mask").skip(skipped)))
    g = drawn(*shape, dtype=dtype)[::-1].copy()
    out.backward(cupy.asarray(g))
    assert leaf.grad.dtype == dtype
    assert np.array_equal(to_host(leaf.grad), dropped(g, rate, Stream(seed, "mask").skip(skipped)))


@every_dtype
@pytest.mark.parametrize(
    ("shape", "width"), [((5, 3, 16), 16), ((5, 4, 6), 6), ((7, 40), 40), ((3, 5), 5), ((2, 8, 3), 3)]
)
def test_rows_that_lie_otherwise_on_the_host_have_its_masks(dtype: np.dtype, shape: tuple[int, ...], width: int):
    x, row = drawn(*shape, dtype=dtype), int(np.prod(shape[1:]))
    begins = np.random.default_rng(1).permutation(40)[: shape[0]].astype("i4")
    order = begins[:, None] * width + np.arange(row)
    keep = Stream(1, "mask").keeps(40 * width + row, 0.3)[order].reshape(shape)
    leaf = parameter(cupy.asarray(x))
    stream = Stream(1, "mask", xp=cupy).of(Order(cupy.asarray(begins), row, width))
    out = fused.dropout(leaf, rate=0.3, stream=stream)
    assert out.node.op.stands_in
    out.backward(cupy.asarray(x))
    expected = (x.astype("f4") * keep * np.float32(1 / 0.7)).astype(dtype)
    assert np.array_equal(to_host(out.data), expected) and np.array_equal(to_host(leaf.grad), expected)
    with plain():
        again = fused.dropout(parameter(cupy.asarray(x)), rate=0.3, stream=stream)
    assert np.array_equal(to_host(again.data), expected)


@every_dtype
def test_what_lies_elsewhere_or_otherwise_in_memory(dtype: np.dtype):
    whole = drawn(9, 24, dtype=dtype)
    columns = (lambda a: a[:, :16], lambda a: a[:, 8:16], lambda a: a[:, 3:19], lambda a: a.reshape(3, 3, 24)[..., :8])
    for part in (*columns, lambda a: a[1:, :], lambda a: a.reshape(-1)[3:], lambda a: a.T, lambda a: a[:, ::2]):
        leaf = parameter(part(cupy.asarray(whole)))
        out = fused.dropout(leaf, rate=0.5, stream=Stream(1, xp=cupy))
        expected = dropped(np.ascontiguousarray(part(whole)), 0.5, Stream(1))
        assert np.array_equal(to_host(out.data), expected)
        out.backward(part(cupy.asarray(whole)))
        assert np.array_equal(to_host(leaf.grad), expected)


@every_dtype
@pytest.mark.parametrize("shape", [(9, 24), (3, 5), (2, 3, 16)])
def test_its_gradient_is_added_to_one_that_is_there(dtype: np.dtype, shape: tuple[int, ...]):
    x, there = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype)[::-1].copy()
    pair = fused.dropout.overrides[cupy.ndarray, dtype]
    _, saved = pair.forward((True,), cupy.asarray(x), rate=0.5, stream=Stream(1, xp=cupy))
    alone = to_host(pair.vjp(cupy.asarray(x), *saved, into=(None,))[0]).astype("f4")
    onto, unfit = cupy.asarray(there), cupy.asarray(there).T.copy().T
    assert pair.vjp(cupy.asarray(x), *saved, into=(onto,)) == (ADDED,)
    assert np.array_equal(to_host(onto), (there.astype("f4") + alone).astype(dtype))
    if len(shape) > 1 and not unfit.flags.c_contiguous:
        assert np.array_equal(to_host(pair.vjp(cupy.asarray(x), *saved, into=(unfit,))[0]).astype("f4"), alone)


@every_dtype
@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.999999])
def test_at_the_ends_of_the_range(dtype: np.dtype, rate: float):
    x = drawn(400, dtype=dtype)
    out = fused.dropout(parameter(cupy.asarray(x)), rate=rate, stream=Stream(1, xp=cupy))
    assert np.array_equal(to_host(out.data), dropped(x, rate, Stream(1)))


@every_dtype
def test_the_stream_goes_on_behind_it(dtype: np.dtype):
    here, there = Stream(1, "a"), Stream(1, "a", xp=cupy)
    for n in (3, 8, 5):
        x = drawn(n, dtype=dtype)
        out = fused.dropout(parameter(cupy.asarray(x)), rate=0.4, stream=there)
        assert np.array_equal(to_host(out.data), dropped(x, 0.4, here))


@every_dtype
def test_a_captured_step_has_the_masks_of_the_step_that_it_runs_as(dtype: np.dtype):
    x = drawn(5, 24, dtype=dtype)
    graphs = cupy.cuda.Stream(non_blocking=True)
    with graphs:  # which waits for nothing on the default stream
        there, slots = cupy.asarray(x), Slots(cupy)

    def step(number: int):
        found = []
        for site in range(3):
            leaf = parameter(there)
            stream = Stream(7, "dropout", site, Step(number), 0, xp=cupy).skip(4 * site)
            out = fused.dropout(leaf, rate=0.3, stream=stream)
            out.backward(there)
            found += [out.data, leaf.grad]
        uniform = Stream(7, "gates", Step(number), xp=cupy).uniform(0, 1, (3, 5))
        return [*found, uniform]

    with graphs:
        step(0)
        with slots.recording():
            graphs.begin_capture()
            captured = step(1)
            graph = graphs.end_capture()
        for number in (1, 2, 300):
            slots.refill(number)
            graph.launch(graphs)
            graphs.synchronize()
            for site in range(3):
                expected = dropped(x, 0.3, Stream(7, "dropout", site, number, 0).skip(4 * site))
                assert np.array_equal(to_host(captured[2 * site]), expected)
                assert np.array_equal(to_host(captured[2 * site + 1]), expected)
            assert np.array_equal(to_host(captured[-1]), Stream(7, "gates", number).uniform(0, 1, (3, 5)))
