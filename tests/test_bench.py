"""The benchmarks run, on models of no size; what they measure there says nothing."""

import importlib.util
import json
import os
import re
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
    printed = run(
        "gpu.py",
        f"{case}=refpeft,peft,bnb",
        "--tiny",
        "--quick",
        "--rounds",
        "1",
        "--turn",
        "0.01",
        "--start",
        "--out",
        file,
    )
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


def test_the_tables_of_the_readme_are_made_of_what_was_measured(tmp_path):
    """Two files of gpu.py, the second of which has a system again, and rows of `refpeft compare --bench`."""
    row = {"ms/step": 96.44, "peak GiB": 11.45, "of it": 0.59, "ceiling TFLOP/s": 787.4, "copy TB/s": 4.28}
    first = [
        {"machine": "a GPU, 2026-11-22", "command": "1b --quick --out somewhere/else"},
        {"case": "1b", "system": "refpeft"} | row,
        {"case": "1b", "system": "peft", "ms/step": 224.7, "peak GiB": 33.6},
        {"case": "1b", "start": {"no kernel cached": 9.04, "kernels cached": 3.71}},
        {"case": "1b", "profile": {"by kernel": {"nvjet_a": [40, 1], "sgemm": [25.5, 2], "idle": [1.5, 0]}}},
    ]
    second = [
        {"case": "1b", "system": "refpeft", "ms/step": 1.0},
        {"case": "8b-qlora", "system": "bnb", "ms/step": 600.0},
        {"case": "135m", "system": "peft", "ms/step": 157.0, "peak GiB": None},
    ]
    for name, lines in (("a.jsonl", first), ("b.jsonl", second)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = {"lora": 10, "dora": 14, "boft": 31, "c3a": None}
    rows = [{"method": name, "step_ms": ms, "refused": "", "error": None} for name, ms in times.items()]
    rows[2]["refused"], rows[3]["error"] = "the host decides", "it broke"
    (tmp_path / "timings.json").write_text(json.dumps({"rows": [*rows, rows[0] | {"step_ms": 11}]}))
    printed = run("gpu_table.py", *(tmp_path / name for name in ("a.jsonl", "b.jsonl")), "--methods",
                  tmp_path / "timings.json")  # fmt: skip
    assert "a GPU, 2026-11-22; `python tests/bench/gpu.py 1b --quick`\n" in printed
    assert "| shape of Llama-3.2-1B, 4 x 2,048 tokens | 96.4, 11.4 | 225, 33.6 |\n" in printed
    assert "| shape of SmolLM2-135M, 8 x 512 tokens |  | 157 |\n" in printed
    assert "|  | bnb |\n| --- | --- |\n| shape of Llama-3.1-8B, 1 x 2,048 tokens, NF4, checkpointing | 600 |" in printed
    assert "reaches 787 TFLOP/s, and a copy 4.28 TB/s; refpeft's steps reach of that 59% (1b)." in printed
    assert "| products | 40.9 TFLOP | 51.99 | 65.50 |\n| attention | 3.85 TFLOP | 4.89 | 0.00 |\n" in printed
    assert "| silu_mul | 17.2 GB | 4.01 | 0.00 |\n" in printed and "| idle |  |  | 1.50 |\n" in printed
    assert "first step of 1b: no kernel cached 9.0 s, kernels cached 3.7 s." in printed
    assert "lora 10.0 ms (11.0 at the end). Within 1.5 times: dora 1.40.\n" in printed
    assert "| boft | 31.0 | 3.10 | the host decides |\n\nc3a: it broke\n" in printed


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
    assert "unknown system bnd: expected some of refpeft, " in refused("1b=refpeft", "8b-qlora=bnd,refpeft")
    assert "--at-once are more than 0" in refused("--at-once", "0")


def test_what_the_cost_of_a_step_grows_with_is_drawn(tmp_path):
    printed = run("growth.py", tmp_path / "growth.svg", "--tiny", "--rounds", "1", "--threads", "1")
    assert printed.count("| exponent |") == 4
    assert (tmp_path / "growth.svg").read_text().count("<circle") == 2 * 19


def test_the_small_benchmarks_run():
    """How refpeft starts, how fast it quantizes, and what that loses."""
    started = run("startup.py", "--runs", "2", "--steps", "1")
    assert re.findall(r"^(first step|more) ", started, re.M) == ["more", "first step"]
    speeds = run("quantize.py", "--rows", "64", "--columns", "256", "--threads", "1", "--repeats", "1")
    assert re.findall(r"1 threads +(\w+) +refpeft +[\d,.]+ ", speeds) == ["quantize", "dequantize"]
    assert "| nf4 | 4.500 | 0.0919 | " in run("quantization_error.py")


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
