"""fused.attention and fused.rope on the GPU as models call them, beside the plain pairs in float64 on the host.

Attention is asked of cuDNN, where that is installed, and of our own kernels. bfloat16's eps is 2^-7 here: a number that
is rounded once is off by half of it at most, times the largest one. Weights are rounded before they are multiplied, and
y in the gradients, which adds to that.
"""

from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import cupy
import numpy as np
import pytest

from refpeft import fused, tensor
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import attention, cudnn, flash, margins, rooms, rope  # noqa: F401  pairs register themselves
from refpeft.cuda import override as cuda_override
from refpeft.errors import RefpeftWarning
from refpeft.fused import Mask
from refpeft.tensor import Tensor, parameter

FLOAT32 = np.dtype("f4")
EPS = {bfloat16: 2.0**-7, FLOAT32: 2.0**-23}


class Asked(NamedTuple):
    """An attention: heads and key heads, numbers of a head, queries and keys, the mask, and who is left with it."""

    mask: Mask
    queries: int
    keys: int
    by: ModuleType = cudnn
    heads: tuple[int, int] = (6, 2)
    dim: int = 64
    batch: int = 2
    scale: float | None = None

    def arrays(self) -> list[np.ndarray]:
        """q, k, v and the gradient of y, in float64; that of padding is zero."""
        draw = np.random.default_rng(self.queries)
        shapes = [(self.heads[0], self.queries), (self.heads[1], self.keys), (self.heads[1], self.keys)]
        q, k, v, g = (draw.standard_normal((self.batch, *shape, self.dim)) for shape in (*shapes, shapes[0]))
        return [rounded(array) for array in (q, k, v, g * self.real())]

    def real(self) -> np.ndarray | bool:
        """Which queries are no padding, of all numbers of y."""
        if self.mask.segments is None or self.mask.asking is not None:
            return True
        virtual = np.zeros((self.batch, self.keys - self.mask.keys), "i4")
        numbers = np.concatenate((virtual, self.mask.segments), axis=1)
        return (numbers[:, -self.queries :] >= 0)[:, None, :, None]

    def expected(self) -> list[np.ndarray]:
        """y, and the gradients of q, k and v, of the plain pair."""
        *leaves, g = self.arrays()
        leaves = [parameter(array) for array in leaves]
        with tensor.plain():
            y = fused.attention(*leaves, mask=self.mask, scale=self.scale)
            y.backward(g)
        return [y.data * self.real(), *(leaf.grad for leaf in leaves)]

    def there(self) -> tuple[list[cupy.ndarray], Mask]:
        """The arrays and the mask on the device."""
        segments, asking = (None if a is None else cupy.asarray(a) for a in (self.mask.segments, self.mask.asking))
        return [as_models_have_it(array) for array in self.arrays()], replace(
            self.mask, segments=segments, asking=asking
        )


def rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(bfloat16).astype("f8")


def as_models_have_it(array: np.ndarray, dtype: np.dtype = bfloat16) -> cupy.ndarray:
    """(batch, heads, time, dim) on the device, in memory (batch, time, heads, dim)."""
    rows = np.ascontiguousarray(array.transpose(0, 2, 1, 3))
    return cupy.asarray(rows).astype(dtype).transpose(0, 2, 1, 3)


def run(arrays: list[cupy.ndarray], mask: Mask, scale: float | None = None) -> tuple[ModuleType, list[cupy.ndarray]]:
    """(who computed it, y and the gradients)"""
    *leaves, g = arrays
    leaves = [parameter(array) for array in leaves]
    y = fused.attention(*leaves, mask=mask, scale=scale)
    assert y.node.op is fused.attention.overrides[cupy.ndarray, bfloat16]
    by = y.node.saved[0]
    y.backward(g)
    return by, [y.data, *(leaf.grad for leaf in leaves)]


def close(got: cupy.ndarray, expected: np.ndarray, times: float) -> None:
    """Within `times` its dtype's eps of the largest expected number."""
    assert isinstance(got, cupy.ndarray) and got.shape == expected.shape
    limit = times * EPS[got.dtype] * max(float(np.abs(expected).max(initial=0)), 1e-3)
    assert np.abs(to_host(got).astype("f8") - expected).max(initial=0) <= limit


def lengths(tokens: int, *rows: int) -> np.ndarray:
    """Segments of rows of so many tokens, padded on the right."""
    return np.where(np.arange(tokens) < np.array(rows)[:, None], 0, -1).astype("i4")


PACKED = np.stack([np.repeat([0, 1, -1], [60, 65, 8]), np.repeat([0, 1, 2], [33, 90, 10])]).astype("i4")
PADDED = Mask(133, None, lengths(133, 133, 37), padded=True)

CASES = {
    "causal": Asked(Mask(133), 133, 133),
    "causal, a head of keys for each": Asked(Mask(64), 64, 64, heads=(3, 3), dim=128),
    "causal, one row": Asked(Mask(257), 257, 257, batch=1, heads=(4, 1), dim=32),
    "causal, other scale": Asked(Mask(70), 70, 70, scale=0.3),
    "wide heads": Asked(Mask(70), 70, 70, dim=256, heads=(2, 1)),
    "odd heads": Asked(Mask(70), 70, 70, dim=80),
    "prefix": Asked(Mask(133), 133, 143),
    "later queries": Asked(Mask(133), 40, 133),
    "virtual tokens": Asked(Mask(133), 143, 143),
    "window": Asked(Mask(133, 50), 133, 133),
    "window, later queries": Asked(Mask(133, 50), 70, 133),
    "window that hides nothing": Asked(Mask(133, 133), 133, 140),
    "padded": Asked(PADDED, 133, 133),
    "padded, prefix": Asked(PADDED, 133, 140),
    "padded, window": Asked(replace(PADDED, window=20), 133, 133),
    "encoder": Asked(Mask(133, causal=False), 133, 133),
    "encoder, padded": Asked(replace(PADDED, causal=False), 133, 133),
    "encoder, padded, prefix": Asked(replace(PADDED, causal=False), 133, 140),
    "encoder, padded, virtual tokens": Asked(replace(PADDED, causal=False), 140, 140),
    "encoder, a row of padding": Asked(Mask(70, None, lengths(70, 70, 0), False, padded=True), 70, 70),
    "other text": Asked(Mask(133, causal=False), 40, 133),
    "packed": Asked(Mask(133, None, PACKED), 133, 133, flash),
    "packed, prefix, window": Asked(Mask(133, 20, PACKED), 133, 140, flash),
    "window, prefix": Asked(Mask(133, 20), 133, 140, flash),
    "encoder, joined": Asked(Mask(133, None, PACKED, False), 133, 133, flash),
    "other text, padded": Asked(Mask(133, None, lengths(133, 133, 37), False, np.zeros((2, 40), "i4")), 40, 133, flash),
}


@pytest.fixture(params=["cudnn", "flash"])
def wanted(request, monkeypatch) -> ModuleType:
    """Who is asked first; cuDNN also of small problems."""
    monkeypatch.setattr(attention, "WORTH_A_PLAN", 0)
    monkeypatch.setattr(attention, "WORTH_A_PLAN_ONCE", 0)
    if request.param == "flash":
        monkeypatch.setenv("REFPEFT_CUDNN", "0")
        return flash
    monkeypatch.delenv("REFPEFT_CUDNN", raising=False)
    if cudnn.missing():
        pytest.skip(cudnn.missing())
    return cudnn


@pytest.mark.parametrize("case", CASES)
def test_every_mask_means_what_it_means_to_the_plain_pair(wanted: ModuleType, case: str):
    asked = CASES[case]
    arrays, mask = asked.there()
    by, (y, *gradients) = run(arrays, mask, asked.scale)
    assert by is (flash if flash in (wanted, asked.by) else cudnn)
    expected = asked.expected()
    assert np.isfinite(to_host(y).astype("f4")).all()  # that of padding, too
    y = cupy.asarray(to_host(y) * np.asarray(asked.real(), bfloat16))
    for got, here in zip((y, *gradients), expected, strict=True):
        assert got.dtype == bfloat16
        close(got, here, 2)


def test_arrays_that_lie_otherwise_are_read_all_the_same(wanted: ModuleType):
    asked = CASES["causal"]
    expected = asked.expected()
    arrays, mask = asked.there()
    whole = cupy.asarray(np.zeros((2, 133, 10, 64), "f4")).astype(bfloat16)  # q, k and v of one linear layer
    for at, array in zip((slice(0, 6), slice(6, 8), slice(8, 10)), arrays, strict=False):
        whole[:, :, at] = array.transpose(0, 2, 1, 3)
    parts = [whole[:, :, at].transpose(0, 2, 1, 3) for at in (slice(0, 6), slice(6, 8), slice(8, 10))]
    one_head = cupy.ascontiguousarray(arrays[3])
    odd = cupy.empty(arrays[1].size + 1, bfloat16)[1:].reshape(arrays[1].shape)  # not at a multiple of 16 bytes
    odd[...] = arrays[1]
    for inputs in (
        [*parts, arrays[3]],
        [*map(cupy.ascontiguousarray, arrays[:3]), one_head],
        [arrays[0], odd, *arrays[2:]],
    ):
        by, found = run(inputs, mask)
        assert by is wanted
        for got, here in zip(found, expected, strict=True):
            close(got, here, 2)


@pytest.mark.parametrize("case", ["causal", "encoder, padded", "packed"])
def test_every_run_and_every_replay_of_a_graph_gives_the_same_bits(wanted: ModuleType, case: str):
    arrays, mask = CASES[case].there()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        first, again = ([to_host(array) for array in run(arrays, mask)[1]] for _ in range(2))
        stream.begin_capture()
        _, captured = run(arrays, mask)
        graph = stream.end_capture()
        replays = []
        for _ in range(2):
            graph.launch(stream)
            stream.synchronize()
            replays.append([to_host(array) for array in captured])
    for found in (again, *replays):
        assert all(np.array_equal(a.view("u2"), b.view("u2")) for a, b in zip(found, first, strict=True))


def test_only_gradients_that_are_wanted_come_back(wanted: ModuleType):
    (q, k, v, g), mask = CASES["causal"].there()
    _, (_, *all_of_them) = run([q, k, v, g], mask)
    for needed in range(3):
        leaves = [parameter(array) if i == needed else Tensor(array) for i, array in enumerate((q, k, v))]
        fused.attention(*leaves, mask=mask).backward(g)
        assert np.array_equal(to_host(leaves[needed].grad).view("u2"), to_host(all_of_them[needed]).view("u2"))


TURNED = ["causal", "padded", "window", "encoder, padded", "packed", "encoder, a row of padding"]


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("name", TURNED)
def test_heads_of_one_product_are_turned_and_attended_to_as_one_op(name, trained, wanted):
    """q, k and v are columns of one array; so are their gradients, which rooms for factors lie behind."""
    asked = CASES[name]
    leaves, g, half = asked.arrays()[:3], asked.arrays()[3], asked.dim // 2
    angles = np.random.default_rng(3).uniform(0, 6, (1, 1, asked.queries, half)).astype("f4")
    cos, sin = np.cos(angles), np.sin(angles)
    with tensor.plain():
        exact = [parameter(array) if need else Tensor(array) for array, need in zip(leaves, trained, strict=True)]
        q, k = (fused.rope(x, cos=cos.astype("f8"), sin=sin.astype("f8")) for x in exact[:2])
        expected = fused.attention(q, k, exact[2], mask=asked.mask)
        expected.backward(g)
    arrays, mask = asked.there()
    rows = [array.transpose(0, 2, 1, 3).reshape(asked.batch, asked.queries, -1) for array in arrays[:3]]
    widths = [array.shape[-1] for array in rows]
    whole = cupy.empty((*rows[0].shape[:2], sum(widths)), bfloat16)
    for place, array in zip(margins.columns(whole, widths), rows, strict=True):
        place[...] = array
    with rooms.lowered(cupy.zeros(8, "f4")):
        heads = [margins.heads_of(place, asked.dim) for place in margins.columns(whole, widths)]
        there = [parameter(array) if need else Tensor(array) for array, need in zip(heads, trained, strict=True)]
        tables = {"cos": cupy.asarray(cos), "sin": cupy.asarray(sin)}
        q, k = (fused.rope(x, **tables) for x in there[:2])
        y = fused.attention(q, k, there[2], mask=mask)
        assert y.node.op is attention.turned and not q.there
        y.backward(arrays[3])
        close(cupy.asarray(to_host(y.data) * np.asarray(asked.real(), bfloat16)), expected.data * asked.real(), 3)
        for x, other, need in zip(there, exact, trained, strict=True):
            assert (x.grad is None) != need
            if need:
                close(x.grad, other.grad, 3)


def test_heads_that_are_turned_for_something_else_are_not_attended_to_as_one_op():
    q, k, v = (parameter(array) for array in CASES["causal, a head of keys for each"].there()[0][:3])
    tables = {name: cupy.ones((1, 1, 64, 64), "f4") for name in ("cos", "sin")}
    with rooms.lowered(cupy.zeros(8, "f4")):
        q, k = (fused.rope(x, **tables) for x in (q, k))
        y = fused.attention(q, k, v, mask=Mask(64))
        assert q.there and y.node.op is fused.attention.overrides[cupy.ndarray, bfloat16]


def planned(task: cudnn.Task) -> cudnn.Plan:
    """cuDNN's plan of a task; the test fails with its reason where there is none."""
    found = cudnn._plan(task, cupy.cuda.Device().id)
    assert not isinstance(found, str), found
    return found


def test_a_backward_pass_that_takes_much_memory_is_done_in_parts(monkeypatch):
    if cudnn.missing():
        pytest.skip(cudnn.missing())
    monkeypatch.setattr(attention, "WORTH_A_PLAN", 0)
    asked = Asked(Mask(300), 300, 300, batch=4, heads=(8, 4))
    arrays, mask = asked.there()
    by, whole = run(arrays, mask)
    task, device = cudnn.task_of(*arrays[:3], mask, asked.dim**-0.5, True), cupy.cuda.Device().id
    most = planned(task).memory
    assert by is cudnn
    for kv_heads in (4, 1):
        memory = planned(replace(task, batch=1, heads=2 * kv_heads, kv_heads=kv_heads)).memory
        assert memory < most, f"a part works in {memory:,} bytes, the whole in {most:,}"
        monkeypatch.setattr(cudnn, "MOST_MEMORY", memory)  # not in proportion: some of it is for any size
        cudnn._planned.cache_clear()
        found = cudnn._planned(task, device)
        assert not isinstance(found, str), found
        assert (found[0].batch, found[0].kv_heads) == (1, kv_heads)
        by, found = run(arrays, mask)
        assert by is cudnn
        for got, expected in zip(found, asked.expected(), strict=True):
            close(got, expected, 2)
        assert np.array_equal(to_host(found[0]).view("u2"), to_host(whole[0]).view("u2"))
    cudnn._planned.cache_clear()


@pytest.mark.parametrize("batch", [1, 4, 6, 7])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_heads_are_parted_of_single_rows_alone(monkeypatch, batch: int, kv_heads: int):
    """Of several rows, the statistics of a part of the heads would not be one piece."""
    arrays, mask = Asked(Mask(300), 300, 300, batch=batch, heads=(2 * kv_heads, kv_heads)).there()
    task, found = cudnn.task_of(*arrays[:3], mask, 0.1, True), set()

    def plan(part: cudnn.Task, device: int) -> cudnn.Plan:
        return cudnn.Plan(None, 100 + part.batch * part.kv_heads * 1000)

    monkeypatch.setattr(cudnn, "_plan", plan)
    for most in range(1100, 60_000, 700):
        monkeypatch.setattr(cudnn, "MOST_MEMORY", most)
        part, its_plan = cudnn._planned.__wrapped__(task, 0)
        assert its_plan.memory <= most and batch % part.batch == kv_heads % part.kv_heads == 0
        assert part.heads == 2 * part.kv_heads and (part.batch == 1 or part.kv_heads == kv_heads)
        found.add((part.batch, part.kv_heads))
    assert {(batch, kv_heads), (1, 1)} <= found


@pytest.mark.filterwarnings("ignore:attention is computed by the plain pair")
def test_what_it_was_not_written_for_is_left_to_the_plain_pair(wanted: ModuleType):
    (q, k, v, _), mask = CASES["causal"].there()
    bias = cupy.zeros((1, 6, 133, 133), bfloat16)
    override = fused.attention.overrides[cupy.ndarray, bfloat16]
    needs = (True, True, True)
    assert override.forward((*needs, False), q, k, v, bias, mask=mask) is NotImplemented
    assert override.forward(needs, q, k.astype("f4"), v.astype("f4"), mask=mask) is NotImplemented
    assert override.forward(needs, q[..., :20], k[..., :20], v[..., :20], mask=mask) is NotImplemented
    assert fused.attention(parameter(q), k, v, bias, mask=mask).dtype == bfloat16


def test_heads_of_other_sizes_are_told_of_once_where_attention_is_large(monkeypatch):
    (q, k, v, _), mask = CASES["causal"].there()
    q, k, v = (parameter(array[..., :20]) for array in (q, k, v))
    monkeypatch.setattr(cuda_override, "_said", set())
    fused.attention(q, k, v, mask=mask)
    monkeypatch.setattr(attention, "WORTH_A_PLAN", 0)
    with pytest.warns(RefpeftWarning, match="by the plain pair, which is slower: heads have 20 dimensions") as said:
        for _ in range(2):
            assert not fused.attention(q, k, v, mask=mask).node.op.stands_in
    assert len(said) == 1


def test_without_cudnn_the_line_that_brings_it_is_said_of_large_attentions(monkeypatch):
    (q, k, v, _), mask = CASES["causal"].there()
    monkeypatch.delenv("REFPEFT_CUDNN", raising=False)
    monkeypatch.setattr(cudnn, "_load", lambda: (None, "nvidia-cudnn-frontend is not installed: pip install it"))
    monkeypatch.setattr(cuda_override, "_said", set())
    assert fused.attention(parameter(q), k, v, mask=mask).node.saved[0] is flash
    monkeypatch.setattr(attention, "WORTH_A_PLAN", 0)
    with pytest.warns(RefpeftWarning, match="own kernels, which are slower than cuDNN's: .* pip install it$") as said:
        for _ in range(2):
            assert fused.attention(parameter(q), k, v, mask=mask).node.saved[0] is flash
    assert len(said) == 1


def test_small_attentions_are_not_planned_for():
    (q, k, v, _), mask = CASES["causal"].there()
    assert fused.attention(parameter(q), k, v, mask=mask).node.saved[0] is flash


# ---- rotary positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bfloat16, FLOAT32], ids=str)
@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize(("heads", "time", "dim"), [(9, 5, 64), (1, 33, 16), (6, 1, 128), (4, 7, 96), (3, 130, 32)])
@pytest.mark.parametrize("contiguous", [False, True])
def test_heads_are_rotated(dtype, tables: int, heads: int, time: int, dim: int, contiguous: bool):
    draw = np.random.default_rng(time)
    x, g = (rounded(draw.standard_normal((3, heads, time, dim))) for _ in range(2))
    angles = draw.uniform(0, 100, (tables, 1, time, dim // 2))
    cos, sin = (f(angles).astype("f4") for f in (np.cos, np.sin))
    leaf = parameter(x)
    with tensor.plain():
        expected = fused.rope(leaf, cos=cos.astype("f8"), sin=sin.astype("f8"))
        expected.backward(g)
    there, g = (as_models_have_it(array, dtype) for array in (x, g))
    found = parameter(cupy.ascontiguousarray(there) if contiguous else there)
    y = fused.rope(found, cos=cupy.asarray(cos), sin=cupy.asarray(sin))
    assert y.node.op is fused.rope.overrides[cupy.ndarray, dtype]
    assert y.data.transpose(0, 2, 1, 3).flags.c_contiguous
    y.backward(cupy.ascontiguousarray(g) if contiguous else g)
    for got, here in ((y.data, expected.data), (found.grad, leaf.grad)):
        assert got.dtype == dtype
        close(got, here, 0.51 if dtype == bfloat16 else 2)


def test_other_heads_are_rotated_by_the_plain_pair():
    x = cupy.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 24)).astype("f4")).astype(bfloat16)
    tables = cupy.ones((1, 1, 3, 12), "f4")
    assert fused.rope.overrides[cupy.ndarray, bfloat16].forward((True,), x, cos=tables, sin=tables) is NotImplemented
    assert fused.rope(parameter(x), cos=tables, sin=tables).dtype == bfloat16
