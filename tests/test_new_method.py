"""`refpeft new-method`: what it writes is right as it stands, and it overwrites nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import refpeft
from refpeft.cli import main
from refpeft.conformance.check import check

ROOT = Path(refpeft.__file__).parents[1]


def new_method(*arguments):
    return CliRunner().invoke(main, ["new-method", *map(str, arguments)])


def test_it_writes_three_files_and_the_method_passes_every_check(tmp_path):
    done = new_method("mine", "--dir", tmp_path / "new")
    assert done.exit_code == 0
    assert [Path(line).name for line in done.output.split()] == ["mine.py", "test_mine.py", "make_mine.py"]
    report = check(tmp_path / "new" / "mine.py")
    assert not report.having("FAILED"), report.text()
    asked = {finding.property for finding in report.having("not applicable")}
    assert asked <= {"gpu", "peft file"}


@pytest.mark.slow
def test_its_test_passes_under_pytest(tmp_path):
    new_method("mine", "--dir", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed, 1 skipped" in done.stdout, done.stdout


@pytest.mark.real
def test_its_make_script_writes_vectors_that_it_agrees_with(tmp_path):
    pytest.importorskip("torch")
    new_method("mine", "--dir", tmp_path)
    python("make_mine.py", cwd=tmp_path)
    conform = ["-m", "refpeft", "conform", "refpeft", "-p", "mine.py", "--vectors", "vectors"]
    assert "4 passed, 0 failed; 2 cases" in python(*conform, cwd=tmp_path)


@pytest.mark.real
def test_vectors_may_have_constants(tmp_path):
    pytest.importorskip("torch")
    new_method("mine", "--dir", tmp_path)
    for name, *pairs in (
        (
            "mine.py",
            ('"B": np.zeros((out, cfg.r))', '"B": Tensor(np.zeros((out, cfg.r)))'),
            ("hookimpl,", "Tensor, hookimpl,"),
        ),
        ("make_mine.py", (', "B": (out, config["r"])}', "}"), ("return {}", 'return {"B": (out, config["r"])}')),
    ):
        text = (tmp_path / name).read_text()
        for old, new in pairs:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
    python("make_mine.py", cwd=tmp_path)
    conform = ["-m", "refpeft", "conform", "refpeft", "-p", "mine.py", "--vectors", "vectors"]
    assert "4 passed, 0 failed; 2 cases" in python(*conform, cwd=tmp_path)


@pytest.mark.real
def test_a_mistake_in_the_method_is_seen_by_the_vectors(tmp_path):
    pytest.importorskip("torch")
    new_method("mine", "--dir", tmp_path)
    python("make_mine.py", cwd=tmp_path)
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("* (cfg.alpha / cfg.r)\n", "* cfg.alpha\n"))
    command = [sys.executable, "-m", "refpeft", "conform", "refpeft", "-p", "mine.py", "--vectors", "vectors"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "4 failed" in done.stdout


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def python(*arguments, cwd) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora", "a plugin is named 'lora' already"),
        ("Lora-XS", "'Lora-XS' is no name for a method: expected small letters, digits and _, such as 'lora_xs'"),
        ("class", "'class' is no name for a method"),
        ("json", "'json' is a module, which json.py would stand in for"),
        ("3", "'3' is no name for a method"),
        ("../mine", "'../mine' is no name for a method"),
    ],
)
def test_a_name_that_is_none_is_a_line_and_nothing_is_written(name, message, tmp_path):
    done = new_method(name, "--dir", tmp_path / "new")
    assert done.exit_code == 2 and message in done.output and len(done.output.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py", "make_mine.py"])
def test_a_file_that_exists_is_kept(there, tmp_path):
    (tmp_path / there).write_text("kept")
    done = new_method("mine", "--dir", tmp_path)
    assert done.exit_code == 2 and f"{there} exists: choose another name or --dir" in done.output
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
