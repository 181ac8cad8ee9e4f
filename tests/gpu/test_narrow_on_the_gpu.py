"""du = g up and dB = g^T u of layers side by side from one pass over g: what products give, always the same bits."""

import cupy
import numpy as np
import pytest
from test_linear_on_the_gpu import EPS, close, drawn
from test_lowrank_on_the_gpu import Problem, behind

from refpeft.backend import bfloat16
from refpeft.cuda import narrow, override, rooms
from refpeft.cuda.kernels import KernelError, Source
from refpeft.errors import RefpeftWarning

LAYERS = {
    "one": ([256], [16]),
    "strips with a rest": ([264], [8]),
    "three": ([256, 64, 64], [16, 16, 8]),
    "one without factors": ([72, 128, 16], [16, 0, 16]),
    "strips of 192": ([192, 384], [16, 16]),
    "strips of 128": ([128, 384], [8, 16]),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(narrow, "_LEAST", 0)
    monkeypatch.setattr(narrow, "_BLOCKS", 6)


def rows(array: np.ndarray, margin: int = 8) -> cupy.ndarray:
    """The same numbers in bfloat16, in rows with something behind them."""
    whole = cupy.full((len(array), array.shape[1] + margin), np.float32(7)).astype(bfloat16)
    whole[:, : array.shape[1]] = cupy.asarray(array).astype(bfloat16)
    return whole[:, : array.shape[1]]


def blocks(widths: list[int], ranks: list[int]) -> np.ndarray:
    """Where the layers' own blocks are in an (out, r)."""
    return np.repeat(np.arange(len(widths)), widths)[:, None] == np.repeat(np.arange(len(ranks)), ranks)


@pytest.mark.parametrize("count", [1, 64, 200])
@pytest.mark.parametrize("layers", LAYERS)
def test_both_are_what_products_give(layers: str, count: int):
    widths, ranks = LAYERS[layers]
    own = blocks(widths, ranks)
    g, u = drawn(count, sum(widths)), drawn(count, sum(ranks), seed=1)
    up = drawn(sum(widths), sum(ranks), seed=2) * own
    du, dB = rows(np.zeros(u.shape)), cupy.full(up.shape, 3, np.float32)
    assert narrow.both_ways(rows(g), rows(u), rows(up), du, dB, widths, ranks)
    close(du.astype("f4"), g @ up, EPS["bfloat16"])
    close(dB, np.where(own, g.T @ u, 3), EPS["float32"], times=32)
    assert (du.base.astype("f4")[:, sum(ranks) :] == 7).all()  # what is behind the rows is left alone

    before = du.astype("f4"), dB.copy()
    assert narrow.both_ways(rows(g), rows(u), rows(up), du, dB, widths, ranks, scale=0.5, add=True)
    close(dB, np.where(own, 1.5 * (g.T @ u), 3), EPS["float32"], times=32)
    dB[...] = 3
    twin = cupy.empty(u.shape, bfloat16)
    assert narrow.both_ways(rows(g), rows(u), rows(up), du, dB, widths, ranks, twin=twin)
    assert (du.astype("f4") == before[0]).all() and (dB == before[1]).all()
    assert (twin.astype("f4") == before[0]).all()


def test_a_strip_is_one_that_a_block_has_room_for(monkeypatch):
    assert [narrow._strip(widths) for widths in ([512], [576, 192], [128], [264])] == [256, 192, 128, 256]
    monkeypatch.setattr(narrow, "_most_shared", lambda device: 99 * 1024)
    assert [narrow._strip(widths) for widths in ([512], [576, 192], [128], [264])] == [128, 192, 128, 192]


def test_it_is_not_done_where_it_cannot_be_or_does_not_pay(monkeypatch):
    def done(width=64, rank=16, margin=8):
        g, u, up = rows(drawn(64, width), margin), rows(drawn(64, rank)), rows(drawn(width, rank))
        dB = cupy.empty(up.shape, np.float32)
        return narrow.both_ways(g, u, up, rows(drawn(64, rank)), dB, [width], [rank])

    assert done()
    assert not done(rank=24)
    assert not done(rank=4)
    assert not done(width=60, margin=12)
    assert not done(margin=4)  # rows that do not begin at multiples of 16 bytes
    monkeypatch.setattr(narrow, "_LEAST", 64 * 64 * 2 + 1)
    assert not done()


def test_a_capture_that_meets_layers_first_leaves_them_to_products(monkeypatch):
    monkeypatch.setattr(narrow, "_known", {})
    given = rows(drawn(64, 64)), rows(drawn(64, 16)), rows(drawn(64, 16)), rows(drawn(64, 16))
    dB = cupy.zeros((64, 16), np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        done = narrow.both_ways(*given, dB, [64], [16])
        stream.end_capture()
        assert not done and narrow.both_ways(*given, dB, [64], [16])
        once = dB.copy()  # before the capture, whose working arrays' memory is free after it
        stream.begin_capture()
        done = narrow.both_ways(*given, dB, [64], [16], add=True)
        graph = stream.end_capture()
        assert done
        graph.launch(stream)
        stream.synchronize()
    assert (dB == 2 * once).all()


def test_where_its_kernels_do_not_compile_that_is_said(monkeypatch):
    def fails(self, kernel, *dtype):
        raise KernelError(f"{self.name}: {kernel} does not compile")

    monkeypatch.setattr(Source, "__call__", fails)
    monkeypatch.setattr(override, "_said", set())
    g, u, up, du = (rows(drawn(64, width)) for width in (64, 16, 16, 16))
    with pytest.warns(RefpeftWarning, match=r"narrow\.cu.*products instead, which is slower"):
        assert not narrow.both_ways(g, u, up, du, cupy.zeros((64, 16), np.float32), [64], [16])


@pytest.mark.parametrize("rank", [8, 16])
def test_a_layer_has_its_gradients_by_it(monkeypatch, rank: int):
    problem = Problem(rows=(2, 40), width=64, out=72, r=rank)
    asked, plain = [], narrow.both_ways
    monkeypatch.setattr(narrow, "both_ways", lambda *args: asked.append(plain(*args)) or asked[-1])
    with rooms.lowered(problem.flat.values):
        problem.x.data = behind(problem.x.data)
        problem.layer(problem.x).backward(behind(cupy.asarray(problem.g).astype(bfloat16)))
    assert asked == [True]
    for name, found in {"x": problem.x.grad, "A": problem.A.grad, "B": problem.B.grad}.items():
        close(found.astype("f4"), problem.expected()[name], EPS["bfloat16"], times=3)
