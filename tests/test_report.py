"""What a run says: metrics.jsonl agrees with the step that a run goes on from; plain lines off a terminal."""

import io
import json

import pytest

from refpeft import report


def step(number: int, loss: float = 2.0, seconds: float = 0.5) -> dict:
    return {
        "event": "step",
        "step": number,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "supervised": 40,
        "seconds": seconds,
    }


def start(done: int = 0, steps: int = 25) -> dict:
    return {"event": "start", "step": done, "steps": steps}


def evaluation(number: int, loss: float = 1.5) -> dict:
    return {"event": "evaluation", "step": number, "eval_loss": loss}


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_have_a_record_for_each_step_and_evaluation(tmp_path):
    metrics = report.Metrics(tmp_path / "metrics.jsonl")
    for record in (start(), evaluation(0), step(1), {"event": "checkpoint", "step": 1, "path": "x"}):
        metrics(record)
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval_loss": 1.5},
        {
            "step": 1,
            "loss": 2.0,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "tokens_per_second": 200.0,
            "supervised_per_second": 80.0,
        },
    ]


def test_resuming_drops_what_came_after_the_step_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = report.Metrics(path)
    for record in (start(), *(step(n) for n in range(1, 6)), evaluation(3), evaluation(5)):
        first(record)
    path.write_text(path.read_text() + '{"step": 2, "lo')
    again = report.Metrics(path)
    again(start(done=3))
    again(step(4, loss=1.0))
    assert [(r["step"], r.get("loss")) for r in read(path)] == [(1, 2.0), (2, 2.0), (3, 2.0), (3, None), (4, 1.0)]


def test_a_run_from_the_start_replaces_an_older_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    report.Metrics(tmp_path / "metrics.jsonl")(start())
    assert read(tmp_path / "metrics.jsonl") == []


def test_off_a_terminal_there_is_a_plain_line_every_few_steps():
    stream = io.StringIO()
    progress = report.Progress(log_every=10, stream=stream)
    for record in (start(), *(step(n) for n in range(1, 26)), evaluation(25)):
        progress(record)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25", "25:"]
    assert lines[1].startswith("step 10/25  loss 2.0000  lr 1.00e-03  grad 0.5  200 tokens/s (80 supervised)  ")
    assert lines[1].endswith("  8 s left")
    assert "iB" in lines[1]
    assert lines[-1] == "step 25: held-out loss 1.5000"
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_one_line_is_redrawn_at_most_four_times_a_second(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    clock = iter(n * 0.1 for n in range(1000))
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    stream = Terminal()
    progress = report.Progress(stream=stream)
    for record in (start(steps=40), *(step(n) for n in range(1, 31))):
        progress(record)
    progress.close()
    drawn = stream.getvalue().count("loss 2.0")
    assert 3 <= drawn <= 12


def test_the_report_tells_scores_sample_files_and_what_next(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(2048))
    (tmp_path / "checkpoints").mkdir()
    text = report.Report(
        title="lora on tiny: 10 steps in 3 s",
        scores=[("held-out loss", "2.1000", "0.4000"), ("exact match", "0 %", "88 %")],
        sample=report.Sample("size: small", "It is small.", "The\nthe", "It is small."),
        directory=tmp_path,
        next_commands=["refpeft generate --adapter runs/x"],
    ).text()
    assert text == (
        "lora on tiny: 10 steps in 3 s\n\n"
        "               before   after\n"
        "held-out loss  2.1000  0.4000\n"
        "exact match       0 %    88 %\n\n"
        "one held-out row\n"
        "  prompt  size: small\n"
        "  wanted  It is small.\n"
        "  before  The\n"
        "          the\n"
        "  after   It is small.\n\n"
        f"files in {tmp_path}\n"
        "  adapter_model.safetensors  2.0 KiB\n\n"
        "next\n"
        "  refpeft generate --adapter runs/x\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (150 * 1024, "150 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_sizes_for_people(value, text):
    assert report.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_durations_for_people(value, text):
    assert report.duration(value) == text


def test_this_process_holds_some_memory():
    assert report.resident() > 2**20
