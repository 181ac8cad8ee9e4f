"""The memory that a plan foresees on the GPU is what runs there take at most, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_files

from refpeft import config, plan

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tests" / "bench"
SHAPE = {  # so large that what it computes with is most of it
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
ALL_LINEAR = ("--set", "lora.targets='all-linear'", "--set", "lora.r=16")
QLORA = ("--quantizer", "nf4", "--double-quant")
AGAIN = ("--set", "train.checkpoint_activations=true")


def run(directory: Path, *command: str | Path) -> str:
    """What Python prints that runs this."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # where CuPy may come from
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *command], cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, "\n".join(done.stderr.splitlines()[-8:])
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and rows of about 500 tokens, which are bytes."""
    folder = tmp_path_factory.mktemp("run")
    tiny_files.write_model(folder / "model", "tied", **SHAPE)
    rows = [{"text": " ".join(f"{n * 7919 + i:03}"[:3] for i in range(125))} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((*ALL_LINEAR, "--batch", "8"), id="lora"),
        pytest.param((*ALL_LINEAR, "--batch", "8", *AGAIN), id="lora, recomputed"),
        pytest.param((*ALL_LINEAR, *QLORA, "--batch", "8"), id="qlora"),
        pytest.param((*ALL_LINEAR, *QLORA, "--batch", "4", *AGAIN), id="qlora, recomputed"),
        pytest.param(("--batch", "8", "--set", "train.capture=false"), id="q and v, no graph"),
        pytest.param((*ALL_LINEAR, "--batch", "8", "--dtype", "float32"), id="lora, float32"),
        pytest.param((*ALL_LINEAR, "--batch", "8", "--set", "train.kl=0.5"), id="lora, kl"),
        pytest.param((*ALL_LINEAR, "--batch", "8", "--set", "lora.dropout=0.1"), id="lora, dropout"),
        pytest.param(("--method", "full", "--batch", "8"), id="full"),
    ],
)
def test_a_run_takes_what_was_planned(options, folder, tmp_path):
    given = ["--model", "model", "--data", "rows.jsonl", "--device", "cuda", "--dtype", "bfloat16", "--steps", "4"]
    command = ["-m", "refpeft", "train", *given, *options, "--out", tmp_path / "out", "--json"]
    planned = json.loads(run(folder, *command, "--dry-run"))["memory"]
    taken = json.loads(run(folder, *command))["peak_bytes"]
    assert taken == pytest.approx(sum(planned.values()), rel=0.1), planned


@pytest.mark.parametrize("case", ["1b", "1b-qlora", "8b-qlora"])
def test_a_case_of_the_benchmark_takes_what_was_planned(case, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from gpu_cases import CASES

    chosen, file = CASES[case], tmp_path / "found.jsonl"
    (tmp_path / "config.json").write_text(json.dumps(chosen.config))
    values = {
        "model": str(tmp_path / "config.json"),
        "data.file": config.EMBEDDED,
        "device": "cuda",
        "dtype": "bfloat16",
        "data.length": chosen.tokens,
        "train.batch": chosen.rows,
        "train.checkpoint_activations": chosen.recompute,
        "lora.r": 16,
        "lora.targets": "all-linear",
    }
    values |= {"quantizer": "nf4", "double_quant": True} if chosen.quantized else {}
    planned = plan.plan_shape(config.resolve(None, [("test", *item) for item in values.items()])).memory
    run(tmp_path, BENCH / "gpu.py", case, "--systems", "refpeft", "--rounds", "1", "--turn", "0.1", "--out", file)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    taken = next(line["peak GiB"] for line in found if line.get("system") == "refpeft") * 2**30
    assert taken == pytest.approx(sum(planned.values()), rel=0.1), planned
