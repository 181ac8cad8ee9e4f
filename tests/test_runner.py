"""An implementation is run through cases, whatever it does; expected failures are strict; reports say what happened."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from implementations import DROPOUT, LORA, PLAIN, Lora, WrongScale

from refpeft.conformance import conform, parametrize_with_vectors, report, runner, vectors
from refpeft.conformance.compare import Result
from refpeft.conformance.expected_failures import read, text
from refpeft.errors import RefpeftError


def of(answer) -> Lora:
    """An implementation whose answer to every case is what `answer` makes of the right one."""

    class Other(Lora):
        def run(self, case, given, dtype):
            return answer(super().run(case, given, dtype))

    return Other()


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raises(error: Exception):
    raise error


def only(implementation, case=PLAIN, dtype="float32", **options):
    """The verdict of one case."""
    (verdict,) = conform(implementation, [case], [dtype], **options).verdicts
    return verdict


def test_a_right_implementation_passes_and_declares_what_it_has_not():
    done = conform(Lora(), LORA)
    assert done.ok
    assert done.count(runner.PASSED) == 2 * len(LORA) - 2
    assert {v.reason for v in done.verdicts if v.status == runner.NOT_IMPLEMENTED} == {"no dropout"}
    assert all(0 < v.share <= 1 for v in done.verdicts if v.results)
    assert report.summary(done) == f"{2 * len(LORA) - 2} passed, 0 failed, 2 not implemented; {len(LORA)} cases"


def test_a_wrong_scale_fails_with_the_flag_that_says_so_and_its_explanation():
    done = conform(WrongScale(), LORA)
    assert not done.ok
    assert {"Scaling", "RsLoraScale"} <= done.flags(done.unexpected).keys()
    said = report.text(done)
    assert "FAILS lora-linear-plain in float64 and float32 (must)\n" in said
    assert "first of 36 at [0, 0, 0]: got -16.4976641, expected -4.05337868" in said
    note = vectors.notes()["Scaling"]
    assert f"with it fail. {note['mistake']} {note['mend']}" in said


def test_a_mistake_is_told_by_the_flag_whose_cases_fail():
    failed = runner.Verdict(PLAIN, "float32", runner.FAILED)
    passed = [runner.Verdict(case, "float32", runner.PASSED) for case in LORA if case is not PLAIN]
    done = runner.Report("mine", "0", [failed, *passed])
    counts = done.flags([failed])
    assert counts.keys() == set(PLAIN.flags)
    assert all(failures == 1 for failures, _ in counts.values())


def test_of_mistakes_that_fail_as_often_the_one_that_cases_name_first_is_likelier():
    done = conform(WrongScale(), LORA)
    said = [flag for flag in done.flags(done.unexpected) if flag in ("Scaling", "TransposedFactor")]
    assert said == ["Scaling", "TransposedFactor"]


def test_a_flag_whose_cases_all_fail_is_likelier_than_one_whose_cases_pass_too():
    failed, passed = runner.FAILED, runner.PASSED
    runs = [(["Alpha", "Omega"], failed), (["Alpha"], passed), (["Omega"], failed)]
    verdicts = [runner.Verdict(dataclasses.replace(PLAIN, flags=flags), "float32", came) for flags, came in runs]
    done = runner.Report("mine", "0", verdicts)
    assert list(done.flags(done.unexpected).items()) == [("Omega", (2, 2)), ("Alpha", (1, 2))]


def test_runs_of_other_methods_do_not_count_for_what_a_flag_says():
    others = [case for case in vectors.cases() if "BaseBias" in case.flags]
    done = runner.Report("mine", "0", [runner.Verdict(case, "float32", runner.FAILED) for case in others])
    wrong = [verdict for verdict in done.verdicts if verdict.case.name == "lora"]
    assert done.flags(wrong)["BaseBias"] == (len(wrong), len(wrong))
    assert done.flags(done.verdicts)["BaseBias"] == (len(others), len(others))


@pytest.mark.parametrize(
    ("answer", "status", "problem"),
    [
        (lambda a: a | {"y": a["y"] * np.nan}, "failed", "y: 36 of 36 values are not finite, first at [0, 0, 0]: nan"),
        (lambda a: a | {"y": a["y"][0]}, "failed", "y: shape (3, 6), expected (2, 3, 6)"),
        (lambda a: a | {"y": a["y"].astype("U4")}, "failed", "y: dtype <U4, expected numbers"),
        (lambda a: {n: x for n, x in a.items() if n != "grad.A"}, "failed", "grad.A: not in the answer"),
        (
            lambda a: list(a.values()),
            "error",
            "TypeError: the answer is of type list, expected arrays by name of output",
        ),
        (lambda a: None, "error", "TypeError: the answer is of type NoneType, expected arrays by name of output"),
        (lambda a: {}["gone"], "error", "KeyError: 'gone'"),
        (lambda a: 1 / 0, "error", "ZeroDivisionError: division by zero"),
        (lambda a: sys.exit("no device\nat all"), "error", "SystemExit: no device"),
        (lambda a: raises(Unprintable()), "error", "Unprintable: it cannot be printed"),
        (lambda a: raises(ValueError("\x1b[2J")), "error", "ValueError: ?[2J"),
    ],
)
def test_no_answer_at_all_is_one_clear_line_and_the_run_goes_on(answer, status, problem):
    done = conform(of(answer), [PLAIN, DROPOUT], ["float32"])
    first, second = done.verdicts if done.verdicts[0].case is PLAIN else done.verdicts[::-1]
    assert (first.status, first.problems) == (status, [problem])
    assert second.status == runner.NOT_IMPLEMENTED


def test_what_an_implementation_says_is_one_short_line_that_steers_no_terminal():
    def fails(answer):
        raise ValueError("\n \x1b[2J" + "x" * 600 + "\nmore")

    mine = of(fails)
    mine.name, mine.version = "mine\x1b[2J", "1\n2"
    done = conform(mine, [PLAIN], ["float32"])
    assert (done.name, done.version) == ("mine?[2J", "1")
    assert done.verdicts[0].reason == "ValueError: ?[2J" + "x" * 496


@pytest.mark.parametrize(("error", "reason"), [(NotImplementedError, "no reason given"), (ValueError, "ValueError: ")])
def test_an_exception_may_say_nothing(error, reason):
    def fails(answer):
        raise error

    assert only(of(fails)).reason == reason


def test_each_verdict_is_told_as_it_comes():
    told = []
    done = conform(Lora(), [PLAIN, DROPOUT], ["float32"], told=lambda verdict: told.append(verdict))
    assert told == done.verdicts


def test_an_answer_may_be_any_mapping():
    assert only(of(MappingProxyType)).status == runner.PASSED


def test_an_implementation_without_its_members_or_of_unknown_dtypes_is_refused():
    members = {"name": "mine", "version": "1", "dtypes": ("float32",), "run": None}
    for member in members:
        others = SimpleNamespace(**{name: value for name, value in members.items() if name != member})
        with pytest.raises(RefpeftError, match=rf"has name, version, .* and run\(\): SimpleNamespace has no {member}"):
            conform(others, [PLAIN])
    strange = Lora()
    strange.dtypes = ("float8",)
    with pytest.raises(RefpeftError, match="there is no dtype 'float8': expected float64, float32, bfloat16, float16"):
        conform(strange, [PLAIN])
    for dtypes in (None, "float32", ()):
        strange.dtypes = dtypes
        with pytest.raises(
            RefpeftError, match=re.escape(f"the dtypes of Lora are {dtypes!r}, expected some of float64")
        ):
            conform(strange, [PLAIN])
    with pytest.raises(RefpeftError, match="mine computes in float64, float32, not in float16"):
        conform(Lora(), [PLAIN], ["float16"])
    with pytest.raises(RefpeftError, match="there is no dtype 'bf16'"):  # else there would be no tests, and none fails
        parametrize_with_vectors(Lora(), dtypes=["bf16"])


def test_what_an_implementation_changes_in_a_case_is_its_own():
    class Careless(Lora):
        def run(self, case, given, dtype):
            case.config.clear()
            case.checks.clear()
            return {name: array * 0 for name, array in given.items()}

    done = conform(Careless(), [PLAIN])
    assert [verdict.status for verdict in done.verdicts] == [runner.FAILED] * 2
    assert PLAIN.config


def test_cases_whose_files_are_damaged_are_errors_and_the_others_run(tmp_path):
    for path in (PLAIN.path, DROPOUT.path):
        shutil.copy(path, tmp_path)
        shutil.copy(path.with_suffix(".safetensors"), tmp_path)
    tensors = tmp_path / PLAIN.tensors
    tensors.write_bytes(tensors.read_bytes()[:-9])
    cases, problems = vectors.collect(tmp_path)
    verdicts = {v.case.id: v for v in conform(Lora(), cases, ["float32"], problems=problems).verdicts}
    assert verdicts[PLAIN.id].status == runner.ERROR
    assert "lora-linear-plain.safetensors: not a whole safetensors file: tensor" in verdicts[PLAIN.id].reason
    assert verdicts[DROPOUT.id].status == runner.NOT_IMPLEMENTED


# ---- expected failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["lora-linear-plain", "lora-linear-pl*", "*plain@float32"])
def test_a_listed_failure_is_expected(pattern):
    done = conform(WrongScale(), [PLAIN], ["float32"], {pattern: "issue 12"})
    assert done.ok
    assert done.verdicts[0].expected == "issue 12"
    assert report.summary(done) == "0 passed, 0 failed, 1 failed as expected; 1 cases"
    assert "      1  issue 12" in report.text(done)
    assert conform(WrongScale(), [PLAIN], ["float32"], {pattern: ""}).ok


def test_a_listed_error_is_expected():
    done = conform(of(lambda a: 1 / 0), [PLAIN], ["float32"], {"lora-*": "issue 12"})
    assert done.ok
    assert report.summary(done) == "0 passed, 0 failed, 1 failed as expected; 1 cases"


def test_a_listed_case_that_passes_is_wrong():
    done = conform(Lora(), [PLAIN], ["float32"], {"lora-*": "issue 12"})
    assert not done.ok
    assert "PASSES lora-linear-plain in float32, expected to fail: issue 12" in report.text(done)
    assert report.summary(done) == "0 passed, 0 failed, 1 passed though expected to fail; 1 cases"


def test_a_pattern_that_names_nothing_is_wrong_unless_it_names_a_case_that_was_not_chosen():
    patterns = {"lora-linear-plain": "x", "dora-*": "y"}
    done = conform(WrongScale(), [PLAIN], ["float32"], patterns, all_ids=[PLAIN.id, "dora-linear-plain"])
    assert done.ok
    done = conform(WrongScale(), [PLAIN], ["float32"], patterns)
    assert done.problems == ["'dora-*' is among the expected failures, but names no case: take it off the list"]
    assert not done.ok
    assert "! 'dora-*' is among" in report.text(done)


def test_what_is_listed_and_not_implemented_is_neither():
    done = conform(Lora(), [DROPOUT], ["float32"], {"lora-*": "x"})
    assert done.ok
    assert report.as_json(done)["runs"][0]["expected_failure"] == "x"


def test_a_list_that_is_written_makes_the_same_run_as_expected_and_keeps_reasons_that_hold(tmp_path):
    patterns = {"lora-linear-bias": "issue 9", "*-plain@float64": "rounding", "lora-linear-square": "old"}
    done = conform(WrongScale(), LORA, expected=patterns)
    entries = report.starter(done, patterns)
    assert entries.items() >= {"lora-linear-bias": "issue 9", "*-plain@float64": "rounding"}.items()
    assert "lora-linear-plain@float32" in entries
    assert "lora-linear-square" not in entries
    assert "dora-*" in report.starter(done, patterns | {"dora-*": "not run"}, ["dora-linear-plain"])
    assert "dora-*" not in report.starter(done, patterns | {"dora-*": "names nothing"}, ["lora-linear-plain"])
    (tmp_path / "list.toml").write_text(text(entries))
    assert read(tmp_path / "list.toml") == entries
    assert conform(WrongScale(), LORA, expected=entries).ok


def test_reasons_and_patterns_are_written_as_they_are(tmp_path):
    entries = {"*-plain@float64": 'it\'s "so"', 'a"b': "\\ and\ttab"}
    (tmp_path / "list.toml").write_text(text(entries))
    assert read(tmp_path / "list.toml") == entries


def test_what_is_written_for_a_part_that_is_not_implemented_or_passes_in_one_dtype_names_runs_that_fail():
    class InOne(WrongScale):
        def run(self, case, given, dtype):
            if dtype == "float64":
                raise NotImplementedError("single precision alone")
            return super().run(case, given, dtype)

    assert report.starter(conform(InOne(), [PLAIN]), {}).keys() == {"lora-linear-plain"}
    mixed = conform(WrongScale(), [PLAIN], ["float32"]).verdicts + conform(Lora(), [PLAIN], ["float64"]).verdicts
    assert report.starter(runner.Report("mine", "0", mixed), {"lora-*": "all"}).keys() == {"lora-linear-plain@float32"}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('"a" = 3\n', 'expected lines of "glob over ids" = "reason", found a = 3'),
        ('"a" = " "\n', 'expected lines of "glob over ids" = "reason", found a = '),
        ("[a]\nb = 1\n", 'expected lines of "glob over ids" = "reason", found a = '),
        ("a = \n", "not valid TOML: "),
        ("\ufeffa = 3\n", 'expected lines of "glob over ids" = "reason", found a = 3'),
    ],
)
def test_a_list_that_is_none_is_one_clear_line(tmp_path, written, message):
    (tmp_path / "list.toml").write_text(written)
    with pytest.raises(RefpeftError, match=message):
        read(tmp_path / "list.toml")
    with pytest.raises(RefpeftError, match=r"gone.toml: cannot be read: No such file"):
        read(tmp_path / "gone.toml")


# ---- reports ---------------------------------------------------------------------------------------------------------


def reports():
    """Of every sort: passed, failed, an error, expected, passing though listed, not implemented, idle patterns."""

    class All(Lora):
        def run(self, case, given, dtype):
            if case.id == "lora-linear-bias":
                raise OSError("a <device> & \x00 is gone")
            kind = WrongScale if case.id in (PLAIN.id, "lora-linear-rslora") else Lora
            return kind().run(case, given, dtype)

    return conform(All(), LORA, ["float32"], {"*rslora": "a <reason>", "*-two-axes": "fixed", "nothing-*": "x"})


def test_the_text_says_everything_once():
    lines = report.text(reports()).splitlines()
    title, table, *heads = [line for line in lines if line and not line.startswith(" ")]
    assert title == "mine 0.1"
    assert re.fullmatch(r"lora  method  worst 8.7e\+06 of the limit  linear 3/6 !x", table)
    assert heads == [
        "! 'nothing-*' is among the expected failures, but names no case: take it off the list",
        "NO ANSWER lora-linear-bias in float32 (must)",
        "FAILS lora-linear-plain in float32 (must)",
        "PASSES lora-linear-two-axes in float32, expected to fail: fixed",
        "what the flags of these cases mean, the likeliest first",
        "failures that are expected",
        "2 passed, 1 failed, 1 gave no answer, 1 failed as expected, 1 passed though expected to fail, "
        "1 not implemented, 1 problems with the vectors or the list; 7 cases",
    ]
    assert lines[lines.index("failures that are expected") + 1 :][:2] == ["      1  a <reason>", ""]
    assert "    OSError: a <device> & ? is gone" in lines
    assert f"    {PLAIN.comment}" in lines
    flags = [line.partition(".")[0] for line in lines if "with it fail" in line]
    assert flags[0] == "  Scaling: 2 of 5 with it fail"
    assert not any("RsLoraScale" in flag for flag in flags)


def test_a_case_that_goes_wrong_otherwise_in_another_dtype_is_told_twice():
    class Both(WrongScale):
        def run(self, case, given, dtype):
            return super().run(case, given, dtype) if dtype == "float64" else {}["gone"]

    said = report.text(conform(Both(), [PLAIN])).splitlines()
    assert "FAILS lora-linear-plain in float64 (must)" in said
    assert "NO ANSWER lora-linear-plain in float32 (must)" in said


def test_passes_that_are_not_expected_are_explained_by_no_flags():
    assert "what the flags" not in report.text(conform(Lora(), [PLAIN], expected={"lora-*": "old"}))


def test_a_row_is_for_a_name_of_one_kind_and_has_the_largest_share():
    of_two = [PLAIN, dataclasses.replace(PLAIN, kind="quantizer"), dataclasses.replace(PLAIN, kind="op", name="exp")]
    shares = (2.0, 6.0, 4.0)
    verdicts = [
        runner.Verdict(case, "float32", runner.PASSED, (Result("y", share, 8.0),))
        for case in of_two
        for share in shares
    ]
    rows = report.rows(runner.Report("mine", "0", verdicts))
    assert [(row["kind"], row["name"], row["share"]) for row in rows] == [
        ("method", "lora", 0.75),
        ("quantizer", "lora", 0.75),
        ("op", "op", 0.75),
    ]


def test_a_missing_answer_is_marked_in_the_table_and_uses_no_share():
    said = report.text(conform(of(lambda a: 1 / 0), [PLAIN], ["float32"]))
    assert "lora  method    linear 0/1 !" in said.splitlines()


def test_what_is_no_number_is_said_in_the_table_and_is_none_in_the_json():
    done = conform(of(lambda a: a | {"y": a["y"] * np.nan}), [PLAIN], ["float32"])
    assert "lora  method  worst: not a number  linear 0/1 !" in report.text(done).splitlines()
    assert report.as_json(done)["runs"][0]["outputs"]["y"] == {"error": None, "limit": 8}


def test_the_json_has_every_run_with_its_errors_and_limits():
    document = json.loads(json.dumps(report.as_json(reports()), allow_nan=False))
    assert document["ok"] is False
    runs = {run["id"]: run for run in document["runs"]}
    assert runs[PLAIN.id]["outputs"]["y"]["limit"] == PLAIN.checks["y"]["float32"]
    assert runs[PLAIN.id]["outputs"]["y"]["error"] > 1e6
    assert runs["lora-linear-rslora"]["expected_failure"] == "a <reason>"
    assert [run["id"] for run in runs.values() if run["unexpected"]] == [
        "lora-linear-bias",
        "lora-linear-plain",
        "lora-linear-two-axes",
    ]
    assert len(document["problems"]) == 1
    assert document["flags"]["Scaling"] == {"failed": 2, "run": 5}
    wrong = [run for run in runs.values() if run["status"] in ("failed", "error")]
    assert document["flags"].keys() == {flag for run in wrong for flag in run["flags"]}


def test_the_junit_counts_what_it_holds():
    suite = ElementTree.fromstring(report.as_junit(reports()))
    assert int(suite.get("tests")) == len(suite)
    found = {kind: len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "error", "skipped")}
    assert found == {"failure": 3, "error": 1, "skipped": 2}
    skipped = [one.get("message") for one in suite.iter("skipped")]
    assert skipped == ["no dropout", "expected to fail: a <reason>"]
    assert suite.find("testcase/error").text.splitlines()[2].strip() == "OSError: a <device> & ? is gone"
    assert {kind: int(suite.get(f"{kind}s" if kind != "skipped" else kind)) for kind in found} == found


def test_the_junit_is_xml_whatever_paths_and_reasons_say():
    patterns, problems = {"lora-*": "because\x01 of\n\ud800"}, ["a\x02 \ud800"]
    done = conform(WrongScale(), [PLAIN], ["float32"], patterns, problems=problems)
    suite = ElementTree.fromstring(report.as_junit(done).encode())
    assert suite.find("testcase/skipped").get("message").startswith("expected to fail: because? of")
    assert suite[1].get("name") == suite.find("testcase/failure").get("message") == "a? ?"


def test_the_page_says_all_and_escapes_what_it_is_told():
    page = report.as_html(reports())
    for said in ("lora-linear-plain in float32", "a &lt;reason&gt;", "a &lt;device&gt; &amp;", "Scaling", "nothing-*"):
        assert said in page, said
    assert "<device>" not in page and "<reason>" not in page
    assert '<p class="bad">2 passed, 1 failed' in page
    assert '<tr class="bad"><td>lora' in page


def test_the_page_of_a_right_implementation_is_not_marked_and_escapes_its_name():
    mine = Lora()
    mine.name = "<mine>"
    page = report.as_html(conform(mine, [PLAIN]))
    assert "<h1>&lt;mine&gt; 0.1</h1>" in page and "<mine>" not in page
    assert '"bad"' not in page.partition("</style>")[2]
    assert "<h2>" not in page


def test_the_page_marks_a_missing_answer_and_escapes_what_is_wrong_with_the_vectors():
    page = report.as_html(conform(of(lambda a: 1 / 0), [PLAIN], ["float32"], problems=["<script>"]))
    assert '<tr class="bad"><td>lora' in page
    assert "<script>" not in page


def test_places_that_are_not_implemented_are_marked_where_others_are():
    cases = [case for case in vectors.cases() if case.name == "lora" and case.at in ("linear", "conv1d")]
    (row,) = [line for line in report.text(conform(Lora(), cases)).splitlines() if line.startswith("lora ")]
    assert re.search(r"of the limit  (conv1d -, )?linear (\d+)/\2(, conv1d -)?$", row), row


def test_the_table_has_a_row_for_each_method_and_counts_by_place():
    everything = [case for case in vectors.cases() if case.name in ("lora", "dora", "sub", "nf4")]
    said = report.text(conform(Lora(), everything))
    assert f"linear {2 * len(LORA) - 2}/{2 * len(LORA) - 2}" in said
    for name in ("dora", "nf4", "op"):
        assert any(line.startswith(name) and line.endswith("not implemented") for line in said.splitlines()), name


def test_a_limit_of_nothing_is_used_wholly_by_any_error():
    verdict = only(of(lambda a: a | {"merged.weight": a["merged.weight"] + 1}))
    assert verdict.share > 1
    exact = dataclasses.replace(verdict.results[0], error=1.0, limit=0.0)
    assert exact.share == float("inf")


# ---- what it needs ---------------------------------------------------------------------------------------------------


def test_the_runner_needs_numpy_alone(tmp_path):
    """With every other distribution out of reach, a program is run through a case in a process of its own."""
    script = tmp_path / "alone.py"
    script.write_text(
        """
import importlib.abc, sys

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "refpeft", "implementations", "__main__"):
            raise ImportError(f"{top} is not there")

sys.meta_path.insert(0, Nothing())
from refpeft.conformance import cases, conform, report
from implementations import Lora
done = conform(Lora(), [case for case in cases() if case.name == "lora"])
report.as_html(done), report.as_junit(done), report.as_json(done)
print(report.text(done))
sys.exit(not done.ok)
"""
    )
    root = Path(__file__).parents[1]
    paths = f"{root}:{root / 'tests'}"
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={"PYTHONPATH": paths, "PATH": "/usr/bin"}
    )
    assert run.returncode == 0, run.stderr
    assert "passed, 0 failed" in run.stdout
