"""The golden vectors notice seeded mistakes (tests/mutations), each by a case with the flag that names it."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from mutations.seeded import ROOT, mistakes

from refpeft.conformance.vectors import cases, notes

MISTAKES = mistakes()

UNPROVEN = {
    "TargetNames": "a file whose targets are read otherwise has tensors too many or too few, and is refused",
}
"""Flags without a mistake, and why."""


def rows():
    """The table in golden/README.md, without its head."""
    text = (ROOT / "golden" / "README.md").read_text("utf-8")
    return text.partition("| mistake | in | flag | caught by |\n|---|---|---|---|\n")[2].splitlines()


@pytest.mark.parametrize("file", sorted({mistake.file for mistake in MISTAKES}))
def test_every_mistake_can_still_be_made(file):
    for mistake in MISTAKES:
        if mistake.file == file:
            assert mistake.becomes != mistake.text
            compile(mistake.source, file, "exec")


def test_no_mistake_is_there_twice():
    assert len({(mistake.file, mistake.text, mistake.becomes, mistake.flag) for mistake in MISTAKES}) == len(MISTAKES)
    assert Counter(mistake.what for mistake in MISTAKES).most_common(1)[0][1] == 1


def test_every_flag_has_a_mistake():
    assert {mistake.flag for mistake in MISTAKES} == notes().keys() - UNPROVEN.keys()


def test_the_readme_has_every_mistake_and_a_case_that_catches_it():
    flags = {case.id: case.flags for case in cases()}
    found = []
    for row in rows():
        what, file, flag, case = re.fullmatch(r"\| (.+) \| `(.+)` \| (\w+) \| `(.+)`, \d+ of \d+ \|", row).groups()
        assert flag in flags[case]
        found.append((what.replace("\\|", "|"), file, flag))
    assert found == [(mistake.what, mistake.file, mistake.flag) for mistake in MISTAKES]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="mistakes are made in forked processes")
def test_every_mistake_is_caught():
    tried = subprocess.run([sys.executable, ROOT / "tests" / "mutations"], capture_output=True, text=True)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    # Whether a case at the edge of its limit is among those that fail may depend on the machine.
    assert [row.rpartition(" | `")[0] for row in tried.stdout.splitlines()] == [
        row.rpartition(" | `")[0] for row in rows()
    ]
