"""What a run says: metrics.jsonl agrees with the step that a run goes on from; plain lines off a terminal."""

import io
import json

import pytest

from refpeft import report


def step(number: int, loss: float = 2.0) -> dict:
    speed = {"tokens": 100, "supervised": 40, "seconds": 0.5}
    return {"step": number, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, **speed}


def evaluation(number: int) -> dict:
    return {"step": number, "eval_loss": 1.5}


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_have_a_record_for_each_step_and_evaluation(tmp_path):
    metrics = report.Metrics(tmp_path / "metrics.jsonl")
    metrics(evaluation(0))
    metrics(step(1))
    speed = {"tokens_per_second": 200.0, "supervised_per_second": 80.0}
    before, first = read(tmp_path / "metrics.jsonl")
    assert before == {"step": 0, "eval_loss": 1.5}
    assert 2**20 < first.pop("peak_bytes") <= report.peak()
    assert first == {"step": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "seconds": 0.5, **speed}


@pytest.mark.parametrize(
    ("first", "kept"),
    [
        (step(4), [(1, True), (2, True), (3, True), (3, False)]),
        (evaluation(3), [(1, True), (2, True), (3, True)]),
        (step(6), [(1, True), (2, True), (3, True), (3, False), (4, True), (5, True), (5, False)]),
    ],
)
def test_resuming_replaces_what_is_computed_again_and_drops_a_cut_line(tmp_path, first, kept):
    path = tmp_path / "metrics.jsonl"
    metrics = report.Metrics(path)
    for record in (step(1), step(2), step(3), evaluation(3), step(4), step(5), evaluation(5)):
        metrics(record)
    path.write_text(path.read_text() + '{"step": 2, "lo')
    report.Metrics(path, resume=True)(first)
    *before, last = read(path)
    assert [(r["step"], "loss" in r) for r in before] == kept
    assert last["step"] == first["step"]


def test_a_run_from_the_start_replaces_an_older_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 9}\n')
    report.Metrics(tmp_path / "metrics.jsonl")(step(1))
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1]


def test_off_a_terminal_there_is_a_plain_line_every_few_steps():
    stream = io.StringIO()
    progress = report.Progress(log_every=10, stream=stream)
    progress.steps = 25
    for record in (*(step(n) for n in range(1, 26)), evaluation(25)):
        progress(record)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25", "25:"]
    assert lines[1].startswith(
        "step 10/25  8 s left  loss 2.0000  lr 1.00e-03  grad 0.5  200 tokens/s (80 supervised)  "
    )
    assert lines[1].endswith("iB")
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
    progress.steps = 40
    for number in range(1, 31):
        progress(step(number))
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
        notes=["2 rows are too long"],
        next_commands=["refpeft generate --adapter runs/x"],
    ).text()
    assert text == (
        "lora on tiny: 10 steps in 3 s\n"
        "2 rows are too long\n\n"
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
