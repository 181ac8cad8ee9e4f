"""A program in another process is run through cases, however it behaves; so is a folder of answers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from implementations import DROPOUT, LORA, PLAIN, START, Lora, program

from refpeft.conformance import Program, Results, conform, results, runner, serve, tensors, vectors
from refpeft.errors import RefpeftError

BIAS = next(case for case in LORA if case.id == "lora-linear-bias")


def run(command: str, cases=(BIAS, PLAIN, DROPOUT), timeout: float = 20.0):
    """The verdicts by the last word of their ids."""
    with Program(command, timeout) as mine:
        done = conform(mine, cases)
    return {verdict.case.id.rpartition("-")[2]: verdict for verdict in done.verdicts}


def test_a_program_passes_as_the_same_in_process_does(tmp_path):
    verdicts = run(program(tmp_path), LORA)
    assert [v.status for v in verdicts.values()] == [v.status for v in conform(Lora(), LORA, ["float32"]).verdicts]
    assert verdicts["dropout"].reason == "no dropout"


def test_a_program_says_who_it_is(tmp_path):
    with Program(program(tmp_path)) as mine:
        assert (mine.name, mine.version, mine.dtypes) == ("program", "3", ("float32",))


@pytest.mark.parametrize(
    ("does", "problem"),
    [
        ("time.sleep(60)", "ProgramError: it gave no answer in 1.5 s"),
        ("sys.exit(3)", "ProgramError: it ended with exit code 3"),
        ("raise ValueError('no such\\nluck')", "ProgramError: it ended with exit code 1: luck"),
        ("os.kill(os.getpid(), 11)", "ProgramError: it was ended by SIGSEGV"),
        ("print('hello', flush=True)", "ProgramError: it answered 'hello', expected one JSON object on one line"),
        ("print([1], flush=True)", "ProgramError: it answered '[1]', expected one JSON object on one line"),
        ("answer['seq'] = 99", "ProgramError: it answered to 99 when it was asked"),
        ("print('{}', flush=True)", "ProgramError: it answered to None when it was asked"),
        ("answer['status'] = 'fine'", 'ProgramError: its status is \'fine\', expected "ok", "not implemented" or'),
        ("answer.update(status='error', message='no memory')", "ProgramError: it says: no memory"),
        ("after = os.unlink", r"safetensors: cannot be read: No such file"),
        ("after = lambda out: open(out, 'r+b').truncate(50)", "safetensors: not a whole safetensors file: "),
        ("after = lambda out: (os.unlink(out), os.mkfifo(out))", "safetensors file: it is no file"),
        ("os.close(1)\ntime.sleep(60)", "ProgramError: it closed its output"),
        ("subprocess.Popen(['sleep', '5'])\nsys.exit(4)", "ProgramError: it ended with exit code 4"),
        ("subprocess.Popen(['sleep', '5'], start_new_session=True)\nsys.exit(5)", "it ended with exit code 5"),
        ("print('x\\n' * 100_000, flush=True)", "ProgramError: it answered 'x', expected one JSON object"),
        ("answer.update(status='error', message='\\x1b[2J a\\nb')", "ProgramError: it says: ?[2J a"),
    ],
)
def test_whatever_it_does_that_case_is_an_error_and_the_next_is_run(tmp_path, does, problem):
    verdicts = run(program(tmp_path, {BIAS.id: does}), timeout=1.5)
    assert verdicts["bias"].status == runner.ERROR
    assert problem in verdicts["bias"].reason
    assert "\n" not in verdicts["bias"].reason
    assert verdicts["plain"].status == runner.PASSED
    assert verdicts["dropout"].status == runner.NOT_IMPLEMENTED


def test_outputs_that_are_wrong_are_told_as_in_process(tmp_path):
    does = "after = lambda out: tensors.write(out, {'y': tensors.read(out)['y'] * float('nan')})"
    verdict = run(program(tmp_path, {BIAS.id: does}))["bias"]
    assert verdict.status == runner.FAILED
    assert "y: 36 of 36 values are not finite, first at [0, 0, 0]: nan" in verdict.problems
    assert "grad.x: not in the answer" in verdict.problems


def test_one_that_never_answers_is_given_up(tmp_path):
    ill = dict.fromkeys((case.id for case in vectors.cases()), "sys.exit(1)")
    begun = time.monotonic()
    with Program(program(tmp_path, ill)) as mine:
        done = conform(mine, vectors.cases()[:60])
    assert time.monotonic() - begun < 60
    assert sum("it is not asked: it gave no answer to 10 cases in a row" in v.reason for v in done.verdicts) == 50


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"protocol": 2}, "it speaks protocol 2, expected 1"),
        ({"name": ""}, 'its answer to "start" has no name or no version'),
        ({"version": 3}, 'its answer to "start" has no name or no version'),
        ({"dtypes": ["float8"]}, "has dtypes ['float8'], expected a list of float64"),
        ({"dtypes": {"float32": 1}}, "has dtypes {'float32': 1}, expected a list of float64"),
        ({"dtypes": []}, "has dtypes [], expected a list of float64"),
    ],
)
def test_a_program_that_does_not_introduce_itself_is_refused(tmp_path, start, message):
    with pytest.raises(RefpeftError, match=re.escape(message)):
        Program(program(tmp_path, start=START | start))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nowhere/harness", "/nowhere/harness: it cannot be started: No such file"),
        ("", "it cannot be started: no program is named"),
        ("node 'harness.mjs", "node 'harness.mjs: not a command line: No closing quotation"),
        ("true", "true: it ended with exit code 0"),
        ("cat", 'cat: it speaks protocol 1, expected|cat: its answer to "start" has no name'),
        ("sh -c 'echo lost >&2; exit 7'", "it ended with exit code 7: lost"),
    ],
)
def test_a_command_that_is_no_program_is_one_clear_line(command, message):
    with pytest.raises(RefpeftError, match=message):
        Program(command, timeout=20)


def test_a_byte_order_mark_before_the_first_answer_does_not_matter(tmp_path):
    command = program(tmp_path)
    path = tmp_path / "program.py"
    path.write_text("import sys\nsys.stdout.write('\\ufeff')\n" + path.read_text())
    assert run(command)["plain"].status == runner.PASSED


SLOW_TO_STOP = """
import json, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
print(json.dumps({{"protocol": 1, "name": str(child.pid), "version": "1", "dtypes": ["float32"]}}), flush=True)
for line in sys.stdin:
    if json.loads(line)["cmd"] == "stop":
        time.sleep(0.3)
        open({stopped!r}, "w").close()
        break
"""


def state(process: str) -> str:
    """Of a process by its number: "" where there is none, Z where it is over."""
    return subprocess.run(["ps", "-o", "state=", "-p", process], capture_output=True, text=True).stdout.strip()


def test_it_is_told_to_stop_and_nothing_of_it_is_left(tmp_path):
    (tmp_path / "program.py").write_text(SLOW_TO_STOP.format(stopped=str(tmp_path / "stopped")))
    with Program(f"{sys.executable} {tmp_path / 'program.py'}") as mine:
        process, child, folder = mine._process.process, mine.name, Path(mine._folder.name)
        assert folder.is_dir()
    assert (tmp_path / "stopped").exists()
    assert process.poll() is not None
    assert not folder.exists()
    assert state(child) in ("", "Z")


def test_one_that_introduces_itself_wrongly_is_ended(tmp_path):
    (tmp_path / "program.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nprint('{{}}', flush=True)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(RefpeftError, match="it speaks protocol None"):
        Program(f"{sys.executable} {tmp_path / 'program.py'}")
    assert state((tmp_path / "pid").read_text()) in ("", "Z")


def test_outputs_are_removed_when_they_are_read(tmp_path):
    with Program(program(tmp_path)) as mine:
        assert conform(mine, [PLAIN]).ok
        assert list(Path(mine._folder.name).iterdir()) == []


def test_an_implementation_in_python_is_served_as_a_program_line_by_line():
    lora = Path(__file__).with_name("implementations.py")
    verdicts = run(f"{sys.executable} -m refpeft.conformance.serve {lora}:Lora", [PLAIN])
    assert verdicts["plain"].status == runner.PASSED


def test_what_is_no_request_ends_the_server_with_a_line():
    for line in ("hello", "[]", "{}"):
        with pytest.raises(SystemExit, match=re.escape(f"expected a request in JSON, found '{line}'")):
            serve.serve(Lora(), [line], None)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_vectors_are_copied_whole_and_only_to_a_new_folder(tmp_path, monkeypatch):
    folder = results.copy(tmp_path / "deep" / "vectors")
    assert vectors.altered(folder) == []
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "MANIFEST.json",
        "case.schema.json",
        "notes.json",
        "v1",
    }
    assert (folder / "README.md").read_text() == (vectors.root() / "README.md").read_text()
    cases, problems = vectors.collect(folder)
    assert ([case.id for case in cases], problems) == ([case.id for case in vectors.cases()], [])
    monkeypatch.chdir(tmp_path)
    for taken in (folder, "."):
        with pytest.raises(RefpeftError, match="exists already: name a new folder"):
            results.copy(taken)
    with pytest.raises(RefpeftError, match="/proc/vectors: cannot be written: No such file"):
        results.copy("/proc/vectors")
    assert [path.name for path in folder.parent.iterdir()] == ["vectors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), shutil.Error([("from", "to", "No space left")])])
def test_of_vectors_that_cannot_be_copied_nothing_is_left(tmp_path, monkeypatch, error):
    monkeypatch.setattr(shutil, "copytree", Mock(side_effect=error))
    with pytest.raises(RefpeftError, match=r"v: cannot be written: (No space left|a file was not copied)"):
        results.copy(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_answers_is_compared_and_what_it_lacks_is_not_implemented(tmp_path):
    for case in (PLAIN, BIAS):
        answer = Lora().run(case, case.given("float32"), "float32")
        tensors.write(tmp_path / f"{case.id}.float32.safetensors", answer)
    tensors.write(tmp_path / "lora-linear-rslora.float32.safetensors", {"y": np.zeros(3, "f4")})
    (tmp_path / "lora-linear-two-axes.float32.safetensors").write_bytes(b"nothing")
    tensors.write(tmp_path / "of-nothing.float32.safetensors", {})
    (tmp_path / "notes.txt").write_text("how they were made")
    answers = Results(tmp_path)
    assert answers.dtypes == ("float32",)
    done = {v.case.id: v for v in conform(answers, LORA).verdicts}
    assert done[PLAIN.id].status == done[BIAS.id].status == runner.PASSED
    assert done["lora-linear-rslora"].problems[0] == "y: shape (3,), expected (2, 3, 6)"
    assert "two-axes.float32.safetensors: not a whole safetensors file" in done["lora-linear-two-axes"].reason
    assert done[DROPOUT.id].reason == "there is no file of it"
    assert answers.strangers({case.id for case in vectors.cases()}) == [
        f"{tmp_path / 'of-nothing'}.float32.safetensors: there is no such case, or dtype"
    ]


def test_a_folder_without_answers_is_refused(tmp_path):
    with pytest.raises(RefpeftError, match=r"gone is not a folder: expected one of <id>.<dtype>.safetensors"):
        Results(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(RefpeftError, match=r"file is not a folder"):
        Results(tmp_path / "file")
    with pytest.raises(RefpeftError, match=r"has no <id>.<dtype>.safetensors, with a dtype of float64, float32"):
        Results(tmp_path)
