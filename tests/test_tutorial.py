"""The README's way from an equation to a trained adapter: its files and its commands, as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import README, ROOT

from refpeft import manager
from refpeft.conformance.check import check

SECTION = README[README.index("## Your own method, from equation to trained adapter\n") :].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", SECTION, re.M | re.S)


def test_the_tutorial_is_short_and_its_method_does_not_ship():
    assert len(SECTION.splitlines()) <= 90
    assert not (manager.shipped() / "lora_xs.py").exists()


def test_the_method_of_the_tutorial_passes_as_many_checks_as_it_says(tmp_path):
    (tmp_path / "lora_xs.py").write_text(dict(BLOCKS)["python"])
    report = check(tmp_path / "lora_xs.py")
    assert not report.having("FAILED"), report.text()
    assert f"each of {len(report.findings)} properties" in SECTION


@pytest.mark.slow
def test_the_tutorial_runs_from_the_equation_to_a_merged_model(tmp_path):
    said = {}
    for language, text in BLOCKS:
        if language == "python":
            (tmp_path / "lora_xs.py").write_text(text)
            continue
        for line in text.splitlines():
            name, *arguments = shlex.split(line)
            assert name == "refpeft"
            said[arguments[0]] = refpeft(arguments, tmp_path)
    assert list(said) == ["new-method", "check", "train", "compare", "merge"]
    assert "exact match" in said["train"] and "lora_xs" in said["compare"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def refpeft(arguments: list[str], folder: Path) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "refpeft", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
