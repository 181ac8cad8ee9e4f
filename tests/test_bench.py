"""The benchmarks run, on models of no size; what they measure there says nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CALM = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}  # beside other tests torch's threads must not spin
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str | Path) -> str:
    """What a benchmark prints."""
    command = [sys.executable, HERE / "bench" / script, *map(str, arguments)]
    environment = os.environ | CALM | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def need(*peers: str) -> None:
    """Skips a test where one of them is not installed; it is the benchmark's own processes that import them."""
    if missing := [peer for peer in peers if importlib.util.find_spec(peer) is None]:
        pytest.skip(f"could not find {', '.join(missing)}")


def given(variable: str, name: str) -> Path:
    """What lies under a variable's folder; the test is skipped where nothing does."""
    path = Path(os.environ.get(variable, "nowhere"), name)
    if not path.exists():
        pytest.skip(f"{variable} is not set or has no {name}")
    return path


@pytest.mark.parametrize("case", ["gpt2-half", "smollm-all", "minilm", "qlora"])
def test_a_step_is_measured_and_its_gradients_are_those_of_transformers_in_float64(tmp_path, case):
    need("torch", "transformers", "peft", "bitsandbytes")
    file = tmp_path / "found.json"
    printed = run("cpu.py", case, "--tiny", "--rounds", "1", "--threads", "1", "--check", "--json", file)
    found = json.loads(file.read_text())["cases"][case]
    assert len(found["systems"]) == 3 and "failed" not in printed
    assert all(row["s/step"] > 0 and len(row["samples"]) >= 1 for row in found["systems"].values())
    losses = [row["losses"][:3] for name, row in found["systems"].items() if name != "refpeft, not quantized"]
    assert all(other == pytest.approx(losses[0], rel=1e-5) for other in losses)
    assert all(max(errors["loss"], errors["gradient"]) < 1e-5 for errors in found["check"].values())


@pytest.mark.parametrize("case", ["1b", "1b-packed", "8b-qlora"])
def test_a_step_for_the_gpu_is_measured_beside_the_peers(tmp_path, case):
    file = tmp_path / "found.jsonl"
    printed = run("gpu.py", case, "--tiny", "--quick", "--rounds", "1", "--turn", "0.01", "--start", "--out", file)
    machine, *found = map(json.loads, file.read_text().splitlines())
    rows = {line["system"]: line for line in found if "system" in line}
    assert machine["systems"].keys() >= rows.keys() and f"### {case}\n" in printed
    assert rows["refpeft"]["ms/step"] > 0 and rows["refpeft"]["x time"] == 1
    if importlib.util.find_spec("peft") and case != "1b-packed":
        assert rows.keys() >= {"refpeft", "peft"}
    assert found[-1]["start"].keys() >= {"no kernel cached", "kernels cached"}


def test_a_step_for_the_gpu_is_told_by_operation(tmp_path):
    file = tmp_path / "found.jsonl"
    printed = run("gpu.py", "1b", "--tiny", "--profile", "--out", file)
    found = json.loads(file.read_text().splitlines()[-1])["profile"]["by operation"]
    assert found["rms_norm, forward"][1] == 5 and found["optimizer"][1] == found["clipping"][1] == 1
    assert all(ms >= 0 for ms, _ in found.values()) and "| frozen_linear, backward |" in printed


def test_the_benchmark_of_the_gpu_says_what_is_wrong_and_that_there_is_none():
    def refused(*arguments: str) -> str:
        command = [sys.executable, HERE / "bench" / "gpu.py", *arguments]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "--tiny runs it without one" in refused()
    assert "unknown case 2b: expected some of 1b, " in refused("2b")
    assert "unknown system hf: expected some of refpeft, " in refused("--systems", "hf")


def test_what_the_cost_of_a_step_grows_with_is_drawn(tmp_path):
    printed = run("growth.py", tmp_path / "growth.svg", "--tiny", "--rounds", "1", "--threads", "1")
    assert printed.count("| exponent |") == 4
    assert (tmp_path / "growth.svg").read_text().count("<circle") == 2 * 19


@pytest.mark.real
def test_both_sides_write_the_same_tokens(tmp_path):
    need("torch", "transformers")
    model = given("REFPEFT_MODELS", "stories260K")
    run("generate.py", model, "--rows", "2", "--new", "8", "--rounds", "1", "--threads", "1", "--json", tmp_path / "f")
    found = json.loads((tmp_path / "f").read_text())["rows"]["2"]
    assert [row["same rows"] for row in found.values()] == ["2/2"] * 3


@pytest.mark.real
def test_ragged_rows_are_the_same_for_all_systems(tmp_path):
    need("torch", "transformers", "peft")
    model, data = given("REFPEFT_MODELS", "stories260K"), given("REFPEFT_DATA", "wikisql")
    file = tmp_path / "found.json"
    options = ["--model", model, "--data", data, "--rounds", "1", "--threads", "1", "--check", "--json", file]
    run("cpu.py", "wikisql", *options)
    found = json.loads(file.read_text())["cases"]["wikisql"]
    losses = [row["losses"][:3] for row in found["systems"].values()]
    assert all(other == pytest.approx(losses[0], rel=1e-4) for other in losses)
    assert all(errors["gradient"] < 1e-4 for errors in found["check"].values())
