"""Where a kernel does not compile, the plain pair does the work of both halves, which is said once."""

import warnings

import cupy
import numpy as np
import pytest

from refpeft import fused, ops
from refpeft.backend import bfloat16, to_host
from refpeft.cuda import override
from refpeft.cuda.kernels import KernelError, Source
from refpeft.errors import RefpeftWarning
from refpeft.fused import Mask
from refpeft.tensor import parameter


@pytest.fixture
def broken(monkeypatch):
    """Kernels of these names do not compile; how often they were asked for."""
    names, asked, compiled = set(), [], Source.__call__

    def fails(self, kernel, dtype=bfloat16):
        if kernel in names:
            asked.append(kernel)
            raise KernelError(f"{self.name}: {kernel} does not compile")
        return compiled(self, kernel, dtype)

    monkeypatch.setattr(Source, "__call__", fails)
    monkeypatch.setattr(override, "_said", set())
    return names, asked


def drawn(*shape: int) -> cupy.ndarray:
    return cupy.asarray(np.random.default_rng(0).standard_normal(shape).astype("f4")).astype(bfloat16)


def gated(width: int):
    return fused.silu_mul, [drawn(3, width) for _ in range(2)], {}


def attended(dim: int):
    arrays = [drawn(1, 12, 2, dim).transpose(0, 2, 1, 3) for _ in range(3)]
    return fused.attention, arrays, {"mask": Mask(12)}


# of widths that other tests do not have: what does not work is remembered
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("silu_mul_forward", gated(88)),
        ("silu_mul_backward", gated(104)),
        ("flash_forward", attended(56)),
        ("flash_backward_queries", attended(72)),
    ],
)
def test_the_plain_pair_does_the_work_where_a_kernel_of_either_half_fails(broken, kernel, case):
    names, asked = broken
    names.add(kernel)
    op, arrays, options = case
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RefpeftWarning)
        for _ in range(2):
            leaves = [parameter(array) for array in arrays]
            out = op(*leaves, **options)
            assert not out.node.op.stands_in
            out.backward()
            assert all(leaf.grad.dtype == bfloat16 for leaf in leaves)
    told = [str(one.message) for one in said if issubclass(one.category, RefpeftWarning)]
    assert len(told) == len(asked) == 1
    assert kernel in told[0] and f"{op.name} is computed by the plain pair" in told[0]


def test_going_through_backward_starts_nothing_and_changes_no_result():
    x = drawn(5, 120)
    found = []
    for _ in range(2):  # the first one compiles both halves
        leaf = parameter(x)
        out = ops.softmax(leaf)
        assert out.node.op.stands_in
        out.backward(x)
        found.append([to_host(array).view("u2") for array in (out.data, leaf.grad)])
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_what_does_not_compile_is_tried_once_and_told_in_a_line(monkeypatch):
    tried = []

    def fails(self, dtype):
        tried.append(dtype)
        raise RuntimeError("in kernel.cu\nkernel.cu(3): error: expected a )\n1 error detected")

    monkeypatch.setattr(Source, "_module", fails)
    source = Source("norms.cu")
    for _ in range(2):
        with pytest.raises(KernelError, match=r"^norms\.cu: nothing in bfloat16 does not compile: .*expected a \)$"):
            source("nothing")
    assert tried == [bfloat16]
