"""Other implementations give what is known of them: every failure is on their list, and nothing on it passes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from refpeft.conformance import Report, Verdict, cases, expected_failures, report
from refpeft.conformance.runner import FAILED

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import reports

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]


def hangs_on_the_last_bit(verdict: Verdict) -> bool:
    """Whether a weight is back to the bit when what was added is taken off: another BLAS may add in another order."""
    return verdict.case.at == "restored" and all(line.startswith("restored.") for line in verdict.problems)


@pytest.mark.parametrize("peer", [peer for peer in reports.PEERS if peer.needs], ids=lambda peer: peer.name)
def test_the_failures_of_a_peer_are_those_on_its_list(peer):
    if not peer.installed:
        pytest.skip(f"needs {peer.needs}")
    found = peer.report()
    assert not found.problems, found.problems
    assert all(map(hangs_on_the_last_bit, found.unexpected)), report.text(found)
    causes = {reason.partition(":")[0] for reason in peer.expected_failures.values()}
    assert causes <= reports.CAUSES.keys()


def test_numbers_in_reports_have_two_digits():
    line = "y: 7.83e+15 of 16 eps, first of 36 at [0, 1]: got -0.567441943, expected 12"
    assert reports.rounded(line) == "y: 7.8e+15 of 16 eps, first of 36 at [0, 1]: got -0.57, expected 12"


@pytest.mark.parametrize("peer", reports.PEERS, ids=lambda peer: peer.name)
def test_a_flag_that_a_list_names_is_one_of_the_cases(peer):
    there = {
        (reason, flag)
        for pattern, reason in peer.expected_failures.items()
        for case in cases()
        if expected_failures.names(pattern.partition("@")[0], case.id, "")
        for flag in case.flags
    }
    for reason in peer.expected_failures.values():
        flag = reason.partition(" [")[2].removesuffix("]")
        assert not flag or (reason, flag) in there, reason


def test_a_flag_that_no_case_of_a_group_has_is_an_error():
    case = next(case for case in cases() if case.id == "lora-two-plain")
    reason = "choice: LoRA reads what the one before it adds [OftSide]"
    with pytest.raises(ValueError, match=r"^mine: .* has the flag OftSide: they have InputOverwritten, Scaling$"):
        reports.flag_to_explain(Report("mine", "1", []), reason, [Verdict(case, "float64", FAILED, expected=reason)])
