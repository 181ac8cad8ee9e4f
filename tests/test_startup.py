"""Help and listings are instant: they import neither NumPy nor a plugin, nor anything else that is heavy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refpeft

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(refpeft.__file__).parents[1])}
HEAVY = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "pydantic", "rich", "cupy", "refpeft_plugins")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -X importtime -m refpeft ...`."""
    command = [sys.executable, "-X", "importtime", "-m", "refpeft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=60)


def imported(done: subprocess.CompletedProcess) -> set[str]:
    """Top-level names of all modules that a run imported."""
    return set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("methods",),
        ("methods", "lora"),
        ("methods", "--json"),
        ("quantizers",),
        ("train", "--help"),
        ("generate", "--help"),
    ],
)
def test_nothing_heavy_is_imported(arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
    names = imported(done)
    assert "refpeft.cli" in names
    assert not {name for name in names if name.split(".")[0] in HEAVY}


def test_listing_does_not_run_the_plugins_it_lists(tmp_path):
    (tmp_path / "loud.py").write_text(
        '"""Shouts."""\nfrom refpeft import hookimpl\n@hookimpl\ndef peft_linear(x, base):\n    return base(x)\n'
        'raise SystemExit("it ran")\n'
    )
    done = run("methods", REFPEFT_PLUGINS=str(tmp_path))
    assert done.returncode == 0
    assert "loud" in done.stdout
    assert "Shouts." in done.stdout


def test_a_reader_that_closes_the_pipe_early_is_no_error(tmp_path):
    for number in range(3000):
        (tmp_path / f"p{number}.py").write_text('"""A."""\n@hookimpl\ndef peft_linear(x, base):\n    return base(x)\n')
    command = [sys.executable, "-m", "refpeft", "methods", "--json", "--plugins-dir", str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    writer.stdout.read(10)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    writer.wait(60)


def test_the_first_step_waits_for_no_answers(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from refpeft.cli import main
    from refpeft.tasks import texts

    out, steps = tmp_path / "run", []

    def generate(model, prompts, *_, **__):
        steps.append((out / "metrics.jsonl").read_text().count('"loss"'))
        return [[] for _ in prompts]

    monkeypatch.setattr(texts, "generate", generate)
    done = CliRunner().invoke(main, ["train", "--steps", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert set(steps) == {1}
