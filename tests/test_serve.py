"""A Python implementation as a program: the protocol on real pipes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from refpeft.conformance import serve, tensors, vectors

MINE = """
import os
import helper_of_mine


class Mine:
    name, version, dtypes = "mine", "1.2", ("float32",)

    def run(self, case, given, dtype):
        print("a print")
        os.write(1, b"a print from C\\n")
        if case.name == "exp":
            raise NotImplementedError("no exponents")
        return {"y": helper_of_mine.added(given["a"], given["b"]).astype(dtype)}
"""


def request(case_id: str, seq: int, out) -> dict:
    (case,) = (case for case in vectors.cases() if case.id == case_id)
    return {"cmd": "run", "seq": seq, "case": str(case.path), "dtype": "float32", "out": str(out)}


@pytest.fixture
def ids() -> dict[str, str]:
    return {name: next(c.id for c in vectors.cases() if c.kind == "op" and c.name == name) for name in ("add", "exp")}


def test_cases_are_answered_and_prints_do_not_get_between(tmp_path, ids):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helper_of_mine.py").write_text("def added(a, b):\n    return a + b\n")
    out = tmp_path / "1.safetensors"
    asked = [{"cmd": "start", "protocol": 1}, request(ids["add"], 1, out), request(ids["exp"], 2, out)]
    lines = "".join(json.dumps(line) + "\n" for line in [*asked, {"cmd": "stop"}])
    command = [sys.executable, "-m", "refpeft.conformance.serve", f"{tmp_path / 'mine.py'}:Mine"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"protocol": 1, "name": "mine", "version": "1.2", "dtypes": ["float32"]},
        {"seq": 1, "status": "ok"},
        {"seq": 2, "status": "not implemented", "reason": "no exponents"},
    ]
    assert sorted(done.stderr.splitlines()) == ["a print", "a print", "a print from C", "a print from C"]
    assert tensors.read(out)["y"].dtype == np.float32


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda given: given["c"], "KeyError: 'c'"),
        (lambda given: {"y": np.array(["text"])}, "dtype"),
        (lambda given: {"y": None}, "dtype"),
    ],
)
def test_an_error_is_that_of_its_case(found, message, tmp_path, ids):
    mine = SimpleNamespace(run=lambda case, given, dtype: found(given))
    answers = io.StringIO()
    asked = [request(ids["add"], seq, tmp_path / "x") for seq in (7, 8)] + [{"cmd": "stop"}, {"cmd": "not read"}]
    serve.serve(mine, map(json.dumps, asked), answers)
    seen = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [(answer["seq"], answer["status"]) for answer in seen] == [(7, "error"), (8, "error")]
    assert message in seen[0]["message"]


def test_a_case_that_cannot_be_read_is_an_error_of_that_case(tmp_path):
    asked = {"cmd": "run", "seq": 1, "case": str(tmp_path / "no.json"), "dtype": "float32", "out": "x"}
    answers = io.StringIO()
    serve.serve(SimpleNamespace(), [json.dumps(asked)], answers)
    assert json.loads(answers.getvalue())["message"].startswith(
        f"RefpeftError: {tmp_path / 'no.json'}: expected a case"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage:"), (["mine"], "usage:"), (["no.py:Mine"], "no.py:Mine: FileNotFoundError: there is no file no.py")],
)
def test_without_an_implementation_it_says_how_it_is_called(arguments, message):
    command = [sys.executable, "-m", "refpeft.conformance.serve", *arguments]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(message)
