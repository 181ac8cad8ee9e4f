"""`refpeft conform`, and the vectors as tests of pytest."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from implementations import LORA, PLAIN, Lora, program

from refpeft.cli import main
from refpeft.commands.conform import _progress
from refpeft.conformance import parametrize, parametrize_with_vectors, results, runner, selection, tensors, vectors
from refpeft.conformance.expected_failures import read
from refpeft.errors import RefpeftError

HERE = Path(__file__).parent
MINE = f"{HERE / 'implementations.py'}:Lora"
WRONG = f"{HERE / 'implementations.py'}:WrongScale"


def conform(*words: str):
    return CliRunner().invoke(main, ["conform", *map(str, words)])


# ---- the command -----------------------------------------------------------------------------------------------------


def test_refpeft_passes_its_own_vectors():
    run = conform("refpeft", "--methods", "lora,nf4,adamw,rope,cross_entropy")
    assert run.exit_code == 0, run.output
    assert re.search(r"lora +method +worst 0\.\d+ of the limit .*linear 14/14", run.output)
    assert "0 failed" in run.output
    assert "not implemented" not in run.output


def test_an_implementation_in_a_file_passes_and_a_wrong_one_is_exit_code_1():
    run = conform(MINE, "--methods", "lora")
    assert run.exit_code == 0, run.output
    run = conform(WRONG, "--cases", "lora-linear-*", "--dtype", "float32")
    assert run.exit_code == 1
    assert "FAILS lora-linear-plain in float32 (must)" in run.output
    assert "float64" not in run.output


def test_a_program_is_a_command_line(tmp_path):
    run = conform(program(tmp_path), "--methods", "lora", "--kinds", "method")
    assert run.exit_code == 0, run.output
    run = conform(program(tmp_path, {PLAIN.id: "time.sleep(9)"}), "--cases", "*-plain,*-bias", "--timeout", "0.5")
    assert run.exit_code == 1
    assert "it gave no answer in 0.5 s" in run.output


def test_refpeft_is_run_on_the_device_that_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("refpeft.conformance.drivers.Refpeft", lambda device: asked.append(device) or Lora())
    for words in ((), ("--device", "cuda")):
        assert conform("refpeft", "--cases", PLAIN.id, *words).exit_code == 0
    assert asked == ["cpu", "cuda"]


def test_on_a_terminal_it_says_how_many_cases_are_done(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    told = _progress(2)
    for case, dtype in ((LORA[0], "float64"), (LORA[0], "float32"), (PLAIN, "float64")):
        told(runner.Verdict(case, dtype, runner.PASSED))
    said = capsys.readouterr().err.split("\r\033[K")
    assert said == ["", *[f"1 of 2 cases: {LORA[0].id}"] * 2, f"2 of 2 cases: {PLAIN.id}"]


def test_flags_choose_the_cases_for_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = conform(MINE, "--flags", "RsLoraScale", "--json", "-")
    assert list(tmp_path.iterdir()) == []
    document = json.loads(run.output)
    assert {run["id"] for run in document["runs"]} == {
        case.id for case in vectors.cases() if "RsLoraScale" in case.flags and case.kind != "quantizer"
    }


def test_reports_are_written(tmp_path):
    files = ("--json", tmp_path / "r.json", "--junit", tmp_path / "r.xml", "--html", tmp_path / "r")
    run = conform(WRONG, "--methods", "lora", *files)
    assert run.exit_code == 1
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is False
    assert ElementTree.parse(tmp_path / "r.xml").getroot().tag == "testsuite"
    assert (tmp_path / "r").read_text().startswith("<!doctype html>")


def test_what_an_implementation_prints_is_not_in_the_report(tmp_path):
    text = "from implementations import Lora\nclass Mine(Lora):\n    def __init__(self):\n        print('loading')\n"
    (tmp_path / "mine.py").write_text(text)
    run = conform(f"{tmp_path / 'mine.py'}:Mine", "--methods", "lora", "--json", "-")
    assert json.loads(run.stdout)["ok"]
    assert run.stderr == "loading\n"


def test_a_list_of_expected_failures_is_started_and_then_holds(tmp_path):
    listed = tmp_path / "xfails.toml"
    assert conform(WRONG, "--methods", "lora", "--write-xfails", listed).exit_code == 1
    assert "lora-linear-plain" in read(listed)
    listed.write_text(f'"dora-*" = "not run"\n{listed.read_text()}')
    assert conform(WRONG, "--methods", "lora", "--xfails", listed).exit_code == 0
    again = tmp_path / "again.toml"
    listed.write_text(listed.read_text().replace('"lora-linear-plain" = ', '"lora-linear-plain" = "issue 12" # '))
    assert conform(WRONG, "--methods", "lora", "--xfails", listed, "--write-xfails", again).exit_code == 0
    assert read(again) == read(listed)
    assert read(again)["lora-linear-plain"] == "issue 12"
    run = conform(MINE, "--methods", "lora", "--xfails", listed)
    assert run.exit_code == 1
    assert "PASSES lora-linear-plain in float64 and float32, expected to fail" in run.output


def test_the_vectors_are_copied_and_a_folder_of_answers_compared(tmp_path):
    run = conform("copy", tmp_path / "v")
    assert run.exit_code == 0
    assert re.fullmatch(r"1?,?\d{3} cases in .*v; README.md there says how to use them\n", run.output)
    (tmp_path / "answers").mkdir()
    for case in LORA:
        if not case.config["dropout"]:
            answer = Lora().run(case, case.given("float32"), "float32")
            tensors.write(tmp_path / "answers" / f"{case.id}.float32.safetensors", answer)
    tensors.write(tmp_path / "answers" / "dora-linear-plain.float32.safetensors", {})
    run = conform("compare", tmp_path / "answers", "--methods", "lora", "--vectors", tmp_path / "v")
    assert run.exit_code == 0, run.output
    tensors.write(tmp_path / "answers" / "no\nbody\udcff.float32.safetensors", {})  # a name that is no UTF-8
    run = conform("compare", tmp_path / "answers", "--methods", "lora", "--html", tmp_path / "page")
    assert run.exit_code == 1
    assert "no?body?.float32.safetensors: there is no such case" in run.output
    assert "no?body?.float32.safetensors: there is no such case" in (tmp_path / "page").read_text()


@pytest.fixture
def damaged(tmp_path):
    """A copy of some vectors: one case is no JSON, one id stands twice, one file of tensors is cut off."""
    folder = results.copy(tmp_path / "v") / "v1" / "lora"
    (folder / "lora-linear-bias.json").write_text("{")
    (folder / "twin.json").write_text((folder / "lora-linear-plain.json").read_text())
    tensors_of = folder / "lora-linear-rslora.safetensors"
    tensors_of.write_bytes(tensors_of.read_bytes()[:200])
    return folder


def test_damaged_vectors_are_a_line_each_and_the_run_completes(damaged):
    run = conform(MINE, "--vectors", damaged, "--dtype", "float32")
    assert run.exit_code == 1
    assert f"! {damaged / 'lora-linear-bias.json'}: expected a case in JSON" in run.output
    assert f"! {damaged / 'twin.json'}: the id lora-linear-plain is that of" in run.output
    assert "lora-linear-rslora.safetensors: not a whole safetensors file" in run.output
    assert "2 problems with the vectors or the list" in run.output
    assert "linear 4/5 !" in run.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["refpeft", "--methods", "lroa"], "no case has the name 'lroa'; did you mean 'lora'?"),
        (["refpeft", "--kinds", "methods"], "no case has the kind 'methods'; did you mean 'method'?"),
        (["refpeft", "--flags", "scaling"], "no case has the flag 'scaling'; did you mean 'Scaling'?"),
        (["refpeft", "--cases", "lora-9*"], "no case has the id 'lora-9*'"),
        (["refpeft", "--methods", "lora", "--dtype", "half"], "there is no dtype 'half': expected float64, float32"),
        (["refpeft", "--methods", "nf4", "--dtype", "float64"], "none of these cases is for float64\n"),
        (["refpeft", "--xfails", "gone.toml"], "gone.toml: cannot be read: No such file"),
        (["refpeft", "--vectors", "gone"], "there are no cases in gone"),
        (["gone.py:Mine"], "gone.py:Mine: FileNotFoundError: there is no file gone.py"),
        (["gone.module:Mine"], "gone.module:Mine: ModuleNotFoundError: No module named 'gone'"),
        ([f"{HERE / 'implementations.py'}:Loraa"], "has no Loraa; did you mean 'Lora'?"),
        ([f"{HERE / 'implementations.py'}:PROGRAM"], "an implementation has name, version, dtypes and run(): str has"),
        (["./gone"], "./gone: it cannot be started: No such file"),
        (["node", "harness.mjs"], "'harness.mjs' is one word too many: a command line is one, in quotation marks"),
        (["refpeft", "--timeout", "0"], "Invalid value for '--timeout'"),
        (["copy"], "`refpeft conform copy` needs a folder"),
        (["compare", "gone"], "gone is not a folder: expected one of <id>.<dtype>.safetensors"),
        (["refpeft", "--json", "/nowhere/r.json"], "/nowhere/r.json: cannot be written: expected a file in a folder"),
        (["refpeft", "--html", "."], ".: cannot be written: expected a file in a folder that is there and writable"),
    ],
)
def test_wrong_use_is_one_clear_line(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = conform(*words)
    assert run.exit_code == 2
    assert message in run.output
    assert "Traceback" not in run.output


def test_a_module_that_fails_while_it_is_loaded_is_one_clear_line(tmp_path):
    (tmp_path / "mine.py").write_text("import gone_away\n")
    (tmp_path / "other.py").write_text("class Mine:\n    def __init__(self):\n        self.a.b\n")
    run = conform(f"{tmp_path / 'mine.py'}:Mine")
    assert "mine.py:Mine: ModuleNotFoundError: No module named 'gone_away'" in run.output
    (tmp_path / "exits.py").write_text("import sys\nsys.exit()\n")
    run = conform(f"{tmp_path / 'exits.py'}:Mine")
    assert (run.exit_code, "exits.py:Mine: SystemExit" in run.output) == (2, True)
    run = conform(f"{tmp_path / 'other.py'}:Mine")
    assert "other.py:Mine: AttributeError: 'Mine' object has no attribute 'a'" in run.output


def test_an_implementation_may_be_a_dataclass_in_a_folder_with_a_space_and_its_file_be_named_as_a_module(
    tmp_path,
):
    home = tmp_path / "my work" / "json.py"
    home.parent.mkdir()
    home.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "@dataclass\nclass Mine:\n    name: ClassVar[str] = 'mine'\n"
    )
    assert selection.in_python(f"{home}:Mine").name == "mine"
    assert sys.modules["json"] is json


def test_cases_may_be_chosen_of_anything_that_gives_them():
    assert selection.chosen(iter(LORA), names=["lo*"], ids=["*-plain"]) == [PLAIN]


def test_what_is_no_python_is_a_command_line():
    assert selection.in_python("node harness.mjs") is None
    assert selection.in_python("./program") is None
    assert selection.in_python("python -m refpeft.conformance.serve a.py:B") is None
    with pytest.raises(RefpeftError, match="No module named"):
        selection.in_python("a.b:C")


# ---- pytest ----------------------------------------------------------------------------------------------------------


def test_a_test_is_made_of_each_case_that_is_asked_for_in_each_dtype(tmp_path):
    (tmp_path / "list.toml").write_text('"nothing-*" = "x"\n')
    asked = ["l*"], ["method"], ["RsLoraScale"]
    expected = [
        f"{case.id}@float32"
        for case in vectors.cases()
        if case.name.startswith("l") and case.kind == "method" and "RsLoraScale" in case.flags
    ]
    for listed in (tmp_path / "list.toml", str(tmp_path / "list.toml"), {"nothing-*": "x", "dora-*": "not asked for"}):
        made = dict(parametrize.checks(Lora, *asked, ["float32"], listed, None))
        assert [*made] == [*expected, "the lists"]
        with pytest.raises(AssertionError, match=r"'nothing-\*'") as error:
            made["the lists"]()
        assert "dora" not in str(error.value)
    assert all("@float32" in name for name, _ in [*parametrize.checks(Lora(), ["nf4"], (), (), None, None, None)][:-1])


def test_damaged_vectors_fail_one_test(damaged):
    made = dict(parametrize.checks(Lora(), (), (), (), ["float32"], None, damaged))
    with pytest.raises(AssertionError, match=r"lora-linear-bias.json: expected a case in JSON"):
        made["the lists"]()


@parametrize_with_vectors(Lora(), methods=["lora"], flags=["RsLoraScale"])
def test_vectors_are_tests(check):
    check()


TESTS = """
import sys
sys.path.insert(0, {here!r})
from implementations import Lora, WrongScale
from refpeft.conformance import parametrize_with_vectors

@parametrize_with_vectors({kind}, methods=["lora"], dtypes=["float32"], expected_failures={expected!r})
def test_vectors(check):
    check()
"""


def outcomes(pytester, kind: str, expected: dict[str, str]) -> tuple[dict[str, int], str]:
    pytester.makepyfile(TESTS.format(here=str(HERE), kind=kind, expected=expected))
    run = pytester.runpytest("-rA", "-p", "no:cacheprovider")
    counts = {name: n for name, n in run.parseoutcomes().items() if name != "warnings"}
    return counts, run.stdout.str()


@pytest.fixture(autouse=True)
def without_xdist(monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_what_is_not_implemented_is_skipped_with_its_reason(pytester):
    counts, said = outcomes(pytester, "Lora", {})
    assert counts.keys() == {"passed", "skipped"}
    assert "not implemented: no dropout" in said


def test_a_failure_tells_the_flags(pytester):
    counts, said = outcomes(pytester, "WrongScale()", {})
    assert counts["failed"] >= len(LORA) - 2
    assert "Scaling: 1 of 1 with it fail." in said


def test_expected_failures_are_strict(pytester):
    right = ("dropout", "rank-one")  # alpha r is alpha / r where r is 1
    expected = {case.id: "issue 12" for case in LORA if not case.id.endswith(right)}
    counts, said = outcomes(pytester, "WrongScale", expected)
    assert "issue 12" in said
    assert counts["xfailed"] == len(expected)
    assert "failed" not in counts
    counts, said = outcomes(pytester, "Lora", {"lora-linear-plain": "issue 12", "nothing-*": "x"})
    assert counts["failed"] == 2
    assert "PASSES lora-linear-plain in float32, expected to fail: issue 12" in said
    assert "'nothing-*' is among the expected failures, but names no case: take it off the list" in said


pytest_plugins = ["pytester"]
