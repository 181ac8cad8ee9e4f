"""A merge is compared with its run before it gets its name: what it costs is measured on the files themselves."""

import json

import numpy as np
import pytest
import tiny
import tiny_files
from click.testing import CliRunner

import refpeft
from refpeft import adapters, cli, files, merging
from refpeft.batches import Batches
from refpeft.errors import RefpeftError
from refpeft.merging import Measured


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Makes the run directory of LoRA on a small model: run.toml, an adapter of the given size, rows."""
    monkeypatch.chdir(tmp_path)
    tiny_files.write_model(tmp_path / "model", "wide")
    tiny_files.write_rows(tmp_path / "rows.jsonl")

    def run_of(*lines: str, scale: float = 0.1, method: str = "lora", **options) -> str:
        model = refpeft.load("model")
        targets = {"targets": "all-linear"} if method == "lora" else {}
        adapter = refpeft.attach(model, method, targets | options)
        tiny.scramble(adapter, scale=scale)
        adapters.save("run", model)
        top = ['model = "model"', f'method = "{method}"', *lines]
        files.write_text("run/run.toml", "\n".join([*top, "[data]", 'file = "rows.jsonl"', ""]))
        return "run"

    return run_of


def logits(model) -> np.ndarray:
    return model(tiny.ids()).data


def test_a_dense_run_merges_to_the_same_model(run_of):
    merged = merging.merge(run_of(), "merged")
    assert merged.into == "original"
    assert merged.measured.kl < 1e-9 < 1e-3 < merged.measured.effect
    assert merged.measured.difference < 1e-5
    assert not merged.changed
    wanted = logits(refpeft.load("model", "run"))
    assert abs(logits(refpeft.load("merged")) - wanted).max() < 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("double_quant", ["false", "true"])
def test_weights_of_a_quantized_run_are_merged_dense_and_exactly(run_of, double_quant):
    merged = merging.merge(run_of('quantizer = "nf4"', f"double_quant = {double_quant}"), "merged")
    assert merged.into == "dequantized"
    assert merged.measured.kl < 1e-9
    wanted = logits(refpeft.load("model", "run", "nf4", double_quant=double_quant == "true"))
    assert abs(logits(refpeft.load("merged")) - wanted).max() < 1e-5 * abs(wanted).max()


def test_a_small_change_is_lost_where_weights_are_quantized_again(run_of, tmp_path):
    run = run_of('quantizer = "nf4"', scale=0.01)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RefpeftError, match="into requantized weights changes the model: a KL divergence of"):
        merging.merge(run, "merged", into="requantized")
    assert sorted(tmp_path.iterdir()) == before
    merged = merging.merge(run, "merged", into="requantized", force=True)
    assert merged.changed
    assert merged.measured.lost > 0.5  # of what the adapter did


def test_what_was_measured_is_what_was_written(run_of):
    merged = merging.merge(run_of('quantizer = "nf4"', "double_quant = true"), "merged", into="requantized", force=True)
    trained, written = refpeft.load("model", "run", "nf4", double_quant=True), refpeft.load("merged")
    batches, rows = merging._batches("run", None, trained)
    assert merging.measure(trained, written, batches) == merged.measured
    assert merged.rows == rows == "12 rows of rows.jsonl"


def test_weights_from_before_quantizing_are_another_base(run_of):
    run = run_of('quantizer = "nf4"')
    with pytest.raises(RefpeftError, match=r"into original weights changes the model.*--into dequantized, or --force"):
        merging.merge(run, "merged", into="original")
    merged = merging.merge(run, "merged", into="original", force=True)
    assert merged.measured.kl > merging.LIMIT
    wanted = logits(refpeft.load("model", "run"))  # as if it had never been quantized
    assert abs(logits(refpeft.load("merged")) - wanted).max() < 1e-5 * abs(wanted).max()


def test_rounding_to_bfloat16_is_measured(run_of):
    merged = merging.merge(run_of(), "merged", dtype="bfloat16", force=True)
    assert 1e-8 < merged.measured.kl < 1e-2
    assert merged.measured.difference > 1e-4


def test_only_quantized_runs_have_a_choice(run_of):
    run = run_of()
    for into in ("dequantized", "requantized"):
        with pytest.raises(RefpeftError, match=f"--into {into} is for runs on quantized weights"):
            merging.merge(run, "merged", into=into)


def test_what_counts_as_a_change():
    assert not Measured(0.0, kl=0.9e-3, effect=1.0, tokens=1).changed
    assert Measured(0.0, kl=1.1e-3, effect=1.0, tokens=1).changed  # however much the adapter does
    assert Measured(0.0, kl=2e-6, effect=1e-4, tokens=1).changed  # however little
    assert not Measured(0.0, kl=1e-12, effect=0.0, tokens=1).changed  # an adapter that was never trained
    assert Measured(np.nan, kl=np.nan, effect=1.0, tokens=1).changed


def test_divergences_are_those_of_the_distributions():
    run, merged = tiny.model(), tiny.model(seed=1)
    tiny.scramble(refpeft.attach(run, "lora"))
    examples = [merging._example(row) for row in tiny.ids(3, 7)] + [merging._example(tiny.ids(1, 4)[0])]  # one padded
    found = merging.measure(run, merged, Batches(examples, 4, 7, shuffle=False))

    def log_p(model):
        rows = [model(example.ids[None]).data[0] for example in examples]
        raw = np.concatenate(rows)
        return raw, raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))

    (raw, wanted), (other_raw, other), (_, bare) = log_p(run), log_p(merged), log_p(tiny.model())
    assert found.tokens == 25
    assert found.kl == pytest.approx((np.exp(wanted) * (wanted - other)).sum() / 25, rel=1e-10)
    assert found.effect == pytest.approx((np.exp(wanted) * (wanted - bare)).sum() / 25, rel=1e-10)
    assert found.difference == pytest.approx(abs(raw - other_raw).max() / abs(raw).max(), rel=1e-10)


def test_the_rows_are_the_run_s_or_those_given_or_random(run_of, tmp_path):
    run, model = run_of(), refpeft.load("model")
    assert merging._batches(run, None, model)[1] == "12 rows of rows.jsonl"
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": "hello " * 60}) + "\n" for _ in range(100)))
    batches, words = merging._batches(run, "long.jsonl", model)
    assert words == "32 rows of long.jsonl"  # of 64 tokens each
    assert sum(batch.tokens for batch in batches) == merging._TOKENS
    toml = (tmp_path / run / "run.toml").read_text()
    for more, expected in (
        ('eval_file = "long.jsonl"\noverlong = "truncate"', "32 rows of long"),
        ("eval_share = 0.25", "3 rows of ro"),
    ):
        (tmp_path / run / "run.toml").write_text(f"{toml}{more}\n")
        assert merging._batches(run, None, model)[1].startswith(expected)
    (tmp_path / run / "run.toml").write_text(toml)
    (tmp_path / "rows.jsonl").unlink()
    random, words = merging._batches(run, None, model)
    assert words.startswith("random tokens, for there are no rows")
    assert np.array_equal(random.at(0).ids, merging._batches("nowhere", None, model)[0].at(0).ids)
    with pytest.raises(RefpeftError, match=r"nothing.jsonl"):
        merging._batches(run, "nothing.jsonl", model)


def test_a_method_without_a_merged_form_is_refused_by_name(run_of):
    with pytest.raises(RefpeftError, match=r"method 'prefix_tuning' cannot be merged into weights \(at model.layers.0"):
        merging.merge(run_of(method="prefix_tuning"), "merged", force=True)


def test_its_report_as_text_and_as_json(run_of):
    arguments = ["merge", "--adapter", run_of('quantizer = "nf4"', scale=0.01), "--into", "requantized", "--force"]
    said = CliRunner().invoke(cli.main, [*arguments, "--out", "text"]).stdout.splitlines()
    assert said[0] == (
        "model with run merged, in text: its weights as the run had them, nf4, quantized again; numbers are float32"
    )
    assert said[1] == "over 146 tokens of 12 rows of rows.jsonl"
    assert said[-1] == "this is another model than the run's, written because of --force"
    found = json.loads(CliRunner().invoke(cli.main, [*arguments, "--out", "json", "--json"]).stdout)
    assert found["into"] == "requantized" and found["changed"]
    assert found["measured"]["kl"] > 0
