"""refpeft as an implementation of the vectors: what it says it has not, and its answers on a stand-in for a GPU."""

from dataclasses import replace

import pytest

import refpeft
from refpeft import backend
from refpeft.conformance import device
from refpeft.conformance.compare import compare
from refpeft.conformance.drivers import Refpeft
from refpeft.conformance.vectors import Case, cases

HOST_ONLY = [("schedule", None), ("template", None), ("loss", "targets"), ("loss", "positions")]
ON_THE_HOST = [case for case in cases() if {(case.kind, None), (case.kind, case.name)} & set(HOST_ONLY)]
ELSEWHERE = [case for case in cases() if case not in ON_THE_HOST]
ONE_OF_EACH = list({(case.kind, case.at): case for case in ELSEWHERE}.values())
IN_BFLOAT16 = [case for case in cases() if "bfloat16" in case.dtypes]


@pytest.fixture
def on_the_device(monkeypatch) -> Refpeft:
    xp = device.install(monkeypatch)
    monkeypatch.setattr(backend, "module", {"cuda": xp}.get)
    return Refpeft(device="cuda")


def check(implementation: Refpeft, case: Case, dtype: str) -> None:
    answer = implementation.run(case, case.given(dtype), dtype)
    assert not [result.problem for result in compare(case, answer, dtype) if result.problem]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_case_of_each_kind_and_place_is_answered_on_the_device(on_the_device, case):
    check(on_the_device, case, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("case", ELSEWHERE, ids=str)
def test_every_case_is_answered_on_the_device(on_the_device, case):
    check(on_the_device, case, "float32")


@pytest.mark.parametrize("case", {(case.kind, case.at): case for case in IN_BFLOAT16}.values(), ids=str)
def test_a_case_of_each_kind_and_place_in_bfloat16(case):
    check(Refpeft(), case, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_BFLOAT16, ids=str)
def test_every_case_in_bfloat16(case):
    """As a GPU computes it, by the plain pairs."""
    check(Refpeft(), case, "bfloat16")


@pytest.mark.parametrize("case", ON_THE_HOST, ids=str)
def test_what_is_always_of_the_host_is_not_implemented_on_the_device(on_the_device, case):
    with pytest.raises(NotImplementedError, match="also of training on a GPU"):
        on_the_device.run(case, case.given("float64"), "float64")


@pytest.mark.parametrize(
    ("member", "kind", "reason"),
    [
        ("kind", "op", "no cases of kind 'unheard-of'"),
        ("name", "op", "no operation 'unheard-of'"),
        ("name", "random", "no random numbers 'unheard-of'"),
        ("name", "fused", "no operation 'unheard-of'"),
        ("name", "loss", "no loss 'unheard-of'"),
        ("name", "method", "no method 'unheard-of'"),
        ("at", "method", "no place 'unheard-of'"),
        ("name", "optimizer", "no optimizer 'unheard-of'"),
        ("name", "schedule", "no schedule 'unheard-of'"),
        ("name", "quantizer", "no quantizer 'unheard-of'"),
    ],
)
def test_what_nobody_has_heard_of_is_not_implemented(member, kind, reason):
    case = next(case for case in cases() if case.kind == kind)
    with pytest.raises(NotImplementedError, match=reason):
        Refpeft().run(replace(case, **{member: "unheard-of"}), case.given("float32"), "float32")


def test_quantizers_are_defined_in_float32_alone():
    case = next(case for case in cases() if case.kind == "quantizer")
    with pytest.raises(NotImplementedError, match="in float32"):
        Refpeft().run(case, case.given("float64"), "float64")


def test_it_says_what_and_where_it_is(on_the_device):
    assert (Refpeft.version, Refpeft.dtypes) == (refpeft.__version__, ("float64", "float32"))
    assert on_the_device.name == "refpeft on cuda"
    assert on_the_device.dtypes == ("float64", "float32", "bfloat16")
