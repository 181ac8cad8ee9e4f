"""The golden vectors are well formed, unaltered and explained; reading and comparing says clearly what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import ml_dtypes
import numpy as np
import pytest

from refpeft import manager
from refpeft.conformance import tensors, vectors
from refpeft.conformance.compare import EPS, compare, compare_output
from refpeft.errors import RefpeftError

CASE = next(case for case in vectors.cases() if case.id == "lora-linear-plain")


def answer_of(case):
    """A perfect answer."""
    return {name: array.copy() for name, array in case.expected().items()}


def problems(case, answer, dtype="float32"):
    return [result.problem for result in compare(case, answer, dtype) if result.problem]


def test_every_case_follows_the_schema():
    schema = json.loads((vectors.root() / "case.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for case in vectors.cases():
        for error in validator.iter_errors(json.loads(case.path.read_text())):
            pytest.fail(f"{case.id}: {error.message}")


def test_no_file_differs_from_the_manifest():
    assert vectors.altered() == []


def test_ids_are_unique_sorted_and_name_the_files():
    ids = [case.id for case in vectors.cases()]
    assert ids == sorted(set(ids))
    assert all(case.path.stem == case.id and case.tensors == f"{case.id}.safetensors" for case in vectors.cases())


def test_every_flag_is_explained_and_used():
    used = {flag for case in vectors.cases() for flag in case.flags}
    assert used == vectors.notes().keys()
    assert all({"mistake", "mend"} <= note.keys() for note in vectors.notes().values())


def test_every_case_has_what_it_names_and_nothing_else():
    for case in vectors.cases():
        assert list(case.given("float32")) == case.inputs
        assert case.expected().keys() == case.checks.keys(), case.id


def test_inputs_are_float32_or_integers_and_outputs_finite():
    for case in vectors.cases():
        for array in case.given("float64").values():
            assert array.dtype.kind in "iub" or np.array_equal(array, array.astype("f4").astype("f8"))
        for array in case.expected().values():
            assert np.isfinite(array).all(), case.id


def test_in_bfloat16_a_case_has_limits_that_say_something_or_none():
    for case in vectors.cases():
        limits = {name: limit.get("bfloat16") for name, limit in case.checks.items() if limit != "exact"}
        assert set(limits.values()) == {None} or set(limits.values()) <= {4, 8, 16, 32, 64}, case.id
        if case.kind in ("optimizer", "schedule", "quantizer", "random") or case.at in ("train", "steps"):
            assert "bfloat16" not in case.dtypes, case.id


def test_the_vectors_are_many_and_small():
    """Some 110 kB for each method, of more than sixty; two megabytes of models, and two of all others."""
    assert len(vectors.cases()) >= 1000
    assert sum(p.stat().st_size for p in (vectors.root() / "v1").rglob("*.*")) < 12 * 10**6


def test_the_readme_names_every_kind_and_name():
    text = (vectors.root() / "README.md").read_text()
    for case in vectors.cases():
        if case.kind not in ("model", "block", "schedule"):
            assert re.search(rf"[` ]{case.name}[` ,]", text), case.name


def test_the_code_in_the_readme_runs_and_passes(capsys, monkeypatch):
    source = re.search(r"```python\n(.*?)```", (vectors.root() / "README.md").read_text(), re.S).group(1)
    exec(source.replace('"golden/v1/lora"', repr(str(vectors.root() / "v1" / "lora"))), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4
    assert all(line.endswith(" pass") for line in lines)


PLACES = {
    "peft_linear": {"linear", "conv1d"},
    "peft_embedding": {"embedding"},
    "peft_norm": {"norm"},
    "peft_attention": {"attention"},
    "peft_block": {"block"},
}
"""Where a method acts that has this hook."""

IN_MODELS_ALONE = {
    "adapterdrop": "pfeiffer, in layers of some numbers",
    "attention_fusion": "of all layers",
    "by_type": "full, in layers of some types",
    "full": "at a Conv1D: GPT-2",
    "ladder_side": "of all layers",
    "llama_adapter": "its keys and values are made by the layer's own matrices",
    "pre_layer": "of all layers",
    "top_layers": "full, in layers of some numbers",
    "trainable_tokens": "at a head, which may be tied",
    "unipelt": "the prefix's gate reads what the attention part reads",
}
"""Methods that have no case by themselves at some of their places, and why."""


@pytest.mark.parametrize(
    "method", [one for one in manager.catalogue().values() if one.kind == "method"], ids=lambda one: one.name
)
def test_every_method_has_cases_of_its_places_of_gradients_of_merging_and_of_training(method):
    cases = [case for case in vectors.cases() if (case.kind, case.name) == ("method", method.name)]
    places, outputs = {case.at for case in cases}, {name for case in cases for name in case.checks}
    assert {"model", "train"} <= places
    assert any(name.startswith("grad.") for name in outputs)
    missing = {place for hook in method.hooks for place in PLACES.get(hook, ())} - places
    assert bool(missing) == (method.name in IN_MODELS_ALONE), missing
    if "peft_merge" in method.hooks and "linear" not in missing:
        assert any(name.startswith("merged.") for name in outputs)


# ---- comparing -------------------------------------------------------------------------------------------------------


def test_a_perfect_answer_passes_and_uses_nothing_of_the_limit():
    results = compare(CASE, answer_of(CASE), "float64")
    assert [r.output for r in results] == list(CASE.checks)
    assert all(r.problem is None and r.error == 0 for r in results)


def test_an_error_is_counted_in_eps_of_the_largest_value():
    expected = np.array([1.0, -4.0])
    got = expected + np.array([0.0, 6 * 4 * np.finfo("f4").eps])
    assert compare_output("y", got, expected, {"float32": 8}, "float32").error == pytest.approx(6)
    problem = compare_output("y", got, expected, {"float32": 4}, "float32").problem
    assert problem.startswith("y: 6 of 4 eps, first of 1 at [1]: got -3.99999714, expected -4")


def test_eps_is_that_of_every_dtype():
    assert {name: float(ml_dtypes.finfo(name).eps) for name in vectors.DTYPES} == EPS


def test_answers_may_be_arrays_of_bfloat16():
    answer = {name: array.astype(ml_dtypes.bfloat16) for name, array in answer_of(CASE).items()}
    assert problems(CASE, answer, "bfloat16") == []
    assert any("eps" in problem for problem in problems(CASE, answer, "float32"))


def test_the_first_differing_element_is_named():
    answer = answer_of(CASE)
    answer["y"][1, 2, 3] += 1
    assert re.match(r"y: \S+ of 8 eps, first of 1 at \[1, 2, 3\]: got .*, expected ", problems(CASE, answer)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("y"), "y: not in the answer"),
        (lambda a: a.update(y=a["y"][0]), r"y: shape (3, 6), expected (2, 3, 6)"),
        (lambda a: a["y"].__setitem__((0, 1, 2), np.nan), "y: 1 of 36 values are not finite, first at [0, 1, 2]: nan"),
        (lambda a: a.update(y=a["y"].reshape(3, 2, 6)), r"y: shape (3, 2, 6), expected (2, 3, 6)"),
        (
            lambda a: a["y"].__setitem__((1, 0, 0), -np.inf),
            "y: 1 of 36 values are not finite, first at [1, 0, 0]: -inf",
        ),
        (lambda a: a.update(y=np.full((2, 3, 6), "x")), "y: dtype <U1, expected numbers"),
        (lambda a: a.update(y=a["y"] + 0j), "y: dtype complex128, expected numbers"),
    ],
)
def test_what_is_no_answer_at_all_is_said(change, message):
    answer = answer_of(CASE)
    change(answer)
    assert problems(CASE, answer) == [message]


def test_where_zero_is_expected_only_zero_passes():
    zero = np.zeros(3)
    assert compare_output("y", zero, zero, {"float32": 8}, "float32").problem is None
    assert "inf of 8 eps" in compare_output("y", zero + 1e-30, zero, {"float32": 8}, "float32").problem


def test_an_output_without_numbers_passes_by_its_shape():
    nothing = np.zeros((0, 3))
    assert compare_output("y", nothing, nothing, {"float32": 8}, "float32").problem is None
    assert (
        compare_output("y", nothing.T, nothing, {"float32": 8}, "float32").problem == "y: shape (3, 0), expected (0, 3)"
    )


def test_a_dtype_without_limits_is_refused():
    with pytest.raises(RefpeftError, match="lora-linear-plain has no limit for y in float16, only in float32, float64"):
        compare(CASE, answer_of(CASE), "float16")


def test_exact_outputs_allow_nothing():
    codes = np.array([1, 2], "u1")
    assert compare_output("codes", codes, codes, "exact", "float32").problem is None
    other = compare_output("codes", codes + np.uint8(1), codes, "exact", "float32").problem
    assert other == "codes: differs, first of 2 at [0]: got 2, expected 1"
    assert compare_output("codes", codes, codes + np.uint8(1), "exact", "float32").error == 1
    assert compare_output("yes", np.array([True]), np.array([True]), "exact", "float32").problem is None


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """One case with its tensors, to be damaged."""
    for path in (CASE.path, CASE.path.with_suffix(".safetensors")):
        shutil.copy(path, tmp_path)
    return tmp_path / CASE.path.name


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_case_that_is_no_json_is_one_clear_line(copied, text):
    copied.write_text(text)
    with pytest.raises(RefpeftError, match=r"lora-linear-plain.json: expected a case in JSON"):
        vectors.read(copied)


def test_a_case_is_read_from_a_relative_path_and_knows_the_whole_one(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    assert vectors.read(Path(copied.name)).path == copied.resolve()
    with pytest.raises(RefpeftError, match=r"gone.json: expected a case in JSON: .* No such file"):
        vectors.read(Path("gone.json"))


def test_a_tensor_that_is_not_there_is_one_clear_line(copied):
    tensors.write(copied.with_suffix(".safetensors"), {"in.x": np.zeros(3)})
    case = vectors.read(copied)
    with pytest.raises(RefpeftError, match=r"lora-linear-plain.json: lora-linear-plain.safetensors has no in.weight"):
        case.given("float32")
    with pytest.raises(RefpeftError, match=r"lora-linear-plain.json: lora-linear-plain.safetensors has no out.y"):
        case.expected()


def test_unknown_and_missing_members_are_refused(copied):
    document = json.loads(copied.read_text())
    for changed in (document | {"surprise": 1}, {k: v for k, v in document.items() if k != "checks"}, [document]):
        copied.write_text(json.dumps(changed))
        with pytest.raises(RefpeftError, match="expected an object with the members"):
            vectors.read(copied)


def test_truncated_or_missing_tensors_are_one_clear_line(copied):
    case, tensors = vectors.read(copied), copied.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(RefpeftError, match=r"lora-linear-plain.safetensors: not a whole safetensors file: tensor"):
        case.expected()
    tensors.unlink()
    with pytest.raises(RefpeftError, match=r"lora-linear-plain.safetensors: cannot be read: No such file"):
        case.given("float32")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_expected_outputs_that_are_not_finite_are_refused_as_any_answer_would_pass(copied, number):
    path = copied.with_suffix(".safetensors")
    arrays = tensors.read(path)
    arrays["out.y"][0] = number
    tensors.write(path, arrays)
    with pytest.raises(RefpeftError, match=r"lora-linear-plain.json: out.y in .* has values that are not finite"):
        vectors.read(copied).expected()


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("checks", {"y": "nearly"}, "the check of y is 'nearly', expected \"exact\" or limits by dtype"),
        ("checks", {"y": {"float32": "8"}}, "the check of y is {'float32': '8'}, expected"),
        ("inputs", "x", "inputs is 'x', expected a JSON array"),
        ("id", 3, "id is 3, expected a string"),
        ("at", None, "at is None, expected a string"),
        ("id", "../../elsewhere", "id is '../../elsewhere', expected letters, digits"),
        ("tensors", "/etc/passwd", "tensors is '/etc/passwd', expected letters, digits"),
        ("tensors", "..", "tensors is '..', expected letters, digits"),
        ("inputs", ["x", 1], "inputs is ['x', 1], expected strings"),
        ("flags", [{}], "flags is [{}], expected strings"),
        ("checks", {}, "checks is empty, expected an output"),
        ("checks", {"y": {"float8": 8}}, "the check of y is {'float8': 8}, expected"),
        ("checks", {"y": {"float32": float("nan")}}, "the check of y is {'float32': nan}, expected"),
    ],
)
def test_a_member_of_another_type_is_one_clear_line(copied, member, value, message):
    copied.write_text(json.dumps(json.loads(copied.read_text()) | {member: value}))
    with pytest.raises(RefpeftError, match=re.escape(message)):
        vectors.read(copied)


def test_files_that_are_no_cases_and_ids_that_stand_twice_are_told_and_the_others_are_there(copied):
    copied.with_name("broken.json").write_text("[")
    copied.with_name("twice.json").write_text(copied.read_text())
    (case,), problems = vectors.collect(copied.parent)
    assert (case.id, case.path) == (CASE.id, copied)
    assert re.search("broken.json: expected a case in JSON", problems[0])
    assert re.search(r"twice.json: the id lora-linear-plain is that of .*lora-linear-plain.json, too", problems[1])
    copied.unlink()
    copied.with_name("twice.json").unlink()
    with pytest.raises(RefpeftError, match=r"there are no cases in .*broken.json: expected a case in JSON"):
        vectors.collect(copied.parent)


def test_vectors_lie_in_the_package_or_beside_it_and_a_folder_without_a_manifest_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "__file__", str(tmp_path / "refpeft" / "conformance" / "vectors.py"))
    inside, beside = tmp_path / "refpeft" / "_golden", tmp_path / "golden"
    inside.mkdir(parents=True)
    beside.mkdir()
    with pytest.raises(RefpeftError, match="no golden vectors beside"):
        vectors.root()
    for folder in (beside, inside):
        (folder / "MANIFEST.json").write_text("{}")
        assert vectors.root() == folder


def test_a_broken_file_among_the_projects_own_is_said(copied, monkeypatch):
    folder = copied.parent / "v1"
    folder.mkdir()
    (folder / "broken.json").write_text("[")
    copied.rename(folder / copied.name)
    monkeypatch.setattr(vectors, "root", lambda: copied.parent)
    with pytest.raises(RefpeftError, match=r"broken.json: expected a case in JSON"):
        vectors.cases.__wrapped__()


def test_bfloat16_inputs_are_the_nearest_with_ties_to_even():
    values = np.concatenate([np.float32([1.00390625, 1.01171875, -0.0, 3e38]), np.arange(-4, 4, 0.0173, "f4")])
    values = np.concatenate([values, np.random.default_rng(0).standard_normal(1000).astype("f4")])
    assert np.array_equal(vectors.in_dtype(values, "bfloat16"), values.astype(ml_dtypes.bfloat16).astype("f4"))


def test_a_case_is_for_the_dtypes_that_all_its_checks_have_a_limit_for(copied):
    document = json.loads(copied.read_text())
    document["checks"]["y"] = {"float32": 8}
    copied.write_text(json.dumps(document))
    assert vectors.read(copied).dtypes == ("float32",)
    by_id = {case.id: case for case in vectors.cases()}
    assert {case.dtypes for case in by_id.values() if case.kind == "quantizer"} == {("float32",)}
    assert {"float64", "float32"} <= set(by_id["philox-pi"].dtypes)


def test_an_altered_file_an_unknown_one_and_a_missing_one_are_found(tmp_path):
    shutil.copytree(vectors.root() / "v1" / "random", tmp_path / "v1" / "random")
    listed = json.loads((vectors.root() / "MANIFEST.json").read_text())
    listed["files"] = {name: sha for name, sha in listed["files"].items() if "/random/" in name}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(listed))
    assert vectors.altered(tmp_path) == []
    (tmp_path / "v1/random/philox-ones.json").write_text("{}")
    (tmp_path / "v1/random/philox-pi.json").unlink()
    (tmp_path / "v1/random/new.json").write_text("{}")
    assert vectors.altered(tmp_path) == [
        "v1/random/new.json: not in MANIFEST.json",
        "v1/random/philox-ones.json: its sha256 is not the one in MANIFEST.json",
        "v1/random/philox-pi.json: missing",
    ]
