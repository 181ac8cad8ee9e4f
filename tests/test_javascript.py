"""The harness in JavaScript (tests/peers/javascript), the example for ports to other languages."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from refpeft.conformance.programs import Program, ProgramError
from refpeft.conformance.runner import NOT_IMPLEMENTED, PASSED, conform
from refpeft.conformance.vectors import cases

pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")

HARNESS = Path(__file__).parent / "peers" / "javascript" / "harness.mjs"
METHODS = {"lora", "dora", "ia3"}
PLACES = ("linear", "conv1d", "embedding", "two", "restored", "combined", "save", "encode", "decode", "file")


@pytest.fixture(scope="module")
def program():
    with Program(f"node '{HARNESS}'") as program:
        yield program


def test_it_passes_lora_dora_ia3_and_nf4_at_one_layer_and_says_of_all_else_that_it_has_it_not(program):
    report = conform(program, [case for case in cases() if case.name in (*METHODS, "nf4", "op", "adalora")])
    assert report.ok
    for verdict in report.verdicts:
        has = verdict.case.name in (*METHODS, "nf4") and verdict.case.at in PLACES
        if verdict.case.at == "two":
            has = all(verdict.case.config[each]["method"] in METHODS for each in ("first", "second"))
        assert verdict.status == (PASSED if has else NOT_IMPLEMENTED), verdict.key


def test_half_of_each_limit_is_enough_for_it(program):
    """It rounds its sums at every step, one element after the other: limits must leave an honest port room."""
    report = conform(program, [case for case in cases() if case.name in METHODS])
    assert max(verdict.share for verdict in report.verdicts) < 0.5


def saved(path, **tensors):
    save_file({name.replace("_", ".", 1): array for name, array in tensors.items()}, path)
    return path.read_bytes()


BROKEN = {
    "4 bytes, a safetensors file has at least 8": lambda whole: whole[:4],
    "the header should end at byte": lambda whole: whole[:20],
    "the header is no JSON": lambda whole: whole[:9] + b"}" + whole[10:],
    "has the dtype F99, which is not read here": lambda whole: whole.replace(b'"F32"', b'"F99"'),
    "should end at byte": lambda whole: whole[:-4],
    "which is not what F32 [3,4] takes": lambda whole: whole.replace(b'"shape":[2,4]', b'"shape":[3,4]'),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_file_of_tensors_is_one_line(program, tmp_path, problem):
    whole = saved(tmp_path / "case.safetensors", in_x=np.ones((2, 4), "f4"))
    (tmp_path / "case.safetensors").write_bytes(BROKEN[problem](whole))
    with pytest.raises(ProgramError, match=re.escape(problem)):
        ask(program, tmp_path)


def test_an_input_that_is_not_in_the_file_is_named(program, tmp_path):
    saved(tmp_path / "case.safetensors", in_y=np.ones(3, "f4"))
    with pytest.raises(ProgramError, match=r"^it says: case.safetensors has no in.x$"):
        ask(program, tmp_path)


def test_a_case_with_a_member_that_it_does_not_know_is_refused(program, tmp_path):
    with pytest.raises(ProgramError, match=r"case.json: precision is no member of a case of this format$"):
        ask(program, tmp_path, precision="high")


def ask(program, folder, **members):
    """Its answer to a case of LoRA whose input x is in case.safetensors of the folder."""
    first = next(case for case in cases() if case.id == "lora-linear-plain")
    document = json.loads(first.path.read_text()) | {"inputs": ["x"], "tensors": "case.safetensors"} | members
    (folder / "case.json").write_text(json.dumps(document))
    return program.run(replace(first, path=folder / "case.json"), {}, "float32")
